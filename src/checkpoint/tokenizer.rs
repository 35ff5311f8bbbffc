//! A checkpoint's tokenizer with its chat template and stop tokens.

use super::chat_template::{self, ChatTemplate};
use super::gguf::Gguf;
use super::special_tokens::{misnumbered, read_object, SpecialTokens};
use crate::error::{At, Error, ErrorKind, Result};
use crate::panics::catch_panic;
use crate::spec::Config;
use serde::Deserialize;
use std::path::Path;
use tokenizers::Tokenizer;

/// A tokenizer with the chat template and stop tokens that a checkpoint defines.
pub struct TextTokenizer {
    /// Tokenizer of the `tokenizers` library.
    pub tokenizer: Tokenizer,
    /// Token ids that end generation.
    pub stop: Vec<u32>,
    /// Chat template, or why there is none.
    template: Result<ChatTemplate, String>,
    /// BOS token to prepend where the tokenizer itself does not (`tokenizer.ggml.add_bos_token` in GGUF files).
    bos: Option<u32>,
    /// Path of the tokenizer's file, for errors.
    origin: String,
    /// Warnings about the tokenizer.
    warnings: Vec<String>,
}

/// Tokens that end a turn or a text in the supported families; those in a model's vocabulary end generation.
pub(super) const TURN_ENDS: &[&str] =
    &["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"];

/// The parts of `tokenizer.json` that are read here; parsing them checks the syntax of the whole file.
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

impl TextTokenizer {
    /// Reads `tokenizer.json` in `dir` and, where present, `tokenizer_config.json`, `special_tokens_map.json`,
    /// `added_tokens.json`, `generation_config.json` and chat templates.
    ///
    /// # Errors
    /// `tokenizer.json` is missing; a file cannot be read or is malformed.
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
        // transformers pads and truncates only on request, whatever the file says.
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
        let added = catch_panic(|| special.add_to(&mut tokenizer)).map_err(fail)?;
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

    /// Builds the tokenizer from a GGUF file's metadata.
    ///
    /// # Errors
    /// The tokenizer is missing, malformed, or of an unsupported kind.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        let origin = file.path().display().to_string();
        let fail = |e: String| Error::new(ErrorKind::Tokenizer, &origin, e);
        let tokenizer = catch_panic(|| super::gguf_tokenizer::build(file)).map_err(fail)??;
        let id = |key: &str| file.metadata(&format!("tokenizer.ggml.{key}")).and_then(|v| v.to_u64().ok());
        let id =
            |key: &str| id(key).and_then(|n| u32::try_from(n).ok()).filter(|n| tokenizer.id_to_token(*n).is_some());
        let pieces = file.string("tokenizer.ggml.model") == Some("llama");
        let pre = file.string("tokenizer.ggml.pre");
        // SentencePiece's default ids, where the file gives none.
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
                // Misspelt in the GGUF specification.
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
                "{origin}: `tokenizer.ggml.pre` is missing, so GPT-2's pre-tokenizer is used; for a Llama 3 file made before \
                 May 2024 token ids are wrong: convert the model again"
            ));
        }
        let template = template.ok_or_else(|| "this checkpoint has no chat template; run without --chat".into());
        Ok(Self { template, stop, bos: bos.filter(|_| begins), tokenizer, origin, warnings }.with_turn_ends())
    }

    fn with_turn_ends(mut self) -> Self {
        self.stop.extend(TURN_ENDS.iter().filter_map(|t| self.tokenizer.token_to_id(t)));
        self.stop.sort_unstable();
        self.stop.dedup();
        self
    }

    /// Returns the checkpoint's chat template.
    ///
    /// # Errors
    /// The checkpoint has no chat template, or several and none named `default`.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().map_err(|why| Error::usage("--chat", why))
    }

    /// Returns warnings about the tokenizer.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Encodes `text`. `special` adds special tokens such as BOS, which a rendered chat template already contains.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let fail = |e: String| Error::new(ErrorKind::Tokenizer, &self.origin, format!("cannot encode the text: {e}"));
        let encoding = catch_panic(|| self.tokenizer.encode_fast(text, special)).map_err(fail)?;
        let encoding = encoding.map_err(|e| fail(e.to_string()))?;
        let bos = self.bos.filter(|_| special);
        Ok(bos.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    /// Decodes `ids`, without special tokens.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let fail = |e: String| Error::new(ErrorKind::Tokenizer, &self.origin, format!("cannot decode token ids: {e}"));
        catch_panic(|| self.tokenizer.decode(ids, true)).map_err(fail)?.map_err(|e| fail(e.to_string()))
    }

    /// Returns the token with this id, unless decoding skips it as a special token.
    pub(super) fn visible_token(&self, id: u32) -> Option<String> {
        let token = self.tokenizer.id_to_token(id)?;
        (!self.tokenizer.get_added_vocabulary().is_special_token(&token)).then_some(token)
    }
}

/// Reads `tokenizer.json`. The tokenizers library panics on some malformed files, so the JSON syntax is checked first
/// and remaining panics become errors.
fn load(path: &Path) -> Result<(Tokenizer, Head)> {
    let fail = |e: String| Error::new(ErrorKind::Tokenizer, path.display(), e);
    let bytes = std::fs::read(path).at(path.display())?;
    let head: Head = serde_json::from_slice(&bytes).map_err(|e| fail(e.to_string()))?;
    let tokenizer = catch_panic(|| Tokenizer::from_bytes(&bytes)).map_err(fail)?;
    Ok((tokenizer.map_err(|e| fail(e.to_string()))?, head))
}
