//! A learning run: several starts, halved as they go.

use super::examples::Examples;
use super::objective::Objective;
use super::polish::{error_of, polish};
use super::product::Product;
use super::search::Search;
use crate::error::{Error, Result};
use crate::ops::factored::Shape;
use rand::rngs::StdRng;
use rand::{seq::index, Rng, SeedableRng};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Settings of a learning run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Modules of the product, left factor first, of `B` and `P`.
    pub product: String,
    /// Whether factors are complex.
    pub complex: bool,
    /// Whether the blocks of a factor share their weights.
    pub tied: bool,
    /// Seed of all random numbers.
    pub seed: u64,
    /// Starts.
    pub starts: usize,
    /// Columns of the matrix that a start compares, at most.
    pub columns: usize,
    /// Learning rate of Adam; fits take half.
    pub rate: f64,
    /// Steps with relaxed permutations.
    pub relaxed_steps: usize,
    /// Scale of the logistic noise on logits, which fades.
    pub logit_noise: f64,
    /// Scale of the normal noise on all parameters, of the learning rate.
    pub weight_noise: f64,
    /// Steps after hardening.
    pub fit_steps: usize,
    /// Rounds of annealing.
    pub rounds: usize,
    /// Changes of a round.
    pub changes: usize,
    /// Steps of a change.
    pub change_steps: usize,
    /// Temperature of the first change, of the error; it falls to 0.
    pub heat: f64,
    /// Starts that are kept as rounds halve their number.
    pub kept: usize,
    /// Error at which a product counts as found.
    pub tolerance: f64,
    /// Iterations of L-BFGS.
    pub polish: u64,
}

impl Settings {
    /// Those for a product of modules, see [`Settings::product`].
    pub fn new(product: &str, complex: bool, seed: u64) -> Self {
        Self {
            product: product.into(),
            complex,
            tied: true,
            seed,
            starts: 16,
            columns: 64,
            rate: 0.1,
            relaxed_steps: 1500,
            logit_noise: 0.5,
            weight_noise: 0.5,
            fit_steps: 800,
            rounds: 20,
            changes: 40,
            change_steps: 150,
            heat: 0.2,
            kept: 4,
            tolerance: 1e-4,
            polish: 400,
        }
    }
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Starts relaxed, then rounds done.
    pub done: usize,
    /// Of these.
    pub total: usize,
    /// Least error so far, on the columns of a start.
    pub error: f64,
}

/// What a run has found.
#[derive(Debug, Clone, PartialEq)]
pub struct Learned {
    /// The product.
    pub product: Product,
    /// Root mean square of its error over all entries.
    pub error: f64,
    /// The start that it comes from.
    pub start: usize,
    /// Rounds of annealing.
    pub rounds: usize,
}

/// Error below which L-BFGS is tried on a product, of the root mean square of a unitary matrix's entries.
const NEAR: f64 = 0.16;

/// Learns a matrix, or what maps inputs to outputs, as a product. The result depends on the settings and these alone.
///
/// # Errors
/// Settings that make no product, no start or no column; a size that is no power of two from 2 on.
pub fn learn<'a>(
    examples: impl Into<Examples<'a>>,
    settings: &Settings,
    on_progress: &(dyn Fn(Progress) + Sync),
) -> Result<Learned> {
    let matrix = &examples.into();
    let n = matrix.size();
    let shape = Shape { size: n, complex: settings.complex, tied: settings.tied };
    if settings.starts == 0 || settings.columns == 0 {
        return Err(Error::usage("transform", "at least one start and one column"));
    }
    let complex = matrix.complex();
    if (complex || matrix.complex_input()) && !settings.complex {
        return Err(Error::usage("transform", "a complex matrix needs complex factors"));
    }
    let search = |start: usize| -> Result<Search> {
        let mut rng = StdRng::seed_from_u64(settings.seed);
        rng = StdRng::seed_from_u64(rng.random::<u64>() ^ start as u64);
        let product = Product::random(shape, &settings.product, &mut rng)?;
        let columns = index::sample(&mut rng, matrix.len(), settings.columns.min(matrix.len())).into_vec();
        let objective = Objective::of_columns(shape, matrix, &columns);
        Ok(Search::new(settings, start, product, (objective, complex), rng))
    };
    let mut searches = (0..settings.starts).map(search).collect::<Result<Vec<_>>>()?;
    let every: Vec<usize> = (0..matrix.len()).collect();
    let whole = (&Objective::of_columns(shape, matrix, &every), complex);
    let total = settings.starts + settings.rounds;
    let relaxed = std::sync::atomic::AtomicUsize::new(0);
    searches.par_iter_mut().for_each(|s| {
        s.relax();
        let done = 1 + relaxed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        on_progress(Progress { done, total, error: s.best.1 });
    });
    let mut best: Option<Learned> = None;
    for rounds in 0..=settings.rounds {
        searches.sort_by(|a, b| a.best.1.total_cmp(&b.best.1).then(a.start.cmp(&b.start)));
        let Some(first) = searches.first_mut() else { break };
        let near = first.best.1 < NEAR / (n as f64).sqrt();
        let found = match near {
            true => polish(&first.best.0, whole, settings.polish, settings.tolerance / 2.0),
            false => (first.best.0.clone(), error_of(&first.best.0, whole)),
        };
        if near {
            (first.now, first.best) = (found.clone(), found.clone());
        }
        if best.as_ref().is_none_or(|b| found.1 < b.error) {
            best = Some(Learned { product: found.0, error: found.1, start: first.start, rounds });
        }
        let error = best.as_ref().map_or(f64::INFINITY, |b| b.error);
        on_progress(Progress { done: settings.starts + rounds, total, error });
        if error < settings.tolerance || rounds == settings.rounds {
            break;
        }
        if rounds > 0 {
            searches.truncate((searches.len() / 2).max(settings.kept));
        }
        searches.par_iter_mut().for_each(|s| s.anneal(settings.changes));
    }
    best.ok_or_else(|| Error::usage("transform", "no start"))
}

#[cfg(test)]
mod tests {
    use super::super::{Matrix, Transform};
    use super::*;

    fn small(transform: Transform, seed: u64) -> Settings {
        let (product, complex) = transform.product();
        Settings { starts: 8, rounds: 10, ..Settings::new(product, complex, seed) }
    }

    /// The recovered product multiplies as the matrix does, computed apart from what learned it.
    #[test]
    fn fast_algorithms_of_8_points_are_found_from_their_matrices() -> Result<()> {
        for transform in [Transform::Dft, Transform::Dct, Transform::Hadamard, Transform::Convolution] {
            let matrix = transform.matrix(8, 0);
            let found = learn(&matrix, &small(transform, 0), &|_| ())?;
            assert!(found.error < 1e-4, "{transform:?}: {:.1e}", found.error);
            let product = &found.product;
            let factors: Vec<Vec<f64>> =
                product.factors().iter().map(|f| f.iter().map(|w| f64::from(*w)).collect()).collect();
            let (index, shape) = (product.permuted(), product.shape());
            let mut sum = 0.0;
            for column in 0..8 {
                let mut x = vec![[0f64; 1]; shape.planes() * 8];
                x[column][0] = 1.0;
                crate::ops::factored::forward(&shape, &product.hard(&factors, &index), &mut x, &mut Default::default());
                for row in 0..8 {
                    sum += (x[row][0] - matrix.re[row * 8 + column]).powi(2);
                    sum += matrix.im.as_ref().map_or(0.0, |im| (x[8 + row][0] - im[row * 8 + column]).powi(2));
                }
            }
            assert!(((sum / 64.0f64).sqrt() - found.error).abs() < 1e-9, "{transform:?}");
        }
        Ok(())
    }

    #[test]
    fn a_run_depends_on_its_settings_alone() -> Result<()> {
        let settings = Settings { rounds: 2, relaxed_steps: 100, fit_steps: 50, ..small(Transform::Dst, 3) };
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            pool.install(|| learn(&Transform::Dst.matrix(16, 3), &settings, &|_| ()))
        };
        assert_eq!(run(1)?, run(3)?);
        Ok(())
    }

    #[test]
    fn what_cannot_be_learned_is_refused() {
        let dft = Transform::Dft.matrix(8, 0);
        for (settings, why) in [
            (Settings::new("BX", true, 0), "`X` in \"BX\""),
            (Settings::new("P", true, 0), "no butterfly"),
            (Settings::new("BP", false, 0), "complex factors"),
            (Settings { starts: 0, ..Settings::new("BP", true, 0) }, "one start"),
        ] {
            let refused = learn(&dft, &settings, &|_| ()).map(|_| ()).expect_err("refused").to_string();
            assert!(refused.contains(why), "{refused}");
        }
        let odd = Matrix { size: 6, re: vec![0.0; 36], im: None };
        assert!(learn(&odd, &Settings::new("BP", true, 0), &|_| ()).is_err());
    }
}
