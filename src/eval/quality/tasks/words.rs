//! Lists of English words, read from a folder written by `scripts/fetch_words.py`.

use crate::error::{At, Error, Result};
use std::path::Path;

/// Lists of nouns, adjectives and verbs, without repeats and in the order of their files.
pub struct WordLists {
    nouns: Vec<String>,
    adjectives: Vec<String>,
    /// All words of the three lists, sorted.
    all: Vec<String>,
}

impl WordLists {
    /// Reads `nouns.txt`, `adjectives.txt` and `verbs.txt`, one word per line.
    ///
    /// # Errors
    /// A file that is missing, unreadable or empty.
    pub fn open(folder: &Path) -> Result<Self> {
        let list = |name: &str| -> Result<Vec<String>> {
            let path = folder.join(name);
            if !path.exists() {
                let message = format!("holds no {name}; fetch the words with scripts/fetch_words.py");
                return Err(Error::usage(format!("--words {}", folder.display()), message));
            }
            let text = std::fs::read_to_string(&path).at(path.display())?;
            let words: Vec<_> = text.lines().map(str::trim).filter(|w| !w.is_empty()).map(String::from).collect();
            match words.is_empty() {
                true => Err(Error::format(path.display(), "has no words; fetch it again with scripts/fetch_words.py")),
                false => Ok(words),
            }
        };
        Ok(Self::new(list("nouns.txt")?, list("adjectives.txt")?, list("verbs.txt")?))
    }

    /// Creates word lists; a word repeated within a list counts once.
    pub fn new(nouns: Vec<String>, adjectives: Vec<String>, verbs: Vec<String>) -> Self {
        let once = |words: Vec<String>| {
            let mut seen = std::collections::HashSet::new();
            words.into_iter().filter(|w| seen.insert(w.clone())).collect::<Vec<_>>()
        };
        let (nouns, adjectives) = (once(nouns), once(adjectives));
        let mut all = [&nouns[..], &adjectives, &verbs].concat();
        all.sort_unstable();
        all.dedup();
        Self { nouns, adjectives, all }
    }

    /// Returns every word, sorted.
    pub fn all(&self) -> &[String] {
        &self.all
    }

    /// Returns the number of pairs of an adjective and a noun.
    pub fn pairs(&self) -> usize {
        self.adjectives.len() * self.nouns.len()
    }

    /// Returns the `i`-th hyphenated pair of an adjective and a noun.
    pub fn pair(&self, i: usize) -> String {
        format!("{}-{}", self.adjectives[i / self.nouns.len()], self.nouns[i % self.nouns.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_trimmed_and_without_repeats() -> crate::Result<()> {
        let dir = tempfile::tempdir().at("temporary folder")?;
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).at(name);
        let refused = |says: &[&str]| {
            let error = WordLists::open(dir.path()).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(says.iter().all(|s| error.contains(s)), "{error:?} should say {says:?}");
        };
        refused(&["nouns.txt", "scripts/fetch_words.py"]);
        put("nouns.txt", "tree\nlake \n\ntree\n")?;
        put("adjectives.txt", "wet\r\nold\r\n")?;
        refused(&["verbs.txt", "scripts/fetch_words.py"]);
        put("verbs.txt", " \n")?;
        refused(&["verbs.txt", "no words"]);
        put("verbs.txt", "lake\nrun")?;
        let words = WordLists::open(dir.path())?;
        assert_eq!(words.all(), ["lake", "old", "run", "tree", "wet"]);
        let pairs: Vec<_> = (0..words.pairs()).map(|i| words.pair(i)).collect();
        assert_eq!(pairs, ["wet-tree", "wet-lake", "old-tree", "old-lake"]);
        Ok(())
    }

    #[test]
    fn the_fetched_lists_are_those_that_ruler_uses() -> crate::Result<()> {
        let words = WordLists::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("words"))?;
        assert_eq!((words.nouns.len(), words.adjectives.len(), words.all().len()), (6782, 910, 8166));
        assert!(words.all().iter().any(|w| w == "contact lens"), "words may hold a blank");
        Ok(())
    }
}
