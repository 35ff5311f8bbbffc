//! Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464): a linear recurrence with a matrix of state for each value head.
//!
//! For position `t`, channel `c`, value head `h` with key head `⌊h K / V⌋`:
//!
//! ```text
//! u_tc = silu(Σ_j w_cj x_{t-n+1+j, c})        causal convolution over n positions; queries, keys and values
//! q = q / √(Σ q² + 1e-6) / √D_k,  k = k / √(Σ k² + 1e-6)
//! β = σ(b_th),  g = exp(a_h softplus(d_th + δ_h)),  a_h < 0
//! S ← g S;  S ← S + k ⊗ β (v - Sᵀ k);  o = Sᵀ q
//! y = o / √(mean(o²) + ε) · w · silu(z)
//! ```

use super::view::view;
use crate::error::{Error, ErrorKind, Result};
use crate::spec::DeltaSpec;
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// Added to the squared length of a query or key.
const L2_EPS: f32 = 1e-6;

/// Inputs of a chunk of `T` positions.
pub struct DeltaArgs<'a> {
    /// Shape of the layer.
    pub spec: DeltaSpec,
    /// Queries, keys and values before the convolution, `[T, C]`.
    pub qkv: &'a Tensor,
    /// Gate of the output, `[T, V D_v]`.
    pub z: &'a Tensor,
    /// `b`, `[T, V]`.
    pub beta: &'a Tensor,
    /// `d`, `[T, V]`.
    pub decay: &'a Tensor,
    /// Weights of the convolution, f32 `[C n]`.
    pub conv: &'a Tensor,
    /// `a`, f32 `[V]`.
    pub rate: &'a Tensor,
    /// `δ`, f32 `[V]`.
    pub decay_bias: &'a Tensor,
    /// Weight of the norm of the output's heads, f32 `[D_v]`, and its epsilon.
    pub norm: (&'a Tensor, f32),
}

/// State of a layer on a CPU, f32.
#[derive(Debug, Clone, PartialEq)]
pub struct DeltaState {
    /// Inputs of the convolution at the last `n - 1` positions, `[n - 1, C]`.
    tail: Vec<f32>,
    /// `S` of each value head, `[V, D_k, D_v]`.
    heads: Vec<f32>,
}

impl DeltaState {
    /// The state before the first position: zeros.
    pub fn new(spec: &DeltaSpec) -> Self {
        let heads = spec.value_heads * spec.key_dim * spec.value_dim;
        Self { tail: vec![0.0; (spec.kernel - 1) * spec.channels()], heads: vec![0.0; heads] }
    }

    /// Bytes of the state.
    pub fn bytes(&self) -> u64 {
        4 * (self.tail.len() + self.heads.len()) as u64
    }
}

/// Output of a chunk, f32 `[T, V D_v]`; the state moves on by the chunk.
///
/// # Errors
/// A tensor of another shape, type or device.
pub fn delta(args: &DeltaArgs, state: &mut DeltaState) -> Result<Tensor> {
    let s = &args.spec;
    let tokens = args.qkv.dim(0)?;
    let shapes =
        [(args.qkv, s.channels()), (args.z, s.value_width()), (args.beta, s.value_heads), (args.decay, s.value_heads)];
    if shapes.iter().any(|(x, n)| x.dims() != [tokens, *n]) {
        return Err(Error::new(ErrorKind::Backend, "delta rule", "inputs of another shape than the layer's"));
    }
    let (qkv, z) = (view(args.qkv, "queries, keys and values")?, view(args.z, "gate")?);
    let (beta, decay) = (view(args.beta, "step")?, view(args.decay, "decay")?);
    let (conv, rate, bias) =
        (view(args.conv, "convolution")?, view(args.rate, "rate")?, view(args.decay_bias, "bias")?);
    let weight = view(args.norm.0, "norm")?;
    let u = convolve(s, qkv.values()?, conv.values()?, &mut state.tail);
    let (qk, v) = (2 * s.key_width(), 2 * s.key_width());
    let unit = unit_heads(s, &u, tokens);
    let (z, beta, decay) = (z.values::<f32>()?, beta.values::<f32>()?, decay.values::<f32>()?);
    let (rate, bias, weight) = (rate.values::<f32>()?, bias.values::<f32>()?, weight.values::<f32>()?);
    let (group, dv) = (s.value_heads / s.key_heads, s.value_dim);
    let heads: Vec<Vec<f32>> = state
        .heads
        .par_chunks_mut(s.key_dim * dv)
        .enumerate()
        .map(|(h, own)| {
            let mut out = vec![0f32; tokens * dv];
            let mut step = vec![0f32; dv];
            for (t, o) in out.chunks_exact_mut(dv).enumerate() {
                let at = t * qk + h / group * s.key_dim;
                let (q, k) = (&unit[at..][..s.key_dim], &unit[at + s.key_width()..][..s.key_dim]);
                let v = &u[t * s.channels() + v + h * dv..][..dv];
                let strength = sigmoid(beta[t * s.value_heads + h]);
                let kept = (rate[h] * softplus(decay[t * s.value_heads + h] + bias[h])).exp();
                recur(own, (q, k, v), (kept, strength), &mut step, o);
                gated_norm(o, &z[t * s.value_width() + h * dv..][..dv], weight, args.norm.1);
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
            let at = t + j;
            let input = if at < n - 1 { &before[at * c..][..c] } else { &x[(at + 1 - n) * c..][..c] };
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
