//! The text side of a checkpoint: tokenizer, chat template and the tokens that end an answer.

use super::chat_template::{self, ChatTemplate};
use super::gguf::Gguf;
use super::special_tokens::{misnumbered, read_object, SpecialTokens};
use crate::error::{At, Error, ErrorKind, Result};
use crate::panics::caught;
use crate::spec::Config;
use serde::Deserialize;
use std::path::Path;
use tokenizers::Tokenizer;

/// Text to token ids and back.
pub struct Text {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Tokens that end generation.
    pub stop: Vec<u32>,
    /// The model's own template, or why it has none.
    template: Result<ChatTemplate, String>,
    /// Put first where the tokenizer itself does not (GGUF files say so in a flag).
    bos: Option<u32>,
    /// The tokenizer's file.
    origin: String,
    /// What a user should know of the tokenizer.
    warnings: Vec<String>,
}

/// Ends of a turn or a text in the templates of the families here; a model stops at those it knows.
pub(super) const TURN_ENDS: &[&str] =
    &["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"];

/// The parts of `tokenizer.json` that are read here; parsing them checks the syntax of the rest.
#[derive(Deserialize)]
struct Head {
    padding: Option<Padding>,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Padding {
    pad_token: Option<String>,
}

#[derive(Deserialize)]
struct Added {
    id: u64,
    content: String,
}

impl Text {
    /// From `tokenizer.json`, and what stands beside it: `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`,
    /// `generation_config.json` and chat templates.
    ///
    /// # Errors
    /// A file that is missing, cannot be read, or is damaged.
    pub fn from_dir(dir: &Path, config: &Config) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            let message = "tokenizer.json is missing; text needs it (--token-ids does not)";
            return Err(Error::new(ErrorKind::Tokenizer, dir.display(), message));
        }
        let (mut tokenizer, head) = load(&path)?;
        let fail = |e: String| Error::new(ErrorKind::Tokenizer, path.display(), e);
        let about = read_object(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let mut special = SpecialTokens::of_dir(dir, &about)?;
        if let Some(pad) = head.padding.and_then(|p| p.pad_token) {
            special.name_by_default("pad_token", &pad);
        }
        // Both cut or fill a text without a word; transformers applies neither unless asked to.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| fail(e.to_string()))?;
        if about.get("split_special_tokens").is_some_and(|v| v == true) {
            tokenizer.set_encode_special_tokens(true);
        }
        let mut warnings: Vec<_> =
            head.added_tokens.iter().filter_map(|t| misnumbered(&tokenizer, &t.content, t.id)).collect();
        let template = chat_template::of_dir(dir, &about)?.map(|(source, origin)| ChatTemplate {
            source,
            origin,
            tokens: special.names.clone(),
        });
        let eos = special.get("eos_token").map(String::from);
        let added = caught(|| special.add_to(&mut tokenizer)).map_err(fail)?;
        warnings.extend(added.map_err(|e| fail(e.to_string()))?);

        let mut stop = config.token_ids("eos_token_id")?;
        let generation = dir.join("generation_config.json");
        if let Some(keys) = read_object(&generation)? {
            stop.extend(Config::new(generation.display().to_string(), keys.into())?.token_ids("eos_token_id")?);
        }
        stop.extend(eos.and_then(|eos| tokenizer.token_to_id(&eos)));
        let origin = path.display().to_string();
        let warnings = warnings.into_iter().map(|w| format!("{origin}: {w}")).collect();
        Ok(Self { tokenizer, template, stop, bos: None, origin, warnings }.with_turn_ends())
    }

    /// From a GGUF file's metadata.
    ///
    /// # Errors
    /// A tokenizer that is missing, damaged, or of an unknown kind.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        let origin = file.path().display().to_string();
        let fail = |e: String| Error::new(ErrorKind::Tokenizer, &origin, e);
        let tokenizer = caught(|| super::gguf_tokenizer::build(file)).map_err(fail)??;
        let id = |key: &str| file.metadata(&format!("tokenizer.ggml.{key}")).and_then(|v| v.to_u64().ok());
        let id =
            |key: &str| id(key).and_then(|n| u32::try_from(n).ok()).filter(|n| tokenizer.id_to_token(*n).is_some());
        let pieces = file.string("tokenizer.ggml.model") == Some("llama");
        let pre = file.string("tokenizer.ggml.pre");
        // SentencePiece's own numbers, where the file gives none.
        let usual = |n: u32| Some(n).filter(|n| pieces && tokenizer.id_to_token(*n).is_some());
        let (bos, eos) = (id("bos_token_id").or(usual(1)), id("eos_token_id").or(usual(2)));
        let flag = file.metadata("tokenizer.ggml.add_bos_token").and_then(|v| v.to_bool().ok());
        let begins = flag.unwrap_or(pieces || pre.is_some_and(super::gguf_tokenizer::begins_with_bos));
        let word = |id: Option<u32>| tokenizer.id_to_token(id?);
        let template = file.string("tokenizer.chat_template").map(|source| ChatTemplate {
            source: source.into(),
            origin: origin.clone(),
            tokens: [
                ("bos_token", bos),
                ("eos_token", eos),
                ("unk_token", id("unknown_token_id")),
                // GGUF's own spelling.
                ("sep_token", id("seperator_token_id")),
                ("pad_token", id("padding_token_id")),
                ("cls_token", id("cls_token_id")),
                ("mask_token", id("mask_token_id")),
            ]
            .into_iter()
            .filter_map(|(name, id)| Some((name.to_string(), word(id)?)))
            .collect(),
        });
        let stop = eos.into_iter().chain(id("eot_token_id")).chain(id("eom_token_id")).collect();
        let mut warnings = vec![];
        if !pieces && pre.is_none() {
            warnings.push(format!(
                "{origin}: `tokenizer.ggml.pre` is missing, so text is split into words as GPT-2 does; a Llama 3 file made \
                 before May 2024 gets other tokens than its own tokenizer gives: convert the model again"
            ));
        }
        let template = template.ok_or_else(|| "this checkpoint has no chat template; leave --chat out".into());
        Ok(Self { template, stop, bos: bos.filter(|_| begins), tokenizer, origin, warnings }.with_turn_ends())
    }

    fn with_turn_ends(mut self) -> Self {
        self.stop.extend(TURN_ENDS.iter().filter_map(|t| self.tokenizer.token_to_id(t)));
        self.stop.sort_unstable();
        self.stop.dedup();
        self
    }

    /// The model's own chat template.
    ///
    /// # Errors
    /// None, or several of which none is the default.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().map_err(|why| Error::usage("--chat", why))
    }

    /// What a user should know of the tokenizer.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Token ids of `text`. `special` adds what begins a sequence; a rendered chat template already holds it.
    ///
    /// # Errors
    /// A tokenizer that fails on it.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let fail = |e: String| Error::new(ErrorKind::Tokenizer, &self.origin, format!("cannot encode the text: {e}"));
        let encoding = caught(|| self.tokenizer.encode_fast(text, special)).map_err(fail)?;
        let encoding = encoding.map_err(|e| fail(e.to_string()))?;
        let bos = self.bos.filter(|_| special);
        Ok(bos.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    /// Text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// A tokenizer that fails on them.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let fail = |e: String| Error::new(ErrorKind::Tokenizer, &self.origin, format!("cannot decode token ids: {e}"));
        caught(|| self.tokenizer.decode(ids, true)).map_err(fail)?.map_err(|e| fail(e.to_string()))
    }

    /// The token called `id`, if decoding does not leave it out.
    pub(super) fn visible_token(&self, id: u32) -> Option<String> {
        let token = self.tokenizer.id_to_token(id)?;
        (!self.tokenizer.get_added_vocabulary().is_special_token(&token)).then_some(token)
    }
}

/// Reads `tokenizer.json`. The tokenizers library panics on some damaged files, so the syntax is checked first and what still panics
/// becomes an error.
fn load(path: &Path) -> Result<(Tokenizer, Head)> {
    let fail = |e: String| Error::new(ErrorKind::Tokenizer, path.display(), e);
    let bytes = std::fs::read(path).at(path.display())?;
    let head: Head = serde_json::from_slice(&bytes).map_err(|e| fail(e.to_string()))?;
    let tokenizer = caught(|| Tokenizer::from_bytes(&bytes)).map_err(fail)?;
    Ok((tokenizer.map_err(|e| fail(e.to_string()))?, head))
}
