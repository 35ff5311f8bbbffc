//! Builds a tokenizer from GGUF metadata.
//!
//! The metadata names the pre-tokenizer (`tokenizer.ggml.pre`) but does not describe it, so each supported one is
//! defined here as in the model's `tokenizer.json`. Byte-level models store merges. SentencePiece models store scores,
//! from which the merges are rebuilt: every token that is two tokens joined is a merge, in order of falling score.

use super::gguf::Gguf;
use super::tokenizer::TURN_ENDS;
use crate::error::{Error, ErrorKind, Result};
use candle_core::quantized::gguf_file::Value;
use std::collections::HashMap;
use tokenizers::decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as DecoderSequence};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Replace, NFC};
use tokenizers::pre_tokenizers::{
    byte_level::ByteLevel, digits::Digits, sequence::Sequence, split::Split, split::SplitPattern,
};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

/// Qwen2's pre-tokenizer: contractions, letters with one leading mark, single digits, marks, line breaks, spaces.
const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Llama 3's pre-tokenizer: Qwen2's with up to three digits.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Values of `tokenizer.ggml.pre` for Llama 3's pre-tokenizer.
const LLAMA3: [&str; 3] = ["llama-bpe", "llama3", "llama-v3"];

/// Whether BOS is prepended under pre-tokenizer `pre` if the file has no `tokenizer.ggml.add_bos_token`, by llama.cpp's
/// defaults:
/// <https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp>.
pub fn begins_with_bos(pre: &str) -> bool {
    LLAMA3.contains(&pre)
}

// Values of `tokenizer.ggml.token_type`.
const NORMAL: i64 = 1;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;
const BYTE: i64 = 6;

/// Builds the tokenizer from the metadata of `file`.
///
/// # Errors
/// A key is missing or malformed; the tokenizer model or the pre-tokenizer is not supported.
pub fn build(file: &Gguf) -> Result<Tokenizer> {
    let place = file.path().display();
    let fail = |m: &str| Error::new(ErrorKind::Tokenizer, &place, m);
    let stored = strings(file, "tokens")
        .ok_or_else(|| fail("has no tokenizer (`tokenizer.ggml.tokens`); --token-ids needs none"))?;
    let types = file.metadata("tokenizer.ggml.token_type").and_then(|v| v.to_vec().ok());
    let types: Vec<i64> = types.map(|v| v.iter().map(type_code).collect()).unwrap_or_default();
    let kind = |i: usize| match types.get(i).copied().unwrap_or(NORMAL) {
        // Some conversions mark end-of-turn tokens as normal; llama.cpp overrides them too.
        NORMAL | USER_DEFINED if stored.get(i).is_some_and(|t| TURN_ENDS.contains(t)) => CONTROL,
        kind => kind,
    };
    let pieces = file.string("tokenizer.ggml.model") == Some("llama");
    // User-defined SentencePiece tokens for runs of spaces are stored with plain spaces.
    let spell = |i: usize, t: &str| if pieces && kind(i) == USER_DEFINED { t.replace(' ', "▁") } else { t.into() };
    let tokens: Vec<String> = stored.iter().enumerate().map(|(i, t)| spell(i, t)).collect();
    // Unused entries pad the embedding matrix; their text must not match.
    let used = tokens.iter().enumerate().filter(|(i, _)| kind(*i) != UNUSED);
    let vocab: HashMap<String, u32> = used.map(|(i, t)| (t.clone(), i as u32)).collect();
    let wrap = |e: tokenizers::Error| Error::new(ErrorKind::Tokenizer, &place, e);
    let mut tokenizer = match file.string("tokenizer.ggml.model") {
        Some("gpt2") => {
            let merges = strings(file, "merges").ok_or_else(|| fail("`tokenizer.ggml.merges` is missing"))?;
            let pairs: Option<Vec<_>> =
                merges.iter().map(|m| m.split_once(' ').map(|(a, b)| (a.into(), b.into()))).collect();
            let pairs = pairs.ok_or_else(|| fail("`tokenizer.ggml.merges` holds an entry that is not a pair"))?;
            byte_level(vocab, pairs, file.string("tokenizer.ggml.pre").unwrap_or("default"), &fail)?.map_err(wrap)?
        }
        Some("llama") => {
            let scores = file.metadata("tokenizer.ggml.scores").and_then(|v| v.to_vec().ok());
            let scores: Option<Vec<f32>> = scores.and_then(|v| v.iter().map(|s| s.to_f32().ok()).collect());
            let mut scores = scores
                .filter(|s| s.len() == tokens.len())
                .ok_or_else(|| fail("`tokenizer.ggml.scores` do not match the tokens"))?;
            for (i, score) in scores.iter_mut().enumerate() {
                // Scores of tokens outside the SentencePiece model are placeholders.
                if matches!(kind(i), CONTROL | USER_DEFINED | BYTE) {
                    *score = 0.0;
                }
            }
            let prefix =
                file.metadata("tokenizer.ggml.add_space_prefix").and_then(|v| v.to_bool().ok()).unwrap_or(true);
            sentence_piece(vocab, &tokens, &scores, prefix).map_err(wrap)?
        }
        other => {
            return Err(fail(&format!(
                "tokenizer model `{}` is not supported; supported: gpt2, llama",
                other.unwrap_or("none")
            )))
        }
    };
    let added = tokens.iter().enumerate().filter_map(|(i, token)| match kind(i) {
        CONTROL => Some(AddedToken::from(token.clone(), true)),
        USER_DEFINED => Some(AddedToken::from(token.clone(), false).normalized(false)),
        _ => None,
    });
    tokenizer.add_tokens(added).map_err(wrap)?;
    Ok(tokenizer)
}

fn strings<'a>(file: &'a Gguf, key: &str) -> Option<Vec<&'a str>> {
    let list = file.metadata(&format!("tokenizer.ggml.{key}"))?.to_vec().ok()?;
    list.iter().map(|v| v.to_string().ok().map(String::as_str)).collect()
}

fn type_code(v: &Value) -> i64 {
    v.to_i32().map(i64::from).or_else(|_| v.to_u64().map(|n| n as i64)).unwrap_or(0)
}

type Pairs = Vec<(String, String)>;

fn byte_level(
    vocab: HashMap<String, u32>,
    merges: Pairs,
    pre: &str,
    fail: &dyn Fn(&str) -> Error,
) -> Result<tokenizers::Result<Tokenizer>> {
    let split =
        |pattern: &str| Split::new(SplitPattern::Regex(pattern.into()), SplitDelimiterBehavior::Isolated, false);
    let by_regex = |pattern: &str| -> tokenizers::Result<Sequence> {
        Ok(Sequence::new(vec![split(pattern)?.into(), ByteLevel::new(false, false, false).into()]))
    };
    let (words, nfc, whole_words) = match pre {
        "smollm" => {
            (Ok(Sequence::new(vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()])), false, false)
        }
        "qwen2" => (by_regex(QWEN2_SPLIT), true, false),
        pre if LLAMA3.contains(&pre) => (by_regex(LLAMA3_SPLIT), false, true),
        "default" | "gpt-2" => (Ok(Sequence::new(vec![ByteLevel::new(false, true, true).into()])), false, false),
        other => {
            let known = "smollm, qwen2, llama-bpe, gpt-2";
            return Err(fail(&format!("pre-tokenizer `{other}` is not supported; supported: {known}")));
        }
    };
    let build = || -> tokenizers::Result<Tokenizer> {
        let vocab: tokenizers::models::bpe::Vocab = vocab.into_iter().collect();
        let model = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(whole_words).build()?;
        let mut t = Tokenizer::new(model);
        t.with_pre_tokenizer(Some(words?));
        t.with_decoder(Some(ByteLevel::new(false, true, true)));
        if nfc {
            t.with_normalizer(Some(NFC))?;
        }
        Ok(t)
    };
    Ok(build())
}

fn sentence_piece(
    vocab: HashMap<String, u32>,
    tokens: &[String],
    scores: &[f32],
    prefix: bool,
) -> tokenizers::Result<Tokenizer> {
    let merges = merges_by_score(&vocab, tokens, scores);
    let vocab: tokenizers::models::bpe::Vocab = vocab.into_iter().collect();
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .unk_token("<unk>".into())
        .fuse_unk(true)
        .byte_fallback(true)
        .build()?;
    let mut t = Tokenizer::new(model);
    let spaces = Replace::new(" ", "▁")?;
    match prefix {
        false => t.with_normalizer(Some(spaces))?,
        true => t.with_normalizer(Some(tokenizers::normalizers::Sequence::new(vec![
            tokenizers::normalizers::Prepend::new("▁".into()).into(),
            spaces.into(),
        ])))?,
    };
    t.with_decoder(Some(DecoderSequence::new(vec![
        Replace::new("▁", " ")?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ])));
    Ok(t)
}

/// Returns every token that is two tokens joined as a merge, best score first; ties by the lengths of the parts,
/// longest first.
fn merges_by_score(vocab: &HashMap<String, u32>, tokens: &[String], scores: &[f32]) -> Pairs {
    let mut merges: Vec<(f32, &str, &str)> = vec![];
    for (token, score) in tokens.iter().zip(scores) {
        let mut parts: Vec<(u32, u32, &str, &str)> = vec![];
        for (at, _) in token.char_indices().skip(1) {
            let (a, b) = token.split_at(at);
            if let (Some(x), Some(y)) = (vocab.get(a), vocab.get(b)) {
                parts.push((*x, *y, a, b));
            }
        }
        parts.sort_unstable();
        merges.extend(parts.into_iter().map(|(_, _, a, b)| (*score, a, b)));
    }
    let lengths = |m: &(f32, &str, &str)| (m.1.chars().count(), m.2.chars().count());
    merges.sort_by(|x, y| y.0.total_cmp(&x.0).then_with(|| lengths(y).cmp(&lengths(x))));
    merges.into_iter().map(|(_, a, b)| (a.into(), b.into())).collect()
}
