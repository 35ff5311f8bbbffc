//! Loss on the next token by position in the text.

use super::header::Header;
use super::variant::VariantRecord;
use serde::{Deserialize, Serialize};

/// `kind` of a loss-by-position file.
pub const POSITIONS: &str = "bfly-positions";

/// Loss of each variant by position.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LossByPosition {
    /// Header of kind [`POSITIONS`].
    #[serde(flatten)]
    pub header: Header,
    /// Tokens read of each document; also the positions provisioned.
    pub ctx: usize,
    /// Distance in tokens between the positions whose loss is measured.
    pub stride: usize,
    /// Bucket size in positions; losses are averaged per bucket.
    pub bucket: usize,
    /// One entry per variant.
    pub runs: Vec<PositionRun>,
}

/// Losses of one variant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PositionRun {
    /// Variant and its cache.
    #[serde(flatten)]
    pub record: VariantRecord,
    /// One entry per document.
    pub documents: Vec<PositionLosses>,
}

/// Losses of one variant on one document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PositionLosses {
    /// File name of the document.
    pub document: String,
    /// Token offset of the text in the document.
    pub offset: usize,
    /// Hash of the text's ids.
    pub sha256: String,
    /// Mean loss over the measured positions of each bucket, in nats.
    pub losses: Vec<f64>,
}
