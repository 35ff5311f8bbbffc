//! GGUF files: candle's bounded header reader, the metadata brought into `config.json`'s form, so that a family is
//! written once. Tensor names are those of [`crate::tensors`].
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use super::TensorInfo;
use crate::error::{At, Error, Result};
use crate::spec::Config;
use crate::tensors;
use candle_core::quantized::gguf_file::{Content, Value};
use serde_json::{json, Map};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// An open GGUF file.
pub struct Gguf {
    path: PathBuf,
    file: Mutex<File>,
    content: Content,
    infos: std::collections::BTreeMap<String, TensorInfo>,
}

/// Types that candle reads but no checkpoint stores, and those it does not know, as ggml numbers them.
const TYPE_NAMES: &[(u32, &str)] = &[
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];
const SUPPORTED: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K";

impl Gguf {
    /// Reads and checks the header.
    pub fn open(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let file = File::open(path).at(&place)?;
        let length = file.metadata().at(&place)?.len();
        refuse_zero_alignment(&place, &file)?;
        let content = Content::read(&mut BufReader::new(&file)).map_err(|e| header_error(&place, &crate::plain(&e)))?;
        let mut infos = std::collections::BTreeMap::new();
        for (name, info) in &content.tensor_infos {
            let what = format!("{place}: {name}");
            let elements = info.shape.dims().iter().try_fold(1usize, |n, &d| n.checked_mul(d));
            let bytes = elements
                .filter(|n| n.is_multiple_of(info.ggml_dtype.block_size()))
                .and_then(|n| (n / info.ggml_dtype.block_size()).checked_mul(info.ggml_dtype.type_size()));
            let end = bytes
                .and_then(|b| content.tensor_data_offset.checked_add(info.offset)?.checked_add(b as u64))
                .ok_or_else(|| Error::format(&what, format!("claims the impossible shape {:?}", info.shape.dims())))?;
            if end > length {
                let short = end - length;
                return Err(Error::format(
                    &what,
                    format!("truncated: its data end {short} bytes past the end of the file"),
                ));
            }
            infos.insert(
                name.clone(),
                TensorInfo { name: name.clone(), shape: info.shape.dims().to_vec(), dtype: Ok(info.ggml_dtype) },
            );
        }
        Ok(Self { path: path.into(), file: Mutex::new(file), content, infos })
    }

    /// The metadata value under `key`.
    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// A string from the metadata.
    pub fn string(&self, key: &str) -> Option<&str> {
        self.metadata(key).and_then(|v| v.to_string().ok()).map(String::as_str)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is stored under `name`.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.infos.get(name)
    }

    /// Copies `length` bytes of `name` (a GGUF name) from `start` on.
    pub fn read_stored(&self, name: &str, start: u64, length: usize) -> Result<Vec<u8>> {
        let place = format!("{}: {name}", self.path.display());
        let entry = self.content.tensor_infos.get(name).ok_or_else(|| Error::tensor(&place, "missing"))?;
        let mut bytes = vec![0; length];
        let mut file = self.file.lock().map_err(|_| Error::format(&place, "an earlier read panicked"))?;
        file.seek(SeekFrom::Start(self.content.tensor_data_offset + entry.offset + start)).at(&place)?;
        file.read_exact(&mut bytes).at(&place)?;
        Ok(bytes)
    }

    /// The metadata in `config.json`'s form.
    pub fn config(&self) -> Result<Config> {
        let place = self.path.display().to_string();
        let arch = self
            .string("general.architecture")
            .ok_or_else(|| Error::format(&place, "`general.architecture` is missing"))?;
        let mut out = Map::new();
        out.insert("model_type".into(), json!(arch));
        let mut copy = |hf: &str, key: &str| -> Result<()> {
            if let Some(v) = self.metadata(key) {
                let v = number(v).ok_or_else(|| Error::unsupported(&place, format!("`{key}` is not one number")))?;
                out.insert(hf.into(), v);
            }
            Ok(())
        };
        for (hf, key) in [
            ("hidden_size", "embedding_length"),
            ("num_hidden_layers", "block_count"),
            ("intermediate_size", "feed_forward_length"),
            ("num_attention_heads", "attention.head_count"),
            ("num_key_value_heads", "attention.head_count_kv"),
            ("head_dim", "attention.key_length"),
            ("max_position_embeddings", "context_length"),
            ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
            ("rope_theta", "rope.freq_base"),
            ("sliding_window", "attention.sliding_window"),
        ] {
            copy(hf, &format!("{arch}.{key}"))?;
        }
        for key in ["bos_token_id", "eos_token_id", "eot_token_id"] {
            copy(key, &format!("tokenizer.ggml.{key}"))?;
        }
        if let Some(kind) = self.string(&format!("{arch}.rope.scaling.type")).filter(|k| *k != "none") {
            let mut scaling = Map::from_iter([("rope_type".to_string(), json!(kind))]);
            for (hf, key) in [("factor", "factor"), ("original_max_position_embeddings", "original_context_length")] {
                if let Some(v) = self.metadata(&format!("{arch}.rope.scaling.{key}")).and_then(number) {
                    scaling.insert(hf.into(), v);
                }
            }
            out.insert("rope_scaling".into(), scaling.into());
        }
        let embed = self
            .info(tensors::EMBED.1)
            .ok_or_else(|| Error::tensor(&place, format!("{} is missing", tensors::EMBED.1)))?;
        out.insert("vocab_size".into(), json!(embed.shape.first()));
        out.insert("tie_word_embeddings".into(), json!(self.info(tensors::HEAD.1).is_none()));
        Config::new(place, out.into())
    }
}

fn number(v: &Value) -> Option<serde_json::Value> {
    match v {
        // Shortest decimal of the f32, so that 1e-5 does not become 9.99999974737875e-6.
        Value::F32(x) => x.to_string().parse::<f64>().ok().map(|x| json!(x)),
        Value::F64(x) => Some(json!(x)),
        Value::I8(_) | Value::I16(_) | Value::I32(_) | Value::I64(_) => match v {
            Value::I8(x) => Some(json!(x)),
            Value::I16(x) => Some(json!(x)),
            Value::I32(x) => Some(json!(x)),
            Value::I64(x) => Some(json!(x)),
            _ => None,
        },
        _ => v.to_u64().ok().map(|x| json!(x)),
    }
}

/// candle 0.11 divides by `general.alignment` without a look at it, so a hostile zero would panic below us.
fn refuse_zero_alignment(place: &str, mut file: &File) -> Result<()> {
    const KEY: &[u8] = b"general.alignment";
    let mut head = vec![];
    file.take(16 << 20).read_to_end(&mut head).at(place)?;
    file.seek(SeekFrom::Start(0)).at(place)?;
    // Every occurrence counts, since a string may hold the key's text too: a four-byte value type, then the value.
    let zero = |rest: &[u8]| rest.len() >= 8 && rest[4..8].iter().all(|b| *b == 0);
    match head.windows(KEY.len()).enumerate().any(|(i, w)| w == KEY && zero(&head[i + KEY.len()..])) {
        true => Err(Error::format(place, "`general.alignment` is 0")),
        false => Ok(()),
    }
}

fn header_error(place: &str, message: &str) -> Error {
    let number = message.split("unknown dtype for tensor ").nth(1).and_then(|n| n.trim().parse::<u32>().ok());
    match number {
        Some(n) => {
            let name = TYPE_NAMES.iter().find(|(k, _)| *k == n).map_or("unknown", |(_, name)| *name);
            Error::unsupported(
                place,
                format!("quantisation type {n} ({name}) is not supported; supported: {SUPPORTED}"),
            )
        }
        None => Error::format(place, format!("not a readable GGUF file: {message}")),
    }
}
