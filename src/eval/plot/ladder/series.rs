//! Lines of a ladder's figures: medians with their samples, failed runs, ratios to the best stock.

use crate::error::{Error, Result};
use crate::eval::report::{median, percentile, Ladder, LadderRun};
use std::collections::BTreeSet;
use std::path::Path;

/// A measured quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// Seconds of prefill.
    Prefill,
    /// Seconds from the prompt's ids to the last new token.
    EndToEnd,
    /// Peak device memory in bytes, the maximum over runs.
    PeakMemory,
    /// Allocated bytes of the KV cache.
    Kv,
    /// Seconds between new tokens.
    InterToken,
}

/// A line's value at one context.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Positions provisioned.
    pub ctx: usize,
    /// Median over runs; the maximum for memory.
    pub value: f64,
    /// Value of every run, the run's median for inter-token times; empty for the cache.
    pub samples: Vec<f64>,
    /// 95th percentile of inter-token times; `None` for other quantities.
    pub p95: Option<f64>,
}

/// The values of one engine and variant over contexts.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Name of engine and variant, such as `bfly retrofit`.
    pub label: String,
    /// Index of colour and marker, the same in every figure of a ladder.
    pub style: usize,
    /// Points in order of contexts.
    pub points: Vec<Point>,
    /// Contexts at which the run failed.
    pub missed: Vec<usize>,
}

/// Validated runs of a ladder, sorted by context.
pub struct SortedRuns<'a> {
    /// Engines and variants, retrofits before stocks.
    pub names: Vec<(&'a str, &'a str)>,
    runs: Vec<&'a LadderRun>,
}

fn name(engine: &str, variant: &str) -> String {
    format!("{engine} {variant}")
}

fn is_retrofit(engine: &str, variant: &str) -> bool {
    engine == "bfly" && variant != "stock"
}

impl Quantity {
    /// Returns the value and samples of a run, in seconds or bytes; `None` where the engine does not report them.
    pub fn of(self, run: &LadderRun) -> Option<Point> {
        let samples: Vec<f64> = match self {
            Self::Prefill => run.samples.iter().map(|s| s.prefill_s).collect(),
            Self::EndToEnd => run.samples.iter().map(|s| s.end_to_end_s).collect(),
            Self::PeakMemory => run.samples.iter().map(|s| s.peak_device_bytes as f64).collect(),
            Self::Kv => vec![],
            Self::InterToken => run.samples.iter().filter_map(|s| median(&s.inter_token_s)).collect(),
        };
        let steps = || run.samples.iter().flat_map(|s| s.inter_token_s.iter().copied()).collect::<Vec<_>>();
        let (value, p95) = match self {
            Self::Prefill | Self::EndToEnd => (median(&samples)?, None),
            Self::PeakMemory => (samples.iter().copied().reduce(f64::max)?, None),
            Self::Kv => (run.kv.map(|kv| kv.total_bytes).or(run.kv_bytes)? as f64, None),
            Self::InterToken => (median(&steps())?, percentile(&steps(), 0.95)),
        };
        // Engines write 0 for a quantity that they do not measure; a logarithmic axis has no 0.
        let drawable = run.ran() && value.is_finite() && value > 0.0;
        let samples = samples.into_iter().filter(|s| s.is_finite() && *s > 0.0).collect();
        drawable.then_some(Point { ctx: run.ctx, value, samples, p95 })
    }
}

impl<'a> SortedRuns<'a> {
    /// Validates the ladder read from `path` and sorts its runs.
    ///
    /// # Errors
    /// No runs, a context of 0, the same run twice, or a run with status `ok` and no samples.
    pub fn of(ladder: &'a Ladder, path: &Path) -> Result<Self> {
        let fail = |message: String| Err(Error::format(path.display(), message));
        if ladder.runs.is_empty() {
            return fail("is a ladder without runs".into());
        }
        let mut seen = BTreeSet::new();
        for run in &ladder.runs {
            let what = format!("{} at context {}", name(&run.engine, &run.variant), run.ctx);
            if run.ctx == 0 {
                return fail(format!("has a run of {what}; a context is at least 1"));
            }
            if !seen.insert((&run.engine, &run.variant, run.ctx)) {
                return fail(format!("has two runs of {what}"));
            }
            if run.ran() && run.samples.is_empty() {
                return fail(format!("{what} is `ok` but has no samples"));
            }
        }
        let mut runs: Vec<&LadderRun> = ladder.runs.iter().collect();
        runs.sort_by_key(|r| r.ctx);
        let mut names: Vec<(&str, &str)> = vec![];
        for run in &ladder.runs {
            if !names.contains(&run.names()) {
                names.push((&run.engine, &run.variant));
            }
        }
        names.sort_by_key(|(engine, variant)| (!is_retrofit(engine, variant), *engine != "bfly"));
        Ok(Self { names, runs })
    }

    /// Returns all contexts, rising.
    pub fn contexts(&self) -> Vec<usize> {
        self.runs.iter().map(|r| r.ctx).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Returns the runs of one engine and variant, in order of contexts.
    pub fn runs_of<'s>(&'s self, engine: &'s str, variant: &'s str) -> impl Iterator<Item = &'a LadderRun> + 's {
        self.runs.iter().copied().filter(move |r| r.names() == (engine, variant))
    }

    /// Returns the names of all variants of bfly other than stock.
    pub fn retrofits(&self) -> impl Iterator<Item = &'a str> + '_ {
        self.names.iter().filter(|(e, v)| is_retrofit(e, v)).map(|(_, v)| *v)
    }

    /// Returns one line per engine and variant; a line may have no points.
    pub fn lines(&self, quantity: Quantity) -> Vec<Line> {
        // The first retrofit and the stocks have fixed styles; further retrofits use the remaining ones.
        let first = self.retrofits().count().min(1);
        let stocks = self.names.len() - self.retrofits().count();
        let style = |i: usize| match i {
            0 => 0,
            i if i < self.retrofits().count() => first + stocks + i - 1,
            i => first + i - self.retrofits().count(),
        };
        let line = |(i, (engine, variant)): (usize, &(&str, &str))| {
            let own = || self.runs_of(engine, variant);
            Line {
                label: name(engine, variant),
                style: style(i),
                points: own().filter_map(|r| quantity.of(r)).collect(),
                missed: own().filter(|r| !r.ran()).map(|r| r.ctx).collect(),
            }
        };
        self.names.iter().enumerate().map(line).collect()
    }

    /// Returns the smallest value of all stocks at `ctx`.
    pub fn best_stock(&self, quantity: Quantity, ctx: usize) -> Option<f64> {
        let stocks = self.runs.iter().filter(|r| r.ctx == ctx && !is_retrofit(&r.engine, &r.variant));
        stocks.filter_map(|r| quantity.of(r)).map(|p| p.value).reduce(f64::min)
    }

    /// Returns the ratios of the retrofit `variant` to the best stock, at every context where both ran.
    pub fn ratios(&self, variant: &str, quantity: Quantity) -> Vec<Point> {
        let ratio = |p: Point| {
            let best = self.best_stock(quantity, p.ctx)?;
            let samples = p.samples.iter().map(|s| s / best).collect();
            Some(Point { value: p.value / best, samples, p95: None, ..p })
        };
        self.runs_of("bfly", variant).filter_map(|r| quantity.of(r)).filter_map(ratio).collect()
    }

    /// Returns the contexts at which `variant` ran and every stock failed, there or at a smaller context.
    pub fn without_stock(&self, variant: &str) -> Vec<usize> {
        let stocks: Vec<_> = self.names.iter().filter(|(e, v)| !is_retrofit(e, v)).collect();
        let fails = |(engine, variant): &(&str, &str), ctx| {
            let ran_on = self.runs_of(engine, variant).any(|r| r.ctx >= ctx && r.ran());
            !ran_on && self.runs_of(engine, variant).any(|r| r.ctx <= ctx && !r.ran())
        };
        let own = self.runs_of("bfly", variant).filter(|r| r.ran()).map(|r| r.ctx);
        own.filter(|c| !stocks.is_empty() && stocks.iter().all(|k| fails(k, *c))).collect()
    }

    /// Returns whether this engine and variant failed at its last context and the ladder has larger ones.
    pub fn given_up(&self, engine: &str, variant: &str) -> bool {
        self.runs_of(engine, variant).last().is_some_and(|l| !l.ran() && self.runs.iter().any(|r| r.ctx > l.ctx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{json, Value};

    fn run(engine: &str, variant: &str, ctx: usize, end_to_end: &[f64], peak: u64, kv: Option<u64>) -> Value {
        let sample = |s: &f64| {
            json!({"prefill_s": s / 2.0, "ttft_s": s / 2.0, "end_to_end_s": s, "inter_token_s": [s / 100.0, s / 50.0],
                   "fetched_tokens": 1, "peak_device_bytes": peak, "prompt_s": 0.0, "tokens_sha256": ""})
        };
        let kv = kv.map(
            |b| json!({"local_bytes": b, "summary_bytes": 0, "sink_bytes": 0, "total_bytes": b, "dense_bytes": b}),
        );
        let status = if end_to_end.is_empty() { "out of memory" } else { "ok" };
        json!({"engine": engine, "variant": variant, "plan": null, "ctx": ctx, "prompt_tokens": ctx, "prefill_chunk": 512,
               "version": null, "weights_bytes": null, "kv": kv, "status": status, "warmups": 1,
               "samples": end_to_end.iter().map(sample).collect::<Vec<_>>(), "summary": null})
    }

    fn ladder(runs: Vec<Value>) -> Ladder {
        let value = json!({"kind": "bfly-ladder", "schema_version": 1, "git_sha": "", "started": "", "command": [],
            "machine": {"device": "synthetic", "driver": null, "compute_capability": null, "memory_bytes": 1},
            "ceilings": null, "model": null, "name": "m", "random_weights": 1, "parameters": 1, "trained_positions": 8,
            "dtype": "f32", "kv_dtype": "f32", "decode_tokens": 2,
            "prompt": {"documents": [], "tokens": 0, "sha256": ""}, "runs": runs});
        serde_json::from_value(value).unwrap()
    }

    fn three() -> Ladder {
        ladder(vec![
            run("transformers", "sdpa", 64, &[7.0, 9.0, 8.0], 300, None),
            run("bfly", "stock", 64, &[10.0, 12.0], 200, Some(1000)),
            run("bfly", "retrofit", 64, &[4.0, 2.0, 9.0], 50, Some(10)),
            run("bfly", "retrofit", 32, &[3.0], 50, Some(10)),
            run("bfly", "stock", 32, &[6.0], 100, Some(500)),
            run("bfly", "retrofit", 128, &[5.0], 50, Some(10)),
            run("bfly", "stock", 128, &[], 0, None),
        ])
    }

    #[test]
    fn ratios_are_against_the_faster_and_the_smaller_stock() {
        let ladder = three();
        let runs = SortedRuns::of(&ladder, Path::new("x")).unwrap();
        let ratios = |m| runs.ratios("retrofit", m).into_iter().map(|p| (p.ctx, p.value)).collect::<Vec<_>>();
        // At 64: transformers is faster (8 against 11), bfly's stock is smaller (200 against 300).
        assert_eq!(ratios(Quantity::EndToEnd), [(32, 0.5), (64, 0.5)]);
        assert_eq!(ratios(Quantity::PeakMemory), [(32, 0.5), (64, 0.25)]);
        assert_eq!(ratios(Quantity::Kv), [(32, 0.02), (64, 0.01)]);
        assert_eq!(runs.ratios("retrofit", Quantity::EndToEnd)[1].samples, [0.5, 0.25, 1.125]);
        assert_eq!(runs.without_stock("retrofit"), [] as [usize; 0], "transformers was not tried at 128");
    }

    #[test]
    fn a_stock_that_failed_is_taken_to_fail_at_every_larger_context() {
        let mut all = vec![run("bfly", "stock", 32, &[], 0, None), run("t", "sdpa", 32, &[9.0], 1, None)];
        all.push(run("t", "sdpa", 64, &[], 0, None));
        all.extend([16, 32, 64, 128].map(|ctx| run("bfly", "retrofit", ctx, &[1.0], 1, None)));
        let ladder = ladder(all);
        let runs = SortedRuns::of(&ladder, Path::new("x")).unwrap();
        assert_eq!(runs.without_stock("retrofit"), [64, 128]);
        assert!(runs.given_up("t", "sdpa") && runs.given_up("bfly", "stock") && !runs.given_up("bfly", "retrofit"));
    }

    #[test]
    fn lines_hold_medians_every_sample_and_what_was_missed() {
        let ladder = three();
        let runs = SortedRuns::of(&ladder, Path::new("x")).unwrap();
        let lines = runs.lines(Quantity::EndToEnd);
        let labels: Vec<_> = lines.iter().map(|l| l.label.as_str()).collect();
        assert_eq!(labels, ["bfly retrofit", "bfly stock", "transformers sdpa"], "retrofits come first");
        assert_eq!(lines.iter().map(|l| l.style).collect::<Vec<_>>(), [0, 1, 2]);
        let values = |l: &Line| l.points.iter().map(|p| (p.ctx, p.value)).collect::<Vec<_>>();
        assert_eq!(values(&lines[0]), [(32, 3.0), (64, 4.0), (128, 5.0)]);
        assert_eq!(values(&lines[1]), [(32, 6.0), (64, 11.0)]);
        assert_eq!(lines[0].points[1].samples, [4.0, 2.0, 9.0]);
        assert_eq!((lines[1].missed.as_slice(), lines[2].missed.as_slice()), ([128].as_slice(), [].as_slice()));
        assert_eq!(runs.contexts(), [32, 64, 128]);
        assert!(runs.lines(Quantity::Kv)[2].points.is_empty(), "this peer reports no KV");
        let tokens = &runs.lines(Quantity::InterToken)[0].points[1];
        // Steps: .04 .08, .02 .04, .09 .18.
        assert!((tokens.value - 0.06).abs() < 1e-12 && tokens.p95 == Some(0.18), "{tokens:?}");
    }

    #[test]
    fn a_ladders_first_retrofit_and_its_stocks_look_the_same_whatever_else_ran() {
        let styles = |variants: &[(&str, &str)]| {
            let ladder = ladder(variants.iter().map(|(e, v)| run(e, v, 32, &[1.0], 1, None)).collect());
            let lines = SortedRuns::of(&ladder, Path::new("x")).unwrap().lines(Quantity::EndToEnd);
            lines.into_iter().map(|l| (l.label, l.style)).collect::<Vec<_>>()
        };
        let owned = |all: &[(&str, usize)]| all.iter().map(|(l, s)| (l.to_string(), *s)).collect::<Vec<_>>();
        let all =
            [("bfly", "stock"), ("t", "sdpa"), ("bfly", "retrofit"), ("bfly", "retrofit:a"), ("bfly", "retrofit:b")];
        let wanted =
            [("bfly retrofit", 0), ("bfly retrofit:a", 3), ("bfly retrofit:b", 4), ("bfly stock", 1), ("t sdpa", 2)];
        assert_eq!(styles(&all), owned(&wanted));
        assert_eq!(styles(&all[..2]), owned(&[("bfly stock", 0), ("t sdpa", 1)]));
    }

    #[test]
    fn a_figure_that_was_not_measured_is_no_point() {
        let ladder = ladder(vec![run("bfly", "retrofit", 32, &[3.0], 0, None)]);
        let runs = SortedRuns::of(&ladder, Path::new("x")).unwrap();
        assert!(runs.lines(Quantity::PeakMemory)[0].points.is_empty());
        assert!(runs.ratios("retrofit", Quantity::EndToEnd).is_empty(), "no stock ran");
        assert!(runs.without_stock("retrofit").is_empty(), "none was tried");
    }

    #[test]
    fn inconsistent_ladders_are_refused() {
        let bad = |runs, words: &str| {
            let ladder = ladder(runs);
            let e = SortedRuns::of(&ladder, Path::new("file.json")).err().unwrap().to_string();
            assert!(e.starts_with("file.json: ") && e.contains(words), "{e}");
        };
        bad(vec![], "without runs");
        bad(vec![run("bfly", "stock", 0, &[1.0], 1, None)], "context 0");
        let twice = run("bfly", "stock", 32, &[1.0], 1, None);
        bad(vec![twice.clone(), twice.clone()], "two runs of bfly stock at context 32");
        let mut empty = twice;
        empty["samples"] = json!([]);
        bad(vec![empty], "no samples");
    }
}
