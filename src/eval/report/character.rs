//! What the character model makes of distance: bits per character by position and context, and copy recall.

use serde::{Deserialize, Serialize};

/// `kind` of a file of bits per character by position and context.
pub const CHAR_EVAL: &str = "bfly-char-eval";

/// `kind` of a file of copy recall.
pub const CHAR_RECALL: &str = "bfly-char-recall";

/// Bits per character of each window, by position and by context.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CharEval {
    /// Command line of the process.
    pub command: Vec<String>,
    /// Name of the device.
    pub device: String,
    /// SHA-256 of all documents, hexadecimal.
    pub corpus: String,
    /// Characters of a window.
    pub window: usize,
    /// Ranges of positions: first position, and the one after the last.
    pub positions: Vec<[usize; 2]>,
    /// One row per window, with the mean over each range of positions.
    pub bits_by_position: Vec<Vec<f64>>,
    /// Characters read before the segment.
    pub contexts: Vec<usize>,
    /// Characters whose bits are compared between contexts.
    pub segment: usize,
    /// One row per window, with the mean over the segment at each context.
    pub bits_by_context: Vec<Vec<f64>>,
}

/// Letters recalled of every value asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CharRecall {
    /// Command line of the process.
    pub command: Vec<String>,
    /// Characters of a window.
    pub window: usize,
    /// Characters of a chunk.
    pub chunk: usize,
    /// Names of the columns of `values`; the last one ends in the letters of a value.
    pub columns: [String; 3],
    /// One row per value: place in the window, characters since the value was stored, right letters.
    pub values: Vec<[usize; 3]>,
}

impl CharRecall {
    /// Returns the letters of a value; `None` where the columns do not tell.
    pub fn letters(&self) -> Option<usize> {
        let [place, distance, right] = &self.columns;
        let letters = right.strip_prefix("letters_right_of_")?.parse().ok()?;
        (place == "place" && distance == "distance" && letters > 0).then_some(letters)
    }
}
