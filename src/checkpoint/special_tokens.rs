//! Special and added tokens defined outside `tokenizer.json`, by the rules of transformers 5.
//!
//! `tokenizer_config.json` names the special tokens. With an `added_tokens_decoder` it also lists every added token;
//! without one, `special_tokens_map.json` and `added_tokens.json` are read as well. Source:
//! `PreTrainedTokenizerBase._from_pretrained` in
//! <https://github.com/huggingface/transformers/blob/main/src/transformers/tokenization_utils_base.py>.

use crate::error::{At, Error, Result};
use serde_json::{Map, Value};
use std::path::Path;
use tokenizers::{AddedToken, Tokenizer};

/// Names of special tokens in the order in which tokens without an id get one; other keys that end in `_token` follow.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A token and the id that a file gives it.
type Listed = (AddedToken, Option<u64>);

/// Special and added tokens of a checkpoint's directory, without those of `tokenizer.json`.
#[derive(Debug, Default)]
pub struct SpecialTokens {
    /// Special tokens as (name in chat templates, text).
    pub names: Vec<(String, String)>,
    /// Tokens with an id, lowest id first.
    listed: Vec<Listed>,
    /// Special tokens without an id.
    unlisted: Vec<AddedToken>,
}

/// Reads a JSON object; returns `None` if the file does not exist.
///
/// # Errors
/// The file cannot be read or is not a JSON object.
pub fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).at(path.display())?;
    match serde_json::from_str(&text).map_err(|e| Error::format(path.display(), e))? {
        Value::Object(map) => Ok(Some(map)),
        _ => Err(Error::format(path.display(), "is not a JSON object")),
    }
}

impl SpecialTokens {
    /// Reads the tokens of a checkpoint's directory; `config` holds the keys of its `tokenizer_config.json`.
    ///
    /// # Errors
    /// A file cannot be read; a token has no text or no valid id.
    pub fn of_dir(dir: &Path, config: &Map<String, Value>) -> Result<Self> {
        let mut keys = config.clone();
        let place = dir.join("tokenizer_config.json");
        let mut this = Self::default();
        if let Some(decoder) = config.get("added_tokens_decoder") {
            this.listed = decoder_tokens(decoder).map_err(|e| Error::format(place.display(), e))?;
            this.name(&keys).map_err(|e| Error::format(place.display(), e))?;
            return Ok(this);
        }
        let map = dir.join("special_tokens_map.json");
        keys.extend(read_object(&map)?.unwrap_or_default());
        this.name(&keys).map_err(|e| Error::format(dir.display(), e))?;
        let added = dir.join("added_tokens.json");
        for (content, id) in read_object(&added)?.unwrap_or_default() {
            let id = id.as_u64().ok_or_else(|| {
                Error::format(added.display(), format!("`{content}` must be a token id, not {}", short(&id)))
            })?;
            let special = this.unlisted.iter().any(|t| t.content == content);
            this.listed.push((AddedToken::from(content, special), Some(id)));
        }
        this.listed.sort_by_key(|(_, id)| *id);
        Ok(this)
    }

    /// Adds the named special tokens and `additional_special_tokens` of `keys`.
    fn name(&mut self, keys: &Map<String, Value>) -> std::result::Result<(), String> {
        let own = keys.iter().filter(|(k, v)| {
            let text = v.is_string() || v.get("__type").is_some_and(|t| t == "AddedToken");
            k.ends_with("_token") && !NAMES.contains(&k.as_str()) && text
        });
        let named = NAMES.iter().filter_map(|name| Some((*name, keys.get(*name).filter(|v| !v.is_null())?)));
        let mut all: Vec<(&str, &Value)> = named.chain(own.map(|(k, v)| (k.as_str(), v))).collect();
        let full = |key: &str| keys.get(key).filter(|v| !matches!(v, Value::Null | Value::Bool(false)) && !is_empty(v));
        let more = full("extra_special_tokens").or(full("additional_special_tokens"));
        match more {
            Some(Value::Object(more)) => all.extend(more.iter().map(|(k, v)| (k.as_str(), v))),
            Some(Value::Array(_)) | None => (),
            Some(other) => return Err(format!("additional_special_tokens must be a list, not {}", short(other))),
        }
        for (key, value) in all {
            let token = special(value).ok_or_else(|| format!("`{key}` must be a token, not {}", short(value)))?;
            self.names.push((key.into(), token.content.clone()));
            self.unlisted.push(token);
        }
        for value in more.and_then(Value::as_array).into_iter().flatten() {
            let what = || format!("additional_special_tokens: {} is not a token", short(value));
            self.unlisted.push(special(value).ok_or_else(what)?);
        }
        Ok(())
    }

    /// Adds the special token `name` with text `content`, unless a file defines `name`.
    pub fn name_by_default(&mut self, name: &str, content: &str) {
        if !self.names.iter().any(|(n, _)| n == name) {
            self.names.push((name.into(), content.into()));
            self.unlisted.push(AddedToken::from(content, true));
        }
    }

    /// Returns the text of special token `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.names.iter().find(|(n, _)| n == name).map(|(_, text)| text.as_str())
    }

    /// Adds the tokens to `tokenizer`; returns a warning for every token whose id differs from the one in its file.
    ///
    /// # Errors
    /// The tokenizer's normalizer fails on a token.
    pub fn add_to(self, tokenizer: &mut Tokenizer) -> tokenizers::Result<Vec<String>> {
        let ids: Vec<_> = self.listed.iter().filter_map(|(t, id)| Some((t.content.clone(), (*id)?))).collect();
        tokenizer.add_tokens(self.listed.into_iter().map(|(token, _)| token))?;
        let known = tokenizer.get_added_vocabulary().get_vocab().clone();
        tokenizer.add_tokens(self.unlisted.into_iter().filter(|t| !known.contains_key(&t.content)))?;
        Ok(ids.iter().filter_map(|(content, id)| misnumbered(tokenizer, content, *id)).collect())
    }
}

/// Returns a warning if token `content` has another id than `id`: the tokenizers library numbers added tokens itself,
/// and transformers uses its numbers.
pub fn misnumbered(tokenizer: &Tokenizer, content: &str, id: u64) -> Option<String> {
    let got = tokenizer.token_to_id(content)?;
    (u64::from(got) != id)
        .then(|| format!("token `{content}` has the id {got}, as in transformers; its file says {id}"))
}

fn decoder_tokens(decoder: &Value) -> std::result::Result<Vec<Listed>, String> {
    let map =
        decoder.as_object().ok_or_else(|| format!("added_tokens_decoder must be an object, not {}", short(decoder)))?;
    let mut listed = vec![];
    for (id, token) in map {
        let n: u64 = id.parse().map_err(|_| format!("added_tokens_decoder: `{id}` is not a token id"))?;
        let token = parse(token, false).ok_or_else(|| format!("added_tokens_decoder: {id} is not a token"))?;
        listed.push((token, Some(n)));
    }
    listed.sort_by_key(|(_, id)| *id);
    Ok(listed)
}

fn special(value: &Value) -> Option<AddedToken> {
    Some(parse(value, true)?.special(true))
}

/// Parses a token given as a string, or as an object with `content` and flags; special tokens are not normalized by
/// default.
fn parse(value: &Value, special: bool) -> Option<AddedToken> {
    if let Some(text) = value.as_str() {
        return Some(AddedToken::from(text, special));
    }
    let flag = |key: &str| value.get(key).and_then(Value::as_bool);
    let token = AddedToken::from(value.get("content")?.as_str()?, flag("special").unwrap_or(special));
    let normalized = flag("normalized").unwrap_or(token.normalized);
    let set = |key: &str| flag(key).unwrap_or(false);
    Some(token.normalized(normalized).single_word(set("single_word")).lstrip(set("lstrip")).rstrip(set("rstrip")))
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty)
}

/// Formats the first 60 characters of a value, for messages.
fn short(value: &Value) -> String {
    value.to_string().chars().take(60).collect()
}
