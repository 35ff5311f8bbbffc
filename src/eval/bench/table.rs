//! Results as people read them: of a ladder one row per context and line, with ratios to the better stock; of a fit one row per
//! budget and variant.

use super::file::OK;
use super::format::{Fit, FitRun, Header, Ladder, Run, Summary};
use crate::cli::{human_bytes, short_count};

const HEAD: [&str; 9] = ["ctx", "", "time", "of stock", "peak", "of stock", "KV of dense", "tokens/s", "GB/s"];

/// Stocks are whatever is not a retrofit of ours: `time` and `peak` are judged against the fastest and the smallest of them.
fn is_stock(run: &Run) -> bool {
    run.engine != "bfly" || run.variant == "stock"
}

/// Renders `ladder`, contexts rising.
pub fn table(ladder: &Ladder) -> String {
    let mut runs: Vec<&Run> = ladder.runs.iter().collect();
    runs.sort_by_key(|r| r.ctx);
    let mut rows = vec![HEAD.map(String::from)];
    for run in &runs {
        let best = |f: fn(&Summary) -> f64| {
            let stocks = runs.iter().filter(|r| r.ctx == run.ctx && is_stock(r) && r.status == OK);
            stocks.filter_map(|r| r.summary.as_ref()).map(f).filter(|v| *v > 0.0).reduce(f64::min)
        };
        rows.push(row(run, best(|s| s.end_to_end_s), best(|s| s.peak_device_bytes as f64)));
    }
    let mut out = columns(&rows);
    for run in runs.iter().filter(|r| r.status != OK) {
        out += &format!("{} {} {}: {}\n", short_count(run.ctx), run.engine, run.variant, run.status);
    }
    out + &remark(&ladder.header)
}

/// What a table must not be read without.
fn remark(header: &Header) -> String {
    let random = |seed: u64| format!("random weights from seed {seed}: speed and memory only\n");
    header.random_weights.map_or(String::new(), random)
}

/// Aligns `rows` of equal length: names, in the second column, to the left, figures to the right.
pub(crate) fn columns(rows: &[impl AsRef<[String]>]) -> String {
    let count = rows.first().map_or(0, |r| r.as_ref().len());
    let width = |i: usize| rows.iter().map(|r| r.as_ref()[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut out = String::new();
    for row in rows.iter().map(AsRef::as_ref) {
        let cell = |(i, text): (usize, &String)| match i {
            1 => format!("{text:<width$}", width = widths[i]),
            _ => format!("{text:>width$}", width = widths[i]),
        };
        out += row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ").trim_end();
        out.push('\n');
    }
    out
}

fn row(run: &Run, fastest: Option<f64>, smallest: Option<f64>) -> [String; 9] {
    let ratio = |value: f64, best: Option<f64>| {
        best.filter(|_| value > 0.0).map_or("-".into(), |b| format!("{:.3}x", value / b))
    };
    let name = format!("{} {}", run.engine, run.variant);
    let Some(s) = run.summary.as_ref().filter(|_| run.status == OK) else {
        let none = || "-".to_string();
        return [short_count(run.ctx), name, none(), none(), none(), none(), none(), none(), none()];
    };
    let peak = s.peak_device_bytes;
    [
        short_count(run.ctx),
        name,
        format!("{:.3} s", s.end_to_end_s),
        ratio(s.end_to_end_s, fastest),
        if peak > 0 { human_bytes(peak) } else { "-".into() },
        ratio(peak as f64, smallest),
        run.kv.map_or("-".into(), |kv| format!("{:.4}x", kv.total_bytes as f64 / kv.dense_bytes as f64)),
        format!("{:.1}", s.decode_tok_s),
        s.decode_gb_s.map_or("-".into(), |r| format!("{r:.1}")),
    ]
}

const FIT_HEAD: [&str; 9] = ["budget", "", "largest ctx", "needs", "chunk", "KV", "peak", "read", "time"];

/// Renders `fit` in the order in which it was run.
pub fn fit_table(fit: &Fit) -> String {
    let mut rows = vec![FIT_HEAD.map(String::from)];
    rows.extend(fit.runs.iter().map(fit_row));
    let mut out = columns(&rows);
    for run in fit.runs.iter().filter(|r| r.status != OK) {
        out += &format!("{} {}: {}\n", human_bytes(run.memory_budget), run.variant, run.status);
    }
    out + &remark(&fit.header)
}

fn fit_row(run: &FitRun) -> [String; 9] {
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
