//! Latin-1: one symbol per character up to U+00FF.

use crate::error::{Error, ErrorKind, Result};

/// Symbol that separates documents, and precedes the first character of a text.
pub const END_OF_TEXT: u8 = 0;
/// Symbol that replaces a character beyond U+00FF.
pub const REPLACEMENT: u8 = b'?';

/// Symbols of a text.
///
/// # Errors
/// A character beyond U+00FF: its offset in characters and its line, both from 1. `what` names the text.
///
/// ```
/// use bfly::char::{decode, encode};
/// assert_eq!(decode(&encode("naïve", "prompt").unwrap()), "naïve");
/// let error = encode("a\n→", "prompt").unwrap_err().to_string();
/// assert_eq!(error, "prompt: character 3, line 2: '→' (U+2192) is not in Latin-1");
/// ```
pub fn encode(text: &str, what: &str) -> Result<Vec<u8>> {
    let mut line = 1;
    let mut symbols = Vec::with_capacity(text.len());
    for (i, c) in text.chars().enumerate() {
        match u8::try_from(c) {
            Ok(symbol) => symbols.push(symbol),
            Err(_) => {
                let message = format!("character {}, line {line}: {c:?} (U+{:04X}) is not in Latin-1", i + 1, c as u32);
                return Err(Error::new(ErrorKind::Format, what, message));
            }
        }
        line += usize::from(c == '\n');
    }
    Ok(symbols)
}

/// Symbols of a text with [`REPLACEMENT`] for every character beyond U+00FF, and how many those are.
pub fn encode_replacing(text: &str) -> (Vec<u8>, usize) {
    let mut replaced = 0;
    let symbols = text.chars().map(|c| u8::try_from(c).unwrap_or_else(|_| (replaced += 1, REPLACEMENT).1));
    let symbols = symbols.collect();
    (symbols, replaced)
}

/// The text of `symbols`.
pub fn decode(symbols: &[u8]) -> String {
    symbols.iter().map(|s| char::from(*s)).collect()
}
