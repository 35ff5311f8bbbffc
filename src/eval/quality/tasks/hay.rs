//! Haystacks, the text in which needles are hidden: repeated noise, or real prose cut into sentences.

use crate::error::{At, Error, Result};
use crate::eval::texts::files;
use std::path::Path;

/// RULER's noise: five sentences, which form one line of the context.
pub const NOISE: &str = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// Abbreviations whose full stop does not end a sentence.
const ABBREVIATIONS: &[&str] = &[
    "mr", "mrs", "ms", "messrs", "dr", "prof", "rev", "hon", "st", "sr", "jr", "gen", "col", "capt", "lieut", "lt",
    "sgt", "vs", "etc", "e.g", "i.e", "cf", "viz", "vol", "no", "fig", "pp", "p", "ch", "co", "inc", "ltd",
];

/// Kind of text that fills a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Haystack {
    /// Repeated [`NOISE`].
    Noise,
    /// Needles with other keys than those in the question.
    Needles,
    /// Sentences of [`Prose`].
    Essay,
}

/// Documents as one circular sequence of words, separated by single spaces: the first word follows the last.
pub struct Prose {
    text: String,
    /// Byte offset of each word.
    words: Vec<usize>,
    /// First word of each sentence.
    sentences: Vec<usize>,
}

impl Prose {
    /// Reads the documents of a folder written by `scripts/fetch_texts.py`, in the order of its manifest.
    ///
    /// # Errors
    /// No documents, or documents without words.
    pub fn open(folder: &Path) -> Result<Self> {
        let read = |path: std::path::PathBuf| std::fs::read_to_string(&path).at(path.display());
        let documents: Vec<String> = files(folder)?.into_iter().map(read).collect::<Result<_>>()?;
        Self::new(documents.iter().map(String::as_str))
            .ok_or_else(|| Error::usage(format!("--texts {}", folder.display()), "its documents have no words"))
    }

    /// Builds the prose of `documents`; `None` where they have no words.
    pub fn new<'a>(documents: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let mut prose = Self { text: String::new(), words: vec![], sentences: vec![] };
        for paragraph in documents.into_iter().flat_map(|d| d.split("\n\n")) {
            let words: Vec<&str> = paragraph.split_whitespace().collect();
            for (i, word) in words.iter().enumerate() {
                if i == 0 || ends_sentence(words[i - 1], word) {
                    prose.sentences.push(prose.words.len());
                }
                if !prose.text.is_empty() {
                    prose.text.push(' ');
                }
                prose.words.push(prose.text.len());
                prose.text.push_str(word);
            }
        }
        (!prose.words.is_empty()).then_some(prose)
    }

    /// Returns the number of sentences.
    pub fn sentences(&self) -> usize {
        self.sentences.len()
    }

    /// Returns whether `needle` occurs in the prose.
    pub fn contains(&self, needle: &str) -> bool {
        self.text.contains(needle)
    }

    /// Returns the sentences of the `words` words from sentence `first` on; the last sentence may be cut.
    pub fn stretch(&self, first: usize, words: usize) -> Vec<&str> {
        let (mut parts, mut left, mut s) = (vec![], words, first % self.sentences.len());
        while left > 0 {
            let begin = self.sentences[s];
            let end = self.sentences.get(s + 1).copied().unwrap_or(self.words.len());
            let take = left.min(end - begin);
            parts.push(self.slice(begin, begin + take));
            left -= take;
            s = (s + 1) % self.sentences.len();
        }
        parts
    }

    /// Returns the text of the words `begin..end`.
    fn slice(&self, begin: usize, end: usize) -> &str {
        let stop = self.words.get(end).map_or(self.text.len(), |next| next - 1);
        &self.text[self.words[begin]..stop]
    }
}

/// Returns whether a sentence ends between two words of a paragraph: after `.`, `!`, `?` or `…` (with closing quotes or
/// brackets) and before a capital or a digit, but not after an abbreviation or an initial.
fn ends_sentence(word: &str, next: &str) -> bool {
    let word = word.trim_end_matches(['"', '\'', ')', ']', '}', '”', '’', '»', '_', '*']);
    let next = next.trim_start_matches(['"', '\'', '(', '[', '{', '“', '‘', '«', '_', '*']);
    if !word.ends_with(['.', '!', '?', '…']) || !next.starts_with(|c: char| c.is_uppercase() || c.is_numeric()) {
        return false;
    }
    let Some(stem) = word.strip_suffix('.') else { return true };
    let stem = stem.trim_start_matches(|c: char| !c.is_alphanumeric());
    let initial = stem.chars().count() == 1 && stem.chars().all(char::is_uppercase) && stem != "I";
    !initial && !ABBREVIATIONS.contains(&stem.to_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sentences(text: &str) -> Vec<String> {
        let prose = Prose::new([text]).expect("words");
        prose.stretch(0, prose.words.len()).into_iter().map(String::from).collect()
    }

    #[test]
    fn sentences_end_where_a_reader_would_end_them() {
        let text = "\"Is it so?\" Mr. Hall\nasked J. Smith. \"It is!\" (He\tleft.) In 3.14 s. he,  was back. 7 more came… Then\n\nA heading\n\nthe end";
        let found = sentences(text);
        let expected = [
            "\"Is it so?\"",
            "Mr. Hall asked J. Smith.",
            "\"It is!\"",
            "(He left.)",
            "In 3.14 s. he, was back.",
            "7 more came…",
            "Then",
            "A heading",
            "the end",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn documents_are_a_ring_of_words() {
        let prose = Prose::new(["One two. Three\nfour  five.", "", "Six."]).expect("words");
        assert_eq!(prose.sentences(), 3);
        assert_eq!(prose.stretch(1, 2), ["Three four"]);
        assert_eq!(prose.stretch(1, 8), ["Three four five.", "Six.", "One two.", "Three four"]);
        assert_eq!(prose.stretch(4, 3), prose.stretch(1, 3));
        assert!(prose.contains("five. Six") && !prose.contains("seven"));
        assert!(Prose::new(["", " \n"]).is_none());
    }

    #[test]
    fn a_folder_is_read_in_the_order_of_its_manifest() -> Result<()> {
        let dir = tempfile::tempdir().at("temporary folder")?;
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).at(name);
        let says = |what: &str| {
            let error = Prose::open(dir.path()).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains(what), "{error:?} should say {what:?}");
        };
        says("scripts/fetch_texts.py");
        put("manifest.json", r#"{"documents": [{"order": 2, "file": "b"}, {"order": 1, "file": "a"}]}"#)?;
        put("a", " ")?;
        says("No such file");
        put("b", "")?;
        says("have no words");
        put("a", "first")?;
        put("b", "second")?;
        assert_eq!(Prose::open(dir.path())?.text, "first second");
        Ok(())
    }
}
