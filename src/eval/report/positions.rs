//! The loss on the next token by its position.

use super::header::Header;
use super::variant::VariantRecord;
use serde::{Deserialize, Serialize};

/// `kind` of losses by position.
pub const POSITIONS: &str = "bfly-positions";

/// Losses of variants by position.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LossByPosition {
    /// Header of kind [`POSITIONS`].
    #[serde(flatten)]
    pub header: Header,
    /// Positions that are read and provisioned.
    pub ctx: usize,
    /// Distance between judged positions.
    pub stride: usize,
    /// Positions to a bucket, whose losses are one mean.
    pub bucket: usize,
    /// One entry per variant.
    pub runs: Vec<PositionRun>,
}

/// One variant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PositionRun {
    /// Variant and its cache.
    #[serde(flatten)]
    pub record: VariantRecord,
    /// One entry per document.
    pub documents: Vec<PositionLosses>,
}

/// Losses on one document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PositionLosses {
    /// File name of the document.
    pub document: String,
    /// Token of the document at which the text begins.
    pub offset: usize,
    /// Hash of the text's ids.
    pub sha256: String,
    /// Mean loss of the judged positions of each bucket, in nats.
    pub losses: Vec<f64>,
}
