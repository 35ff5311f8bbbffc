//! Source and hash of prompts.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Source of prompts, which are prefixes of one stream of documents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptSource {
    /// Names of the documents in order, or `random ids` where the model has no tokenizer.
    pub documents: Vec<String>,
    /// Tokens of the longest prompt.
    pub tokens: usize,
    /// SHA-256 of the longest prompt's ids as little-endian u32.
    pub sha256: String,
    /// Seconds taken to read and tokenise the stream, once and before the first run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenise_s: Option<f64>,
}

/// Returns the SHA-256 of `ids` as little-endian u32, in hexadecimal.
pub fn hash(ids: &[u32]) -> String {
    let digest = Sha256::digest(id_bytes(ids));
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// Encodes `ids` as little-endian u32.
pub fn id_bytes(ids: &[u32]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_of_little_endian_words() {
        // printf '\x01\0\0\0\0\x01\0\0' | sha256sum
        assert_eq!(hash(&[1, 256]), "242045e2f1bb37769b514f182fd91b3d215324cb57f187cced1e9c62921dbac3");
    }
}
