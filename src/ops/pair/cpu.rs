//! Pair attention on a CPU, in f32: one task a sequence and head, matrix products tile by tile.

use super::{PairRope, PairShape, Partner};
use crate::error::{At, Result};
use crate::ops::gemm::{multiply_add, multiply_add_of_transposed, multiply_transposed, Strided};
use crate::ops::view::view;
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// Queries (rotated for either part), keys and values of one head of a sequence, each `[chunks * B][D]`.
struct Head {
    near: Vec<f32>,
    far: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Mean keys and values of the chunks `[chunks][D]`, where partners are read so.
    means: Option<(Vec<f32>, Vec<f32>)>,
}

/// What one head of a sequence reads and computes with.
#[derive(Clone, Copy)]
struct Task<'a> {
    shape: PairShape,
    partner: Partner,
    rope: &'a PairRope,
    scale: f32,
}

impl Task<'_> {
    fn rows(&self) -> usize {
        self.shape.chunks * self.shape.chunk
    }

    fn gather(&self, qkv: &[f32], sequence: usize, head: usize) -> Head {
        let (rows, dim, width) = (self.rows(), self.shape.dim, self.shape.width());
        let room = || vec![0f32; rows * dim];
        let mut h = Head { near: room(), far: room(), keys: room(), values: room(), means: None };
        for t in 0..rows {
            let row = &qkv[(sequence * rows + t) * 3 * width..][..3 * width];
            let part = |i: usize| &row[i * width + head * dim..][..dim];
            let (at, p) = (t * dim..(t + 1) * dim, t % self.shape.chunk);
            self.rope.rotate_into(part(0), p, &mut h.near[at.clone()]);
            self.rope.rotate_into(part(0), p + self.shape.chunk, &mut h.far[at.clone()]);
            self.rope.rotate_into(part(1), p, &mut h.keys[at.clone()]);
            h.values[at].copy_from_slice(part(2));
        }
        if self.partner.is_summary() {
            h.means = Some((self.means(&h.keys), self.means(&h.values)));
        }
        h
    }

    fn means(&self, x: &[f32]) -> Vec<f32> {
        let dim = self.shape.dim;
        x.chunks_exact(self.shape.chunk * dim).flat_map(|chunk| mean_row(chunk, dim)).collect()
    }

    /// The partner's keys and values of chunk `c`.
    fn partner<'h>(&self, h: &'h Head, c: usize) -> Option<(&'h [f32], &'h [f32])> {
        let partner = self.partner.of(c, self.shape.chunks)?;
        let (size, dim) = (self.shape.chunk * self.shape.dim, self.shape.dim);
        Some(match &h.means {
            Some((k, v)) => (&k[partner * dim..][..dim], &v[partner * dim..][..dim]),
            None => (&h.keys[partner * size..][..size], &h.values[partner * size..][..size]),
        })
    }

    /// Scaled scores of chunk `c`: `[B, B]` of the chunk itself, then `[B, keys]` of its partner.
    fn scores(&self, h: &Head, c: usize) -> (Vec<f32>, Vec<f32>) {
        let (chunk, dim) = (self.shape.chunk, self.shape.dim);
        let at = c * chunk * dim;
        let mut near = vec![0f32; chunk * chunk];
        multiply_transposed(chunk, chunk, dim, strided(&h.near[at..], dim), strided(&h.keys[at..], dim), &mut near);
        let mut far = vec![];
        if let Some((keys, _)) = self.partner(h, c) {
            far = vec![0f32; chunk * (keys.len() / dim)];
            multiply_transposed(chunk, keys.len() / dim, dim, strided(&h.far[at..], dim), strided(keys, dim), &mut far);
        }
        for s in near.iter_mut().chain(&mut far) {
            *s *= self.scale;
        }
        if self.partner.is_causal() {
            for i in 0..chunk {
                near[i * chunk + i + 1..(i + 1) * chunk].fill(f32::NEG_INFINITY);
            }
        }
        (near, far)
    }

    /// Output `[rows][D]` and log-sum-exp `[rows]`.
    fn forward(&self, h: &Head) -> (Vec<f32>, Vec<f32>) {
        let (chunk, dim) = (self.shape.chunk, self.shape.dim);
        let (mut out, mut lse) = (vec![0f32; self.rows() * dim], vec![0f32; self.rows()]);
        for c in 0..self.shape.chunks {
            let (mut near, mut far) = self.scores(h, c);
            let keys = far.len() / chunk;
            for i in 0..chunk {
                let (near, far) = (&mut near[i * chunk..(i + 1) * chunk], &mut far[i * keys..(i + 1) * keys]);
                let top = near.iter().chain(far.iter()).fold(f32::NEG_INFINITY, |m, s| m.max(*s));
                let mut sum = 0f32;
                for s in near.iter_mut().chain(far.iter_mut()) {
                    *s = (*s - top).exp();
                    sum += *s;
                }
                for s in near.iter_mut().chain(far.iter_mut()) {
                    *s /= sum;
                }
                lse[c * chunk + i] = top + sum.ln();
            }
            let at = c * chunk * dim;
            let own = &mut out[at..at + chunk * dim];
            multiply_add(chunk, dim, chunk, strided(&near, chunk), strided(&h.values[at..], dim), own);
            if let Some((_, values)) = self.partner(h, c) {
                multiply_add(chunk, dim, keys, strided(&far, keys), strided(values, dim), own);
            }
        }
        (out, lse)
    }

    /// Gradients of the rotated queries (near, far), the rotated keys and the values.
    fn backward(&self, h: &Head, out: &[f32], lse: &[f32], grad: &[f32]) -> Head {
        let (chunk, dim, rows) = (self.shape.chunk, self.shape.dim, self.rows());
        let room = || vec![0f32; rows * dim];
        let mut d = Head { near: room(), far: room(), keys: room(), values: room(), means: None };
        let mut means = h.means.as_ref().map(|(k, v)| (vec![0f32; k.len()], vec![0f32; v.len()]));
        for c in 0..self.shape.chunks {
            let at = c * chunk * dim..(c + 1) * chunk * dim;
            let grads = &grad[at.clone()];
            let dots: Vec<f32> = grads
                .chunks_exact(dim)
                .zip(out[at.clone()].chunks_exact(dim))
                .map(|(g, o)| g.iter().zip(o).map(|(g, o)| g * o).sum())
                .collect();
            let (near, far) = self.scores(h, c);
            // dS of one part, with its P in place of the scores.
            let part = |mut p: Vec<f32>, values: &[f32]| {
                let keys = p.len() / chunk;
                let mut ds = vec![0f32; p.len()];
                multiply_transposed(chunk, keys, dim, strided(grads, dim), strided(values, dim), &mut ds);
                for i in 0..chunk {
                    for (p, ds) in p[i * keys..(i + 1) * keys].iter_mut().zip(&mut ds[i * keys..(i + 1) * keys]) {
                        *p = (*p - lse[c * chunk + i]).exp();
                        *ds = *p * (*ds - dots[i]) * self.scale;
                    }
                }
                (p, ds, keys)
            };
            let (p, ds, _) = part(near, &h.values[at.clone()]);
            multiply_add(
                chunk,
                dim,
                chunk,
                strided(&ds, chunk),
                strided(&h.keys[at.clone()], dim),
                &mut d.near[at.clone()],
            );
            let (dk, dv) = (&mut d.keys[at.clone()], &mut d.values[at.clone()]);
            multiply_add_of_transposed(chunk, dim, chunk, strided(&ds, chunk), strided(&h.near[at.clone()], dim), dk);
            multiply_add_of_transposed(chunk, dim, chunk, strided(&p, chunk), strided(grads, dim), dv);
            let Some(partner) = self.partner.of(c, self.shape.chunks) else { continue };
            let Some((keys, values)) = self.partner(h, c) else { continue };
            let (p, ds, count) = part(far, values);
            multiply_add(chunk, dim, count, strided(&ds, count), strided(keys, dim), &mut d.far[at.clone()]);
            let size = count * dim;
            let (dk, dv) = match &mut means {
                Some((k, v)) => (&mut k[partner * size..][..size], &mut v[partner * size..][..size]),
                None => (&mut d.keys[partner * size..][..size], &mut d.values[partner * size..][..size]),
            };
            multiply_add_of_transposed(count, dim, chunk, strided(&ds, count), strided(&h.far[at.clone()], dim), dk);
            multiply_add_of_transposed(count, dim, chunk, strided(&p, count), strided(grads, dim), dv);
        }
        if let Some((k, v)) = means {
            for (to, from) in [(&mut d.keys, k), (&mut d.values, v)] {
                for (rows, mean) in to.chunks_exact_mut(chunk * dim).zip(from.chunks_exact(dim)) {
                    for row in rows.chunks_exact_mut(dim) {
                        row.iter_mut().zip(mean).for_each(|(x, m)| *x += m / chunk as f32);
                    }
                }
            }
        }
        d
    }

    /// Adds the gradients of one head to rows of `[rows][3 width]`.
    fn scatter(&self, d: &Head, head: usize, to: &mut [f32]) {
        let (dim, width) = (self.shape.dim, self.shape.width());
        for (t, row) in to.chunks_exact_mut(3 * width).enumerate() {
            let (at, p) = (t * dim..(t + 1) * dim, t % self.shape.chunk);
            let [q, k, v] = [0, 1, 2].map(|i| i * width + head * dim);
            self.rope.add_rotated_back(&d.near[at.clone()], p, &mut row[q..q + dim]);
            self.rope.add_rotated_back(&d.far[at.clone()], p + self.shape.chunk, &mut row[q..q + dim]);
            self.rope.add_rotated_back(&d.keys[at.clone()], p, &mut row[k..k + dim]);
            row[v..v + dim].copy_from_slice(&d.values[at]);
        }
    }
}

fn strided(data: &[f32], stride: usize) -> Strided<'_> {
    Strided { data, stride }
}

/// The mean of the rows `[n][dim]`.
pub fn mean_row(rows: &[f32], dim: usize) -> Vec<f32> {
    let mut mean = vec![0f32; dim];
    for row in rows.chunks_exact(dim) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
    }
    let count = (rows.len() / dim) as f32;
    mean.iter_mut().for_each(|m| *m /= count);
    mean
}

fn task(shape: PairShape, partner: Partner, rope: &PairRope) -> Task<'_> {
    Task { shape, partner, rope, scale: 1.0 / (shape.dim as f32).sqrt() }
}

/// Columns of one head of `[rows][width]`, of the rows of one sequence.
fn columns(x: &[f32], task: &Task, sequence: usize, head: usize) -> Vec<f32> {
    let (rows, dim, width) = (task.rows(), task.shape.dim, task.shape.width());
    (0..rows).flat_map(|t| &x[(sequence * rows + t) * width + head * dim..][..dim]).copied().collect()
}

pub(super) fn forward(qkv: &Tensor, shape: PairShape, partner: Partner, rope: &PairRope) -> Result<(Tensor, Tensor)> {
    let (qkv, task) = (view(qkv, "queries, keys and values")?, task(shape, partner, rope));
    let qkv = qkv.values::<f32>()?;
    let (rows, width, dim, heads) = (task.rows(), shape.width(), shape.dim, shape.heads);
    let heads_of: Vec<_> = (0..shape.batch * heads)
        .into_par_iter()
        .map(|i| task.forward(&task.gather(qkv, i / heads, i % heads)))
        .collect();
    let (mut out, mut lse) = (vec![0f32; shape.rows() * width], vec![0f32; shape.rows() * heads]);
    for (i, (o, l)) in heads_of.iter().enumerate() {
        for t in 0..rows {
            let row = i / heads * rows + t;
            out[row * width + i % heads * dim..][..dim].copy_from_slice(&o[t * dim..(t + 1) * dim]);
            lse[row * heads + i % heads] = l[t];
        }
    }
    let out = Tensor::from_vec(out, (shape.rows(), width), &Device::Cpu).at("pair attention")?;
    Ok((out, Tensor::from_vec(lse, (shape.rows(), heads), &Device::Cpu).at("pair attention")?))
}

pub(super) fn backward(
    qkv: &Tensor,
    (out, lse): (&Tensor, &Tensor),
    grad: &Tensor,
    shape: PairShape,
    partner: Partner,
    rope: &PairRope,
) -> Result<Tensor> {
    let (qkv, out, lse) = (view(qkv, "queries, keys and values")?, view(out, "output")?, view(lse, "log-sum-exp")?);
    let (grad, task) = (view(grad, "gradient")?, task(shape, partner, rope));
    let (qkv, out, lse, grad) = (qkv.values::<f32>()?, out.values()?, lse.values::<f32>()?, grad.values()?);
    let (rows, width, heads) = (task.rows(), shape.width(), shape.heads);
    let all: Vec<Head> = (0..shape.batch * heads)
        .into_par_iter()
        .map(|i| {
            let (sequence, head) = (i / heads, i % heads);
            let own: Vec<f32> = (0..rows).map(|t| lse[(sequence * rows + t) * heads + head]).collect();
            let (out, grad) = (columns(out, &task, sequence, head), columns(grad, &task, sequence, head));
            task.backward(&task.gather(qkv, sequence, head), &out, &own, &grad)
        })
        .collect();
    let mut d = vec![0f32; shape.rows() * 3 * width];
    d.par_chunks_mut(rows * 3 * width).enumerate().for_each(|(sequence, to)| {
        for head in 0..heads {
            task.scatter(&all[sequence * heads + head], head, to);
        }
    });
    Tensor::from_vec(d, (shape.rows(), 3 * width), &Device::Cpu).at("gradient of pair attention")
}

/// One query of a stream: `q [D]` not rotated, at position `p` of its chunk; `near` and `far` are keys (rotated) and values
/// `[n][D]` of its own chunk up to itself and of its partner. Adds the result to `out [D]`.
pub fn decode(q: &[f32], p: usize, near: (&[f32], &[f32]), far: (&[f32], &[f32]), rope: &PairRope, out: &mut [f32]) {
    let dim = q.len();
    let scale = 1.0 / (dim as f32).sqrt();
    let mut rotated = vec![0f32; dim];
    let mut scores = Vec::with_capacity((near.0.len() + far.0.len()) / dim);
    for ((keys, _), p) in [(near, p), (far, p + rope.chunk())] {
        rope.rotate_into(q, p, &mut rotated);
        scores.extend(keys.chunks_exact(dim).map(|k| k.iter().zip(&rotated).map(|(k, q)| k * q).sum::<f32>() * scale));
    }
    let top = scores.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
    scores.iter_mut().for_each(|s| *s = (*s - top).exp());
    let sum: f32 = scores.iter().sum();
    for (s, v) in scores.iter().zip(near.1.chunks_exact(dim).chain(far.1.chunks_exact(dim))) {
        out.iter_mut().zip(v).for_each(|(o, v)| *o += s / sum * v);
    }
}
