//! Butterfly factors and permutations applied to `W` vectors at a time, forward and backward.
//!
//! A tile is `[planes, N]` rows of `W` numbers: row `i` holds element `i` of every vector, real parts first, imaginary
//! parts after them. All loops run over whole rows, which compile to vector instructions.

use num_traits::Float;
use std::ops::AddAssign;

/// Numbers that products are computed in: f32 or f64.
pub trait Real: Float + AddAssign + Default + Send + Sync + 'static {}
impl<T: Float + AddAssign + Default + Send + Sync + 'static> Real for T {}

/// Shape of the factors of one butterfly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// `N`, a power of two of at least 2.
    pub size: usize,
    /// Whether factors are complex.
    pub complex: bool,
    /// Whether the blocks of a factor share their weights.
    pub tied: bool,
}

impl Shape {
    /// Number of factors, `log2 N`.
    pub fn levels(&self) -> usize {
        self.size.trailing_zeros() as usize
    }

    /// Numbers to an element: 1, or 2 for real and imaginary part.
    pub fn planes(&self) -> usize {
        1 + usize::from(self.complex)
    }

    /// Different 2 x 2 matrices of factor `level`, whose blocks have `2^(level + 1)` rows.
    fn pairs(&self, level: usize) -> usize {
        if self.tied {
            1 << level
        } else {
            self.size / 2
        }
    }

    /// Parameters of factor `level`: `[pair, 4, planes]`, the four of `[[d1, d2], [d3, d4]]`.
    pub(super) fn factor_len(&self, level: usize) -> usize {
        4 * self.planes() * self.pairs(level)
    }

    /// Parameters of a butterfly, factors one after the other from blocks of 2 rows to one of N.
    pub fn butterfly_len(&self) -> usize {
        (0..self.levels()).map(|level| self.factor_len(level)).sum()
    }

    /// Parameters of a relaxed permutation: three logits a level, from blocks of N rows to those of 2.
    pub fn permutation_len(&self) -> usize {
        3 * self.levels()
    }
}

/// A factor of a product, with its parameters.
#[derive(Debug, Clone, Copy)]
pub enum Step<'a, T> {
    /// A butterfly: `log2 N` block-diagonal factors.
    Butterfly(&'a [T]),
    /// A relaxed permutation: logits.
    Relaxed(&'a [T]),
    /// A permutation: element `i` of the result is element `index[i]`.
    Permutation(&'a [u32]),
}

/// What a forward pass leaves for the backward pass: the input of every stage.
#[derive(Debug, Default)]
pub struct Kept<T, const W: usize> {
    rows: Vec<[T; W]>,
    room: Vec<[T; W]>,
}

impl<T: Real, const W: usize> Kept<T, W> {
    fn push(&mut self, x: &[[T; W]]) {
        self.rows.extend_from_slice(x);
    }

    /// The stage's input that was kept last.
    fn last(&self, rows: usize) -> &[[T; W]] {
        &self.rows[self.rows.len() - rows..]
    }

    fn pop(&mut self, rows: usize) {
        self.rows.truncate(self.rows.len() - rows);
    }
}

/// Applies the steps in order to a tile.
#[inline(always)]
pub fn forward<T: Real, const W: usize>(shape: &Shape, steps: &[Step<T>], x: &mut [[T; W]], kept: &mut Kept<T, W>) {
    kept.rows.clear();
    for step in steps {
        match step {
            Step::Butterfly(w) => {
                let mut at = 0;
                for level in 0..shape.levels() {
                    kept.push(x);
                    let w = &w[at..][..shape.factor_len(level)];
                    match shape.complex {
                        true => complex_factor(shape, level, w, x),
                        false => real_factor(shape, level, w, x),
                    }
                    at += w.len();
                }
            }
            Step::Relaxed(logits) => {
                for (level, p) in probabilities(logits).enumerate().take(shape.levels() - 1) {
                    let block = shape.size >> level;
                    kept.push(x);
                    mix(block, even_odd, [p[0], p[0]], kept.last(x.len()), x);
                    kept.push(x);
                    mix(block, reversed, [p[1], p[2]], kept.last(x.len()), x);
                }
            }
            Step::Permutation(index) => {
                kept.room.clear();
                kept.room.extend_from_slice(x);
                for (to, from) in x.chunks_exact_mut(shape.size).zip(kept.room.chunks_exact(shape.size)) {
                    to.iter_mut().zip(*index).for_each(|(x, i)| *x = from[*i as usize]);
                }
            }
        }
    }
}

/// Turns the gradient of a tile's result into that of its input, and adds those of the steps' parameters to `gradients`,
/// the steps' one after the other. `kept` is of [`forward`].
#[inline(always)]
pub fn backward<T: Real, const W: usize>(
    shape: &Shape,
    steps: &[Step<T>],
    d: &mut [[T; W]],
    kept: &mut Kept<T, W>,
    gradients: &mut [T],
) {
    let mut end = gradients.len();
    for step in steps.iter().rev() {
        match step {
            Step::Butterfly(w) => {
                for level in (0..shape.levels()).rev() {
                    let n = shape.factor_len(level);
                    let at: usize = (0..level).map(|l| shape.factor_len(l)).sum();
                    end -= n;
                    let (w, g) = (&w[at..][..n], &mut gradients[end..][..n]);
                    match shape.complex {
                        true => complex_factor_back(shape, level, w, kept.last(d.len()), d, g),
                        false => real_factor_back(shape, level, w, kept.last(d.len()), d, g),
                    }
                    kept.pop(d.len());
                }
            }
            Step::Relaxed(logits) => {
                end -= shape.permutation_len();
                let g = &mut gradients[end..][..shape.permutation_len()];
                let levels: Vec<[T; 3]> = probabilities(logits).take(shape.levels() - 1).collect();
                let mut room = std::mem::take(&mut kept.room);
                for (level, p) in levels.iter().enumerate().rev() {
                    let block = shape.size >> level;
                    let mut dp = [T::zero(); 3];
                    let by = mix_back(block, reversed, [p[1], p[2]], kept.last(d.len()), d, &mut room);
                    (dp[1], dp[2]) = (by[0], by[1]);
                    kept.pop(d.len());
                    let by = mix_back(block, even_odd, [p[0], p[0]], kept.last(d.len()), d, &mut room);
                    dp[0] = by[0] + by[1];
                    kept.pop(d.len());
                    for ((g, p), dp) in g[3 * level..][..3].iter_mut().zip(p).zip(dp) {
                        *g += dp * *p * (T::one() - *p);
                    }
                }
                kept.room = room;
            }
            Step::Permutation(index) => {
                kept.room.clear();
                kept.room.extend_from_slice(d);
                for (to, from) in d.chunks_exact_mut(shape.size).zip(kept.room.chunks_exact(shape.size)) {
                    from.iter().zip(*index).for_each(|(x, i)| to[*i as usize] = *x);
                }
            }
        }
    }
}

/// Sigmoids of the three logits of each level.
fn probabilities<T: Real>(logits: &[T]) -> impl Iterator<Item = [T; 3]> + '_ {
    let sigmoid = |x: T| T::one() / (T::one() + (-x).exp());
    logits.chunks_exact(3).map(move |l| [sigmoid(l[0]), sigmoid(l[1]), sigmoid(l[2])])
}

/// Where element `j` of a block comes from when elements of even index go first.
pub(super) fn even_odd(block: usize, j: usize) -> usize {
    let half = block / 2;
    if j < half {
        2 * j
    } else {
        2 * (j - half) + 1
    }
}

/// Where element `j` of a block comes from when both halves are reversed.
pub(super) fn reversed(block: usize, j: usize) -> usize {
    let half = block / 2;
    if j < half {
        half - 1 - j
    } else {
        block + half - 1 - j
    }
}

/// `x_j = (1 - p) from_j + p from_source(j)` in every block, with `p` of the half that `j` is in.
#[inline(always)]
fn mix<T: Real, const W: usize>(
    block: usize,
    source: impl Fn(usize, usize) -> usize,
    p: [T; 2],
    from: &[[T; W]],
    x: &mut [[T; W]],
) {
    for (x, from) in x.chunks_exact_mut(block).zip(from.chunks_exact(block)) {
        for (j, x) in x.iter_mut().enumerate() {
            let (p, a, b) = (p[usize::from(j >= block / 2)], from[j], from[source(block, j)]);
            for (t, x) in x.iter_mut().enumerate() {
                *x = a[t] + p * (b[t] - a[t]);
            }
        }
    }
}

/// Turns the gradient of [`mix`]'s result into that of `from`; returns those of `p`.
#[inline(always)]
fn mix_back<T: Real, const W: usize>(
    block: usize,
    source: impl Fn(usize, usize) -> usize,
    p: [T; 2],
    from: &[[T; W]],
    d: &mut [[T; W]],
    room: &mut Vec<[T; W]>,
) -> [T; 2] {
    room.clear();
    room.extend_from_slice(d);
    d.fill([T::zero(); W]);
    let mut sums = [[T::zero(); W]; 2];
    for ((d, out), from) in d.chunks_exact_mut(block).zip(room.chunks_exact(block)).zip(from.chunks_exact(block)) {
        for (j, out) in out.iter().enumerate() {
            let (half, s) = (usize::from(j >= block / 2), source(block, j));
            let p = p[half];
            let (a, b, sum) = (&from[j], &from[s], &mut sums[half]);
            for t in 0..W {
                sum[t] += out[t] * (b[t] - a[t]);
                d[j][t] += (T::one() - p) * out[t];
            }
            for t in 0..W {
                d[s][t] += p * out[t];
            }
        }
    }
    sums.map(total)
}

fn total<T: Real, const W: usize>(lanes: [T; W]) -> T {
    lanes.into_iter().fold(T::zero(), |sum, x| sum + x)
}

/// Index of the 2 x 2 matrix for row `j` of the block that begins at `block`.
pub(super) fn pair_of(shape: &Shape, block: usize, j: usize) -> usize {
    if shape.tied {
        j
    } else {
        block / 2 + j
    }
}

/// Adds the lanes' sums to the gradients of the 2 x 2 matrix for row `j` of a block, and clears them; where blocks share
/// weights, not before the last block.
#[inline(always)]
fn add_sums<T: Real, const W: usize, const K: usize>(
    shape: &Shape,
    level: usize,
    (block, j): (usize, usize),
    sums: &mut [[T; W]; K],
    g: &mut [T],
) {
    if shape.tied && block + (2 << level) < shape.size {
        return;
    }
    let g = &mut g[K * pair_of(shape, block, j)..][..K];
    g.iter_mut().zip(std::mem::replace(sums, [[T::zero(); W]; K])).for_each(|(g, s)| *g += total(s));
}

#[inline(always)]
fn real_factor<T: Real, const W: usize>(shape: &Shape, level: usize, w: &[T], x: &mut [[T; W]]) {
    let half = 1 << level;
    for j in 0..half {
        for block in (0..shape.size).step_by(2 * half) {
            let w = &w[4 * pair_of(shape, block, j)..][..4];
            let (a, b) = (x[block + j], x[block + j + half]);
            for t in 0..W {
                x[block + j][t] = w[0] * a[t] + w[1] * b[t];
                x[block + j + half][t] = w[2] * a[t] + w[3] * b[t];
            }
        }
    }
}

#[inline(always)]
fn real_factor_back<T: Real, const W: usize>(
    shape: &Shape,
    level: usize,
    w: &[T],
    x: &[[T; W]],
    d: &mut [[T; W]],
    g: &mut [T],
) {
    let half = 1 << level;
    for j in 0..half {
        let mut sums = [[T::zero(); W]; 4];
        for block in (0..shape.size).step_by(2 * half) {
            let w = &w[4 * pair_of(shape, block, j)..][..4];
            let (a, b) = (&x[block + j], &x[block + j + half]);
            let (da, db) = (d[block + j], d[block + j + half]);
            for t in 0..W {
                sums[0][t] += da[t] * a[t];
                sums[1][t] += da[t] * b[t];
                sums[2][t] += db[t] * a[t];
                sums[3][t] += db[t] * b[t];
                d[block + j][t] = w[0] * da[t] + w[2] * db[t];
                d[block + j + half][t] = w[1] * da[t] + w[3] * db[t];
            }
            add_sums(shape, level, (block, j), &mut sums, g);
        }
    }
}

#[inline(always)]
fn complex_factor<T: Real, const W: usize>(shape: &Shape, level: usize, w: &[T], x: &mut [[T; W]]) {
    let half = 1 << level;
    let (re, im) = x.split_at_mut(shape.size);
    for j in 0..half {
        for block in (0..shape.size).step_by(2 * half) {
            let w = &w[8 * pair_of(shape, block, j)..][..8];
            let (i, k) = (block + j, block + j + half);
            let (ar, ai, br, bi) = (re[i], im[i], re[k], im[k]);
            for t in 0..W {
                re[i][t] = w[0] * ar[t] - w[1] * ai[t] + w[2] * br[t] - w[3] * bi[t];
                im[i][t] = w[0] * ai[t] + w[1] * ar[t] + w[2] * bi[t] + w[3] * br[t];
                re[k][t] = w[4] * ar[t] - w[5] * ai[t] + w[6] * br[t] - w[7] * bi[t];
                im[k][t] = w[4] * ai[t] + w[5] * ar[t] + w[6] * bi[t] + w[7] * br[t];
            }
        }
    }
}

#[inline(always)]
fn complex_factor_back<T: Real, const W: usize>(
    shape: &Shape,
    level: usize,
    w: &[T],
    x: &[[T; W]],
    d: &mut [[T; W]],
    g: &mut [T],
) {
    let half = 1 << level;
    let (re, im) = x.split_at(shape.size);
    let (d_re, d_im) = d.split_at_mut(shape.size);
    for j in 0..half {
        let mut sums = [[T::zero(); W]; 8];
        for block in (0..shape.size).step_by(2 * half) {
            let w = &w[8 * pair_of(shape, block, j)..][..8];
            let (i, k) = (block + j, block + j + half);
            let (ar, ai, br, bi) = (&re[i], &im[i], &re[k], &im[k]);
            let (pr, pi, qr, qi) = (d_re[i], d_im[i], d_re[k], d_im[k]);
            for t in 0..W {
                // Of w z: the gradient times conj(z).
                sums[0][t] += pr[t] * ar[t] + pi[t] * ai[t];
                sums[1][t] += pi[t] * ar[t] - pr[t] * ai[t];
                sums[2][t] += pr[t] * br[t] + pi[t] * bi[t];
                sums[3][t] += pi[t] * br[t] - pr[t] * bi[t];
                sums[4][t] += qr[t] * ar[t] + qi[t] * ai[t];
                sums[5][t] += qi[t] * ar[t] - qr[t] * ai[t];
                sums[6][t] += qr[t] * br[t] + qi[t] * bi[t];
                sums[7][t] += qi[t] * br[t] - qr[t] * bi[t];
                d_re[i][t] = w[0] * pr[t] + w[1] * pi[t] + w[4] * qr[t] + w[5] * qi[t];
                d_im[i][t] = w[0] * pi[t] - w[1] * pr[t] + w[4] * qi[t] - w[5] * qr[t];
                d_re[k][t] = w[2] * pr[t] + w[3] * pi[t] + w[6] * qr[t] + w[7] * qi[t];
                d_im[k][t] = w[2] * pi[t] - w[3] * pr[t] + w[6] * qi[t] - w[7] * qr[t];
            }
            add_sums(shape, level, (block, j), &mut sums, g);
        }
    }
}
