//! Streaming detokenizer.

use super::TextTokenizer;
use crate::error::Result;

/// Tokens in the window at which it is cut to the last [`CONTEXT`] tokens, so that a step decodes a bounded number.
const WINDOW: usize = 64;
/// Tokens kept at a cut: a decoder may treat the first token of a text specially, so new text must not come first in a
/// window.
const CONTEXT: usize = 8;

/// Decodes token ids to text one at a time; the returned pieces concatenate to [`TextTokenizer::decode`] of all ids.
///
/// Text is returned once no later token can change it. Byte tokens (`<0xE2>`) wait for the next other token, since
/// decoders replace a whole run of bytes that is not UTF-8; of other tokens only an incomplete last character waits.
/// [`Detokenizer::finish`] returns the rest.
pub struct Detokenizer<'a> {
    tokenizer: &'a TextTokenizer,
    /// The last tokens; their decoded text is a suffix of the text of all tokens.
    window: Vec<u32>,
    /// The part of the window's text that has been returned.
    given: String,
    /// All text returned so far.
    all: String,
}

impl<'a> Detokenizer<'a> {
    /// Starts a new text.
    pub fn new(tokenizer: &'a TextTokenizer) -> Self {
        Self { tokenizer, window: vec![], given: String::new(), all: String::new() }
    }

    /// Adds a token and returns the text that it completes, which may be empty.
    pub fn push(&mut self, id: u32) -> String {
        let Some(token) = self.tokenizer.visible_token(id) else { return String::new() };
        self.window.push(id);
        if is_byte_piece(&token) {
            return String::new();
        }
        let Ok(now) = self.tokenizer.decode(&self.window) else { return String::new() };
        let settled = now.strip_suffix(char::REPLACEMENT_CHARACTER).unwrap_or(&now);
        let Some(piece) = settled.strip_prefix(self.given.as_str()) else { return String::new() };
        self.all.push_str(piece);
        let piece = piece.to_string();
        if settled.len() == now.len() && self.window.len() >= WINDOW {
            self.restart(now);
        } else {
            self.given = settled.into();
        }
        piece
    }

    /// Cuts the window to its last [`CONTEXT`] tokens, unless they decode to nothing.
    fn restart(&mut self, now: String) {
        let tail = self.window.split_off(self.window.len() - CONTEXT);
        match self.tokenizer.decode(&tail) {
            Ok(given) if !given.is_empty() => (self.window, self.given) = (tail, given),
            _ => {
                self.window.extend(tail);
                self.given = now;
            }
        }
    }

    /// Returns the text that was held back and ends the stream.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn finish(&mut self) -> Result<String> {
        let now = self.tokenizer.decode(&self.window)?;
        // No known decoder changes text once returned; if one does, what follows the common prefix is returned.
        let same = now.char_indices().zip(self.given.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
        let from = same.unwrap_or(self.given.len().min(now.len()));
        let piece = now[from..].to_string();
        self.all.push_str(&piece);
        self.given = now;
        Ok(piece)
    }

    /// Returns all text returned so far.
    pub fn text(&self) -> &str {
        &self.all
    }
}

/// Whether `token` is a byte-fallback token such as `<0xE2>`.
fn is_byte_piece(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && u8::from_str_radix(d, 16).is_ok())
}
