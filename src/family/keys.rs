//! Meaning of every key of a `config.json`, per model type: read, supported with one value only, or without effect on
//! the logits. The table of a model type is in its family's file; the groups that families share are here.
//!
//! A key that is not in the table is refused. Defaults are those of transformers' configuration classes;
//! `tests/it/unread.rs` compares keys and defaults with the classes, as recorded by `scripts/dump_config_keys.py`.

use super::Quantisation;
use crate::error::{Error, Result};
use crate::spec::Config;
use serde_json::{json, Value};

/// Meaning of a configuration key.
#[derive(Debug, Clone, Copy)]
pub enum Meaning {
    /// Read by the family, with this default.
    Used(Const),
    /// An object with its own table of keys.
    Section(Table),
    /// Supported with this value only.
    OnlyIf(Const),
    /// Quantisation of the weights: MLX's affine one is read, others are refused with the method's name.
    Quantised,
    /// Ignored, for this reason.
    NoEffect(&'static str),
}

/// A JSON scalar.
#[derive(Debug, Clone, Copy)]
pub enum Const {
    /// `null`, which counts as absent.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(u64),
    /// A number.
    Float(f64),
    /// A string.
    Text(&'static str),
}

/// A key and its meaning.
pub type Row = (&'static str, Meaning);

/// The keys of a model type, in groups: its own first, then shared ones.
pub type Table = &'static [&'static [Row]];

pub(super) use Const::{Bool, Float, Int, Null, Text};
pub(super) use Meaning::{NoEffect, OnlyIf, Quantised, Section, Used};

const RUN: &str = "a runtime setting of transformers";
const GENERATION: &str = "a default of transformers' generate()";
pub(super) const TRAINING: &str = "used in training only";
pub(super) const RECORD: &str = "records how the file was made";
const TOKENIZER: &str = "read from the tokenizer's files";
const LABELS: &str = "for classification heads";
const STORED: &str = "each tensor stores its own type";
const NO_WINDOW: &str = "used only if `use_sliding_window` is true";

/// Keys that all families share.
pub(super) const DECODER: &[Row] = &[
    ("rms_norm_eps", Used(Float(1e-6))),
    ("initializer_range", NoEffect(TRAINING)),
    ("attention_dropout", NoEffect(TRAINING)),
    ("partial_rotary_factor", OnlyIf(Float(1.0))),
    ("max_sequence_length", NoEffect(RECORD)),
];

/// Keys of families with one rotary embedding for all layers.
pub(super) const ONE_ROPE: &[Row] = &[
    ("rope_theta", Used(Float(10_000.0))),
    ("rope_scaling", Section(ROPE)),
    ("rope_parameters", Section(ROPE)),
    ("original_max_position_embeddings", Used(Null)),
];

/// A RoPE section.
pub(super) const ROPE: Table = &[ROPE_KEYS];

/// Keys of a RoPE section.
pub(super) const ROPE_KEYS: &[Row] = &[
    ("rope_type", Used(Null)),
    ("type", Used(Null)),
    ("rope_theta", Used(Null)),
    ("factor", Used(Null)),
    ("original_max_position_embeddings", Used(Null)),
    ("low_freq_factor", Used(Null)),
    ("high_freq_factor", Used(Null)),
    ("attention_factor", Used(Null)),
    ("mscale", Used(Null)),
    ("mscale_all_dim", Used(Null)),
    ("beta_fast", Used(Null)),
    ("beta_slow", Used(Null)),
    ("truncate", Used(Null)),
    ("partial_rotary_factor", OnlyIf(Float(1.0))),
    ("finetuned", NoEffect(RECORD)),
];

/// Keys of sliding-window attention, which Qwen models turn off with `use_sliding_window`.
pub(super) const QWEN_WINDOW: &[Row] = &[
    ("layer_types", Used(Null)),
    ("use_sliding_window", OnlyIf(Bool(false))),
    ("sliding_window", NoEffect(NO_WINDOW)),
    ("max_window_layers", NoEffect(NO_WINDOW)),
];

/// Keys of transformers' base class, and keys that other software adds to any configuration.
pub(super) const GENERIC: &[Row] = &[
    ("model_type", Used(Null)),
    ("architectures", NoEffect("`model_type` and the tensors are used")),
    ("auto_map", NoEffect("the checkpoint's own code is not run; transformers' class is implemented")),
    ("quantization_config", Quantised),
    ("compression_config", Quantised),
    ("quantization", Quantised),
    ("is_encoder_decoder", OnlyIf(Bool(false))),
    ("add_cross_attention", OnlyIf(Bool(false))),
    ("cross_attention_hidden_size", OnlyIf(Null)),
    ("per_layer_config", OnlyIf(Null)),
    ("is_decoder", NoEffect("all supported families are decoders")),
    ("tie_encoder_decoder", NoEffect("for encoder-decoder models")),
    ("tie_last_hidden_states", NoEffect("for models that output hidden states")),
    ("pruned_heads", NoEffect("transformers does not prune heads of these families")),
    ("chunk_size_feed_forward", NoEffect("does not change results")),
    ("dtype", NoEffect(STORED)),
    ("torch_dtype", NoEffect(STORED)),
    ("transformers_version", NoEffect(RECORD)),
    ("_name_or_path", NoEffect(RECORD)),
    ("name_or_path", NoEffect(RECORD)),
    ("_commit_hash", NoEffect(RECORD)),
    ("unsloth_version", NoEffect(RECORD)),
    ("unsloth_fixed", NoEffect(RECORD)),
    ("transformers.js_config", NoEffect(RUN)),
    ("use_cache", NoEffect(RUN)),
    ("return_dict", NoEffect(RUN)),
    ("keys_to_ignore_at_inference", NoEffect(RUN)),
    ("output_attentions", NoEffect(RUN)),
    ("output_hidden_states", NoEffect(RUN)),
    ("torchscript", NoEffect(RUN)),
    ("use_bfloat16", NoEffect(RUN)),
    ("attn_implementation", NoEffect(RUN)),
    ("_attn_implementation", NoEffect(RUN)),
    ("_attn_implementation_autoset", NoEffect(RUN)),
    ("_attn_implementation_internal", NoEffect(RUN)),
    ("_flash_attn_2_enabled", NoEffect(RUN)),
    ("experts_implementation", NoEffect(RUN)),
    ("cache_implementation", NoEffect(RUN)),
    ("tf_legacy_loss", NoEffect(TRAINING)),
    ("neftune_noise_alpha", NoEffect(TRAINING)),
    ("gradient_checkpointing", NoEffect(TRAINING)),
    ("id2label", NoEffect(LABELS)),
    ("label2id", NoEffect(LABELS)),
    ("num_labels", NoEffect(LABELS)),
    ("problem_type", NoEffect(LABELS)),
    ("finetuning_task", NoEffect(RECORD)),
    ("task_specific_params", NoEffect(GENERATION)),
    ("tokenizer_class", NoEffect(TOKENIZER)),
    ("prefix", NoEffect(TOKENIZER)),
    ("bos_token_id", NoEffect(TOKENIZER)),
    ("eos_token_id", NoEffect(TOKENIZER)),
    ("pad_token_id", NoEffect(TOKENIZER)),
    ("sep_token_id", NoEffect(TOKENIZER)),
    ("decoder_start_token_id", NoEffect(TOKENIZER)),
    ("assistant_confidence_threshold", NoEffect(GENERATION)),
    ("assistant_lookbehind", NoEffect(GENERATION)),
    ("bad_words_ids", NoEffect(GENERATION)),
    ("begin_suppress_tokens", NoEffect(GENERATION)),
    ("diversity_penalty", NoEffect(GENERATION)),
    ("do_sample", NoEffect(GENERATION)),
    ("early_stopping", NoEffect(GENERATION)),
    ("encoder_no_repeat_ngram_size", NoEffect(GENERATION)),
    ("encoder_repetition_penalty", NoEffect(GENERATION)),
    ("epsilon_cutoff", NoEffect(GENERATION)),
    ("eta_cutoff", NoEffect(GENERATION)),
    ("exponential_decay_length_penalty", NoEffect(GENERATION)),
    ("forced_bos_token_id", NoEffect(GENERATION)),
    ("forced_eos_token_id", NoEffect(GENERATION)),
    ("length_penalty", NoEffect(GENERATION)),
    ("max_length", NoEffect(GENERATION)),
    ("max_new_tokens", NoEffect(GENERATION)),
    ("min_length", NoEffect(GENERATION)),
    ("no_repeat_ngram_size", NoEffect(GENERATION)),
    ("num_assistant_tokens", NoEffect(GENERATION)),
    ("num_assistant_tokens_schedule", NoEffect(GENERATION)),
    ("num_beam_groups", NoEffect(GENERATION)),
    ("num_beams", NoEffect(GENERATION)),
    ("num_return_sequences", NoEffect(GENERATION)),
    ("output_scores", NoEffect(GENERATION)),
    ("remove_invalid_values", NoEffect(GENERATION)),
    ("repetition_penalty", NoEffect(GENERATION)),
    ("return_dict_in_generate", NoEffect(GENERATION)),
    ("suppress_tokens", NoEffect(GENERATION)),
    ("target_lookbehind", NoEffect(GENERATION)),
    ("temperature", NoEffect(GENERATION)),
    ("top_k", NoEffect(GENERATION)),
    ("top_p", NoEffect(GENERATION)),
    ("typical_p", NoEffect(GENERATION)),
];

/// Returns the meaning of `key`, or `None` if the table does not have it.
pub fn meaning(table: Table, key: &str) -> Option<Meaning> {
    table.iter().copied().flatten().find(|(name, _)| *name == key).map(|(_, meaning)| *meaning)
}

/// Checks `config` against `table` and returns it with defaults filled in.
///
/// # Errors
/// A key is not in the table, or has an unsupported value.
pub fn complete(config: &Config, table: Table) -> Result<Config> {
    check(config, table)?;
    let mut full = config.clone();
    for (key, meaning) in table.iter().copied().flatten() {
        if let Used(default) = meaning {
            full.set_missing(key, default.json());
        }
    }
    Ok(full)
}

fn check(config: &Config, table: Table) -> Result<()> {
    let mut unknown = vec![];
    for (key, value) in config.entries() {
        match meaning(table, key) {
            Some(Used(_) | NoEffect(_)) => {}
            Some(Section(table)) => config.section(key)?.map_or(Ok(()), |s| check(&s, table))?,
            Some(OnlyIf(wanted)) if wanted.is(value) => {}
            Some(OnlyIf(wanted)) => {
                let message = format!("`{key}` is {}; supported: {}", brief(value), wanted.json());
                return Err(Error::unsupported(config.origin(), message));
            }
            Some(Quantised) if Quantisation::read(config)?.is_none() => return Err(quantised(config, key, value)),
            Some(Quantised) => {}
            None => unknown.push(format!("`{key}`")),
        }
    }
    match unknown.as_slice() {
        [] => Ok(()),
        [key] => {
            let message = format!("unknown key {key}; it may change the model's outputs");
            Err(Error::unsupported(config.origin(), message))
        }
        keys => {
            let message = format!("unknown keys {}; they may change the model's outputs", keys.join(", "));
            Err(Error::unsupported(config.origin(), message))
        }
    }
}

fn quantised(config: &Config, key: &str, value: &Value) -> Error {
    let method = match value["quant_method"].as_str() {
        Some(method) => format!("by {method} "),
        None if key == "quantization" => "by MLX ".into(),
        None => String::new(),
    };
    let message =
        format!("`{key}`: weights quantised {method}are not supported; use the original weights or a GGUF file");
    Error::unsupported(config.origin(), message)
}

/// Formats the first 60 characters of a value's JSON.
fn brief(value: &Value) -> String {
    value.to_string().chars().take(60).collect()
}

impl Const {
    /// Converts the value to JSON.
    pub fn json(&self) -> Value {
        match *self {
            Null => Value::Null,
            Bool(b) => json!(b),
            Int(n) => json!(n),
            Float(x) => json!(x),
            Text(s) => json!(s),
        }
    }

    /// Whether `value` is equal; 1 and 1.0 are.
    pub fn is(&self, value: &Value) -> bool {
        match (self.json().as_f64(), value.as_f64()) {
            (Some(a), Some(b)) => a == b,
            _ => self.json() == *value,
        }
    }
}
