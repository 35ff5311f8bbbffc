//! A learning run: several starts, halved as they go.

use super::cpu;
use super::examples::Examples;
use super::objective::Objective;
use super::polish::{error_of, polish, LANES};
use super::product::Product;
use super::search::Search;
use crate::error::{Error, Result};
use crate::ops::factored::Shape;
use crate::train::random;
use candle_core::Device;
use rand::seq::index;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicUsize, Ordering};

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
    /// Starts with drawn permutations, which come first.
    pub drawn: usize,
    /// Steps of their first fits, after which as many as `starts` go on.
    pub drawn_steps: usize,
    /// Starts with relaxed permutations.
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
    /// Products that a GPU fits at once; a CPU fits one a thread.
    pub batch: usize,
    /// Starts that are kept as rounds halve their number.
    pub kept: usize,
    /// Error at which a product counts as found.
    pub tolerance: f64,
    /// Iterations of L-BFGS.
    pub polish: u64,
}

impl Settings {
    /// Those for a product of modules, see [`Settings::product`], on a CPU or on a GPU.
    pub fn new(product: &str, complex: bool, seed: u64, gpu: bool) -> Self {
        let permutations = product.matches('P').count();
        let cpu = Self {
            product: product.into(),
            complex,
            tied: true,
            seed,
            // Of two permutations there are 225 forms, each of which is drawn once; of one 15.
            drawn: if permutations > 1 { 225 } else { 45 },
            drawn_steps: 200,
            starts: 16,
            columns: 64,
            rate: 0.1,
            relaxed_steps: 1500,
            logit_noise: 0.5,
            weight_noise: 0.5,
            fit_steps: 800,
            rounds: 40,
            changes: 40,
            change_steps: 150,
            heat: 0.2,
            batch: 128,
            kept: 8,
            tolerance: 1e-4,
            polish: 400,
        };
        // Of several butterflies the relaxed descent finds more with stronger noise, and a change shows later.
        let several = product.matches('B').count() > 1;
        match (gpu, several) {
            (false, false) => cpu,
            (false, true) => Self { logit_noise: 1.0, columns: 128, change_steps: 300, changes: 30, rounds: 30, ..cpu },
            (true, false) => {
                Self { starts: 64, columns: 256, fit_steps: 1500, rounds: 20, change_steps: 300, kept: 32, ..cpu }
            }
            (true, true) => Self {
                logit_noise: 1.0,
                relaxed_steps: 4000,
                fit_steps: 1500,
                starts: 64,
                columns: 256,
                change_steps: 500,
                kept: 32,
                polish: 3000,
                ..cpu
            },
        }
    }
}

impl Settings {
    /// The learning rate of step `i` of a fit of `steps`, which falls to 0.
    pub(super) fn fit_rate(&self, i: usize, steps: usize) -> f32 {
        self.rate as f32 / 2.0 * (1.0 - i as f32 / steps as f32)
    }

    /// Of step `i` with relaxed permutations: the learning rate, a cosine that the fit after it goes on from, and the
    /// scales of the noise on logits and on all parameters.
    pub(super) fn relaxed_rates(&self, i: usize) -> [f32; 3] {
        let done = i as f32 / self.relaxed_steps as f32;
        let rate = self.rate as f32 * 0.5 * (1.0 + (0.6 * std::f32::consts::PI * done).cos());
        [rate, self.logit_noise as f32 * (1.0 - done), self.weight_noise as f32 * rate]
    }
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Starts, then rounds done.
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

impl Learned {
    /// The product times `scale`, where there is one.
    pub(crate) fn scaled(mut self, scale: Option<f64>) -> Self {
        if let Some(scale) = scale {
            self.product.scale(scale);
        }
        self
    }
}

/// Error below which L-BFGS is tried on a product, of the root mean square of a unitary matrix's entries.
const NEAR: f64 = 0.16;
/// L-BFGS begins again while it lowers the error by this factor.
const FALLS: f64 = 0.7;
/// Starts with drawn permutations on which L-BFGS is tried before permutations are relaxed.
const NEARS: usize = 8;
/// Examples that L-BFGS compares, where there are as many.
const SOME: usize = 256;
/// Times that L-BFGS begins on a product.
const POLISHES: usize = 5;

/// Where descents run.
enum Backend<'a> {
    Cpu(Examples<'a>),
    #[cfg(feature = "cuda")]
    Gpu(super::gpu::Gpu),
}

impl Backend<'_> {
    /// Relaxed descents of starts; `done` is called as starts end.
    fn relax(&self, searches: &mut [Search], settings: &Settings, done: impl Fn(usize) + Sync) -> Result<()> {
        match self {
            Self::Cpu(examples) => {
                let ended = AtomicUsize::new(0);
                searches.par_iter_mut().for_each(|s| {
                    cpu::relax(s, settings, examples);
                    done(1 + ended.fetch_add(1, Ordering::Relaxed));
                });
            }
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.relax(searches, settings)?,
        }
        Ok(())
    }

    /// Fits of starts with hardened permutations; `done` is called as starts end.
    fn fit(
        &self,
        searches: &mut [Search],
        settings: &Settings,
        steps: usize,
        done: impl Fn(usize) + Sync,
    ) -> Result<()> {
        match self {
            Self::Cpu(examples) => {
                let ended = AtomicUsize::new(0);
                searches.par_iter_mut().for_each(|s| {
                    cpu::fit(s, settings, steps, examples);
                    done(1 + ended.fetch_add(1, Ordering::Relaxed));
                });
            }
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.fit(searches, settings, steps, done)?,
        }
        Ok(())
    }

    /// The changes of a round.
    fn anneal(&self, searches: &mut [Search], settings: &Settings) -> Result<()> {
        match self {
            Self::Cpu(examples) => searches.par_iter_mut().for_each(|s| cpu::anneal(s, settings, examples)),
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.anneal(searches, settings)?,
        }
        Ok(())
    }
}

/// A learning run.
pub struct Run<'a> {
    pub(super) settings: &'a Settings,
    backend: Backend<'a>,
    /// Every example.
    whole: Objective<f64, LANES>,
    /// Those that L-BFGS compares.
    some: Objective<f64, LANES>,
    /// Whether outputs are complex.
    complex: bool,
    pub(super) searches: Vec<Search>,
    /// Rounds done; none before the first descents.
    pub(super) rounds: Option<usize>,
    pub(super) best: Option<Learned>,
}

impl<'a> Run<'a> {
    /// Draws the starts.
    ///
    /// # Errors
    /// Settings that make no product, no start or no column; a size that is no power of two from 2 on; a device's failure.
    pub fn new(examples: Examples<'a>, settings: &'a Settings, device: &Device) -> Result<Self> {
        let n = examples.size();
        let shape = Shape { size: n, complex: settings.complex, tied: settings.tied };
        if settings.starts + settings.drawn == 0 || settings.columns == 0 {
            return Err(Error::usage("transform", "at least one start and one column"));
        }
        let complex = examples.complex();
        if (complex || examples.complex_input()) && !settings.complex {
            return Err(Error::usage("transform", "a complex matrix needs complex factors"));
        }
        let search = |start| Search::new(settings, shape, examples.len(), start);
        let searches = (0..settings.drawn + settings.starts).map(search).collect::<Result<Vec<_>>>()?;
        let backend = match device {
            Device::Cpu => Backend::Cpu(examples),
            #[cfg(feature = "cuda")]
            device => Backend::Gpu(super::gpu::Gpu::new(shape, &examples, device)?),
            #[cfg(not(feature = "cuda"))]
            _ => return Err(Error::unsupported("transform", "a device of another kind than this build's")),
        };
        let every: Vec<usize> = (0..examples.len()).collect();
        let some = index::sample(
            &mut random(settings.seed, u64::MAX),
            every.len(),
            every.len().min(SOME.max(settings.columns)),
        );
        let some = Objective::of_columns(shape, &examples, &some.into_vec());
        let whole = Objective::of_columns(shape, &examples, &every);
        Ok(Self { settings, backend, whole, some, complex, searches, rounds: None, best: None })
    }

    /// Runs the first descents of all starts, or the next round of annealing, and polishes what is near; returns whether
    /// the run has ended.
    ///
    /// # Errors
    /// A device's failure.
    pub fn advance(&mut self, on_progress: &(dyn Fn(Progress) + Sync)) -> Result<bool> {
        let s = self.settings;
        let total = s.drawn + s.starts + s.rounds;
        let rounds = match self.rounds {
            None => {
                self.begin(|done, error| on_progress(Progress { done, total, error }))?;
                0
            }
            Some(done) => {
                if done > 0 {
                    self.searches.truncate((self.searches.len() / 2).max(s.kept));
                }
                self.searches.iter_mut().for_each(|search| search.begin_round(s, done + 1));
                self.backend.anneal(&mut self.searches, s)?;
                done + 1
            }
        };
        self.rounds = Some(rounds);
        self.polish(rounds, NEAR);
        if self.error() >= s.tolerance && rounds >= s.rounds {
            // Of a matrix that is no such product nothing is near.
            self.polish(rounds, f64::INFINITY);
        }
        let error = self.error();
        on_progress(Progress { done: s.drawn + s.starts + rounds, total, error });
        Ok(error < s.tolerance || rounds >= s.rounds)
    }

    /// Fits the starts with drawn permutations; the relaxed descents of the others, and their fits, if none of those is
    /// near enough.
    fn begin(&mut self, on_progress: impl Fn(usize, f64) + Sync) -> Result<()> {
        let s = self.settings;
        let mut relaxed = self.searches.split_off(s.drawn);
        self.backend.fit(&mut self.searches, s, s.drawn_steps, |done| on_progress(done, f64::INFINITY))?;
        self.sort();
        self.searches.truncate(s.starts.max(1));
        self.backend.fit(&mut self.searches, s, s.fit_steps, |_| ())?;
        for _ in 0..NEARS {
            if !self.polish(0, NEAR) || self.error() < s.tolerance {
                break;
            }
        }
        let error = self.error();
        on_progress(s.drawn, error);
        if error >= s.tolerance {
            self.backend.relax(&mut relaxed, s, |done| on_progress(s.drawn + done, error))?;
            self.backend.fit(&mut relaxed, s, s.fit_steps, |_| ())?;
            self.searches.append(&mut relaxed);
        }
        Ok(())
    }

    fn error(&self) -> f64 {
        self.best.as_ref().map_or(f64::INFINITY, |b| b.error)
    }

    fn sort(&mut self) {
        self.searches.sort_by(|a, b| a.best.1.total_cmp(&b.best.1).then(a.start.cmp(&b.start)));
    }

    /// Polishes the best start whose error is below `bound` and keeps it if it is the best so far; returns whether there
    /// was one.
    fn polish(&mut self, rounds: usize, bound: f64) -> bool {
        self.sort();
        let root = self.searches.first().map_or(1.0, |s| s.now.0.shape().size as f64).sqrt();
        let near = |s: &&mut Search| s.best.1 < bound / root && s.best.1 < FALLS * s.polished;
        // A start whose product L-BFGS could not bring down waits until annealing has found a better one.
        let (product, start, is_near) = match self.searches.iter_mut().find(near) {
            Some(search) => {
                search.polished = search.best.1;
                (polished(&search.best.0, (&self.some, self.complex), self.settings), search.start, true)
            }
            None => {
                let Some(first) = self.searches.first() else { return false };
                (first.best.0.clone(), first.start, false)
            }
        };
        let error = error_of(&product, (&self.whole, self.complex));
        if self.best.as_ref().is_none_or(|b| error < b.error) {
            self.best = Some(Learned { product, error, start, rounds });
        }
        is_near
    }

    /// The best product so far; none before the first [`advance`](Self::advance).
    pub fn into_best(self) -> Option<Learned> {
        self.best
    }
}

/// Learns a matrix, or what maps inputs to outputs, as a product on `device`. The result depends on the settings, the
/// examples and the kind of device alone.
///
/// # Errors
/// As of [`Run`].
pub fn learn<'a>(
    examples: impl Into<Examples<'a>>,
    settings: &Settings,
    device: &Device,
    on_progress: &(dyn Fn(Progress) + Sync),
) -> Result<Learned> {
    let mut run = Run::new(examples.into(), settings, device)?;
    while !run.advance(on_progress)? {}
    run.into_best().ok_or_else(|| Error::usage("transform", "no start"))
}

/// L-BFGS on a product, begun again as long as it is worth it.
fn polished(product: &Product, some: (&Objective<f64, LANES>, bool), settings: &Settings) -> Product {
    let mut found = polish(product, some, settings.polish, settings.tolerance / 2.0);
    for _ in 1..POLISHES {
        let before = found.1;
        if before < settings.tolerance {
            break;
        }
        found = polish(&found.0, some, settings.polish, settings.tolerance / 2.0);
        if found.1 > FALLS * before {
            break;
        }
    }
    found.0
}

#[cfg(test)]
mod tests {
    use super::super::{Matrix, Transform};
    use super::*;

    fn small(transform: Transform, seed: u64) -> Settings {
        let (product, complex) = transform.product();
        Settings { starts: 8, rounds: 10, ..Settings::new(product, complex, seed, false) }
    }

    /// The recovered product multiplies as the matrix does, computed apart from what learned it.
    #[test]
    fn fast_algorithms_of_8_points_are_found_from_their_matrices() -> Result<()> {
        for transform in [Transform::Dft, Transform::Dct, Transform::Hadamard, Transform::Convolution] {
            let matrix = transform.matrix(8, 0);
            let found = learn(&matrix, &small(transform, 0), &Device::Cpu, &|_| ())?;
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

    /// Without drawn permutations the relaxed descents and annealing find what there is.
    #[test]
    fn relaxed_permutations_alone_find_small_transforms() -> Result<()> {
        for transform in [Transform::Dft, Transform::Dct] {
            let settings = Settings { drawn: 0, ..small(transform, 1) };
            let found = learn(&transform.matrix(8, 0), &settings, &Device::Cpu, &|_| ())?;
            assert!(found.error < 1e-4, "{transform:?}: {:.1e}", found.error);
        }
        Ok(())
    }

    #[test]
    fn a_run_depends_on_its_settings_alone() -> Result<()> {
        let settings = Settings {
            drawn: 20,
            drawn_steps: 10,
            rounds: 2,
            relaxed_steps: 100,
            fit_steps: 50,
            ..small(Transform::Dst, 3)
        };
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            pool.install(|| learn(&Transform::Dst.matrix(16, 3), &settings, &Device::Cpu, &|_| ()))
        };
        assert_eq!(run(1)?, run(3)?);
        Ok(())
    }

    #[test]
    fn what_cannot_be_learned_is_refused() {
        let dft = Transform::Dft.matrix(8, 0);
        for (settings, why) in [
            (Settings::new("BX", true, 0, false), "`X` in \"BX\""),
            (Settings::new("P", true, 0, false), "no butterfly"),
            (Settings::new("BP", false, 0, false), "complex factors"),
            (Settings { starts: 0, drawn: 0, ..Settings::new("BP", true, 0, false) }, "one start"),
        ] {
            let refused = learn(&dft, &settings, &Device::Cpu, &|_| ()).map(|_| ()).expect_err("refused").to_string();
            assert!(refused.contains(why), "{refused}");
        }
        let odd = Matrix { size: 6, re: vec![0.0; 36], im: None };
        assert!(learn(&odd, &Settings::new("BP", true, 0, false), &Device::Cpu, &|_| ()).is_err());
    }
}
