//! What every key of a `config.json` means, per model type: read, bound to one value, or without effect on the logits.
//!
//! A key outside its table is refused by name. Defaults are those of transformers' configuration classes;
//! `tests/unread.rs` compares keys and defaults with the classes, as recorded by `scripts/dump_config_keys.py`.

use crate::error::{Error, Result};
use crate::spec::Config;
use serde_json::{json, Value};

/// What a key means.
#[derive(Debug, Clone, Copy)]
pub enum Meaning {
    /// Read by the family; where a configuration leaves the key out, this value stands.
    Used(Const),
    /// An object whose own keys have a table.
    Section(Table),
    /// Refused with any other value than this one.
    OnlyIf(Const),
    /// Says how the weights are quantised: refused with the method's name.
    Quantised,
    /// Not read, for this reason.
    NoEffect(&'static str),
}

/// A plain value.
#[derive(Debug, Clone, Copy)]
pub enum Const {
    /// `null`, which counts as absent.
    Null,
    /// A truth value.
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

/// The rows of a model type, own ones first.
pub type Table = &'static [&'static [Row]];

use Const::{Bool, Float, Int, Null, Text};
use Meaning::{NoEffect, OnlyIf, Quantised, Section, Used};

const RUN: &str = "a setting of the run";
const GENERATION: &str = "a default of transformers' generation";
const TRAINING: &str = "used in training alone";
const RECORD: &str = "a record of where the file comes from";
const TOKENIZER: &str = "read with the tokenizer";
const LABELS: &str = "names the classes of a classifier";
const STORED: &str = "every tensor's own type decides";
const IMAGES: &str = "concerns images, which are not read";
const NO_WINDOW: &str = "transformers reads it where `use_sliding_window` is true";

/// transformers' `LlamaConfig`.
pub const LLAMA: Table = &[
    &[
        ("vocab_size", Used(Int(32_000))),
        ("hidden_size", Used(Int(4096))),
        ("intermediate_size", Used(Int(11_008))),
        ("num_hidden_layers", Used(Int(32))),
        ("num_attention_heads", Used(Int(32))),
        ("num_key_value_heads", Used(Null)),
        ("head_dim", Used(Null)),
        ("hidden_act", Used(Text("silu"))),
        ("max_position_embeddings", Used(Int(2048))),
        ("tie_word_embeddings", Used(Bool(false))),
        ("attention_bias", Used(Bool(false))),
        ("mlp_bias", Used(Bool(false))),
        ("pretraining_tp", NoEffect("splits products, whose sums stay the same")),
        ("rope_interleaved", OnlyIf(Bool(false))),
        ("is_llama_config", NoEffect(RECORD)),
    ],
    ONE_ROPE,
    DECODER,
    GENERIC,
];

/// transformers' `Qwen2Config`.
pub const QWEN2: Table = &[
    &[
        ("vocab_size", Used(Int(151_936))),
        ("hidden_size", Used(Int(4096))),
        ("intermediate_size", Used(Int(22_016))),
        ("num_hidden_layers", Used(Int(32))),
        ("num_attention_heads", Used(Int(32))),
        ("num_key_value_heads", Used(Int(32))),
        ("head_dim", Used(Null)),
        ("hidden_act", Used(Text("silu"))),
        ("max_position_embeddings", Used(Int(32_768))),
        ("tie_word_embeddings", Used(Bool(false))),
        ("use_mrope", OnlyIf(Bool(false))),
    ],
    QWEN_WINDOW,
    ONE_ROPE,
    DECODER,
    GENERIC,
];

/// transformers' `Qwen3Config`.
pub const QWEN3: Table = &[
    &[
        ("vocab_size", Used(Int(151_936))),
        ("hidden_size", Used(Int(4096))),
        ("intermediate_size", Used(Int(22_016))),
        ("num_hidden_layers", Used(Int(32))),
        ("num_attention_heads", Used(Int(32))),
        ("num_key_value_heads", Used(Int(32))),
        ("head_dim", Used(Int(128))),
        ("hidden_act", Used(Text("silu"))),
        ("max_position_embeddings", Used(Int(32_768))),
        ("tie_word_embeddings", Used(Bool(false))),
        ("attention_bias", Used(Bool(false))),
    ],
    QWEN_WINDOW,
    ONE_ROPE,
    DECODER,
    GENERIC,
];

/// transformers' `Gemma3TextConfig`.
pub const GEMMA3: Table = &[
    &[
        ("vocab_size", Used(Int(262_208))),
        ("hidden_size", Used(Int(2304))),
        ("intermediate_size", Used(Int(9216))),
        ("num_hidden_layers", Used(Int(26))),
        ("num_attention_heads", Used(Int(8))),
        ("num_key_value_heads", Used(Int(4))),
        ("head_dim", Used(Int(256))),
        ("hidden_activation", Used(Text("gelu_pytorch_tanh"))),
        ("hidden_act", OnlyIf(Text("gelu_pytorch_tanh"))),
        ("max_position_embeddings", Used(Int(131_072))),
        ("tie_word_embeddings", Used(Bool(true))),
        ("attention_bias", Used(Bool(false))),
        ("query_pre_attn_scalar", Used(Int(256))),
        ("sliding_window", Used(Int(4096))),
        ("layer_types", Used(Null)),
        ("sliding_window_pattern", Used(Int(6))),
        ("_sliding_window_pattern", NoEffect("`layer_types` or `sliding_window_pattern` decides")),
        ("final_logit_softcapping", OnlyIf(Null)),
        ("attn_logit_softcapping", OnlyIf(Null)),
        ("use_bidirectional_attention", OnlyIf(Bool(false))),
        ("rope_theta", Used(Float(1_000_000.0))),
        ("rope_local_base_freq", Used(Float(10_000.0))),
        ("rope_scaling", Section(ROPE)),
        ("rope_parameters", Section(&[&[("full_attention", Section(ROPE)), ("sliding_attention", Section(ROPE))]])),
    ],
    DECODER,
    GENERIC,
];

/// transformers' `Gemma3Config`, around [`GEMMA3`].
pub const GEMMA3_WRAPPER: Table = &[
    &[
        ("text_config", Section(GEMMA3)),
        ("vision_config", NoEffect(IMAGES)),
        ("tie_word_embeddings", Used(Bool(true))),
        ("mm_tokens_per_image", NoEffect(IMAGES)),
        ("boi_token_index", NoEffect(IMAGES)),
        ("eoi_token_index", NoEffect(IMAGES)),
        ("image_token_index", NoEffect(IMAGES)),
        ("boi_token_id", NoEffect(IMAGES)),
        ("eoi_token_id", NoEffect(IMAGES)),
        ("image_token_id", NoEffect(IMAGES)),
        ("initializer_range", NoEffect(TRAINING)),
    ],
    GENERIC,
];

/// Keys of every decoder here.
const DECODER: &[Row] = &[
    ("rms_norm_eps", Used(Float(1e-6))),
    ("initializer_range", NoEffect(TRAINING)),
    ("attention_dropout", NoEffect(TRAINING)),
    ("partial_rotary_factor", OnlyIf(Float(1.0))),
    ("max_sequence_length", NoEffect(RECORD)),
];

/// Keys of families with one rotary embedding for all layers.
const ONE_ROPE: &[Row] = &[
    ("rope_theta", Used(Float(10_000.0))),
    ("rope_scaling", Section(ROPE)),
    ("rope_parameters", Section(ROPE)),
    ("original_max_position_embeddings", Used(Null)),
];

/// Keys of one set of rotary parameters.
const ROPE: Table = &[&[
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
]];

/// Windows, which the Qwen families turn off by one key.
const QWEN_WINDOW: &[Row] = &[
    ("layer_types", Used(Null)),
    ("use_sliding_window", OnlyIf(Bool(false))),
    ("sliding_window", NoEffect(NO_WINDOW)),
    ("max_window_layers", NoEffect(NO_WINDOW)),
];

/// Keys that transformers' base class knows, and what tools add to any configuration.
const GENERIC: &[Row] = &[
    ("model_type", Used(Null)),
    ("architectures", NoEffect("`model_type` and the tensors decide")),
    ("auto_map", NoEffect("transformers' own class is computed, not code beside the checkpoint")),
    ("quantization_config", Quantised),
    ("compression_config", Quantised),
    ("quantization", Quantised),
    ("is_encoder_decoder", OnlyIf(Bool(false))),
    ("add_cross_attention", OnlyIf(Bool(false))),
    ("cross_attention_hidden_size", OnlyIf(Null)),
    ("per_layer_config", OnlyIf(Null)),
    ("is_decoder", NoEffect("every family here is a decoder")),
    ("tie_encoder_decoder", NoEffect("there is no encoder")),
    ("tie_last_hidden_states", NoEffect("concerns hidden states that are handed out")),
    ("pruned_heads", NoEffect("transformers prunes no heads of these families")),
    ("chunk_size_feed_forward", NoEffect("the same result in pieces")),
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

/// What `key` means, if the table has it.
pub fn meaning(table: Table, key: &str) -> Option<Meaning> {
    table.iter().copied().flatten().find(|(name, _)| *name == key).map(|(_, meaning)| *meaning)
}

/// `config` with the defaults of keys that it leaves out.
///
/// # Errors
/// A key that no row names, or one with a value that its row forbids.
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
            Some(Quantised) => return Err(quantised(config, key, value)),
            None => unknown.push(format!("`{key}`")),
        }
    }
    match unknown.as_slice() {
        [] => Ok(()),
        [key] => {
            let message = format!("key {key} is not understood; it may change the model's mathematics");
            Err(Error::unsupported(config.origin(), message))
        }
        keys => {
            let message =
                format!("keys {} are not understood; they may change the model's mathematics", keys.join(", "));
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
        format!("`{key}`: weights quantised {method}cannot be read; give the original weights or a GGUF file");
    Error::unsupported(config.origin(), message)
}

/// A value's JSON, cut where it is long.
fn brief(value: &Value) -> String {
    value.to_string().chars().take(60).collect()
}

impl Const {
    /// As JSON.
    pub fn json(&self) -> Value {
        match *self {
            Null => Value::Null,
            Bool(b) => json!(b),
            Int(n) => json!(n),
            Float(x) => json!(x),
            Text(s) => json!(s),
        }
    }

    /// Whether `value` says the same; numbers are compared as numbers.
    pub fn is(&self, value: &Value) -> bool {
        match (self.json().as_f64(), value.as_f64()) {
            (Some(a), Some(b)) => a == b,
            _ => self.json() == *value,
        }
    }
}
