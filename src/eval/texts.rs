//! Real text as token ids: the documents of a folder as one stream, of which every prompt is a prefix.
//!
//! Documents are read in the order of the folder's manifest (scripts/fetch_texts.py), each once, so that no prompt
//! repeats text. A model without a tokenizer gets random ids.

use super::report::{hash, PromptSource};
use crate::checkpoint::{splitmix, Checkpoint, OnProgress, TextTokenizer};
use crate::error::{At, Error, Result};
use rayon::prelude::*;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Document name that results show for a stream of random ids.
pub const RANDOM_IDS: &str = "random ids";

/// Approximate size in bytes of a piece of text tokenised at once; pieces end at paragraph ends.
const PIECE: usize = 32 << 10;
/// Pieces tokenised in parallel before the ids are counted.
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

/// A stream of token ids and its source.
pub struct TextStream {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Names of the documents that the ids come from.
    pub documents: Vec<String>,
    /// Seconds taken to read and tokenise the documents.
    pub seconds: f64,
}

impl TextStream {
    /// Reads at least `tokens` ids for `checkpoint` from the documents in `folder`, or generates them from `seed` where
    /// the checkpoint has no tokenizer.
    ///
    /// # Errors
    /// No documents, or too few; a tokenizer that fails or returns an id outside the model's vocabulary.
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
                format!("the tokenizer returns id {id}, outside the model's vocabulary of {}", checkpoint.spec.vocab);
            return Err(Error::format(checkpoint.identity.place(), message));
        }
        Ok(Self { ids, documents, seconds: begin.elapsed().as_secs_f64() })
    }

    /// Returns the record of a prompt that consists of the first `tokens` ids.
    pub fn describe(&self, tokens: usize) -> PromptSource {
        PromptSource {
            documents: self.documents.clone(),
            tokens,
            sha256: hash(&self.ids[..tokens]),
            tokenise_s: Some(self.seconds),
        }
    }
}

/// Generates random ids below `vocab`; a shorter stream of the same seed is a prefix of a longer one.
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
        let mut wants_more = |n: usize| {
            progress("tokenise", (before + n).min(tokens) as u64, tokens as u64);
            before + n < tokens
        };
        ids.extend(encode(text, &content, &mut wants_more)?);
        documents.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
    }
    if ids.len() < tokens {
        let message = format!(
            "its {} documents hold {} tokens of the {tokens} that the largest prompt needs: {} are missing; add documents, or \
             reduce the context",
            documents.len(),
            ids.len(),
            tokens - ids.len()
        );
        return Err(Error::usage(format!("--texts {}", folder.display()), message));
    }
    Ok((ids, documents))
}

/// Tokenises one document, without BOS. After each batch `wants_more` is called with the number of ids so far;
/// tokenisation stops where it returns false.
///
/// # Errors
/// A tokenizer that fails.
pub fn encode(text: &TextTokenizer, content: &str, wants_more: &mut dyn FnMut(usize) -> bool) -> Result<Vec<u32>> {
    let mut ids = vec![];
    for batch in pieces(content).chunks(BATCH) {
        let parts: Result<Vec<_>> = batch.par_iter().map(|piece| text.encode(piece, false)).collect();
        ids.extend(parts?.into_iter().flatten());
        if !wants_more(ids.len()) {
            break;
        }
    }
    Ok(ids)
}

/// Returns the paths of a folder's documents, in the order of its manifest.
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
            return Err(Error::format(
                manifest.display(),
                format!("`{}` is not the name of a file in its folder", d.file),
            ));
        }
        if found.documents[..i].iter().any(|other| other.file == d.file) {
            return Err(Error::format(
                manifest.display(),
                format!("lists `{}` twice; prompts must not repeat text", d.file),
            ));
        }
    }
    Ok(found.documents.iter().map(|d| folder.join(&d.file)).collect())
}

/// Cuts `text` after paragraphs, or inside a paragraph that is longer than [`PIECE`].
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
