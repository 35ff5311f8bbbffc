//! Tensor schema: every tensor that a [`ModelSpec`] needs, with its shape and its name in Hugging Face checkpoints and
//! in GGUF files.
//!
//! Loading, random weights, byte counts and the check for unread tensors all use [`Schema`].
//! GGUF names: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#standardized-tensor-names>

use crate::spec::{AttentionSpec, FeedForwardSpec, MixerSpec, ModelSpec, Norms};

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
    /// Rows per head of q and k, whose heads are rotated: llama GGUF files interleave the two halves of each head.
    pub rotary_rows: Option<usize>,
}

impl TensorSpec {
    fn new((name, gguf): (impl Into<String>, impl Into<String>), shape: Vec<usize>, role: Role) -> Self {
        Self { name: name.into(), gguf: gguf.into(), shape, role, rotary_rows: None }
    }

    /// Returns the output matrix, `[vocab, hidden]`.
    pub fn head(spec: &ModelSpec) -> Self {
        Self::new(HEAD, vec![spec.vocab, spec.hidden], Role::Matrix)
    }

    /// Returns the divisors of the rotary frequencies, `[half]`.
    pub fn rope_factors(half: usize) -> Self {
        Self::new(ROPE_FACTORS, vec![half], Role::Other)
    }

    /// Returns the number of elements; saturates on overflow.
    pub fn elements(&self) -> u64 {
        self.shape.iter().fold(1u64, |n, d| n.saturating_mul(*d as u64))
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
}

/// Tensors of one layer; `I` is the width of the feed-forward.
#[derive(Debug, Clone)]
pub struct LayerTensors {
    /// Tensors of the attention.
    pub attention: AttentionTensors,
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
    fn iter(&self) -> impl Iterator<Item = &TensorSpec> {
        let a = &self.attention;
        let linear = [&a.q, &a.k, &a.v, &a.out, &self.gate, &self.up, &self.down];
        let norms =
            [Some(&self.before_mixer), self.after_mixer.as_ref(), Some(&self.before_mlp), self.after_mlp.as_ref()];
        let heads = a.qk_norm.iter().flat_map(|(q, k)| [q, k]);
        linear.into_iter().flat_map(LinearSpec::iter).chain(norms.into_iter().flatten()).chain(heads)
    }
}

fn layer(spec: &ModelSpec, i: usize) -> LayerTensors {
    let hidden = spec.hidden;
    let l = &spec.layers[i];
    let MixerSpec::Attention(a) = &l.mixer;
    let AttentionSpec { head_dim, qkv_bias, out_bias, .. } = *a;
    let FeedForwardSpec { width, bias: mlp_bias, .. } = l.feed_forward;
    let tensor = |(hf, gguf): (&str, &str), kind: &str, shape: Vec<usize>, role| {
        TensorSpec::new((format!("model.layers.{i}.{hf}.{kind}"), format!("blk.{i}.{gguf}.{kind}")), shape, role)
    };
    let linear = |names, (out, input): (usize, usize), bias: bool| LinearSpec {
        weight: tensor(names, "weight", vec![out, input], Role::Matrix),
        bias: bias.then(|| tensor(names, "bias", vec![out], Role::Bias)),
    };
    let rotated = |mut linear: LinearSpec| {
        linear.weight.rotary_rows = Some(head_dim);
        linear.bias.iter_mut().for_each(|b| b.rotary_rows = Some(head_dim));
        linear
    };
    let norm = |hf: &str, gguf: &str, len: usize| tensor((hf, gguf), "weight", vec![len], Role::Norm);
    let sandwich = l.norms == Norms::Sandwich;
    LayerTensors {
        attention: AttentionTensors {
            q: rotated(linear(("self_attn.q_proj", "attn_q"), (a.q_width(), hidden), qkv_bias)),
            k: rotated(linear(("self_attn.k_proj", "attn_k"), (a.kv_width(), hidden), qkv_bias)),
            v: linear(("self_attn.v_proj", "attn_v"), (a.kv_width(), hidden), qkv_bias),
            out: linear(("self_attn.o_proj", "attn_output"), (hidden, a.q_width()), out_bias),
            qk_norm: a.qk_norm.then(|| {
                let q = norm("self_attn.q_norm", "attn_q_norm", head_dim);
                (q, norm("self_attn.k_norm", "attn_k_norm", head_dim))
            }),
        },
        gate: linear(("mlp.gate_proj", "ffn_gate"), (width, hidden), mlp_bias),
        up: linear(("mlp.up_proj", "ffn_up"), (width, hidden), mlp_bias),
        down: linear(("mlp.down_proj", "ffn_down"), (hidden, width), mlp_bias),
        before_mixer: norm("input_layernorm", "attn_norm", hidden),
        after_mixer: sandwich.then(|| norm("post_attention_layernorm", "post_attention_norm", hidden)),
        before_mlp: match sandwich {
            true => norm("pre_feedforward_layernorm", "ffn_norm", hidden),
            // In the Llama layout `post_attention_layernorm` is the norm before the feed-forward.
            false => norm("post_attention_layernorm", "ffn_norm", hidden),
        },
        after_mlp: sandwich.then(|| norm("post_feedforward_layernorm", "post_ffw_norm", hidden)),
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
