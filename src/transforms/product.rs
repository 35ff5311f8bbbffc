//! A product of butterflies and permutations that is being learned.

use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::ops::factored::Kind;
use crate::ops::factored::{hardened, Real, Shape, Step};
use crate::stats::normal;
use rand::rngs::StdRng;

/// A factor of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Module {
    Butterfly,
    Permutation,
}

/// Butterflies and permutations in the order in which they are applied, and their parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct Product {
    shape: Shape,
    modules: Vec<Module>,
    /// Of each butterfly.
    factors: Vec<Vec<f32>>,
    /// Of each permutation.
    logits: Vec<Vec<f32>>,
}

/// Choices of the steps of a permutation: bit 0 even indices first, bit 1 first half reversed, bit 2 second half reversed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Choices {
    /// The same at every step.
    EveryStep(u8),
    /// At the step of all N elements, and nothing at the others.
    FirstStep(u8),
}

/// Standard deviation of the first logits.
const LOGITS: f64 = 0.5;

impl Product {
    /// Draws factors that keep the length of a vector on average, and logits about 0.
    ///
    /// `product` names the modules, left factor first, such as `BP`: the permutation is applied first.
    ///
    /// # Errors
    /// A size that is no power of two from 2 on; another letter than `B` and `P`, or no `B`.
    pub fn random(shape: Shape, product: &str, rng: &mut StdRng) -> Result<Self> {
        let modules = modules(product)?;
        if !shape.size.is_power_of_two() || shape.size < 2 {
            return Err(Error::usage("transform", format!("{} is no power of two from 2 on", shape.size)));
        }
        let std = if shape.complex { 0.5 } else { 0.5f64.sqrt() };
        let (mut factors, mut logits) = (vec![], vec![]);
        for module in &modules {
            let mut draw = |n: usize, std: f64| (0..n).map(|_| (std * normal(rng)) as f32).collect();
            match module {
                Module::Butterfly => factors.push(draw(shape.butterfly_len(), std)),
                Module::Permutation => logits.push(draw(shape.permutation_len(), LOGITS)),
            }
        }
        Ok(Self { shape, modules, factors, logits })
    }

    /// Size and field.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The same modules and permutations with other factors.
    pub(super) fn with_factors(&self, shape: Shape, factors: Vec<Vec<f32>>) -> Self {
        Self { shape, modules: self.modules.clone(), factors, logits: self.logits.clone() }
    }

    /// Parameters of each butterfly, in the order of application.
    pub fn factors(&self) -> &[Vec<f32>] {
        &self.factors
    }

    pub(crate) fn factors_mut(&mut self) -> &mut [Vec<f32>] {
        &mut self.factors
    }

    pub(super) fn logits_mut(&mut self) -> &mut [Vec<f32>] {
        &mut self.logits
    }

    /// Sets the permutations.
    pub(super) fn choose(&mut self, choices: &[Choices]) {
        for (logits, choices) in self.logits.iter_mut().zip(choices) {
            for (i, logit) in logits.iter_mut().enumerate() {
                let bits = match choices {
                    Choices::EveryStep(bits) => *bits,
                    Choices::FirstStep(bits) if i < 3 => *bits,
                    Choices::FirstStep(_) => 0,
                };
                *logit = if bits >> (i % 3) & 1 == 1 { 1.0 } else { -1.0 };
            }
        }
    }

    /// The modules, left factor first, as [`Self::random`] takes them.
    pub fn modules(&self) -> String {
        let letter = |m: &Module| if *m == Module::Butterfly { 'B' } else { 'P' };
        self.modules.iter().rev().map(letter).collect()
    }

    /// Multiplies the product by a number, in the last factor of the last butterfly.
    pub fn scale(&mut self, by: f64) {
        let last = 2 * self.shape.size * self.shape.planes();
        if let Some(factors) = self.factors.last_mut() {
            let from = factors.len() - last;
            factors[from..].iter_mut().for_each(|w| *w = (f64::from(*w) * by) as f32);
        }
    }

    /// Number of permutations.
    pub(super) fn permutations(&self) -> usize {
        self.logits.len()
    }

    /// The permutations, hardened: element `i` of a result is element `index[i]`.
    pub fn permuted(&self) -> Vec<Vec<u32>> {
        self.logits.iter().map(|l| hardened(self.shape.size, l)).collect()
    }

    /// Trainable parameters: of the factors, and of the relaxed permutations.
    pub fn parameters(&self) -> (usize, usize) {
        let count = |of: &[Vec<f32>]| of.iter().map(Vec::len).sum();
        (count(&self.factors), count(&self.logits))
    }

    /// The steps with relaxed permutations.
    pub(super) fn relaxed(&self) -> Vec<Step<'_, f32>> {
        let mut logits = self.logits.iter();
        self.steps(&self.factors, || logits.next().map(|l| Step::Relaxed(l)))
    }

    /// The steps with permutations `index` and the given factors.
    pub(super) fn hard<'a, T: Real>(&self, factors: &'a [Vec<T>], index: &'a [Vec<u32>]) -> Vec<Step<'a, T>> {
        let mut index = index.iter();
        self.steps(factors, || index.next().map(|i| Step::Permutation(i)))
    }

    fn steps<'a, T: Real>(
        &self,
        factors: &'a [Vec<T>],
        mut permutation: impl FnMut() -> Option<Step<'a, T>>,
    ) -> Vec<Step<'a, T>> {
        let mut factors = factors.iter();
        let step = |m: &Module| match m {
            Module::Butterfly => factors.next().map(|f| Step::Butterfly(f)),
            Module::Permutation => permutation(),
        };
        self.modules.iter().filter_map(step).collect()
    }

    /// The modules as a GPU reads them, with permutations of one kind.
    #[cfg(feature = "cuda")]
    pub(super) fn kinds(&self, permutation: Kind) -> Vec<Kind> {
        let kind = |m: &Module| if *m == Module::Butterfly { Kind::Butterfly } else { permutation };
        self.modules.iter().map(kind).collect()
    }

    /// All parameters: factors, then logits.
    pub(super) fn flat(&self) -> Vec<f32> {
        self.factors.iter().chain(&self.logits).flatten().copied().collect()
    }

    /// Sets all parameters, as [`flat`](Self::flat) gives them.
    pub(super) fn set_flat(&mut self, flat: &[f32]) {
        let own = self.factors.iter_mut().chain(&mut self.logits).flatten();
        own.zip(flat).for_each(|(to, from)| *to = *from);
    }

    /// All parameters in the order of the steps, as gradients of relaxed products are laid out.
    pub(super) fn all_mut(&mut self) -> impl Iterator<Item = &mut f32> {
        let (mut factors, mut logits) = (self.factors.iter_mut(), self.logits.iter_mut());
        let of = move |m: &Module| match m {
            Module::Butterfly => factors.next(),
            Module::Permutation => logits.next(),
        };
        self.modules.iter().filter_map(of).flatten()
    }
}

fn modules(product: &str) -> Result<Vec<Module>> {
    let module = |c: char| match c {
        'B' => Ok(Module::Butterfly),
        'P' => Ok(Module::Permutation),
        other => Err(Error::usage("--product", format!("`{other}` in {product:?}: B is a butterfly, P a permutation"))),
    };
    let modules: Vec<Module> = product.chars().rev().map(module).collect::<Result<_>>()?;
    if !modules.contains(&Module::Butterfly) {
        return Err(Error::usage("--product", format!("{product:?} has no butterfly, B")));
    }
    Ok(modules)
}
