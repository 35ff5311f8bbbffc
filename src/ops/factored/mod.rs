//! Products of butterfly factors and permutations (Dao, Gu, Eichhorn, Rudra and Ré 2019, arXiv:1903.05895).
//!
//! A butterfly on `N = 2^L` elements is `B = B_L ... B_1`. Factor `B_l` is block diagonal with blocks of `m = 2^l` rows,
//! each `[[D1, D2], [D3, D4]]` with diagonal `D` of `m / 2`: for `j < m / 2` of a block
//!
//! ```text
//! y_j           = d1_j x_j + d2_j x_{j + m/2}
//! y_{j + m/2}   = d3_j x_j + d4_j x_{j + m/2}
//! ```
//!
//! so that a product costs `2 N log2 N` multiplications. A permutation is a product of one step for each block size from
//! `N` to 2, of three choices in all blocks: elements of even index first, then the first half reversed, the second half
//! reversed. Relaxed, a choice is the mixture `(1 - p) I + p S` with `p` the sigmoid of a logit.
//!
//! Layers are stacks of real butterflies without permutations, whose blocks have their own weights ([`apply`]).

mod apply;
#[cfg(feature = "cuda")]
mod descent;
mod entries;
mod pass;
mod plan;
#[cfg(feature = "cuda")]
mod rows;
mod tile;
mod untied;

pub(crate) use apply::scratch;
pub use apply::{apply, apply_backward};
#[cfg(feature = "cuda")]
pub(crate) use descent::{Descents, Kind, Steps};
pub use entries::Entry;
pub use plan::{Plan, PlanRoom};
pub use tile::{backward, forward, Kept, Real, Shape, Step};

/// The permutation that logits harden to: each choice is taken where its logit is positive.
///
/// Element `i` of the result is element `index[i]`.
pub fn hardened<T: Real>(size: usize, logits: &[T]) -> Vec<u32> {
    let mut index: Vec<u32> = (0..size as u32).collect();
    for (level, choice) in logits.chunks_exact(3).enumerate().take(size.trailing_zeros() as usize - 1) {
        let block = size >> level;
        let [sorts, first, second] = [0, 1, 2].map(|i| choice[i] > T::zero());
        let before = index.clone();
        for (to, from) in index.chunks_exact_mut(block).zip(before.chunks_exact(block)) {
            for (j, to) in to.iter_mut().enumerate() {
                let turned = if j < block / 2 { first } else { second };
                let at = if turned { tile::reversed(block, j) } else { j };
                *to = from[if sorts { tile::even_odd(block, at) } else { at }];
            }
        }
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{rngs::StdRng, Rng, SeedableRng};

    /// A dense matrix of complex numbers, row-major.
    type Dense = Vec<(f64, f64)>;

    fn times(a: &Dense, b: &Dense, n: usize) -> Dense {
        let mut c = vec![(0.0, 0.0); n * n];
        for i in 0..n {
            for k in 0..n {
                let (ar, ai) = a[i * n + k];
                for j in 0..n {
                    let ((br, bi), c) = (b[k * n + j], &mut c[i * n + j]);
                    *c = (c.0 + ar * br - ai * bi, c.1 + ar * bi + ai * br);
                }
            }
        }
        c
    }

    /// The matrix of a step, factor by factor, as the module's text defines it.
    fn dense(shape: &Shape, step: &Step<f64>) -> Dense {
        let n = shape.size;
        let one = |source: &dyn Fn(usize) -> Vec<(usize, f64)>| {
            let mut m = vec![(0.0, 0.0); n * n];
            (0..n).for_each(|i| source(i).into_iter().for_each(|(j, x)| m[i * n + j].0 += x));
            m
        };
        let mut all = one(&|i| vec![(i, 1.0)]);
        match step {
            Step::Butterfly(w) => {
                let mut at = 0;
                for level in 0..shape.levels() {
                    let half = 1 << level;
                    let mut m = vec![(0.0, 0.0); n * n];
                    for block in (0..n).step_by(2 * half) {
                        for j in 0..half {
                            let pair = if shape.tied { j } else { block / 2 + j };
                            for e in 0..4 {
                                let from = at + (4 * pair + e) * shape.planes();
                                let (row, column) = (block + j + e / 2 * half, block + j + e % 2 * half);
                                m[row * n + column] = (w[from], if shape.complex { w[from + 1] } else { 0.0 });
                            }
                        }
                    }
                    all = times(&m, &all, n);
                    at += 4 * shape.planes() * if shape.tied { half } else { n / 2 };
                }
                assert_eq!(at, shape.butterfly_len());
            }
            Step::Relaxed(logits) => {
                for (level, logit) in logits.chunks_exact(3).enumerate() {
                    let (block, p) = (n >> level, [0, 1, 2].map(|i| 1.0 / (1.0 + (-logit[i]).exp())));
                    let half = block / 2;
                    let sorted = one(&|i| {
                        let j = i % block;
                        let from = if j < half { 2 * j } else { 2 * (j - half) + 1 };
                        vec![(i, 1.0 - p[0]), (i - j + from, p[0])]
                    });
                    let turned = one(&|i| {
                        let j = i % block;
                        let (first, p) = if j < half { (0, p[1]) } else { (half, p[2]) };
                        vec![(i, 1.0 - p), (i - j + first + half - 1 - (j - first), p)]
                    });
                    all = times(&turned, &times(&sorted, &all, n), n);
                }
            }
            Step::Permutation(index) => all = one(&|i| vec![(index[i] as usize, 1.0)]),
        }
        all
    }

    /// Random steps B, P, B, relaxed or hardened, and their parameters.
    struct Product {
        shape: Shape,
        factors: [Vec<f64>; 2],
        logits: Vec<f64>,
        index: Vec<u32>,
    }

    impl Product {
        fn random(shape: Shape, rng: &mut StdRng) -> Self {
            let mut random = |n: usize| -> Vec<f64> { (0..n).map(|_| rng.random_range(-1.0..1.0)).collect() };
            let factors = [random(shape.butterfly_len()), random(shape.butterfly_len())];
            let logits = random(shape.permutation_len());
            Self { index: hardened(shape.size, &logits), shape, factors, logits }
        }

        fn steps(&self, relaxed: bool) -> [Step<'_, f64>; 3] {
            let middle = if relaxed { Step::Relaxed(&self.logits) } else { Step::Permutation(&self.index) };
            [Step::Butterfly(&self.factors[0]), middle, Step::Butterfly(&self.factors[1])]
        }
    }

    fn shapes() -> impl Iterator<Item = Shape> {
        [2, 4, 8, 32]
            .into_iter()
            .flat_map(|size| [(false, false), (false, true), (true, false), (true, true)].map(|o| (size, o)))
            .map(|(size, (complex, tied))| Shape { size, complex, tied })
    }

    fn random_tile<const W: usize>(shape: &Shape, rng: &mut StdRng) -> Vec<[f64; W]> {
        (0..shape.planes() * shape.size).map(|_| std::array::from_fn(|_| rng.random_range(-1.0..1.0))).collect()
    }

    #[test]
    fn a_tile_is_multiplied_as_by_the_dense_matrices() {
        let mut rng = StdRng::seed_from_u64(1);
        for shape in shapes() {
            let product = Product::random(shape, &mut rng);
            for relaxed in [true, false] {
                let steps = product.steps(relaxed);
                let matrix = steps.iter().map(|s| dense(&shape, s)).reduce(|all, m| times(&m, &all, shape.size));
                let (matrix, x) = (matrix.expect("three steps"), random_tile::<3>(&shape, &mut rng));
                let mut y = x.clone();
                forward(&shape, &steps, &mut y, &mut Kept::default());
                let n = shape.size;
                for i in 0..n {
                    for lane in 0..3 {
                        let mut want = (0.0, 0.0);
                        for j in 0..n {
                            let ((mr, mi), re) = (matrix[i * n + j], x[j][lane]);
                            let im = if shape.complex { x[n + j][lane] } else { 0.0 };
                            want = (want.0 + mr * re - mi * im, want.1 + mr * im + mi * re);
                        }
                        assert!((y[i][lane] - want.0).abs() < 1e-12, "{shape:?}, relaxed {relaxed}");
                        assert!(!shape.complex || (y[n + i][lane] - want.1).abs() < 1e-12, "{shape:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn entries_of_the_factors_multiply_to_the_dense_butterfly() {
        let mut rng = StdRng::seed_from_u64(4);
        for shape in shapes() {
            let n = shape.size;
            let w: Vec<f32> = (0..shape.butterfly_len()).map(|_| rng.random_range(-1.0..1.0)).collect();
            let factor = |level: usize| {
                let (mut m, entries) = (vec![(0.0, 0.0); n * n], shape.entries(level, &w));
                assert_eq!(entries.len(), 2 * n, "two entries a row");
                entries.iter().for_each(|e| m[e.row * n + e.column] = (f64::from(e.re), f64::from(e.im)));
                m
            };
            let got = (0..shape.levels()).map(factor).reduce(|all, m| times(&m, &all, n)).expect("a factor");
            let wide: Vec<f64> = w.iter().map(|x| f64::from(*x)).collect();
            for (got, want) in got.iter().zip(dense(&shape, &Step::Butterfly(&wide))) {
                assert!((got.0 - want.0).hypot(got.1 - want.1) < 1e-12, "{shape:?}: {got:?} {want:?}");
            }
        }
    }

    /// Against central differences of `sum(result * d)`.
    #[test]
    fn gradients_are_those_of_differences() {
        let mut rng = StdRng::seed_from_u64(2);
        for shape in shapes() {
            let product = Product::random(shape, &mut rng);
            let (x, d) = (random_tile::<2>(&shape, &mut rng), random_tile::<2>(&shape, &mut rng));
            for relaxed in [true, false] {
                let value = |product: &Product, x: &[[f64; 2]]| -> f64 {
                    let mut y = x.to_vec();
                    forward(&shape, &product.steps(relaxed), &mut y, &mut Kept::default());
                    y.iter().flatten().zip(d.iter().flatten()).map(|(y, d)| y * d).sum()
                };
                let (mut y, mut kept, mut got) = (x.clone(), Kept::default(), d.clone());
                let logits = if relaxed { shape.permutation_len() } else { 0 };
                let mut gradient = vec![0.0; 2 * shape.butterfly_len() + logits];
                forward(&shape, &product.steps(relaxed), &mut y, &mut kept);
                backward(&shape, &product.steps(relaxed), &mut got, &mut kept, &mut gradient);
                let h = 1e-5;
                let check = |got: f64, by: &dyn Fn(f64) -> f64| {
                    let want = (by(h) - by(-h)) / (2.0 * h);
                    assert!((got - want).abs() < 1e-6 * (1.0 + want.abs()), "{shape:?}: {got} {want}");
                };
                for i in 0..x.len() {
                    check(got[i][1], &|h| {
                        let mut x = x.clone();
                        x[i][1] += h;
                        value(&product, &x)
                    });
                }
                let moved = |at: usize, h: f64| {
                    let (len, mut p) = (shape.butterfly_len(), Product { ..clone(&product) });
                    match at {
                        at if at < len => p.factors[0][at] += h,
                        at if at < len + logits => p.logits[at - len] += h,
                        at => p.factors[1][at - len - logits] += h,
                    }
                    value(&p, &x)
                };
                for (at, got) in gradient.iter().enumerate() {
                    check(*got, &|h| moved(at, h));
                }
            }
        }
    }

    fn clone(p: &Product) -> Product {
        Product { shape: p.shape, factors: p.factors.clone(), logits: p.logits.clone(), index: p.index.clone() }
    }

    #[test]
    fn saturated_logits_mix_to_the_hardened_permutation() {
        let mut rng = StdRng::seed_from_u64(3);
        for size in [2, 4, 16, 64] {
            let shape = Shape { size, complex: false, tied: true };
            let logits: Vec<f64> =
                (0..shape.permutation_len()).map(|_| if rng.random() { 60.0 } else { -60.0 }).collect();
            let (x, index) = (random_tile::<1>(&shape, &mut rng), hardened(size, &logits));
            let [soft, hard] = [Step::Relaxed(&logits), Step::Permutation(&index)].map(|step| {
                let mut y = x.clone();
                forward(&shape, &[step], &mut y, &mut Kept::default());
                y
            });
            assert_eq!(soft, hard, "{size}");
        }
    }
}
