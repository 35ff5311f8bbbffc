//! The text side of a checkpoint: tokenizer, chat template and the tokens that end an answer.

use super::gguf::Gguf;
use crate::error::{At, Error, ErrorKind, Result};
use crate::spec::Config;
use std::path::Path;
use tokenizers::Tokenizer;

/// A chat template and the names it may use.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    /// Jinja source.
    pub source: String,
    /// Text of the token that begins a sequence.
    pub bos: String,
    /// Text of the token that ends it.
    pub eos: String,
}

/// Text to token ids and back.
pub struct Text {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The model's own template, if it has one.
    pub template: Option<ChatTemplate>,
    /// Tokens that end generation.
    pub stop: Vec<u32>,
    /// Put first where the tokenizer itself does not (GGUF files say so in a flag).
    bos: Option<u32>,
}

/// Ends of a turn in the templates of the families here; a model stops at those it knows.
const TURN_ENDS: &[&str] = &["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>"];

impl Text {
    /// From `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and `chat_template.jinja`.
    pub fn from_dir(dir: &Path, config: &Config) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            let message = "tokenizer.json is missing; text needs it (--token-ids does not)";
            return Err(Error::new(ErrorKind::Tokenizer, dir.display(), message));
        }
        let tokenizer = Tokenizer::from_file(&path).map_err(|e| Error::new(ErrorKind::Tokenizer, path.display(), e))?;
        let about = read_json(&dir.join("tokenizer_config.json"))?;
        let generation = read_json(&dir.join("generation_config.json"))?;
        let named = |key: &str| about.as_ref().and_then(|c| token_text(c, key)).unwrap_or_default();
        let (bos, eos) = (named("bos_token"), named("eos_token"));
        let mut stop = config.token_ids("eos_token_id")?;
        if let Some(g) = &generation {
            stop.extend(g.token_ids("eos_token_id")?);
        }
        stop.extend(tokenizer.token_to_id(&eos));
        let file = dir.join("chat_template.jinja");
        let source = match file.exists() {
            true => Some(std::fs::read_to_string(&file).at(file.display())?),
            false => about.as_ref().and_then(template_of),
        };
        let template = source.map(|source| ChatTemplate { source, bos, eos });
        Ok(Self { tokenizer, template, stop, bos: None }.with_turn_ends())
    }

    /// From a GGUF file's metadata.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        let tokenizer = super::gguf_tokenizer::build(file)?;
        let id =
            |key: &str| file.metadata(&format!("tokenizer.ggml.{key}")).and_then(|v| v.to_u64().ok()).map(|n| n as u32);
        let flag = |key: &str| file.metadata(&format!("tokenizer.ggml.{key}")).and_then(|v| v.to_bool().ok());
        let (bos, eos) = (id("bos_token_id"), id("eos_token_id"));
        // SentencePiece models begin with BOS unless they say otherwise; byte-level ones must say so.
        let begins = flag("add_bos_token").unwrap_or(file.string("tokenizer.ggml.model") == Some("llama"));
        let word = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default();
        let template = file.string("tokenizer.chat_template").map(|source| ChatTemplate {
            source: source.into(),
            bos: word(bos),
            eos: word(eos),
        });
        let stop = eos.into_iter().chain(id("eot_token_id")).collect();
        Ok(Self { template, stop, bos: bos.filter(|_| begins), tokenizer }.with_turn_ends())
    }

    fn with_turn_ends(mut self) -> Self {
        self.stop.extend(TURN_ENDS.iter().filter_map(|t| self.tokenizer.token_to_id(t)));
        self.stop.sort_unstable();
        self.stop.dedup();
        self
    }

    /// Token ids of `text`. `special` adds what begins a sequence; a rendered chat template already holds it.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding =
            self.tokenizer.encode_fast(text, special).map_err(|e| Error::new(ErrorKind::Tokenizer, "prompt", e))?;
        let bos = self.bos.filter(|_| special);
        Ok(bos.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    /// Text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true).map_err(|e| Error::new(ErrorKind::Tokenizer, "token ids", e))
    }
}

fn read_json(path: &Path) -> Result<Option<Config>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).at(path.display())?;
    let value = serde_json::from_str(&text).map_err(|e| Error::format(path.display(), e))?;
    Config::new(path.display().to_string(), value).map(Some)
}

/// A special token: a string, or an object with its `content`.
fn token_text(config: &Config, key: &str) -> Option<String> {
    let v = config.get(key)?;
    v.as_str().or_else(|| v.get("content")?.as_str()).map(String::from)
}

/// `chat_template`: one string, or a list of named ones of which `default` is meant.
fn template_of(config: &Config) -> Option<String> {
    let v = config.get("chat_template")?;
    if let Some(s) = v.as_str() {
        return Some(s.into());
    }
    let list = v.as_array()?;
    let default = list.iter().find(|t| t["name"] == "default").or(list.first())?;
    default["template"].as_str().map(String::from)
}
