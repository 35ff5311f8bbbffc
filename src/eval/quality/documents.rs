//! Texts on which distributions are compared: the middle of each of several documents.
//!
//! Each document gives one text per context, its middle tokens, which skips title pages and tables of contents and
//! centres all contexts on the same passage. A document with fewer tokens than a context is skipped at that context.

use crate::checkpoint::{Checkpoint, OnProgress};
use crate::cli::short_count;
use crate::error::{At, Error, Result};
use crate::eval::texts::{encode, files, random, RANDOM_IDS};
use std::path::Path;

/// A document as token ids.
#[derive(Debug, Clone)]
pub struct Document {
    /// Name of its file, or `random ids` with a number.
    pub name: String,
    ids: Vec<u32>,
}

/// Tokenised documents.
#[derive(Debug)]
pub struct Documents {
    all: Vec<Document>,
    /// Ids that begin every text, such as BOS.
    begin: Vec<u32>,
}

/// A contiguous part of a document.
#[derive(Debug, Clone, PartialEq)]
pub struct Excerpt {
    /// Name of the document.
    pub document: String,
    /// Token offset of the excerpt in the document.
    pub offset: usize,
    /// Ids of the excerpt, BOS included.
    pub ids: Vec<u32>,
}

impl Documents {
    /// Reads up to `count` documents of `folder` with at least `least` tokens, in the order of its manifest; `None`
    /// reads all of them. A checkpoint without a tokenizer gets random ids, enough for excerpts of `most` tokens.
    ///
    /// # Errors
    /// No documents, or none that is long enough.
    pub fn open(
        checkpoint: &Checkpoint,
        folder: &Path,
        count: Option<usize>,
        (least, most): (usize, usize),
        progress: OnProgress,
    ) -> Result<Self> {
        if !checkpoint.has_tokenizer() {
            let vocab = checkpoint.spec.vocab;
            let one = |i| Document { name: format!("{RANDOM_IDS} {i}"), ids: random(2 * most, vocab, i) };
            return Ok(Self { all: (0..count.unwrap_or(4) as u64).map(one).collect(), begin: vec![] });
        }
        let (text, files) = (checkpoint.tokenizer()?, files(folder)?);
        let begin = text.encode("", true)?;
        let (mut all, mut longest) = (vec![], 0);
        for (i, path) in files.iter().enumerate() {
            progress("documents", i as u64, files.len() as u64);
            if count.is_some_and(|c| all.len() == c) {
                break;
            }
            let content = std::fs::read_to_string(path).at(path.display())?;
            let ids = encode(&text, &content, &mut |_| true)?;
            longest = longest.max(ids.len());
            if ids.len() + begin.len() >= least {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                all.push(Document { name, ids });
            }
        }
        progress("documents", files.len() as u64, files.len() as u64);
        if all.is_empty() {
            let message = format!(
                "its {} documents are too short for {} tokens: the longest has {longest}",
                files.len(),
                short_count(least)
            );
            return Err(Error::usage(format!("--texts {}", folder.display()), message));
        }
        Ok(Self { all, begin })
    }

    /// Returns the middle `tokens` tokens of every document with at least that many.
    pub fn excerpts(&self, tokens: usize) -> Vec<Excerpt> {
        let own = tokens.saturating_sub(self.begin.len());
        let enough = self.all.iter().filter(|d| d.ids.len() >= own);
        let excerpt = |d: &Document| {
            let offset = (d.ids.len() - own) / 2;
            let ids = [self.begin.as_slice(), &d.ids[offset..offset + own]].concat();
            Excerpt { document: d.name.clone(), offset, ids }
        };
        enough.map(excerpt).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpts_are_the_middle_and_begin_as_texts_do() {
        let document = |name: &str, n: u32| Document { name: name.into(), ids: (10..10 + n).collect() };
        let documents = Documents { all: vec![document("a", 100), document("b", 7)], begin: vec![1] };
        let excerpts = documents.excerpts(11);
        assert_eq!(excerpts.len(), 1, "b is too short");
        assert_eq!((excerpts[0].document.as_str(), excerpts[0].offset), ("a", 45));
        assert_eq!(excerpts[0].ids, [1, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64]);
        assert_eq!(documents.excerpts(8).len(), 2);
    }
}
