//! Exact recall: a few bytes per token on the device choose which exact keys and values a decode step fetches.
//!
//! A key code stores each token's key in a few bytes, from which a query gets the token's approximate score. A value
//! code estimates the values of the tokens that are not fetched. Both are fitted to a [`Calibration`]: moments of keys
//! and queries, and codewords of values, from text that the model has read once.
//!
//! A code is one file with one [`KeyCode`] and one line in [`KEY_CODES`].

mod calibrate;
mod calibration;
mod codewords;
mod exact;
mod fits;
mod lloyd;
mod matrix;
mod moments;
mod page;
mod pair;
mod qpq;
mod scalar;
mod scalar2;
mod text;
mod value;

pub use calibrate::{bundled, calibrate, joined, tokenise, LONGEST, TOKENS};
pub use calibration::{Calibration, LayerCalibration, LayerTables, Positions};
pub use codewords::WORDS;
pub use fits::{Fit, Fits};
#[cfg(feature = "cuda")]
pub(crate) use lloyd::{levels, MOST_BITS};
pub use moments::{HeadMoments, KeyStatistics, RotatedHead};
pub use page::PAGE;
pub use scalar::{Field, ScalarCode};
pub use text::{KeyFit, ValueFit};
pub use value::{ValueCode, SUB};

use crate::error::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// Supported key codes; the first is the default.
pub static KEY_CODES: &[&dyn KeyCode] = &[&pair::Pair, &qpq::Qpq, &scalar2::Scalar2, &page::Page, &exact::Exact];

/// A kind of key code.
pub trait KeyCode: std::fmt::Debug + Sync {
    /// Returns the code's name for `--key-code`.
    fn name(&self) -> &'static str;

    /// Returns a one-line description for help texts.
    fn about(&self) -> &'static str;

    /// Returns the rates that the code offers, in bits per channel; the first is the default. A code without rates has a
    /// size of its own.
    fn rates(&self) -> &'static [f64] {
        &[]
    }

    /// Returns the bytes per token of a head of `dim` channels.
    fn bytes(&self, dim: usize, rate: Option<f64>) -> usize;

    /// Returns the bytes of the tables of a head of `dim` channels: a mean, a scale and a field per channel, unless
    /// overridden.
    fn table_bytes(&self, dim: usize, _rate: Option<f64>) -> usize {
        12 * dim
    }

    /// Returns whether the code is fitted to moments before rotation, which a calibration at natural positions lacks.
    fn needs_unrotated(&self) -> bool {
        false
    }

    /// Returns whether `--code-fit text` refits the code, which takes [`HeadCode::scalar`].
    fn follows_text(&self) -> bool {
        false
    }

    /// Fits the code of one KV head.
    fn fit(&self, keys: &KeyStatistics, rate: Option<f64>) -> Arc<dyn HeadCode>;
}

/// The key code of one KV head.
pub trait HeadCode: std::fmt::Debug + Send + Sync {
    /// Returns the bytes per token.
    fn bytes(&self) -> usize;

    /// Returns the number of tokens that share one record of `page · bytes` bytes: keys are encoded from a multiple of
    /// it.
    fn page(&self) -> usize {
        1
    }

    /// Writes the codes of `keys [n, D]`, of which the first is at a multiple of [`HeadCode::page`], to `codes`; the
    /// last record may lack tokens.
    fn encode(&self, keys: &[f32], codes: &mut [u8]);

    /// Appends the scores `q · k̂` of `tokens` to one list per query.
    ///
    /// # Shapes
    /// `queries [n, D]`, `scores [n]`.
    fn scores(&self, queries: &[f32], rows: &HeadRows, tokens: Range<usize>, scores: &mut [Vec<f32>]);

    /// Writes one row for each of `tokens` whose product with [`HeadCode::lift`] of a query is the token's score: the
    /// decoded key `k̂`, unless a code overrides `lift`. A GPU without kernels for the code stores these rows.
    ///
    /// # Shapes
    /// `decoded [n, F]`, `F` the length of a lifted query.
    fn decode(&self, rows: &HeadRows, tokens: Range<usize>, decoded: &mut [f32]);

    /// Returns the factor of decoded rows for the query `q [D]`, `[F]`.
    fn lift(&self, q: &[f32]) -> Vec<f32> {
        q.to_vec()
    }

    /// Returns the code as scalar fields, if it is one: the form that kernels read.
    fn scalar(&self) -> Option<&ScalarCode> {
        None
    }
}

/// What is stored of the keys of one KV head, from position 0 on.
#[derive(Debug, Clone, Copy)]
pub struct HeadRows<'a> {
    /// Key codes, `[positions, bytes]`.
    pub codes: &'a [u8],
    /// Exact keys and values, `[positions, 2, D]`.
    pub exact: &'a [f32],
}

/// A key code with its rate, as `--key-code` names it.
#[derive(Debug, Clone, Copy)]
pub struct KeyCodeChoice {
    /// The code.
    pub code: &'static dyn KeyCode,
    /// Bits per channel, for codes that have rates.
    pub rate: Option<f64>,
}

impl KeyCodeChoice {
    /// Parses a name such as `pair`, `pair:1bit` or `pair:1/2bit`.
    ///
    /// # Errors
    /// An unknown code, or a rate that the code does not offer; the message lists what there is.
    pub fn parse(text: &str) -> Result<Self> {
        let fail = |message: String| Err(Error::usage("--key-code", message));
        let (name, rate) = text.split_once(':').map_or((text, None), |(name, rate)| (name, Some(rate)));
        let Some(code) = KEY_CODES.iter().find(|c| c.name() == name) else {
            let names: Vec<_> = KEY_CODES.iter().map(|c| c.name()).collect();
            return fail(format!("`{name}` is not one of {}", names.join(", ")));
        };
        let rates = code.rates();
        let Some(rate) = rate else { return Ok(Self { code: *code, rate: rates.first().copied() }) };
        match rates.iter().find(|r| rate_name(**r) == rate) {
            Some(rate) => Ok(Self { code: *code, rate: Some(*rate) }),
            None if rates.is_empty() => fail(format!("`{name}` has one size: give it without `:{rate}`")),
            None => {
                let names: Vec<_> = rates.iter().map(|r| rate_name(*r)).collect();
                fail(format!("`{rate}` is not a size of `{name}`: give one of {}", names.join(", ")))
            }
        }
    }

    /// Returns every code at every rate, codes and rates each with their default first.
    pub fn all() -> impl Iterator<Item = Self> {
        KEY_CODES.iter().flat_map(|code| {
            let sizes = code.rates().len().max(1);
            (0..sizes).map(|i| Self { code: *code, rate: code.rates().get(i).copied() })
        })
    }

    /// Returns the name that [`KeyCodeChoice::parse`] reads, with the rate of codes that have rates.
    pub fn name(&self) -> String {
        let name = self.code.name();
        self.rate.map_or_else(|| name.into(), |rate| format!("{name}:{}", rate_name(rate)))
    }

    /// Checks that the code can be fitted to a calibration at natural positions.
    ///
    /// # Errors
    /// A code that needs moments before rotation.
    pub fn check_natural(&self) -> Result<()> {
        match self.code.needs_unrotated() {
            false => Ok(()),
            true => {
                let message = format!(
                    "`{}` is fitted to moments before rotation, which a calibration at natural positions lacks; \
                     calibrate with --positions uniform",
                    self.name()
                );
                Err(Error::usage("--key-code", message))
            }
        }
    }

    /// Returns the bytes per token of a head of `dim` channels.
    pub fn bytes(&self, dim: usize) -> usize {
        self.code.bytes(dim, self.rate)
    }

    /// Returns the bytes of the tables of a head of `dim` channels.
    pub fn table_bytes(&self, dim: usize) -> usize {
        self.code.table_bytes(dim, self.rate)
    }

    /// Fits the code of one KV head.
    pub fn fit(&self, keys: &KeyStatistics) -> Arc<dyn HeadCode> {
        self.code.fit(keys, self.rate)
    }
}

fn rate_name(rate: f64) -> String {
    match rate {
        r if r < 1.0 => format!("1/{}bit", (1.0 / r).round()),
        r => format!("{r}bit"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_rates_are_parsed_and_refused_by_name() {
        let default = KeyCodeChoice::parse("pair").unwrap();
        assert_eq!((default.code.name(), default.rate), ("pair", Some(1.5)));
        assert_eq!(KeyCodeChoice::parse("pair:1/2bit").unwrap().bytes(64), 4);
        assert_eq!(KeyCodeChoice::parse("pair:2bit").unwrap().bytes(128), 32);
        for (text, words) in [
            ("pairs", "`pairs` is not one of pair, qpq, scalar2, page, exact"),
            ("pair:3bit", "`3bit` is not a size of `pair`: give one of 1.5bit, 2bit, 1.25bit, 1bit, 1/2bit"),
            ("exact:1bit", "`exact` has one size"),
            ("", "`` is not one of"),
        ] {
            let e = KeyCodeChoice::parse(text).unwrap_err().to_string();
            assert!(e.contains(words), "{text}: {e}");
        }
    }

    #[test]
    fn every_code_scores_what_it_encodes() {
        let (dim, n, cut) = (32, 100, 37);
        let number = |i: usize| ((i * 7919 + 13) % 9973) as f32 / 4986.5 - 1.0;
        let exact: Vec<f32> = (0..2 * n * dim).map(number).collect();
        let keys: Vec<f32> = exact.chunks(dim).step_by(2).flatten().copied().collect();
        let queries: Vec<f32> = (0..3 * dim).map(|i| number(i + 77_777)).collect();
        // Pairs that do not turn: a mean of 0.1, a deviation of 0.6, queries of mean square 1.
        let (zeros, frequencies) = (vec![0.0; dim / 2], vec![0.0; dim / 2]);
        let moments = HeadMoments {
            key_mean: vec![0.1; dim],
            key_square: vec![0.37; dim],
            key_cross: vec![0.01; dim / 2],
            query_square: vec![1.0; dim],
            query_cross: zeros,
        };
        let statistics = moments.rotated((&frequencies, 1.0), 0..n, 0..n);
        for code in KEY_CODES {
            let rates: Vec<_> =
                code.rates().iter().map(|r| Some(*r)).chain(code.rates().is_empty().then_some(None)).collect();
            for rate in rates {
                let head = code.fit(&statistics, rate);
                assert_eq!(head.bytes(), code.bytes(dim, rate), "{}", code.name());
                let scores = |codes: &[u8], exact: &[f32], tokens: Range<usize>| {
                    let mut scores = vec![vec![]; 3];
                    head.scores(&queries, &HeadRows { codes, exact }, tokens, &mut scores);
                    scores
                };
                let room = n.next_multiple_of(head.page()) * head.bytes();
                let (mut whole, mut parts) = (vec![0; room], vec![0; room]);
                head.encode(&keys, &mut whole);
                head.encode(&keys[..cut * dim], &mut parts);
                let before = scores(&parts, &exact[..2 * cut * dim], 3..cut);
                let from = cut / head.page() * head.page();
                head.encode(&keys[from * dim..], &mut parts[from * head.bytes()..]);
                assert_eq!(scores(&whole, &exact, 3..n), scores(&parts, &exact, 3..n), "{}: in pieces", code.name());
                if head.page() == 1 {
                    let after = scores(&whole, &exact, 3..cut);
                    assert_eq!(before, after, "{}: a later key moves an earlier score", code.name());
                }
                let lifted: Vec<Vec<f32>> = queries.chunks(dim).map(|q| head.lift(q)).collect();
                let length = lifted[0].len();
                let mut decoded = vec![0.0; (n - 3) * length];
                head.decode(&HeadRows { codes: &whole, exact: &exact }, 3..n, &mut decoded);
                for (q, want) in lifted.iter().zip(scores(&whole, &exact, 3..n)) {
                    for (row, want) in decoded.chunks(length).zip(want) {
                        let got: f32 = q.iter().zip(row).map(|(q, x)| q * x).sum();
                        assert!((got - want).abs() < 1e-3, "{} {rate:?}: decoded to {got}, not {want}", code.name());
                    }
                }
                // Bounds of 16 random keys say nothing about one of them.
                for (q, got) in queries.chunks(dim).zip(scores(&whole, &exact, 0..n)).filter(|_| head.page() == 1) {
                    let want: Vec<f32> = keys.chunks(dim).map(|k| q.iter().zip(k).map(|(q, k)| q * k).sum()).collect();
                    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
                    let centred = |x: &[f32]| -> Vec<f32> {
                        let mean = x.iter().sum::<f32>() / x.len() as f32;
                        x.iter().map(|x| x - mean).collect()
                    };
                    let (a, b) = (centred(&want), centred(&got));
                    let correlation = dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt();
                    assert!(correlation > 0.3, "{} {rate:?}: correlation {correlation} with exact scores", code.name());
                }
            }
        }
    }
}
