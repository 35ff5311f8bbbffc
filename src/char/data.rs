//! Training text: documents from files, split into training and held-out ones, and windows in an order from a seed.

use super::text::{encode_replacing, END_OF_TEXT};
use super::Batch;
use crate::error::{Error, ErrorKind, Result};
use rand::{seq::SliceRandom, Rng};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Of 1000 documents, how many are held out.
const HELD_OUT: u64 = 20;
/// A file of this name lists a corpus and is none of its documents.
const MANIFEST: &str = "manifest.json";

/// Documents of symbols.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Corpus {
    /// Training documents.
    pub training: Vec<Vec<u8>>,
    /// Held-out documents: those whose SHA-256 says so, or of two or more the one that comes closest to it.
    pub held_out: Vec<Vec<u8>>,
    /// Characters that were replaced, as they are not in Latin-1.
    pub replaced: usize,
    /// SHA-256 of all documents, hexadecimal.
    pub hash: String,
}

impl Corpus {
    /// Reads files, and all files of directories in the order of their paths. NUL separates documents of a file.
    ///
    /// # Errors
    /// A file that cannot be read or is not UTF-8 text; a corpus without characters.
    pub fn read(paths: &[PathBuf]) -> Result<Self> {
        let mut files = vec![];
        for path in paths {
            find(path, &mut files)?;
        }
        let (mut corpus, mut all) = (Self::default(), Sha256::new());
        let mut documents = vec![];
        for file in &files {
            let bytes = std::fs::read(file).map_err(|e| Error::io(file, e))?;
            let text = String::from_utf8(bytes).map_err(|e| {
                let at = e.utf8_error().valid_up_to();
                Error::format(file.display(), format!("is not UTF-8 text: byte {at} is invalid"))
            })?;
            let (symbols, replaced) = encode_replacing(&text);
            corpus.replaced += replaced;
            for document in symbols.split(|s| *s == END_OF_TEXT).filter(|d| !d.is_empty()) {
                let hash = Sha256::digest(document);
                all.update(hash);
                documents.push((u64::from_le_bytes(std::array::from_fn(|i| hash[i])), document.to_vec()));
            }
        }
        let rank = |hash: u64| hash % 1000;
        // A small corpus holds out the document whose hash comes closest.
        let least = documents.iter().map(|(hash, _)| rank(*hash)).min().filter(|_| documents.len() > 1);
        let bound = HELD_OUT.max(least.map_or(0, |least| least + 1));
        for (hash, document) in documents {
            if rank(hash) < bound { &mut corpus.held_out } else { &mut corpus.training }.push(document);
        }
        if corpus.training.is_empty() {
            let names = paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ");
            return Err(Error::new(ErrorKind::Usage, names, "has no text to train on"));
        }
        corpus.hash = all.finalize().iter().map(|b| format!("{b:02x}")).collect();
        Ok(corpus)
    }
}

fn find(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !path.is_dir() {
        files.push(path.into());
        return Ok(());
    }
    let entries = std::fs::read_dir(path).and_then(|d| d.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>());
    let mut entries = entries.map_err(|e| Error::io(path, e))?;
    entries.sort();
    for entry in entries {
        let name = entry.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if !name.starts_with('.') && name != MANIFEST {
            find(&entry, files)?;
        }
    }
    Ok(())
}

/// Windows of a corpus in an order from a seed: every epoch cuts each document into as many windows as fit, from an offset
/// of its own, and shuffles all of them.
#[derive(Debug, Clone)]
pub struct Windows {
    documents: Vec<Vec<u8>>,
    window: usize,
    seed: u64,
    /// The epoch that `order` is of.
    epoch: u64,
    /// Document and first character.
    order: Vec<(usize, usize)>,
}

impl Windows {
    /// Windows of `window` characters. Documents that are shorter are joined, with [`END_OF_TEXT`] between them.
    ///
    /// # Errors
    /// Fewer characters in all than a window.
    pub fn new(documents: &[Vec<u8>], window: usize, seed: u64) -> Result<Self> {
        let (mut whole, mut joined) = (vec![], vec![]);
        for document in documents {
            if document.len() >= window {
                whole.push(document.clone());
                continue;
            }
            if !joined.is_empty() {
                joined.push(END_OF_TEXT);
            }
            joined.extend_from_slice(document);
            if joined.len() >= window {
                whole.push(std::mem::take(&mut joined));
            }
        }
        if whole.is_empty() || window == 0 {
            let all: usize = documents.iter().map(Vec::len).sum();
            let message = format!("{window} characters are more than the {all} of all documents together");
            return Err(Error::usage("--window", message));
        }
        let mut windows = Self { documents: whole, window, seed, epoch: 0, order: vec![] };
        windows.shuffle(0);
        Ok(windows)
    }

    fn shuffle(&mut self, epoch: u64) {
        let mut rng = crate::train::random(self.seed, epoch);
        self.order.clear();
        for (i, document) in self.documents.iter().enumerate() {
            let count = document.len() / self.window;
            let offset = rng.random_range(0..=document.len() - count * self.window);
            self.order.extend((0..count).map(|n| (i, offset + n * self.window)));
        }
        self.order.shuffle(&mut rng);
        self.epoch = epoch;
    }

    /// Windows of an epoch.
    pub fn per_epoch(&self) -> usize {
        self.order.len()
    }

    /// The batch of windows `first .. first + count`, counted through all epochs.
    pub fn batch(&mut self, first: u64, count: usize) -> Batch {
        let mut batch = Batch { symbols: vec![], targets: vec![], sequences: count };
        for i in first..first + count as u64 {
            let (epoch, at) = (i / self.order.len() as u64, (i % self.order.len() as u64) as usize);
            if epoch != self.epoch {
                self.shuffle(epoch);
            }
            let (document, start) = self.order[at];
            let document = &self.documents[document];
            let before = start.checked_sub(1).map_or(END_OF_TEXT, |i| document[i]);
            let window = &document[start..start + self.window];
            let read = std::iter::once(&before).chain(&window[..self.window - 1]);
            batch.symbols.extend(read.map(|s| u32::from(*s)));
            batch.targets.extend(window.iter().map(|s| u32::from(*s)));
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_has_every_window_once_and_depends_on_the_seed_alone() -> Result<()> {
        let documents = vec![(1..=100).collect(), (101..=109).collect(), (110..=130).collect::<Vec<u8>>()];
        let mut windows = Windows::new(&documents, 10, 7)?;
        // The short document is joined to nothing that fills a window: 10 + 2 windows.
        assert_eq!(windows.per_epoch(), 12);
        let batch = windows.batch(0, 12);
        let mut seen: Vec<u32> = batch.targets.clone();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 120);
        for (read, targets) in batch.symbols.chunks(10).zip(batch.targets.chunks(10)) {
            assert_eq!(read[1..], targets[..9]);
            assert!(read[0] == 0 || read[0] + 1 == targets[0]);
        }
        let later = windows.batch(30, 4);
        assert_eq!(Windows::new(&documents, 10, 7)?.batch(30, 4), later);
        assert_ne!(Windows::new(&documents, 10, 8)?.batch(30, 4), later);
        assert!(Windows::new(&documents, 140, 7)
            .is_err_and(|e| e.to_string().contains("140 characters are more than the 130")));
        Ok(())
    }
}
