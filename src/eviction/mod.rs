//! KV cache eviction: other training-free methods, as baselines.
//!
//! A rule scores the cached tokens of a full-attention layer separately for each KV head, and the `budget`
//! highest-scored stay, so that after an eviction one cache row holds different positions in different heads. Keys are
//! stored rotated at their true positions, so attention over the remaining rows is dense attention over fewer rows.
//! Sliding-window layers are unchanged. The cache moves the rows ([`crate::cache::CompressedKv`]); a rule is one file
//! with one [`Eviction`] and one line in [`RULES`].
//!
//! | rule | score | evicts | peak rows |
//! |---|---|---|---|
//! | `snapkv` | attention from the last queries | once, at the end of the context | the context's, plus one layer's copy |
//! | `keydiff` | dissimilarity to the mean key | after every block | `budget + block` |
//!
//! A rule's settings are whole numbers by name, so that plans of all rules have one format. Each rule's file lists its
//! differences from the paper. StreamingLLM (Xiao et al. 2023, arXiv:2309.17453) needs no rule: sinks and a window are
//! `retrofit:partner=local`, except that the paper renumbers the kept positions from 0.

mod keydiff;
mod snapkv;

use crate::error::{Error, Result};
use crate::layout::LayerPlan;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;

/// Supported eviction rules.
pub static RULES: &[&dyn Eviction] = &[&snapkv::SnapKv, &keydiff::KeyDiff];

/// Schema version of plans that this build reads and writes.
pub const EVICTION_VERSION: u32 = 1;
/// Default number of tokens kept per KV head.
pub const DEFAULT_BUDGET: usize = 1024;
/// Largest value of a setting: f32 represents positions exactly up to here.
const MOST: usize = 1 << 24;

/// A setting of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RuleSetting {
    /// Name in plans and in `--variants`.
    pub name: &'static str,
    /// Default value.
    pub default: usize,
    /// One-line description.
    pub about: &'static str,
}

/// Times at which a rule evicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// After every block of this many positions, counted from the start of the text, and at the end of the context.
    EveryBlock(usize),
    /// Once, at the end of the context; tokens that come later are all kept.
    Once,
}

/// Arguments of [`Eviction::scores`].
#[derive(Debug, Clone, Copy)]
pub struct ScoreArgs<'a> {
    /// Cached keys, `[count, G, D]`, rotated, in order of position.
    pub keys: &'a Tensor,
    /// The last [`Eviction::observes`] queries, `[W, H, D]`, rotated, at the positions of the last `W` keys.
    pub queries: Option<&'a Tensor>,
    /// Factor on dot products.
    pub scale: f32,
}

/// An eviction rule: scores tokens.
pub trait Eviction: std::fmt::Debug + Sync {
    /// Returns the rule's name in plans and `--variants`.
    fn name(&self) -> &'static str;

    /// Returns a one-line description for help texts.
    fn about(&self) -> &'static str;

    /// Returns the rule's settings besides the budget.
    fn settings(&self) -> &'static [RuleSetting];

    /// Checks the settings against each other and the budget; each is known to be from 1 to 16M.
    ///
    /// # Errors
    /// Settings contradict each other or the budget.
    fn check(&self, plan: &EvictionPlan) -> Result<()>;

    /// Returns when the rule evicts.
    fn when(&self, plan: &EvictionPlan) -> When;

    /// Returns the number of last queries that the rule scores with.
    fn observes(&self, _: &EvictionPlan) -> usize {
        0
    }

    /// Scores each token for each KV head; the highest stay, and a score of infinity always does. Implementations for a
    /// GPU should avoid host syncs.
    ///
    /// # Shapes
    /// f32 `[G, count]`.
    ///
    /// # Errors
    /// The device fails; `args` lacks queries that the rule observes.
    fn scores(&self, plan: &EvictionPlan, args: &ScoreArgs) -> Result<Tensor>;

    /// Returns the bytes of temporary memory for scoring `rows` tokens of `layer`.
    fn scratch(&self, plan: &EvictionPlan, rows: usize, layer: &LayerPlan) -> u64;
}

/// Finds a rule by name.
///
/// # Errors
/// The name is unknown; the message lists the known ones.
pub fn find(name: &str) -> Result<&'static dyn Eviction> {
    RULES.iter().find(|r| r.name() == name).copied().ok_or_else(|| {
        let names: Vec<_> = RULES.iter().map(|r| r.name()).collect();
        Error::usage("rule", format!("`{name}` is not one of {}", names.join(", ")))
    })
}

/// An eviction plan: every full-attention layer keeps `budget` tokens per KV head, chosen by one rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvictionPlan {
    /// Schema version: [`EVICTION_VERSION`].
    pub schema_version: u32,
    /// Name of the rule.
    pub rule: String,
    /// Tokens kept per KV head of each layer.
    pub budget: usize,
    /// Settings of the rule by name; absent ones have their defaults.
    pub settings: BTreeMap<String, usize>,
}

impl EvictionPlan {
    /// Creates a plan of `rule` with the settings `given`, and defaults for the others.
    ///
    /// # Errors
    /// Those of [`EvictionPlan::check`].
    pub fn new(rule: &str, budget: usize, given: &[(&str, usize)]) -> Result<Self> {
        let mut settings: BTreeMap<String, usize> =
            find(rule)?.settings().iter().map(|s| (s.name.into(), s.default)).collect();
        settings.extend(given.iter().map(|(name, value)| (name.to_string(), *value)));
        let plan = Self { schema_version: EVICTION_VERSION, rule: rule.into(), budget, settings };
        plan.check()?;
        Ok(plan)
    }

    /// Checks the plan.
    ///
    /// # Errors
    /// The schema version, the rule or a setting is unknown; a value is out of range, or values contradict each other.
    pub fn check(&self) -> Result<()> {
        if self.schema_version != EVICTION_VERSION {
            let message = format!("is of version {}; this build reads version {EVICTION_VERSION}", self.schema_version);
            return Err(Error::usage("eviction plan", message));
        }
        let rule = self.find()?;
        let known: Vec<_> = rule.settings().iter().map(|s| s.name).collect();
        if let Some(name) = self.settings.keys().find(|name| !known.contains(&name.as_str())) {
            let message = format!("`{name}` is not a setting; settings are budget, {}", known.join(", "));
            return Err(Error::usage(&self.rule, message));
        }
        let settings = self.settings.iter().map(|(name, value)| (name.as_str(), *value));
        for (name, value) in std::iter::once(("budget", self.budget)).chain(settings) {
            if value == 0 || value > MOST {
                return Err(Error::usage(name, format!("{value} is not a number of tokens from 1 to 16M")));
            }
        }
        rule.check(self)
    }

    /// Returns the rule.
    ///
    /// # Errors
    /// Those of [`find`].
    pub fn find(&self) -> Result<&'static dyn Eviction> {
        find(&self.rule)
    }

    /// Returns the value of a setting.
    pub fn setting(&self, setting: &RuleSetting) -> usize {
        self.settings.get(setting.name).copied().unwrap_or(setting.default)
    }

    /// Returns the rows that a layer allocates at first for a context of `ctx` positions.
    ///
    /// # Errors
    /// The rule is unknown.
    pub fn rows(&self, ctx: usize) -> Result<usize> {
        Ok(match self.find()?.when(self) {
            When::EveryBlock(block) => (self.budget + block).min(ctx),
            When::Once => ctx,
        })
    }

    /// Returns the rows that queries at `positions` read in a layer, in total, where the context ended before
    /// `positions`.
    ///
    /// # Errors
    /// The rule is unknown.
    pub fn rows_read(&self, positions: Range<usize>) -> Result<usize> {
        let when = self.find()?.when(self);
        let mut rows = self.budget.min(positions.start);
        let mut sum = 0;
        for p in positions {
            rows += 1;
            sum += rows;
            if matches!(when, When::EveryBlock(block) if (p + 1).is_multiple_of(block)) {
                rows = rows.min(self.budget);
            }
        }
        Ok(sum)
    }

    /// Returns the bytes of temporary memory of an eviction in `layer` for a context of `ctx` positions with `element`
    /// bytes per number: scores, and a copy of the rows that stay.
    ///
    /// # Errors
    /// The rule is unknown.
    pub(crate) fn scratch(&self, ctx: usize, layer: &LayerPlan, element: usize) -> Result<u64> {
        let (rows, rule) = (self.rows(ctx)?, self.find()?);
        if rows <= self.budget {
            return Ok(0);
        }
        let moved = 2 * self.budget * layer.kv_heads * layer.head_dim * element;
        Ok(rule.scratch(self, rows, layer).max(moved as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_stores_defaults_and_reads_back() {
        let plan = EvictionPlan::new("snapkv", 512, &[("window", 32)]).unwrap();
        let json = serde_json::to_string(&plan).unwrap();
        assert_eq!(json, r#"{"schema_version":1,"rule":"snapkv","budget":512,"settings":{"kernel":5,"window":32}}"#);
        assert_eq!(serde_json::from_str::<EvictionPlan>(&json).unwrap(), plan);
        assert!(serde_json::from_str::<EvictionPlan>(&json.replace("budget", "bugdet")).is_err());
    }

    #[test]
    fn bad_settings_are_named() {
        for (rule, budget, given, words) in [
            ("h2o", 8, &[][..], "rule: `h2o` is not one of snapkv, keydiff"),
            ("keydiff", 0, &[], "budget: 0 is not a number of tokens"),
            ("keydiff", 1 << 25, &[], "budget: 33554432 is not"),
            ("keydiff", 8, &[("block", 0)], "block: 0 is not a number of tokens"),
            ("keydiff", 8, &[("window", 4)], "keydiff: `window` is not a setting; settings are budget, block"),
            ("snapkv", 64, &[], "budget: 64 leaves no token besides the observation window of 64"),
            ("snapkv", 16, &[("window", 17)], "budget: 16 leaves no token"),
            ("snapkv", 99, &[("kernel", 4)], "kernel: 4 is even"),
            ("snapkv", 99, &[("block", 4)], "snapkv: `block` is not a setting; settings are budget, window, kernel"),
        ] {
            let e = EvictionPlan::new(rule, budget, given).unwrap_err().to_string();
            assert!(e.starts_with(words), "{rule} {budget} {given:?}: {e}");
        }
        let plan = EvictionPlan { schema_version: 2, ..EvictionPlan::new("keydiff", 8, &[]).unwrap() };
        assert!(plan.check().unwrap_err().to_string().contains("version 2"));
    }

    #[test]
    fn rows_read_in_decode_are_counted() {
        let keydiff = EvictionPlan::new("keydiff", 8, &[("block", 4)]).unwrap();
        // The context of 10 leaves 8; positions 10 and 11 end a block, 12 begins the next.
        assert_eq!(keydiff.rows_read(10..13).unwrap(), 9 + 10 + 9);
        let snapkv = EvictionPlan::new("snapkv", 8, &[("window", 2)]).unwrap();
        assert_eq!(snapkv.rows_read(10..13).unwrap(), 9 + 10 + 11);
        assert_eq!(snapkv.rows_read(5..6).unwrap(), 6);
        assert_eq!((keydiff.rows(100).unwrap(), keydiff.rows(9).unwrap(), snapkv.rows(100).unwrap()), (12, 9, 100));
    }
}
