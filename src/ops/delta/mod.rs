//! Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464): a linear recurrence with a matrix of state for each value head.
//!
//! For position `t`, channel `c`, value head `h` with key head `⌊h K / V⌋`, or `h mod K` where a file stores them so:
//!
//! ```text
//! u_tc = silu(Σ_j w_cj x_{t-n+1+j, c})        causal convolution over n positions; queries, keys and values
//! q = q / √(Σ q² + 1e-6) / √D_k,  k = k / √(Σ k² + 1e-6)
//! β = σ(b_th),  g = exp(a_h softplus(d_th + δ_h)),  a_h < 0
//! S ← g S;  S ← S + k ⊗ β (v - Sᵀ k);  o = Sᵀ q
//! y = o / √(mean(o²) + ε) · w · silu(z)
//! ```

#[cfg(feature = "cuda")]
mod chunks;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use super::gemm::{multiply_add, multiply_add_of_transposed, multiply_transposed, Strided};
use super::view::view;
use crate::error::{Error, ErrorKind, Result};
use crate::spec::DeltaSpec;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// Added to the squared length of a query or key.
const L2_EPS: f32 = 1e-6;

/// Shape and parameters of a layer.
#[derive(Debug, Clone, Copy)]
pub struct DeltaLayer<'a> {
    /// Shape of the layer.
    pub spec: DeltaSpec,
    /// Weights of the convolution, f32 `[C n]`.
    pub conv: &'a Tensor,
    /// `a`, f32 `[V]`.
    pub rate: &'a Tensor,
    /// `δ`, f32 `[V]`.
    pub decay_bias: &'a Tensor,
    /// Weight of the norm of the output's heads, f32 `[D_v]`, and its epsilon.
    pub norm: (&'a Tensor, f32),
    /// Whether value head `h` has key head `h mod K`.
    pub tiled: bool,
}

/// Inputs of a chunk of `T` positions.
pub struct DeltaArgs<'a> {
    /// The layer.
    pub layer: DeltaLayer<'a>,
    /// Queries, keys and values before the convolution, `[T, C]`.
    pub qkv: &'a Tensor,
    /// Gate of the output, `[T, V D_v]`.
    pub z: &'a Tensor,
    /// `b`, `[T, V]`.
    pub beta: &'a Tensor,
    /// `d`, `[T, V]`.
    pub decay: &'a Tensor,
    /// Position of the first row.
    pub start: usize,
}

impl DeltaArgs<'_> {
    /// Checks the inputs' shapes, and returns the number of positions.
    pub(crate) fn check(&self) -> Result<usize> {
        let (s, tokens) = (&self.layer.spec, self.qkv.dim(0)?);
        let shapes = [
            (self.qkv, s.channels()),
            (self.z, s.value_width()),
            (self.beta, s.value_heads),
            (self.decay, s.value_heads),
        ];
        if shapes.iter().any(|(x, n)| x.dims() != [tokens, *n]) {
            return Err(Error::new(ErrorKind::Backend, "delta rule", "inputs of another shape than the layer's"));
        }
        Ok(tokens)
    }
}

/// State of a layer on a CPU, f32.
#[derive(Debug, Clone, PartialEq)]
pub struct DeltaState {
    /// Inputs of the convolution at the last `n` positions, `[n, C]`: one more than it reads, as on a GPU.
    tail: Vec<f32>,
    /// `S` of each value head, `[V, D_k, D_v]`.
    heads: Vec<f32>,
}

impl DeltaState {
    /// The state before the first position: zeros.
    pub fn new(spec: &DeltaSpec) -> Self {
        let heads = spec.value_heads * spec.key_dim * spec.value_dim;
        Self { tail: vec![0.0; spec.kernel * spec.channels()], heads: vec![0.0; heads] }
    }
}

/// Device memory that a chunk takes besides its inputs and outputs, in bytes: in all, and for each position.
pub(crate) fn scratch(spec: &DeltaSpec, dtype: DType, device: &Device) -> (u64, u64) {
    #[cfg(feature = "cuda")]
    if device.is_cuda() && dtype != DType::F32 && chunks::fits(spec) {
        return (chunks::scratch(spec), 0);
    }
    let _ = (dtype, device);
    // The convolution's output, unit queries and keys, the output by heads.
    (0, 4 * (spec.channels() + 2 * spec.key_width() + spec.value_width()) as u64)
}

/// Positions that are computed at once.
const PIECE: usize = 64;
/// Fewest positions for which products of matrices are faster than steps.
const LEAST: usize = 8;

/// Output of a chunk, f32 `[T, V D_v]`; the state moves on by the chunk.
///
/// Pieces of 64 positions are computed as products of matrices. With `G_t = Σ_{i ≤ t} ln g_i` in a piece and the state `S`
/// before it, the updates `u_t` solve a triangular system (the WY form, Yang et al. 2024, arXiv:2406.06484):
///
/// ```text
/// u_t = β_t (v_t - e^{G_t} Sᵀ k_t - Σ_{i < t} e^{G_t - G_i} (k_i · k_t) u_i)
/// o_t = e^{G_t} Sᵀ q_t + Σ_{i ≤ t} e^{G_t - G_i} (k_i · q_t) u_i
/// S  ← e^{G_n} S + Σ_i e^{G_n - G_i} k_i ⊗ u_i
/// ```
///
/// # Errors
/// A tensor of another shape, type or device.
pub fn delta(args: &DeltaArgs, state: &mut DeltaState) -> Result<Tensor> {
    run(args, state, LEAST)
}

/// The recurrence position by position, the definition that [`delta`] is checked against.
///
/// # Errors
/// As of [`delta`].
pub fn delta_reference(args: &DeltaArgs, state: &mut DeltaState) -> Result<Tensor> {
    run(args, state, usize::MAX)
}

/// Computes pieces of `least` positions or more as products, fewer step by step.
fn run(args: &DeltaArgs, state: &mut DeltaState, least: usize) -> Result<Tensor> {
    let (tokens, layer) = (args.check()?, &args.layer);
    let s = &layer.spec;
    let (qkv, z) = (view(args.qkv, "queries, keys and values")?, view(args.z, "gate")?);
    let (beta, decay) = (view(args.beta, "step")?, view(args.decay, "decay")?);
    let (conv, rate, bias) =
        (view(layer.conv, "convolution")?, view(layer.rate, "rate")?, view(layer.decay_bias, "bias")?);
    let weight = view(layer.norm.0, "norm")?;
    let u = convolve(s, qkv.values()?, conv.values()?, &mut state.tail);
    let unit = unit_heads(s, &u, tokens);
    let (z, beta, decay) = (z.values::<f32>()?, beta.values::<f32>()?, decay.values::<f32>()?);
    let (rate, bias, weight) = (rate.values::<f32>()?, bias.values::<f32>()?, weight.values::<f32>()?);
    let (group, dk, dv) = (s.value_heads / s.key_heads, s.key_dim, s.value_dim);
    let heads: Vec<Vec<f32>> = state
        .heads
        .par_chunks_mut(dk * dv)
        .enumerate()
        .map(|(h, own)| {
            let mut out = vec![0f32; tokens * dv];
            let mut room = Room::default();
            for start in (0..tokens).step_by(PIECE) {
                let n = PIECE.min(tokens - start);
                let key_head = if layer.tiled { h % s.key_heads } else { h / group };
                let at = start * 2 * s.key_width() + key_head * dk;
                let piece = Piece {
                    q: Strided { data: &unit[at..], stride: 2 * s.key_width() },
                    k: Strided { data: &unit[at + s.key_width()..], stride: 2 * s.key_width() },
                    v: Strided { data: &u[start * s.channels() + 2 * s.key_width() + h * dv..], stride: s.channels() },
                };
                let of = |t: usize| (start + t) * s.value_heads + h;
                let beta: Vec<f32> = (0..n).map(|t| sigmoid(beta[of(t)])).collect();
                let logs: Vec<f32> = (0..n).map(|t| rate[h] * softplus(decay[of(t)] + bias[h])).collect();
                let o = &mut out[start * dv..][..n * dv];
                match n < least {
                    true => piece.steps(own, (dk, dv), (&logs, &beta), o),
                    false => piece.products(own, (dk, dv), (&logs, &beta), &mut room, o),
                }
            }
            for (t, o) in out.chunks_exact_mut(dv).enumerate() {
                gated_norm(o, &z[t * s.value_width() + h * dv..][..dv], weight, layer.norm.1);
            }
            out
        })
        .collect();
    let mut y = vec![0f32; tokens * s.value_width()];
    y.par_chunks_mut(s.value_width()).enumerate().for_each(|(t, row)| {
        row.chunks_exact_mut(dv).zip(&heads).for_each(|(to, head)| to.copy_from_slice(&head[t * dv..][..dv]));
    });
    Ok(Tensor::from_vec(y, (tokens, s.value_width()), &Device::Cpu)?)
}

/// Room for a piece's products.
#[derive(Default)]
struct Room {
    u: Vec<f32>,
    products: Vec<f32>,
    keys: Vec<f32>,
}

/// Queries, keys and values of consecutive positions of one value head.
struct Piece<'a> {
    q: Strided<'a>,
    k: Strided<'a>,
    v: Strided<'a>,
}

impl Piece<'_> {
    /// Step by step; `logs` are `ln g`, `o` is `[n, D_v]`.
    fn steps(&self, state: &mut [f32], (dk, dv): (usize, usize), (logs, beta): (&[f32], &[f32]), o: &mut [f32]) {
        let mut room = vec![0f32; dv];
        for (t, o) in o.chunks_exact_mut(dv).enumerate() {
            let (q, k, v) = (self.q.row(t, dk), self.k.row(t, dk), self.v.row(t, dv));
            recur(state, (q, k, v), (logs[t].exp(), beta[t]), &mut room, o);
        }
    }

    /// As products of matrices; see [`delta`].
    fn products(
        &self,
        state: &mut [f32],
        (dk, dv): (usize, usize),
        (logs, beta): (&[f32], &[f32]),
        room: &mut Room,
        o: &mut [f32],
    ) {
        let n = logs.len();
        let sums: Vec<f32> = logs.iter().scan(0f32, |sum, l| Some(std::mem::replace(sum, *sum + l) + l)).collect();
        let Room { u, products, keys } = room;
        u.clear();
        u.resize(n * dv, 0.0);
        multiply_add(n, dv, dk, self.k, rows_of(state, dv), u);
        products.resize(n * n, 0.0);
        multiply_transposed(n, n, dk, self.k, self.k, &mut products[..n * n]);
        for t in 0..n {
            let (earlier, own) = u.split_at_mut(t * dv);
            let own = &mut own[..dv];
            let kept = sums[t].exp();
            own.iter_mut().zip(self.v.row(t, dv)).for_each(|(u, v)| *u = beta[t] * (v - kept * *u));
            for (i, row) in earlier.chunks_exact(dv).enumerate() {
                let factor = -beta[t] * (sums[t] - sums[i]).exp() * products[t * n + i];
                own.iter_mut().zip(row).for_each(|(u, x)| *u += factor * x);
            }
        }
        o.fill(0.0);
        multiply_add(n, dv, dk, self.q, rows_of(state, dv), o);
        for (o, sum) in o.chunks_exact_mut(dv).zip(&sums) {
            let kept = sum.exp();
            o.iter_mut().for_each(|o| *o *= kept);
        }
        multiply_transposed(n, n, dk, self.q, self.k, &mut products[..n * n]);
        for (t, row) in products[..n * n].chunks_exact_mut(n).enumerate() {
            for (i, p) in row.iter_mut().enumerate() {
                *p = if i <= t { *p * (sums[t] - sums[i]).exp() } else { 0.0 };
            }
        }
        multiply_add(n, dv, n, Strided { data: products, stride: n }, rows_of(u, dv), o);
        let last = sums[n - 1];
        keys.clear();
        for (t, sum) in sums.iter().enumerate() {
            let factor = (last - sum).exp();
            keys.extend(self.k.row(t, dk).iter().map(|k| k * factor));
        }
        let kept = last.exp();
        state.iter_mut().for_each(|s| *s *= kept);
        multiply_add_of_transposed(dk, dv, n, Strided { data: keys, stride: dk }, rows_of(u, dv), state);
    }
}

/// Rows of `width` numbers, one after the other.
fn rows_of(data: &[f32], width: usize) -> Strided<'_> {
    Strided { data, stride: width }
}

/// One step of the recurrence; `step` is room for `D_v` numbers.
fn recur(
    state: &mut [f32],
    (q, k, v): (&[f32], &[f32], &[f32]),
    (kept, strength): (f32, f32),
    step: &mut [f32],
    o: &mut [f32],
) {
    let dv = v.len();
    step.fill(0.0);
    for (row, k) in state.chunks_exact_mut(dv).zip(k) {
        for (s, m) in row.iter_mut().zip(step.iter_mut()) {
            *s *= kept;
            *m += *s * k;
        }
    }
    step.iter_mut().zip(v).for_each(|(m, v)| *m = (v - *m) * strength);
    o.fill(0.0);
    for ((row, k), q) in state.chunks_exact_mut(dv).zip(k).zip(q) {
        for ((s, d), o) in row.iter_mut().zip(step.iter()).zip(o.iter_mut()) {
            *s += k * d;
            *o += *s * q;
        }
    }
}

/// Normalises a head of the output and multiplies it by its gate.
fn gated_norm(o: &mut [f32], z: &[f32], weight: &[f32], eps: f32) {
    let square = o.iter().map(|x| x * x).sum::<f32>() / o.len() as f32;
    let r = 1.0 / (square + eps).sqrt();
    o.iter_mut().zip(z).zip(weight).for_each(|((o, z), w)| *o = *o * r * w * silu(*z));
}

/// The convolution with its activation, `[T, C]`; `tail` becomes the last inputs.
fn convolve(s: &DeltaSpec, x: &[f32], weights: &[f32], tail: &mut Vec<f32>) -> Vec<f32> {
    let (c, n) = (s.channels(), s.kernel);
    let before = std::mem::take(tail);
    let mut u = vec![0f32; x.len()];
    u.par_chunks_mut(c).enumerate().for_each(|(t, row)| {
        for j in 0..n {
            // Position t - n + 1 + j, counted from the first in `before`.
            let at = t + j + 1;
            let input = if at < n { &before[at * c..][..c] } else { &x[(at - n) * c..][..c] };
            row.iter_mut().zip(input).enumerate().for_each(|(i, (u, x))| *u += weights[i * n + j] * x);
        }
        row.iter_mut().for_each(|u| *u = silu(*u));
    });
    let all = before.len() + x.len();
    tail.extend((all - before.len()..all).map(|i| if i < before.len() { before[i] } else { x[i - before.len()] }));
    u
}

/// Queries and keys of length 1, queries also divided by `√D_k`: `[T, 2 K D_k]`.
fn unit_heads(s: &DeltaSpec, u: &[f32], tokens: usize) -> Vec<f32> {
    let width = 2 * s.key_width();
    let mut unit = vec![0f32; tokens * width];
    unit.par_chunks_mut(width).zip(u.par_chunks(s.channels())).for_each(|(to, from)| {
        for (h, (to, from)) in to.chunks_exact_mut(s.key_dim).zip(from.chunks_exact(s.key_dim)).enumerate() {
            let scale = if h < s.key_heads { 1.0 / (s.key_dim as f32).sqrt() } else { 1.0 };
            let r = scale / (from.iter().map(|x| x * x).sum::<f32>() + L2_EPS).sqrt();
            to.iter_mut().zip(from).for_each(|(to, x)| *to = x * r);
        }
    });
    unit
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

fn softplus(x: f32) -> f32 {
    if x > 20.0 {
        x
    } else {
        x.exp().ln_1p()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{rngs::StdRng, Rng, SeedableRng};

    /// Inputs of `tokens` positions: queries, keys and values, gate, step, decay.
    fn inputs(spec: &DeltaSpec, tokens: usize, rng: &mut StdRng) -> Result<[Tensor; 4]> {
        let mut random = |width: usize| -> Result<Tensor> {
            let values: Vec<f32> = (0..tokens * width).map(|_| rng.random_range(-2.0..2.0)).collect();
            Ok(Tensor::from_vec(values, (tokens, width), &Device::Cpu)?)
        };
        Ok([
            random(spec.channels())?,
            random(spec.value_width())?,
            random(spec.value_heads)?,
            random(spec.value_heads)?,
        ])
    }

    #[test]
    fn products_give_what_steps_give_in_any_cut() -> Result<()> {
        let mut rng = StdRng::seed_from_u64(1);
        for (key_heads, group, key_dim, value_dim, kernel) in
            [(1, 1, 16, 16, 4), (2, 3, 8, 24, 4), (4, 2, 128, 128, 4), (1, 2, 32, 16, 2), (3, 1, 5, 7, 3)]
        {
            let spec = DeltaSpec { key_heads, value_heads: key_heads * group, key_dim, value_dim, kernel };
            let mut vector = |n: usize, range: std::ops::Range<f32>| -> Result<Tensor> {
                Ok(Tensor::from_vec(
                    (0..n).map(|_| rng.random_range(range.clone())).collect::<Vec<f32>>(),
                    n,
                    &Device::Cpu,
                )?)
            };
            let conv = vector(spec.channels() * kernel, -0.7..0.7)?;
            // From decays of a thousandth a position to those that forget within one.
            let (rate, bias) = (vector(spec.value_heads, -8.0..-0.001)?, vector(spec.value_heads, -4.0..1.0)?);
            let weight = vector(value_dim, 0.5..1.5)?;
            let tokens = rng.random_range(150..300);
            let all = inputs(&spec, tokens, &mut rng)?;
            let layer = DeltaLayer {
                spec,
                conv: &conv,
                rate: &rate,
                decay_bias: &bias,
                norm: (&weight, 1e-6),
                tiled: group == 3,
            };
            let run = |cuts: &[usize], exact: bool| -> Result<(Vec<f32>, DeltaState)> {
                let (mut state, mut out, mut start) = (DeltaState::new(&spec), vec![], 0);
                for n in cuts.iter().copied().chain([tokens - cuts.iter().sum::<usize>()]) {
                    let part =
                        all.iter().map(|x| Ok(x.narrow(0, start, n)?.contiguous()?)).collect::<Result<Vec<_>>>()?;
                    let args = DeltaArgs { layer, qkv: &part[0], z: &part[1], beta: &part[2], decay: &part[3], start };
                    let y = if exact { delta_reference(&args, &mut state)? } else { delta(&args, &mut state)? };
                    out.extend(y.flatten_all()?.to_vec1::<f32>()?);
                    start += n;
                }
                Ok((out, state))
            };
            let (want, end) = run(&[], true)?;
            for cuts in [&[][..], &[1], &[63, 2], &[64, 64], &[3, 1, 1, 70, 9]] {
                let (got, state) = run(cuts, false)?;
                let apart = |a: &[f32], b: &[f32]| {
                    let most = b.iter().fold(1f32, |m, x| m.max(x.abs()));
                    a.iter().zip(b).fold(0f32, |m, (x, y)| m.max((x - y).abs())) / most
                };
                let off = (apart(&got, &want), apart(&state.heads, &end.heads));
                assert!(off.0 < 2e-5 && off.1 < 2e-5, "{spec:?} cut at {cuts:?}: {off:?}");
                assert_eq!(state.tail, end.tail);
            }
        }
        Ok(())
    }
}
