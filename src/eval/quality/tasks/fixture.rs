//! Sources for the tests of all tasks, and a tokenizer that counts words.

use super::hay::Prose;
use super::words::WordLists;
use super::Sources;
use crate::error::Result;
use std::cell::Cell;

/// Counts the words of `text`.
pub fn words(text: &str) -> Result<usize> {
    Ok(text.split_whitespace().count())
}

/// A word counter that also counts its calls.
#[derive(Default)]
pub struct Counter(Cell<usize>);

impl Counter {
    pub fn count(&self, text: &str) -> Result<usize> {
        self.0.set(self.0.get() + 1);
        words(text)
    }

    pub fn counts(&self) -> usize {
        self.0.get()
    }
}

/// Returns sources with 90 nouns, 40 adjectives and 600 verbs of equal length, so that none contains another, and a
/// real text of 5,000 words.
pub fn sources() -> Sources {
    let make = |kind: char, n: usize| (0..n).map(|i| format!("{kind}{i:03}")).collect();
    Sources {
        words: Some(WordLists::new(make('n', 90), make('a', 40), make('v', 600))),
        prose: Prose::new([include_str!("../../../../tests/data/jargon-excerpt.txt")]),
        ..Sources::default()
    }
}
