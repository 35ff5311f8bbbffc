//! Record of a variant: its plan and the bytes of its cache.

use crate::cache::Cache;
use crate::eviction::EvictionPlan;
use crate::method::Method;
use crate::retrofit::RetrofitPlan;
use serde::{Deserialize, Serialize};

/// Allocated bytes of a KV cache, by pool.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct KvBytes {
    /// Bytes of exact positions.
    pub local_bytes: u64,
    /// Bytes of block summaries and running sums.
    pub summary_bytes: u64,
    /// Bytes of attention sinks.
    pub sink_bytes: u64,
    /// Bytes of the codes, means and tables of exact recall.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub code_bytes: u64,
    /// Bytes of exact keys and values in host memory, which are not part of the sum.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub host_bytes: u64,
    /// Bytes of the states of recurrent layers, which are not part of the sum.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub recurrent_bytes: u64,
    /// Sum of all pools of keys and values on the device in bytes.
    pub total_bytes: u64,
    /// Bytes that the stock model allocates for the same context and element type.
    pub dense_bytes: u64,
    /// Peak bytes, where they exceed `total_bytes`: a rule that evicts once caches the whole context before eviction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
}

impl KvBytes {
    /// Returns the bytes that `cache` has allocated.
    pub fn of(cache: &Cache) -> Self {
        let (bytes, peak) = (cache.capacity_bytes(), cache.peak_bytes().total());
        Self {
            local_bytes: bytes.local,
            summary_bytes: bytes.summary,
            sink_bytes: bytes.sink,
            code_bytes: bytes.key_codes + bytes.values + bytes.tables,
            host_bytes: bytes.host,
            recurrent_bytes: bytes.recurrent,
            total_bytes: bytes.total(),
            dense_bytes: cache.dense_bytes(),
            peak_bytes: (peak != bytes.total()).then_some(peak),
        }
    }

    /// Returns the peak bytes, prefill included, as a share of a dense cache.
    pub fn share_of_dense(&self) -> f64 {
        self.peak_bytes.unwrap_or(self.total_bytes) as f64 / self.dense_bytes as f64
    }
}

fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

/// A variant and the cache that it allocated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VariantRecord {
    /// Name as given: `stock`, `retrofit:KEY=VALUE,..`, or an eviction rule with its settings.
    pub variant: String,
    /// Plan of a retrofit; null for stock and evictions.
    pub plan: Option<RetrofitPlan>,
    /// Plan of an eviction rule; null for other methods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eviction: Option<EvictionPlan>,
    /// Allocated bytes of the cache.
    pub kv: KvBytes,
}

impl VariantRecord {
    /// Creates the record of the variant `name` that runs `method` and allocated `kv`.
    pub fn of(name: &str, method: &Method, kv: KvBytes) -> Self {
        Self { variant: name.into(), plan: method.plan().cloned(), eviction: method.eviction().cloned(), kv }
    }

    /// Returns [`KvBytes::share_of_dense`] of the cache.
    pub fn share_of_dense(&self) -> f64 {
        self.kv.share_of_dense()
    }
}

#[cfg(test)]
impl VariantRecord {
    /// Returns a record whose cache takes half of a dense one.
    pub(crate) fn test(variant: &str) -> Self {
        let kv = KvBytes {
            local_bytes: 1,
            summary_bytes: 0,
            sink_bytes: 0,
            code_bytes: 0,
            host_bytes: 0,
            recurrent_bytes: 0,
            total_bytes: 1,
            dense_bytes: 2,
            peak_bytes: None,
        };
        Self { variant: variant.into(), plan: None, eviction: None, kv }
    }
}
