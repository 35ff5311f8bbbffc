//! Fast algorithms of linear transforms, found by gradient descent (Dao, Gu, Eichhorn, Rudra and Ré 2019,
//! arXiv:1903.05895).
//!
//! A matrix is approximated by a product of butterflies and permutations ([`crate::ops::factored`]), given its entries
//! alone. Several starts, each from random factors:
//!
//! 1. drawn permutations, each of one choice at all steps or at the first step alone; the factors are fitted by Adam, the
//!    best starts for longer;
//! 2. if none of these is near: Adam on factors and relaxed permutations together, with noise on the logits that fades,
//!    after which the permutations are hardened and the factors fitted;
//! 3. annealing: one step of one permutation is changed, the factors are fitted for a few steps from where they were, and
//!    the change is kept by Metropolis' rule;
//! 4. L-BFGS in f64 on the factors.
//!
//! Steps 1 to 3 compare some columns of the matrix, drawn for each start; step 4 and the reported error all of them. In
//! place of a matrix, pairs of an input and its output may be given, which are then what is compared.

mod closed;
mod cpu;
mod examples;
#[cfg(feature = "cuda")]
mod gpu;
mod learn;
mod objective;
mod polish;
mod product;
mod search;
mod state;
mod target;

/// A fit of changed permutations ends after a third of its steps if its error is above this times what would be kept.
const HOPELESS: f64 = 3.0;

pub use closed::closed_form;
pub use examples::{Examples, Pairs, Vectors};
pub use learn::{learn, Learned, Progress, Run, Settings};
pub use product::Product;
pub use target::{Matrix, Transform};
