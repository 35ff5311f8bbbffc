//! What every metadata key of a GGUF file means, and the metadata in `config.json`'s form, so that a family is
//! written once.
//!
//! Keys and what llama.cpp makes of them: <https://github.com/ggml-org/llama.cpp/blob/master/src/llama-arch.cpp>
//! (names), `llama_model_base::load_hparams` in `llama-model.cpp` (defaults), `llama-context.cpp` (YaRN's factor on
//! cos and sin). Keys under the architecture's name that are not listed here are refused by name. Outside `general.`,
//! `tokenizer.`, `split.` and the architecture's own, llama.cpp reads no key of these families, and neither do we.

use super::gguf::Gguf;
use crate::error::{Error, Result};
use crate::family::keys::Const::{self, Bool, Float, Int};
use crate::family::{self, Family};
use crate::spec::Config;
use crate::tensors;
use candle_core::quantized::gguf_file::Value;
use serde_json::{json, Map, Value as Json};

/// What a key means.
#[derive(Debug, Clone, Copy)]
pub enum Meaning {
    /// Stands for this key of `config.json`.
    Is(&'static str),
    /// Read here.
    Used,
    /// Refused with any other value than this one.
    OnlyIf(Const),
    /// Not read, for this reason.
    NoEffect(&'static str),
}

use Meaning::{Is, NoEffect, OnlyIf, Used};

/// Keys under the architecture's name, of every decoder here.
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
    // llama.cpp takes its own values of these in the families here, whatever a file says.
    ("rope.scaling.yarn_ext_factor", OnlyIf(Float(1.0))),
    ("rope.scaling.yarn_attn_factor", OnlyIf(Float(1.0))),
    ("rope.scaling.yarn_beta_fast", OnlyIf(Float(32.0))),
    ("rope.scaling.yarn_beta_slow", OnlyIf(Float(1.0))),
    ("rope.scaling.yarn_log_multiplier", OnlyIf(Float(0.0))),
    ("rope.scaling.finetuned", NoEffect("a record of how it was trained")),
    ("attention.causal", OnlyIf(Bool(true))),
    ("attn_logit_softcapping", OnlyIf(Float(0.0))),
    ("final_logit_softcapping", OnlyIf(Float(0.0))),
    ("expert_count", OnlyIf(Int(0))),
    ("expert_used_count", OnlyIf(Int(0))),
    ("expert_shared_count", OnlyIf(Int(0))),
    ("nextn_predict_layers", OnlyIf(Int(0))),
    ("vocab_size", NoEffect("the embedding's rows decide")),
    ("pooling_type", NoEffect("pools hidden states that are handed out")),
    ("tensor_data_layout", NoEffect("llama.cpp does not read it")),
];

/// Keys that a model must have.
const REQUIRED: &[&str] = &[
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "context_length",
    "attention.layer_norm_rms_epsilon",
];

/// Keys of the tokenizer: one that is not listed, or has another value, gets a warning, since it changes token ids and not
/// the model.
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
    ("tokenizer.chat_templates", NoEffect("the default template is taken")),
    ("tokenizer.ggml.add_eos_token", OnlyIf(Bool(false))),
    ("tokenizer.ggml.add_sep_token", OnlyIf(Bool(false))),
    ("tokenizer.ggml.remove_extra_whitespaces", OnlyIf(Bool(false))),
    ("tokenizer.ggml.normalizer.lowercase", OnlyIf(Bool(false))),
    ("tokenizer.ggml.normalizer.strip_accents", OnlyIf(Bool(false))),
    ("tokenizer.ggml.token_type_count", NoEffect("of models with token types")),
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
    ("tokenizer.ggml.precompiled_charsmap", NoEffect("the families here normalise nothing by it")),
    ("tokenizer.huggingface.json", NoEffect("the lists beside it say the same")),
];

/// The metadata in `config.json`'s form, and warnings.
///
/// # Errors
/// A key that is missing, malformed or not understood, or one with a value that is not supported.
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

    /// Every key under the architecture's name is known, and has a value that is supported.
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
                    let message = format!("key `{key}` is not understood; it may change the model's mathematics");
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
            if let Some(value) = self.number(key)? {
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
        for key in ["attention.value_length", "rope.dimension_count"] {
            match self.number(key)? {
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

    /// As llama.cpp: linear where no type is given, no scaling where the factor is absent or 0, and YaRN's own factor
    /// on cos and sin multiplied by `attn_factor`.
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
                    warnings.push(format!("{}: `{key}` is not followed; token ids may differ", self.place));
                }
                Some(_) => {}
                None if key.starts_with("tokenizer.chat_template.") => {}
                None => warnings.push(format!("{}: `{key}` is not understood; token ids may differ", self.place)),
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

    fn number(&self, key: &str) -> Result<Option<Json>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let number = json(value).filter(Json::is_number);
        number
            .map(Some)
            .ok_or_else(|| Error::unsupported(&self.place, format!("`{}` is not one number", self.full(key))))
    }
}

/// A scalar as JSON.
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
