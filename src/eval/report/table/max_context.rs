//! Table of largest contexts: one row per budget and variant.

use super::{columns, random_weights};
use crate::cli::{human_bytes, short_count};
use crate::eval::report::{MaxContextRun, MaxContexts, OK};

const HEAD: [&str; 9] = ["budget", "", "largest ctx", "needs", "chunk", "KV", "peak", "read", "time"];

/// Renders `found` in the order in which it was run.
pub fn max_context_table(found: &MaxContexts) -> String {
    let mut rows = vec![HEAD.map(String::from)];
    rows.extend(found.runs.iter().map(row));
    let mut out = columns(&rows);
    for run in found.runs.iter().filter(|r| r.status != OK) {
        out += &format!("{} {}: {}\n", human_bytes(run.memory_budget), run.variant, run.status);
    }
    out + &random_weights(&found.header)
}

fn row(run: &MaxContextRun) -> [String; 9] {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let at_least = if run.at_most { ">= " } else { "" };
    let sample = run.sample.as_ref();
    [
        human_bytes(run.memory_budget),
        run.variant.clone(),
        or_none(run.ctx.map(|c| format!("{at_least}{}", short_count(c)))),
        or_none(run.needed_bytes.map(human_bytes)),
        or_none(run.prefill_chunk.map(|c| c.to_string())),
        or_none(run.kv.map(|kv| human_bytes(kv.total_bytes))),
        or_none(sample.map(|s| human_bytes(s.peak_device_bytes))),
        or_none(run.read_tokens.map(short_count)),
        or_none(sample.map(|s| format!("{:.3} s", s.end_to_end_s))),
    ]
}
