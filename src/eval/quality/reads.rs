//! Tokens and summaries that the measured queries of a plan read, to detect plans that read the same, and to count
//! summaries per query. What exact recall fetches depends on the text, so that its plans read the same only with equal
//! settings.

use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::recall::KeyCodeChoice;
use crate::retrofit::{CodeFit, KeyPooling, PrefillKind, RestKind, RetrofitPlan};
use crate::spec::ModelSpec;
use std::ops::Range;

/// Tokens and summaries that the measured queries of a plan read; equal for plans whose measured queries read the same.
#[derive(Debug, Clone, PartialEq)]
pub struct ReadSet {
    layers: Vec<usize>,
    butterfly_layers: Vec<usize>,
    /// Window, alignment, sinks and block size, which determine the raw positions that are read.
    exact: (usize, String, usize, usize),
    /// Blocks whose summaries are read, per swapped layer and measured query block.
    routes: Vec<Vec<Vec<usize>>>,
    /// Number of measured queries per measured query block.
    queries: Vec<usize>,
    /// Pooling, far position and bias (as bits) of summaries; `None` where none is read.
    summaries: Option<(KeyPooling, String, u64)>,
    /// Tokens fetched, key code, estimate of the rest, fit of the codes and prefill of exact recall.
    recall: Option<(usize, String, RestKind, CodeFit, PrefillKind)>,
}

impl ReadSet {
    /// Computes what the queries at `positions` read under `plan` for `spec`, provisioned for `ctx`.
    ///
    /// # Errors
    /// A plan that does not fit the model.
    pub fn of(spec: &ModelSpec, plan: &RetrofitPlan, ctx: usize, positions: Range<usize>) -> Result<Self> {
        let (s, layout) = (&plan.settings, Layout::new(spec, plan, ctx)?);
        let blocks = positions.start / s.block..=positions.end.saturating_sub(1) / s.block;
        let routes: Vec<Vec<Vec<usize>>> =
            layout.butterfly().map(|l| blocks.clone().map(|b| l.route(b)).collect()).collect();
        let within = |b: usize| positions.end.min((b + 1) * s.block) - positions.start.max(b * s.block);
        let queries = blocks.clone().map(within).collect();
        let any = routes.iter().flatten().any(|r| !r.is_empty());
        let recall = s.recalls().map(|s| {
            let code = KeyCodeChoice::parse(&s.key_code)?.name();
            Ok::<_, Error>((s.recall, code, s.rest, s.code_fit, s.prefill))
        });
        Ok(Self {
            recall: recall.transpose()?,
            layers: plan.layers.clone(),
            butterfly_layers: s.butterfly_layers.clone(),
            exact: (s.window, format!("{:?}", s.window_align), s.sink_tokens, s.block),
            summaries: any.then(|| (s.pool, format!("{:?}", s.far_position), s.summary_bias.to_bits())),
            routes,
            queries,
        })
    }

    /// Returns the mean number of summaries that a measured query reads per butterfly layer; 0 where all others recall.
    pub fn summaries_per_query(&self) -> f64 {
        let of_layer = |blocks: &Vec<Vec<usize>>| -> usize {
            blocks.iter().zip(&self.queries).map(|(read, queries)| read.len() * queries).sum()
        };
        let read: usize = self.routes.iter().map(of_layer).sum();
        read as f64 / (self.routes.len() * self.queries.iter().sum::<usize>()).max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::retrofit::Settings;

    fn reads(settings: Settings) -> ReadSet {
        let spec = Checkpoint::random("tests/fixtures/shapes/qwen2.5-0.5b", 0).unwrap().spec;
        let plan = RetrofitPlan::new(&spec, None, settings).unwrap();
        ReadSet::of(&spec, &plan, 8192, 8000..8192).unwrap()
    }

    #[test]
    fn settings_of_summaries_matter_only_where_summaries_are_read() {
        let local = Settings { partner: "local".into(), ..Settings::default() };
        let biased = Settings { summary_bias: 1.0, ..local.clone() };
        assert_eq!(reads(local.clone()), reads(biased.clone()), "a bias on summaries that no query reads");
        let read = Settings { partner: "causal_shift".into(), ..biased };
        assert_ne!(reads(read.clone()), reads(Settings { summary_bias: 0.0, ..read }));
        // A seed matters to one rule only.
        let seeded = |partner: &str, seed| Settings { partner: partner.into(), seed, ..Settings::default() };
        assert_eq!(reads(seeded("xor", 1)), reads(seeded("xor", 2)));
        assert_ne!(reads(seeded("random", 1)), reads(seeded("random", 2)));
        assert_ne!(reads(local.clone()), reads(Settings { window: 1024, ..local }));
    }

    #[test]
    fn plans_with_exact_recall_read_the_same_only_with_equal_settings_and_read_no_summaries() {
        let base = Settings { recall: 512, ..Settings::default() };
        let changes = [
            Settings { recall: 1024, ..base.clone() },
            Settings { recall: 0, ..base.clone() },
            Settings { key_code: "pair:2bit".into(), ..base.clone() },
            Settings { key_code: "exact".into(), ..base.clone() },
            Settings { rest: RestKind::Means, ..base.clone() },
            Settings { rest: RestKind::None, ..base.clone() },
            Settings { prefill: PrefillKind::Butterfly, ..base.clone() },
            Settings { window: 256, ..base.clone() },
            Settings { sink_tokens: 16, ..base.clone() },
            Settings { block: 64, ..base.clone() },
        ];
        for (i, one) in changes.iter().enumerate() {
            assert_ne!(reads(one.clone()), reads(base.clone()), "{one:?}");
            assert!(changes[..i].iter().all(|other| reads(one.clone()) != reads(other.clone())), "{one:?}");
            assert!(one.recall == 0 || reads(one.clone()).summaries_per_query() == 0.0);
        }
        assert_eq!(reads(Settings { key_code: "pair".into(), ..base.clone() }), reads(base), "the default rate");
    }

    #[test]
    fn summaries_are_counted_per_layer_and_query() {
        let count = |partner: &str, partner_count| {
            reads(Settings { partner: partner.into(), partner_count, ..Settings::default() }).summaries_per_query()
        };
        assert_eq!(count("local", 1), 0.0);
        // Blocks 62 and 63 of 64: 5, 10, 20 and 40 blocks back all exist.
        assert_eq!((count("causal_shift", 1), count("causal_shift", 2)), (1.0, 2.0));
        // 64 queries in block 62, which has 58 blocks left of its window, and 128 in block 63, which has 59.
        assert_eq!(count("all", 1), (64.0 * 58.0 + 128.0 * 59.0) / 192.0);
    }
}
