//! Streaming: one character at a time, with keys and values in rings that are allocated once. A prompt is read in whole
//! chunks by the forward pass, which fills the rings.

use super::config::CharConfig;
use super::model::{CharModel, LayerWeights, Weights};
use super::projection::row;
use crate::error::{Error, ErrorKind, Result};
use crate::ops::pair::{decode, mean_row, Partner};
use crate::ops::{human_bytes, view, View};
use candle_core::{Storage, Tensor};
use std::ops::Deref;

/// Symbols that a prompt's first forward pass reads, at most; the rest are read one by one.
const PIECE: usize = 1 << 16;

/// Keys and values of one layer, `[rows][H D]`: rows of raw chunks, then mean rows.
struct Ring {
    partner: Partner,
    keys: Vec<f32>,
    values: Vec<f32>,
    mean_keys: Vec<f32>,
    mean_values: Vec<f32>,
}

/// A text that is read character by character.
pub trait Streaming {
    /// Reads symbols; returns the logits of the next, or `None` where there are none to read.
    ///
    /// At the start of a text whole chunks are read at once, 64k symbols at most on a CPU, 1M on a GPU.
    ///
    /// # Errors
    /// A backend's failure.
    fn read_all(&mut self, symbols: &[u8]) -> Result<Option<Vec<f32>>> {
        let (chunk, most) = self.at_once();
        // The last symbol is read by itself: its logits are asked for.
        let whole = if self.position() == 0 { symbols.len().saturating_sub(1).min(most) / chunk * chunk } else { 0 };
        if whole > 0 {
            self.read_chunks(&symbols[..whole])?;
        }
        let mut logits = None;
        for symbol in &symbols[whole..] {
            logits = Some(self.read(*symbol)?);
        }
        Ok(logits)
    }

    /// Symbols of a chunk, and those that [`Streaming::read_chunks`] takes, at most.
    fn at_once(&self) -> (usize, usize);

    /// Reads whole chunks at the start of a text by the forward pass, which fills the rings.
    ///
    /// # Errors
    /// A backend's failure.
    fn read_chunks(&mut self, symbols: &[u8]) -> Result<()>;

    /// Reads one symbol; returns the logits of the next.
    ///
    /// # Errors
    /// A backend's failure.
    fn read(&mut self, symbol: u8) -> Result<Vec<f32>>;

    /// Characters read.
    fn position(&self) -> usize;

    /// Bytes of keys and values, which do not depend on how much was read.
    fn bytes(&self) -> u64;
}

/// A text being read on a CPU; see the module.
pub struct Stream<'a> {
    model: &'a CharModel,
    weights: Weights,
    layers: Vec<LayerWeights>,
    embedding: Tensor,
    final_weight: Tensor,
    rings: Vec<Ring>,
    position: usize,
}

impl<'a> Stream<'a> {
    /// An empty text.
    ///
    /// # Errors
    /// Weights of another length, or a model that reads later characters.
    pub fn new(model: &'a CharModel, weights: &Tensor) -> Result<Self> {
        let config = model.config();
        let (width, chunk) = (config.num_attention_heads * config.head_dim, config.chunk);
        let ring = |partner| {
            let (raw, means) = match partner {
                Partner::Shift(distance) => ((distance + 1) * chunk, 0),
                Partner::Summary(distance) => (chunk, distance),
                Partner::Xor(_) => {
                    return Err(Error::unsupported("pairing", "xor reads later characters: it has no stream"))
                }
            };
            let room = |rows: usize| zeros(rows * width, config.stream_bytes(4));
            Ok(Ring {
                partner,
                keys: room(raw)?,
                values: room(raw)?,
                mean_keys: room(means)?,
                mean_values: room(means)?,
            })
        };
        let weights = Weights::new(weights)?;
        Ok(Self {
            rings: config.layers().into_iter().map(ring).collect::<Result<_>>()?,
            layers: (0..config.num_layers()).map(|i| model.layer_weights(&weights, i)).collect::<Result<_>>()?,
            embedding: model.embedding(&weights)?,
            final_weight: model.final_weight(&weights)?,
            weights,
            model,
            position: 0,
        })
    }
}

impl Streaming for Stream<'_> {
    fn position(&self) -> usize {
        self.position
    }

    fn bytes(&self) -> u64 {
        let elements = |r: &Ring| r.keys.len() + r.values.len() + r.mean_keys.len() + r.mean_values.len();
        self.rings.iter().map(|r| elements(r) as u64 * 4).sum()
    }

    fn at_once(&self) -> (usize, usize) {
        (self.model.config().chunk, PIECE)
    }

    fn read_chunks(&mut self, symbols: &[u8]) -> Result<()> {
        let wide: Vec<u32> = symbols.iter().map(|s| u32::from(*s)).collect();
        let (model, rings, chunks) = (self.model, &mut self.rings, symbols.len() / self.model.config().chunk);
        model.forward(&self.weights, &wide, 1, |layer, qkv| rings[layer].fill(qkv, chunks, model))?;
        self.position = symbols.len();
        Ok(())
    }

    fn read(&mut self, symbol: u8) -> Result<Vec<f32>> {
        let config = self.model.config();
        let eps = config.rms_norm_eps as f32;
        let (d, wide) = (config.hidden_size, config.intermediate_size);
        let embedding = view(&self.embedding, "embedding")?;
        let mut x = embedding.values::<f32>()?[usize::from(symbol) * d..][..d].to_vec();
        for (w, ring) in self.layers.iter().zip(&mut self.rings) {
            let qkv = row(&w.qkv, &normed(&x, &view(&w.norm1, "norm")?, eps)?)?;
            let attended = ring.attend(&qkv, self.position, self.model);
            add(&mut x, &row(&w.o, &attended)?);
            let both = w.gate_up.row(&normed(&x, &view(&w.norm2, "norm")?, eps)?)?;
            let gated: Vec<f32> =
                (0..wide).map(|i| both[i] * both[wide + i] / (1.0 + (-both[i]).min(80.0).exp())).collect();
            add(&mut x, &w.down.row(&gated)?);
        }
        self.position += 1;
        row(&self.embedding, &normed(&x, &view(&self.final_weight, "norm")?, eps)?)
    }
}

impl Ring {
    /// Keeps the keys and values of the first `chunks` chunks of a text, as far as later ones read them.
    fn fill(&mut self, qkv: &Tensor, chunks: usize, model: &CharModel) -> Result<()> {
        let (config, qkv) = (model.config(), view(qkv, "queries, keys and values")?);
        let (chunk, dim, heads) = (config.chunk, config.head_dim, config.num_attention_heads);
        let (qkv, width) = (qkv.values::<f32>()?, heads * dim);
        let last = chunks.saturating_sub(self.partner.distance() + 1);
        for (position, row) in qkv.chunks_exact(3 * width).enumerate().skip(last * chunk) {
            for head in 0..heads {
                let [k, v] = [1, 2].map(|i| &row[i * width + head * dim..][..dim]);
                self.keep(head, k, v, position, model);
                self.summarise(head, position, config);
            }
        }
        Ok(())
    }

    /// First element of a head's keys of chunk `c`: `[chunks][H][B][D]`, so that a head's keys of a chunk lie together.
    fn place(&self, c: usize, head: usize, config: &CharConfig) -> usize {
        let (size, heads) = (config.chunk * config.head_dim, config.num_attention_heads);
        (c % (self.keys.len() / (heads * size)) * heads + head) * size
    }

    /// Keeps a head's key and value of the character at `position`.
    fn keep(&mut self, head: usize, k: &[f32], v: &[f32], position: usize, model: &CharModel) {
        let (config, rope) = (model.config(), model.rope());
        let (dim, chunk) = (config.head_dim, config.chunk);
        let (c, p) = (position / chunk, position % chunk);
        let own = self.place(c, head, config);
        rope.rotate_into(k, p, &mut self.keys[own + p * dim..][..dim]);
        self.values[own + p * dim..][..dim].copy_from_slice(v);
    }

    /// Keeps the means of a head's chunk once the character at `position` has completed it.
    fn summarise(&mut self, head: usize, position: usize, config: &CharConfig) {
        let (dim, chunk) = (config.head_dim, config.chunk);
        let (c, p) = (position / chunk, position % chunk);
        let own = self.place(c, head, config);
        if let (Partner::Summary(distance), true) = (self.partner, p + 1 == chunk) {
            let row = (c % distance * config.num_attention_heads + head) * dim;
            for (to, from) in [(&mut self.mean_keys, &self.keys), (&mut self.mean_values, &self.values)] {
                to[row..][..dim].copy_from_slice(&mean_row(&from[own..][..chunk * dim], dim));
            }
        }
    }

    /// Keeps the key and value of the character at `position` and attends with its query.
    fn attend(&mut self, qkv: &[f32], position: usize, model: &CharModel) -> Vec<f32> {
        let (config, rope) = (model.config(), model.rope());
        let (chunk, dim, heads) = (config.chunk, config.head_dim, config.num_attention_heads);
        let (width, c, p) = (heads * dim, position / chunk, position % chunk);
        let mut out = vec![0f32; width];
        for head in 0..heads {
            let [q, k, v] = [0, 1, 2].map(|i| &qkv[i * width + head * dim..][..dim]);
            let far = match (self.partner, self.partner.of(c, usize::MAX)) {
                (_, None) => None,
                (Partner::Summary(distance), Some(partner)) => Some((partner % distance * heads + head) * dim),
                (_, Some(partner)) => Some(self.place(partner, head, config)),
            };
            let summary = matches!(self.partner, Partner::Summary(_));
            let own = self.place(c, head, config);
            self.keep(head, k, v, position, model);
            let near = (&self.keys[own..][..(p + 1) * dim], &self.values[own..][..(p + 1) * dim]);
            let far = match far {
                None => (&[][..], &[][..]),
                Some(row) if summary => (&self.mean_keys[row..][..dim], &self.mean_values[row..][..dim]),
                Some(row) => (&self.keys[row..][..chunk * dim], &self.values[row..][..chunk * dim]),
            };
            decode(q, p, near, far, rope, &mut out[head * dim..][..dim]);
            // Only now: the mean takes the place of the partner's.
            self.summarise(head, position, config);
        }
        out
    }
}

/// `count` zeros; `all` are the bytes of the whole stream.
fn zeros(count: usize, all: u64) -> Result<Vec<f32>> {
    let mut room = vec![];
    room.try_reserve_exact(count).map_err(|_| {
        Error::new(ErrorKind::Memory, "stream", format!("its keys and values take {}", human_bytes(all)))
    })?;
    room.resize(count, 0f32);
    Ok(room)
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn normed<G: Deref<Target = Storage>>(x: &[f32], weight: &View<G>, eps: f32) -> Result<Vec<f32>> {
    let r = 1.0 / (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32 + eps).sqrt();
    Ok(x.iter().zip(weight.values::<f32>()?).map(|(x, w)| x * r * w).collect())
}
