//! Metadata keys of GGUF files, and their conversion to `config.json` keys, so that a family reads one format.
//!
//! Sources in llama.cpp: <https://github.com/ggml-org/llama.cpp/blob/master/src/llama-arch.cpp> (names),
//! `llama_model_base::load_hparams` in `llama-model.cpp` (defaults), `llama-context.cpp` (YaRN's factor on cos and
//! sin). Keys under the architecture's name that are not listed here are refused. For these families llama.cpp reads
//! only `general.`, `tokenizer.`, `split.` and the architecture's keys, so other keys are ignored.

use super::gguf::Gguf;
use crate::error::{Error, Result};
use crate::family::keys::Const::{self, Bool, Float, Int};
use crate::family::{self, Family};
use crate::spec::Config;
use crate::tensors;
use candle_core::quantized::gguf_file::Value;
use serde_json::{json, Map, Value as Json};

/// Meaning of a metadata key.
#[derive(Debug, Clone, Copy)]
pub enum Meaning {
    /// Equivalent to this key of `config.json`.
    Is(&'static str),
    /// Read by this module or by the tokenizer.
    Used,
    /// Supported with this value only.
    OnlyIf(Const),
    /// Ignored, for this reason.
    NoEffect(&'static str),
}

use Meaning::{Is, NoEffect, OnlyIf, Used};

/// Keys under the architecture's name that all families share.
pub const DECODER: &[(&str, Meaning)] = &[
    ("embedding_length", Is("hidden_size")),
    ("block_count", Is("num_hidden_layers")),
    ("feed_forward_length", Is("intermediate_size")),
    ("attention.head_count", Is("num_attention_heads")),
    ("attention.head_count_kv", Is("num_key_value_heads")),
    ("attention.key_length", Is("head_dim")),
    ("context_length", Is("max_position_embeddings")),
    ("attention.layer_norm_rms_epsilon", Is("rms_norm_eps")),
    ("rope.freq_base", Is("rope_theta")),
    ("attention.value_length", Used),
    ("rope.dimension_count", Used),
    ("rope.scaling.type", Used),
    ("rope.scaling.factor", Used),
    ("rope.scale_linear", Used),
    ("rope.scaling.original_context_length", Used),
    ("rope.scaling.attn_factor", Used),
    // For these families llama.cpp ignores the file's values and uses these.
    ("rope.scaling.yarn_ext_factor", OnlyIf(Float(1.0))),
    ("rope.scaling.yarn_attn_factor", OnlyIf(Float(1.0))),
    ("rope.scaling.yarn_beta_fast", OnlyIf(Float(32.0))),
    ("rope.scaling.yarn_beta_slow", OnlyIf(Float(1.0))),
    ("rope.scaling.yarn_log_multiplier", OnlyIf(Float(0.0))),
    ("rope.scaling.finetuned", NoEffect("records how the model was trained")),
    ("attention.causal", OnlyIf(Bool(true))),
    ("attn_logit_softcapping", OnlyIf(Float(0.0))),
    ("final_logit_softcapping", OnlyIf(Float(0.0))),
    ("expert_count", OnlyIf(Int(0))),
    ("expert_used_count", OnlyIf(Int(0))),
    ("expert_shared_count", OnlyIf(Int(0))),
    ("nextn_predict_layers", OnlyIf(Int(0))),
    ("vocab_size", NoEffect("the embedding's shape gives the vocabulary size")),
    ("pooling_type", NoEffect("pools hidden states for embedding outputs")),
    ("tensor_data_layout", NoEffect("llama.cpp does not read it")),
];

/// Required keys under the architecture's name.
const REQUIRED: &[&str] = &[
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "context_length",
    "attention.layer_norm_rms_epsilon",
];

/// Tokenizer keys. An unlisted key or an unsupported value gives a warning, not an error, since it changes token ids
/// only.
pub const TOKENIZER: &[(&str, Meaning)] = &[
    ("tokenizer.ggml.model", Used),
    ("tokenizer.ggml.pre", Used),
    ("tokenizer.ggml.tokens", Used),
    ("tokenizer.ggml.token_type", Used),
    ("tokenizer.ggml.scores", Used),
    ("tokenizer.ggml.merges", Used),
    ("tokenizer.ggml.bos_token_id", Used),
    ("tokenizer.ggml.eos_token_id", Used),
    ("tokenizer.ggml.eot_token_id", Used),
    ("tokenizer.ggml.eom_token_id", Used),
    ("tokenizer.ggml.add_bos_token", Used),
    ("tokenizer.ggml.add_space_prefix", Used),
    ("tokenizer.chat_template", Used),
    ("tokenizer.chat_templates", NoEffect("the default template is used")),
    ("tokenizer.ggml.add_eos_token", OnlyIf(Bool(false))),
    ("tokenizer.ggml.add_sep_token", OnlyIf(Bool(false))),
    ("tokenizer.ggml.remove_extra_whitespaces", OnlyIf(Bool(false))),
    ("tokenizer.ggml.normalizer.lowercase", OnlyIf(Bool(false))),
    ("tokenizer.ggml.normalizer.strip_accents", OnlyIf(Bool(false))),
    ("tokenizer.ggml.token_type_count", NoEffect("for models with token type embeddings")),
    ("tokenizer.ggml.unknown_token_id", NoEffect("every byte has a token")),
    ("tokenizer.ggml.padding_token_id", NoEffect("nothing is padded")),
    ("tokenizer.ggml.seperator_token_id", NoEffect("names a token")),
    ("tokenizer.ggml.cls_token_id", NoEffect("names a token")),
    ("tokenizer.ggml.mask_token_id", NoEffect("names a token")),
    ("tokenizer.ggml.prefix_token_id", NoEffect("names a token")),
    ("tokenizer.ggml.suffix_token_id", NoEffect("names a token")),
    ("tokenizer.ggml.middle_token_id", NoEffect("names a token")),
    ("tokenizer.ggml.fim_pre_token_id", NoEffect("names a token")),
    ("tokenizer.ggml.fim_suf_token_id", NoEffect("names a token")),
    ("tokenizer.ggml.fim_mid_token_id", NoEffect("names a token")),
    ("tokenizer.ggml.fim_pad_token_id", NoEffect("names a token")),
    ("tokenizer.ggml.fim_rep_token_id", NoEffect("names a token")),
    ("tokenizer.ggml.fim_sep_token_id", NoEffect("names a token")),
    ("tokenizer.ggml.precompiled_charsmap", NoEffect("these families do not normalise with it")),
    ("tokenizer.huggingface.json", NoEffect("repeats the other tokenizer keys")),
];

/// Converts the metadata to a configuration with `config.json` keys; also returns warnings about tokenizer keys.
///
/// # Errors
/// A key is missing, malformed or unknown, or has an unsupported value.
pub(super) fn config(file: &Gguf) -> Result<(Config, Vec<String>)> {
    let place = file.place();
    let missing = || Error::format(&place, "`general.architecture` is missing");
    let arch = file.string("general.architecture").ok_or_else(missing)?;
    match file.string("general.type") {
        None | Some("model") => {}
        Some(other) => return Err(Error::unsupported(&place, format!("`general.type` is {other}, not model"))),
    }
    let family = family::of_arch(arch, &place)?;
    let reader = Reader { file, arch, family, place: place.clone() };
    reader.check()?;
    Ok((reader.config()?, reader.tokenizer_warnings()))
}

struct Reader<'a> {
    file: &'a Gguf,
    arch: &'a str,
    family: &'static Family,
    place: String,
}

impl Reader<'_> {
    fn meaning(&self, key: &str) -> Option<Meaning> {
        let own = self.family.gguf.keys.iter().find(|(k, _)| *k == key).map(|(_, is)| Is(is));
        own.or_else(|| DECODER.iter().find(|(k, _)| *k == key).map(|(_, m)| *m))
    }

    /// Checks that every key under the architecture's name is known and has a supported value.
    fn check(&self) -> Result<()> {
        let prefix = format!("{}.", self.arch);
        for (key, value) in self.file.entries() {
            if key.starts_with("adapter.") || key.starts_with("xielu.") {
                return Err(Error::unsupported(&self.place, format!("`{key}` is not supported")));
            }
            let Some(own) = key.strip_prefix(&prefix) else { continue };
            match self.meaning(own) {
                Some(Is(_) | Used | NoEffect(_)) => {}
                Some(OnlyIf(wanted)) if json(value).is_some_and(|v| wanted.is(&v)) => {}
                Some(OnlyIf(wanted)) => {
                    let (got, wanted) = (json(value).unwrap_or_default(), wanted.json());
                    return Err(Error::unsupported(&self.place, format!("`{key}` is {got}; supported: {wanted}")));
                }
                None => {
                    let message = format!("unknown key `{key}`; it may change the model's outputs");
                    return Err(Error::unsupported(&self.place, message));
                }
            }
        }
        Ok(())
    }

    fn config(&self) -> Result<Config> {
        let mut out = Config::new(&self.place, Map::new().into())?;
        out.set("model_type", json!(self.family.model_type));
        let mapped = DECODER.iter().filter_map(|(k, m)| match m {
            Is(name) => Some((*k, *name)),
            _ => None,
        });
        for (key, name) in mapped.chain(self.family.gguf.keys.iter().copied()) {
            if let Some(value) = self.number_or_list(key)? {
                out.set(name, value);
            }
        }
        if let Some(key) = REQUIRED.iter().find(|key| self.value(key).is_none()) {
            return Err(Error::format(&self.place, format!("`{}` is missing", self.full(key))));
        }
        let heads = out.size("num_attention_heads")?;
        out.set_missing("num_key_value_heads", json!(heads));
        out.set_missing("head_dim", json!(out.size("hidden_size")? / heads));
        out.set_missing("rope_theta", json!(10_000.0));
        let head_dim = out.size("head_dim")?;
        const ROTATED: &str = "rope.dimension_count";
        for key in ["attention.value_length", ROTATED] {
            match self.number(key)? {
                Some(n) if key == ROTATED && self.family.gguf.partial_rope => {
                    let share = n.as_f64().unwrap_or(f64::NAN) / head_dim as f64;
                    out.set("partial_rotary_factor", json!(share));
                }
                Some(n) if n != head_dim => {
                    let message = format!("`{}` is {n}; supported: {head_dim}, the head dimension", self.full(key));
                    return Err(Error::unsupported(&self.place, message));
                }
                _ => {}
            }
        }
        if let Some(scaling) = self.scaling()? {
            out.set("rope_scaling", scaling);
        }
        let embed = self.file.info(tensors::EMBED.1);
        let embed = embed.ok_or_else(|| Error::tensor(&self.place, format!("{} is missing", tensors::EMBED.1)))?;
        out.set("vocab_size", json!(embed.shape.first()));
        out.set("tie_word_embeddings", json!(self.file.info(tensors::HEAD.1).is_none()));
        (self.family.gguf.complete)(&mut out)?;
        Ok(out)
    }

    /// Returns the rope scaling by llama.cpp's rules: linear if no type is given, none if the factor is absent or 0;
    /// YaRN's factor on cos and sin is multiplied by `attn_factor`.
    fn scaling(&self) -> Result<Option<Json>> {
        const TYPE: &str = "rope.scaling.type";
        let kind = match self.value(TYPE) {
            None => "linear",
            Some(v) => v
                .to_string()
                .map(String::as_str)
                .map_err(|_| Error::format(&self.place, format!("`{}` is not a string", self.full(TYPE))))?,
        };
        let float = |key: &str| Ok::<_, Error>(self.number(key)?.and_then(|v| v.as_f64()));
        let factor = match float("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => float("rope.scale_linear")?,
        };
        let factor = factor.filter(|f| *f != 0.0 && kind != "none");
        let attn_factor = float("rope.scaling.attn_factor")?.unwrap_or(1.0);
        if attn_factor != 1.0 && kind != "yarn" {
            let key = self.full("rope.scaling.attn_factor");
            return Err(Error::unsupported(&self.place, format!("`{key}` is {attn_factor}; supported: 1")));
        }
        let known = matches!(kind, "none" | "linear" | "yarn");
        if known && factor.is_none() && attn_factor == 1.0 {
            return Ok(None);
        }
        let factor = factor.unwrap_or(1.0);
        let mut out = Map::from_iter([("rope_type".into(), json!(kind)), ("factor".into(), json!(factor))]);
        if kind == "yarn" {
            let own = if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
            out.insert("attention_factor".into(), json!(own * attn_factor));
            if let Some(original) = self.number("rope.scaling.original_context_length")? {
                out.insert("original_max_position_embeddings".into(), original);
            }
        }
        Ok(Some(out.into()))
    }

    fn tokenizer_warnings(&self) -> Vec<String> {
        let mut warnings = vec![];
        for (key, value) in self.file.entries().filter(|(k, _)| k.starts_with("tokenizer.")) {
            match TOKENIZER.iter().find(|(k, _)| *k == key).map(|(_, m)| *m) {
                Some(OnlyIf(wanted)) if !json(value).is_some_and(|v| wanted.is(&v)) => {
                    let supported = wanted.json();
                    warnings.push(format!(
                        "{}: only `{key}` of {supported} is supported; token ids may differ from llama.cpp's",
                        self.place
                    ));
                }
                Some(_) => {}
                None if key.starts_with("tokenizer.chat_template.") => {}
                None => {
                    warnings.push(format!("{}: unknown key `{key}`; token ids may differ from llama.cpp's", self.place))
                }
            }
        }
        warnings
    }

    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.file.metadata(&self.full(key))
    }

    /// A number, or a list of the family's own keys.
    fn number_or_list(&self, key: &str) -> Result<Option<Json>> {
        let own = self.family.gguf.keys.iter().any(|(k, _)| *k == key);
        match self.value(key) {
            Some(Value::Array(list)) if own => Ok(Some(list.iter().map(|v| json(v).unwrap_or_default()).collect())),
            _ => self.number(key),
        }
    }

    fn number(&self, key: &str) -> Result<Option<Json>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let number = json(value).filter(Json::is_number);
        number
            .map(Some)
            .ok_or_else(|| Error::unsupported(&self.place, format!("`{}` is not a single number", self.full(key))))
    }
}

/// Converts a scalar to JSON; `None` for an array.
fn json(v: &Value) -> Option<Json> {
    match v {
        // Shortest decimal of the f32, so that 1e-5 does not become 9.99999974737875e-6.
        Value::F32(x) => x.to_string().parse::<f64>().ok().map(|x| json!(x)),
        Value::F64(x) => Some(json!(x)),
        Value::I8(x) => Some(json!(x)),
        Value::I16(x) => Some(json!(x)),
        Value::I32(x) => Some(json!(x)),
        Value::I64(x) => Some(json!(x)),
        Value::Bool(b) => Some(json!(b)),
        Value::String(s) => Some(json!(s)),
        _ => v.to_u64().ok().map(|x| json!(x)),
    }
}
