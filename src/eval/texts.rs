//! Real text as token ids: folders of documents, and prompts that are prefixes of one stream of them.
//!
//! A stream is a folder of documents in the order of its manifest (scripts/fetch_texts.py), each read once, so that no
//! prompt repeats itself. For a model without a tokenizer it is random ids.

use super::report::{hash, PromptSource};
use crate::checkpoint::{splitmix, Checkpoint, OnProgress, TextTokenizer};
use crate::error::{At, Error, Result};
use rayon::prelude::*;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Name that stands for the documents of a stream of random ids.
pub const RANDOM_IDS: &str = "random ids";

/// Bytes, about, of the pieces in which text is tokenised; each ends where a paragraph does.
const PIECE: usize = 32 << 10;
/// Pieces that are tokenised in parallel before the ids are counted.
const BATCH: usize = 64;

#[derive(Deserialize)]
struct Manifest {
    documents: Vec<ManifestEntry>,
}

#[derive(Deserialize)]
struct ManifestEntry {
    order: usize,
    file: String,
}

/// A stream of ids, and where it comes from.
pub struct TextStream {
    /// Ids of the stream.
    pub ids: Vec<u32>,
    /// Names of the documents that the ids are of.
    pub documents: Vec<String>,
    /// Seconds for making the stream.
    pub seconds: f64,
}

impl TextStream {
    /// At least `tokens` ids for `checkpoint`: of the documents in `folder`, or drawn from `seed` where it has no
    /// tokenizer.
    ///
    /// # Errors
    /// No documents, or too few; a tokenizer that fails or gives an id outside the model's vocabulary.
    pub fn open(
        checkpoint: &Checkpoint,
        folder: &Path,
        tokens: usize,
        seed: u64,
        progress: OnProgress,
    ) -> Result<Self> {
        let begin = Instant::now();
        let (ids, documents) = match checkpoint.has_tokenizer() {
            true => read(&checkpoint.tokenizer()?, folder, tokens, progress)?,
            false => (random(tokens, checkpoint.spec.vocab, seed), vec![RANDOM_IDS.to_string()]),
        };
        if let Some(id) = ids.iter().find(|id| **id as usize >= checkpoint.spec.vocab) {
            let message =
                format!("the tokenizer gives id {id}, outside the model's vocabulary of {}", checkpoint.spec.vocab);
            return Err(Error::format(checkpoint.identity.place(), message));
        }
        Ok(Self { ids, documents, seconds: begin.elapsed().as_secs_f64() })
    }

    /// What results say of a prompt of the first `tokens` ids.
    pub fn describe(&self, tokens: usize) -> PromptSource {
        PromptSource {
            documents: self.documents.clone(),
            tokens,
            sha256: hash(&self.ids[..tokens]),
            tokenise_s: Some(self.seconds),
        }
    }
}

/// Random ids below `vocab`; a shorter stream of the same seed is a prefix.
pub fn random(tokens: usize, vocab: usize, seed: u64) -> Vec<u32> {
    (0..tokens as u64).map(|i| (splitmix(seed, i) % vocab as u64) as u32).collect()
}

fn read(text: &TextTokenizer, folder: &Path, tokens: usize, progress: OnProgress) -> Result<(Vec<u32>, Vec<String>)> {
    let (mut ids, mut documents) = (text.encode("", true)?, vec![]);
    for path in files(folder)? {
        if ids.len() >= tokens {
            break;
        }
        let content = std::fs::read_to_string(&path).at(path.display())?;
        let before = ids.len();
        let mut go_on = |n: usize| {
            progress("tokenise", (before + n).min(tokens) as u64, tokens as u64);
            before + n < tokens
        };
        ids.extend(encode(text, &content, &mut go_on)?);
        documents.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
    }
    if ids.len() < tokens {
        let message = format!(
            "its {} documents hold {} tokens of the {tokens} that the largest prompt needs: {} are missing. Add documents, or \
             read less",
            documents.len(),
            ids.len(),
            tokens - ids.len()
        );
        return Err(Error::usage(format!("--texts {}", folder.display()), message));
    }
    Ok((ids, documents))
}

/// Ids of one document, without the tokens that begin a text. `go_on` is called with the number of ids so far, and says
/// whether more are wanted.
///
/// # Errors
/// A tokenizer that fails.
pub fn encode(text: &TextTokenizer, content: &str, go_on: &mut dyn FnMut(usize) -> bool) -> Result<Vec<u32>> {
    let mut ids = vec![];
    for batch in pieces(content).chunks(BATCH) {
        let parts: Result<Vec<_>> = batch.par_iter().map(|piece| text.encode(piece, false)).collect();
        ids.extend(parts?.into_iter().flatten());
        if !go_on(ids.len()) {
            break;
        }
    }
    Ok(ids)
}

/// The documents of a folder in the order of its manifest.
///
/// # Errors
/// No manifest, or one that lists a document twice or outside the folder.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let manifest = folder.join("manifest.json");
    if !manifest.exists() {
        let message = "holds no manifest.json; fetch the texts with scripts/fetch_texts.py";
        return Err(Error::usage(format!("--texts {}", folder.display()), message));
    }
    let text = std::fs::read_to_string(&manifest).at(manifest.display())?;
    let mut found: Manifest = serde_json::from_str(&text).map_err(|e| Error::format(manifest.display(), e))?;
    found.documents.sort_by_key(|d| d.order);
    for (i, d) in found.documents.iter().enumerate() {
        if Path::new(&d.file).file_name().is_none_or(|n| n != d.file.as_str()) {
            return Err(Error::format(manifest.display(), format!("`{}` is not the name of a file beside it", d.file)));
        }
        if found.documents[..i].iter().any(|other| other.file == d.file) {
            return Err(Error::format(
                manifest.display(),
                format!("lists `{}` twice; no prompt may repeat itself", d.file),
            ));
        }
    }
    Ok(found.documents.iter().map(|d| folder.join(&d.file)).collect())
}

/// `text` cut after paragraphs, or anywhere where a paragraph is too long.
fn pieces(text: &str) -> Vec<&str> {
    let (mut pieces, mut rest) = (vec![], text);
    while rest.len() > PIECE {
        let limit = (PIECE..).find(|i| rest.is_char_boundary(*i)).unwrap_or(rest.len());
        let cut = rest[..limit].rfind("\n\n").map_or(limit, |i| i + 2);
        let (piece, after) = rest.split_at(cut);
        pieces.push(piece);
        rest = after;
    }
    if !rest.is_empty() {
        pieces.push(rest);
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_whole_text_cut_after_paragraphs() {
        let paragraph = format!("{}é\n\n", "word ".repeat(999));
        let text = paragraph.repeat(20) + &"ü".repeat(2 * PIECE);
        let cut = pieces(&text);
        assert_eq!(cut.concat(), text);
        assert!(cut.len() >= 5 && cut.iter().all(|p| !p.is_empty() && p.len() <= PIECE + 4));
        assert!(cut[0].ends_with("\n\n"), "{:?}", &cut[0][cut[0].len() - 9..]);
        assert!(pieces("").is_empty());
    }

    #[test]
    fn random_ids_depend_on_the_seed_and_stay_in_the_vocabulary() {
        let ids = random(10_000, 50, 3);
        assert!(ids.iter().all(|id| *id < 50) && (0..50).all(|id| ids.contains(&id)));
        assert_eq!(ids[..100], random(100, 50, 3), "a shorter stream is a prefix");
        assert_ne!(ids[..100], random(100, 50, 4));
    }
}
