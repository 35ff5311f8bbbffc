//! Tensor schema: every tensor that a [`ModelSpec`] needs, with its shape and its name in Hugging Face checkpoints and
//! in GGUF files.
//!
//! Loading, random weights, byte counts and the check for unread tensors all use [`Schema`].
//! GGUF names: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#standardized-tensor-names>

use crate::spec::{AttentionSpec, DeltaSpec, FeedForwardSpec, MixerSpec, ModelSpec, Norms, RopeSpec};

/// Names of the embedding matrix: (Hugging Face, GGUF).
pub const EMBED: (&str, &str) = ("model.embed_tokens.weight", "token_embd.weight");
/// Names of the output matrix: (Hugging Face, GGUF).
pub const HEAD: (&str, &str) = ("lm_head.weight", "output.weight");
/// Names of the norm before the output matrix: (Hugging Face, GGUF).
pub const FINAL_NORM: (&str, &str) = ("model.norm.weight", "output_norm.weight");
/// Names of the divisors of the rotary frequencies, which only GGUF files store.
pub const ROPE_FACTORS: (&str, &str) = ("rope_freqs.weight", "rope_freqs.weight");

/// Role of a tensor in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Weight matrix `[out, in]` of a linear layer, or the embedding.
    Matrix,
    /// Bias of a linear layer.
    Bias,
    /// Weight of an RMS norm.
    Norm,
    /// Weight of an RMS norm that every kind of file stores as it is used.
    PlainNorm,
    /// Rate `a < 0` of a decay: GGUF files store it, others `ln(-a)`.
    Rate,
    /// Weights of a causal convolution by channel.
    Conv,
    /// Any other tensor.
    Other,
}

/// Specification of a tensor that a model needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in Hugging Face checkpoints, without the prefix of a multimodal wrapper.
    pub name: String,
    /// Name in GGUF files.
    pub gguf: String,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Role in the model.
    pub role: Role,
    /// Which rows of the file's tensor are its heads, where it is not all of them as they lie.
    pub heads: Option<HeadRows>,
}

/// Rows of a head of q, k or a gate in a file and in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadRows {
    /// Rows of a head in memory, `D`.
    pub dim: usize,
    /// Rows of a head in the file: `D`, or `2 D` where its gate follows each query.
    pub stored: usize,
    /// First of the head's rows in the file.
    pub first: usize,
    /// Rotated rows, the first `R` of the `D` in the file, half by half. In memory their two halves begin the two halves of
    /// the head, so that a head is rotated as a whole, the other channels by nothing. 0 without rotation.
    pub rotated: usize,
}

/// Order in which the rows of a file's tensor are read.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// The heads.
    pub heads: HeadRows,
    /// Whether the file stores the two rotated halves of each head row by row in turns, as llama GGUF files do.
    pub interleaved: bool,
}

impl Order {
    /// Returns the file's row of row `row` in memory.
    pub fn source(&self, row: usize) -> usize {
        self.heads.source(row, self.interleaved)
    }

    /// Returns the rows in memory of `stored` rows in the file.
    pub fn rows(&self, stored: usize) -> usize {
        stored / self.heads.stored * self.heads.dim
    }
}

impl HeadRows {
    fn source(&self, row: usize, interleaved: bool) -> usize {
        let (head, at) = (row / self.dim, row % self.dim);
        let (half, rotated) = (self.dim / 2, self.rotated / 2);
        let (i, second) = (at % half, at / half);
        let within = match (i < rotated, interleaved) {
            _ if rotated == 0 => at,
            (true, true) => 2 * i + second,
            (true, false) => second * rotated + i,
            (false, _) => self.rotated + second * (half - rotated) + i - rotated,
        };
        head * self.stored + self.first + within
    }
}

impl TensorSpec {
    fn new((name, gguf): (impl Into<String>, impl Into<String>), shape: Vec<usize>, role: Role) -> Self {
        Self { name: name.into(), gguf: gguf.into(), shape, role, heads: None }
    }

    /// Returns the output matrix, `[vocab, hidden]`.
    pub fn head(spec: &ModelSpec) -> Self {
        Self::new(HEAD, vec![spec.vocab, spec.hidden], Role::Matrix)
    }

    /// Returns the divisors of the rotary frequencies, `[half]`.
    pub fn rope_factors(half: usize) -> Self {
        Self::new(ROPE_FACTORS, vec![half], Role::Other)
    }

    /// Returns the number of elements in memory; saturates on overflow.
    pub fn elements(&self) -> u64 {
        self.shape[1..].iter().fold(self.rows() as u64, |n, d| n.saturating_mul(*d as u64))
    }

    /// Returns the rows in memory.
    pub fn rows(&self) -> usize {
        self.heads.map_or(self.shape[0], |h| self.shape[0] / h.stored * h.dim)
    }
}

/// Tensors of a linear layer.
#[derive(Debug, Clone)]
pub struct LinearSpec {
    /// Weight matrix, `[out, in]`.
    pub weight: TensorSpec,
    /// Bias, `[out]`.
    pub bias: Option<TensorSpec>,
}

/// Tensors of an attention layer.
#[derive(Debug, Clone)]
pub struct AttentionTensors {
    /// Query projection, `[H D, hidden]`.
    pub q: LinearSpec,
    /// Key projection, `[G D, hidden]`.
    pub k: LinearSpec,
    /// Value projection, `[G D, hidden]`.
    pub v: LinearSpec,
    /// Output projection, `[hidden, H D]`.
    pub out: LinearSpec,
    /// RMS norms of each head of q and of k, `[D]` each.
    pub qk_norm: Option<(TensorSpec, TensorSpec)>,
    /// Gate of the output, `[H D, hidden]`: rows of the query projection's tensor.
    pub gate: Option<LinearSpec>,
}

/// Tensors of a Gated DeltaNet layer.
#[derive(Debug, Clone)]
pub struct DeltaTensors {
    /// Projection to queries, keys and values, `[C, hidden]`.
    pub qkv: LinearSpec,
    /// Projection to the gate of the output, `[V D_v, hidden]`.
    pub z: LinearSpec,
    /// Projection to the step of each value head, `[V, hidden]`.
    pub beta: LinearSpec,
    /// Projection to the decay of each value head, `[V, hidden]`.
    pub decay: LinearSpec,
    /// Weights of the convolution, `[C, 1, kernel]`.
    pub conv: TensorSpec,
    /// Logarithm of the decay's rate, `[V]`.
    pub rate: TensorSpec,
    /// Bias of the decay, `[V]`.
    pub decay_bias: TensorSpec,
    /// Norm of each head of the output, `[D_v]`.
    pub norm: TensorSpec,
    /// Output projection, `[hidden, V D_v]`.
    pub out: LinearSpec,
}

/// Tensors of a layer's mixer.
#[derive(Debug, Clone)]
pub enum MixerTensors {
    /// Of attention.
    Attention(Box<AttentionTensors>),
    /// Of Gated DeltaNet.
    Delta(Box<DeltaTensors>),
}

/// Tensors of one layer; `I` is the width of the feed-forward.
#[derive(Debug, Clone)]
pub struct LayerTensors {
    /// Tensors of the mixer.
    pub mixer: MixerTensors,
    /// Gate projection of the feed-forward, `[I, hidden]`.
    pub gate: LinearSpec,
    /// Up projection of the feed-forward, `[I, hidden]`.
    pub up: LinearSpec,
    /// Down projection of the feed-forward, `[hidden, I]`.
    pub down: LinearSpec,
    /// Norm before the mixer, `[hidden]`.
    pub before_mixer: TensorSpec,
    /// Norm after the mixer, `[hidden]`, where the family has one.
    pub after_mixer: Option<TensorSpec>,
    /// Norm before the feed-forward, `[hidden]`.
    pub before_mlp: TensorSpec,
    /// Norm after the feed-forward, `[hidden]`, where the family has one.
    pub after_mlp: Option<TensorSpec>,
}

/// All tensors of a model.
#[derive(Debug, Clone)]
pub struct Schema {
    /// Embedding matrix, `[vocab, hidden]`.
    pub embed: TensorSpec,
    /// Norm before the output matrix, `[hidden]`.
    pub norm: TensorSpec,
    /// Output matrix, `[vocab, hidden]`; `None` if it is the embedding (tied).
    pub head: Option<TensorSpec>,
    /// Tensors of each layer.
    pub layers: Vec<LayerTensors>,
}

impl Schema {
    /// Returns the tensors that `spec` needs.
    pub fn new(spec: &ModelSpec) -> Self {
        Self {
            embed: TensorSpec::new(EMBED, vec![spec.vocab, spec.hidden], Role::Matrix),
            norm: TensorSpec::new(FINAL_NORM, vec![spec.hidden], Role::Norm),
            head: (!spec.tied).then(|| TensorSpec::head(spec)),
            layers: (0..spec.layers.len()).map(|i| layer(spec, i)).collect(),
        }
    }

    /// Returns all tensors: embedding, final norm and head first, then layer by layer.
    pub fn iter(&self) -> impl Iterator<Item = &TensorSpec> {
        [&self.embed, &self.norm].into_iter().chain(&self.head).chain(self.layers.iter().flat_map(LayerTensors::iter))
    }

    /// Returns all tensors with the role [`Role::Matrix`].
    pub fn matrices(&self) -> impl Iterator<Item = &TensorSpec> {
        self.iter().filter(|t| t.role == Role::Matrix)
    }
}

impl LinearSpec {
    fn iter(&self) -> impl Iterator<Item = &TensorSpec> {
        std::iter::once(&self.weight).chain(&self.bias)
    }
}

impl LayerTensors {
    /// Returns the tensors of the attention of an attention layer.
    pub fn attention(&self) -> Option<&AttentionTensors> {
        match &self.mixer {
            MixerTensors::Attention(a) => Some(a),
            MixerTensors::Delta(_) => None,
        }
    }

    fn iter(&self) -> impl Iterator<Item = &TensorSpec> {
        let norms =
            [Some(&self.before_mixer), self.after_mixer.as_ref(), Some(&self.before_mlp), self.after_mlp.as_ref()];
        let mlp = [&self.gate, &self.up, &self.down];
        self.mixer.iter().chain(mlp.into_iter().flat_map(LinearSpec::iter)).chain(norms.into_iter().flatten())
    }
}

impl MixerTensors {
    fn iter(&self) -> impl Iterator<Item = &TensorSpec> {
        let (linear, others): (Vec<&LinearSpec>, Vec<&TensorSpec>) = match self {
            Self::Attention(a) => {
                let linear = [&a.q, &a.k, &a.v, &a.out].into_iter().chain(&a.gate).collect();
                (linear, a.qk_norm.iter().flat_map(|(q, k)| [q, k]).collect())
            }
            Self::Delta(d) => {
                (vec![&d.qkv, &d.z, &d.beta, &d.decay, &d.out], vec![&d.conv, &d.rate, &d.decay_bias, &d.norm])
            }
        };
        linear.into_iter().flat_map(LinearSpec::iter).chain(others)
    }
}

fn layer(spec: &ModelSpec, i: usize) -> LayerTensors {
    let hidden = spec.hidden;
    let l = &spec.layers[i];
    let FeedForwardSpec { width, bias: mlp_bias, .. } = l.feed_forward;
    let names = Names { layer: i, hidden };
    let sandwich = l.norms == Norms::Sandwich;
    LayerTensors {
        mixer: match &l.mixer {
            MixerSpec::Attention(a) => MixerTensors::Attention(Box::new(names.attention(a, &spec.ropes[a.rope]))),
            MixerSpec::Delta(d) => MixerTensors::Delta(Box::new(names.delta(d))),
        },
        gate: names.linear(("mlp.gate_proj", "ffn_gate"), (width, hidden), mlp_bias),
        up: names.linear(("mlp.up_proj", "ffn_up"), (width, hidden), mlp_bias),
        down: names.linear(("mlp.down_proj", "ffn_down"), (hidden, width), mlp_bias),
        before_mixer: names.norm("input_layernorm", "attn_norm", hidden),
        after_mixer: sandwich.then(|| names.norm("post_attention_layernorm", "post_attention_norm", hidden)),
        before_mlp: match (sandwich, spec.has_delta()) {
            (true, _) => names.norm("pre_feedforward_layernorm", "ffn_norm", hidden),
            // In the Llama layout `post_attention_layernorm` is the norm before the feed-forward.
            (false, false) => names.norm("post_attention_layernorm", "ffn_norm", hidden),
            (false, true) => names.norm("post_attention_layernorm", "post_attention_norm", hidden),
        },
        after_mlp: sandwich.then(|| names.norm("post_feedforward_layernorm", "post_ffw_norm", hidden)),
    }
}

/// Tensors of layer `layer` by their names in both kinds of file.
struct Names {
    layer: usize,
    hidden: usize,
}

impl Names {
    /// A tensor whose names end in `kind`, after a dot where it is not empty.
    fn tensor(&self, (hf, gguf): (&str, &str), kind: &str, shape: Vec<usize>, role: Role) -> TensorSpec {
        let (i, dot) = (self.layer, if kind.is_empty() { "" } else { "." });
        let names = (format!("model.layers.{i}.{hf}{dot}{kind}"), format!("blk.{i}.{gguf}{dot}{kind}"));
        TensorSpec::new(names, shape, role)
    }

    fn linear(&self, names: (&str, &str), (out, input): (usize, usize), bias: bool) -> LinearSpec {
        LinearSpec {
            weight: self.tensor(names, "weight", vec![out, input], Role::Matrix),
            bias: bias.then(|| self.tensor(names, "bias", vec![out], Role::Bias)),
        }
    }

    fn norm(&self, hf: &str, gguf: &str, len: usize) -> TensorSpec {
        self.tensor((hf, gguf), "weight", vec![len], Role::Norm)
    }

    fn attention(&self, a: &AttentionSpec, rope: &RopeSpec) -> AttentionTensors {
        let AttentionSpec { head_dim: dim, qkv_bias, out_bias, .. } = *a;
        let (hidden, rotated) = (self.hidden, rope.rotated);
        let own = HeadRows { dim, stored: dim, first: 0, rotated };
        let query = if a.gate { HeadRows { stored: 2 * dim, ..own } } else { own };
        let of_heads = |mut linear: LinearSpec, heads: HeadRows| {
            linear.weight.heads = Some(heads);
            linear.bias.iter_mut().for_each(|b| b.heads = Some(heads));
            linear
        };
        // The norm's weights lie as the channels of a head.
        let normed = |hf: &str, gguf: &str| TensorSpec { heads: Some(own), ..self.norm(hf, gguf, dim) };
        let q = || self.linear(("self_attn.q_proj", "attn_q"), (a.heads * query.stored, hidden), qkv_bias);
        AttentionTensors {
            q: of_heads(q(), query),
            gate: a.gate.then(|| of_heads(q(), HeadRows { first: dim, rotated: 0, ..query })),
            k: of_heads(self.linear(("self_attn.k_proj", "attn_k"), (a.kv_width(), hidden), qkv_bias), own),
            v: self.linear(("self_attn.v_proj", "attn_v"), (a.kv_width(), hidden), qkv_bias),
            out: self.linear(("self_attn.o_proj", "attn_output"), (hidden, a.q_width()), out_bias),
            qk_norm: a.qk_norm.then(|| {
                let q = normed("self_attn.q_norm", "attn_q_norm");
                (q, normed("self_attn.k_norm", "attn_k_norm"))
            }),
        }
    }

    fn delta(&self, d: &DeltaSpec) -> DeltaTensors {
        let (hidden, heads) = (self.hidden, d.value_heads);
        let linear = |hf: &str, gguf, shape| self.linear((&format!("linear_attn.{hf}"), gguf), shape, false);
        let other =
            |hf: &str, gguf, kind, shape| self.tensor((&format!("linear_attn.{hf}"), gguf), kind, shape, Role::Other);
        DeltaTensors {
            qkv: linear("in_proj_qkv", "attn_qkv", (d.channels(), hidden)),
            z: linear("in_proj_z", "attn_gate", (d.value_width(), hidden)),
            beta: linear("in_proj_b", "ssm_beta", (heads, hidden)),
            decay: linear("in_proj_a", "ssm_alpha", (heads, hidden)),
            conv: TensorSpec {
                role: Role::Conv,
                ..other("conv1d", "ssm_conv1d", "weight", vec![d.channels(), 1, d.kernel])
            },
            rate: TensorSpec { role: Role::Rate, ..other("A_log", "ssm_a", "", vec![heads]) },
            decay_bias: other("dt_bias", "ssm_dt.bias", "", vec![heads]),
            norm: TensorSpec { role: Role::PlainNorm, ..other("norm", "ssm_norm", "weight", vec![d.value_dim]) },
            out: linear("out_proj", "ssm_out", (hidden, d.value_width())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use std::collections::BTreeSet;

    fn schema(golden: &str) -> Schema {
        let path = format!("tests/fixtures/goldens/{golden}");
        Schema::new(&Checkpoint::open(&path, &Default::default(), &|_, _, _| ()).unwrap().spec)
    }

    #[test]
    fn heads_are_put_in_halves_however_they_are_stored() {
        let order = |dim, stored, first, rotated, interleaved| Order {
            heads: HeadRows { dim, stored, first, rotated },
            interleaved,
        };
        let rows = |order: Order, n: usize| (0..n).map(|r| order.source(r)).collect::<Vec<_>>();
        // Stored rows of one head of 8: 0 4 1 5 2 6 3 7.
        let interleaved = order(8, 8, 0, 8, true);
        let stored = [0, 4, 1, 5, 2, 6, 3, 7];
        assert_eq!(rows(interleaved, 8).iter().map(|r| stored[*r]).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
        assert_eq!(interleaved.source(11), 8 + 2 * 3);
        assert_eq!(rows(order(8, 8, 0, 8, false), 16), (0..16).collect::<Vec<_>>());
        // Four of eight rotated, 0 with 2 and 1 with 3; gates follow each head's queries.
        let query = order(8, 16, 0, 4, false);
        assert_eq!(rows(query, 16), [0, 1, 4, 5, 2, 3, 6, 7, 16, 17, 20, 21, 18, 19, 22, 23]);
        assert_eq!(rows(order(8, 16, 8, 0, false), 16), (8..16).chain(24..32).collect::<Vec<_>>());
        assert_eq!(query.rows(32), 16);
    }

    #[test]
    fn names_are_unique_in_hugging_face_and_gguf_files() {
        for golden in ["qwen2", "qwen3", "llama", "gemma3"] {
            let schema = schema(golden);
            let count = schema.iter().count();
            assert_eq!(schema.iter().map(|t| &t.name).collect::<BTreeSet<_>>().len(), count, "{golden}");
            assert_eq!(schema.iter().map(|t| &t.gguf).collect::<BTreeSet<_>>().len(), count, "{golden}");
        }
    }

    #[test]
    fn the_name_of_the_norm_before_the_feed_forward_depends_on_the_family() {
        let names = |golden: &str| {
            let l = schema(golden).layers.remove(0);
            (l.before_mlp.name, l.before_mlp.gguf, l.after_mixer.map(|t| t.gguf))
        };
        let pre = ("model.layers.0.post_attention_layernorm.weight".into(), "blk.0.ffn_norm.weight".into(), None);
        assert_eq!(names("qwen2"), pre);
        let after = Some("blk.0.post_attention_norm.weight".into());
        let own = "model.layers.0.pre_feedforward_layernorm.weight";
        assert_eq!(names("gemma3"), (own.into(), "blk.0.ffn_norm.weight".into(), after));
    }
}
