//! Chat templates: which one of a checkpoint's templates is used, and the special tokens it may name.

use crate::error::{At, Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// A chat template and its special tokens.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    /// Jinja source.
    pub source: String,
    /// Path of the file that holds the template.
    pub origin: String,
    /// Special tokens as (name in the template, text), such as `("bos_token", "<s>")`.
    pub tokens: Vec<(String, String)>,
}

/// Folder of named templates in a checkpoint's directory.
const NAMED_DIR: &str = "additional_chat_templates";

/// A template's source and file path, or the reason why there is none.
pub type SourceOrReason = Result<(String, String), String>;

/// Selects the template that transformers uses without tools: files take precedence over `config` (the keys of
/// `tokenizer_config.json`), and of several named templates the one named `default` is used.
///
/// # Errors
/// A file cannot be read; `chat_template` is neither a string nor a list of named templates.
pub fn of_dir(dir: &Path, config: &Map<String, Value>) -> Result<SourceOrReason> {
    let read = |path: &Path| std::fs::read_to_string(path).at(path.display());
    let mut named: Vec<String> = vec![];
    let folder = dir.join(NAMED_DIR);
    if folder.is_dir() {
        for entry in std::fs::read_dir(&folder).at(folder.display())? {
            let path = entry.at(folder.display())?.path();
            if path.extension().is_some_and(|e| e == "jinja") {
                named.extend(path.file_stem().map(|s| s.to_string_lossy().into_owned()));
            }
        }
    }
    named.sort();
    let in_folder = folder.join("default.jinja");
    let file = if in_folder.exists() { in_folder } else { dir.join("chat_template.jinja") };
    if file.exists() {
        return Ok(Ok((read(&file)?, file.display().to_string())));
    }
    if !named.is_empty() {
        return Ok(Err(without_default(&named)));
    }
    let place = dir.join("tokenizer_config.json");
    let wrong = || Error::format(place.display(), "`chat_template` must be a string or a list of named templates");
    let found = |source: &str| Ok((source.to_string(), place.display().to_string()));
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(Err("this checkpoint has no chat template; run without --chat".into())),
        Some(Value::String(source)) => Ok(found(source)),
        Some(Value::Array(list)) => {
            let text = |t: &Value, key: &str| t.get(key).and_then(Value::as_str).map(String::from);
            let all: Option<Vec<_>> = list.iter().map(|t| Some((text(t, "name")?, text(t, "template")?))).collect();
            let all = all.ok_or_else(wrong)?;
            let default = all.iter().find(|(name, _)| name == "default");
            let names: Vec<String> = all.iter().map(|(name, _)| name.clone()).collect();
            Ok(default.map_or_else(|| Err(without_default(&names)), |(_, source)| found(source)))
        }
        Some(_) => Err(wrong()),
    }
}

fn without_default(names: &[String]) -> String {
    format!("this checkpoint has chat templates named {}, but none named default", names.join(", "))
}
