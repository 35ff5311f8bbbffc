//! Token ids to text, piece by piece.

use super::Text;
use crate::error::Result;

/// Decoding starts anew from the last [`CONTEXT`] tokens once so many are held.
const WINDOW: usize = 64;
/// Tokens kept as context: a decoder may treat the first token of a text in its own way, so a window must not begin with new text.
const CONTEXT: usize = 8;

/// Turns token ids into text as they come: the pieces, joined, are [`Text::decode`] of all ids.
///
/// A piece is given out once no later token can change it. Byte pieces (`<0xE2>`) wait for the piece after them, since decoders
/// replace a whole run of bytes that is no UTF-8; of other tokens only an incomplete last character waits. Nothing ends the
/// stream before [`Detokenizer::finish`].
pub struct Detokenizer<'a> {
    text: &'a Text,
    /// Tokens whose decoded text differs from the text of all tokens by a prefix only.
    window: Vec<u32>,
    /// How the window's text begins: what has been given out of it.
    given: String,
    /// Everything given out.
    all: String,
}

impl<'a> Detokenizer<'a> {
    /// Begins a text.
    pub fn new(text: &'a Text) -> Self {
        Self { text, window: vec![], given: String::new(), all: String::new() }
    }

    /// The text that `id` completes, which may be empty.
    pub fn push(&mut self, id: u32) -> String {
        let Some(token) = self.text.visible_token(id) else { return String::new() };
        self.window.push(id);
        if is_byte_piece(&token) {
            return String::new();
        }
        let Ok(now) = self.text.decode(&self.window) else { return String::new() };
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

    /// Keeps the last tokens as context, if they have text of their own.
    fn restart(&mut self, now: String) {
        let tail = self.window.split_off(self.window.len() - CONTEXT);
        match self.text.decode(&tail) {
            Ok(given) if !given.is_empty() => (self.window, self.given) = (tail, given),
            _ => {
                self.window.extend(tail);
                self.given = now;
            }
        }
    }

    /// What was held back: the end of the text.
    ///
    /// # Errors
    /// A decoder that fails.
    pub fn finish(&mut self) -> Result<String> {
        let now = self.text.decode(&self.window)?;
        // No decoder in use changes text that it once gave; one that did would not get it back.
        let same = now.char_indices().zip(self.given.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
        let from = same.unwrap_or(self.given.len().min(now.len()));
        let piece = now[from..].to_string();
        self.all.push_str(&piece);
        self.given = now;
        Ok(piece)
    }

    /// All that was given out.
    pub fn text(&self) -> &str {
        &self.all
    }
}

/// Whether `token` stands for one byte, as decoders with a byte fallback read it.
fn is_byte_piece(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && u8::from_str_radix(d, 16).is_ok())
}
