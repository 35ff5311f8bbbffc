//! Keeping some tokens and dropping the rest: other training-free methods behind the same seam, to compare with.
//!
//! A rule scores the tokens that a full-attention layer holds, for each KV head on its own, and the `budget` highest stay: after an
//! eviction one row of the cache holds different positions in different heads. Keys are stored rotated at their true positions,
//! so attention over what is left is dense attention over fewer rows. Sliding layers stay as they are. The cache does the rest
//! ([`crate::cache::CompressedKv`]): a rule is one file with one [`Eviction`] and one line in [`RULES`].
//!
//! | rule | scores by | evicts | most rows at once |
//! |---|---|---|---|
//! | `snapkv` | attention of the context's last queries | once, when the context is over | the context's, and one layer's copy |
//! | `keydiff` | how unlike the other keys a key is | whenever a block is complete | `budget + block` |
//!
//! A rule's settings are whole numbers by name, so that a plan is plain data whatever the rule. What each rule leaves out of its
//! paper is told in its file. StreamingLLM (Xiao et al. 2023, arXiv:2309.17453) needs no rule here: sinks and a window are
//! `retrofit:partner=local`, with true positions, where the paper numbers what it keeps anew from 0.

mod keydiff;
mod snapkv;

use crate::error::{Error, Result};
use crate::layout::LayerPlan;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;

/// Every rule this build knows.
pub static RULES: &[&dyn Eviction] = &[&snapkv::SnapKv, &keydiff::KeyDiff];

/// The form of a plan that this build writes and reads.
pub const EVICTION_VERSION: u32 = 1;
/// Tokens kept where a plan does not say.
pub const DEFAULT_BUDGET: usize = 1024;
/// Positions are exact in f32 that far.
const MOST: usize = 1 << 24;

/// A setting of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// Its name in plans and in `--variants`.
    pub name: &'static str,
    /// Its value where none is given.
    pub default: usize,
    /// What it is, in a few words.
    pub about: &'static str,
}

/// When a rule evicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// After every so many positions, counted from the first of the text; and when the context is over.
    EveryBlock(usize),
    /// When the context is over; everything is kept until then, and after it.
    Once,
}

/// What a layer shows to a rule.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// Keys held, `[count, G, D]`, rotated, in order of position.
    pub keys: &'a Tensor,
    /// The last [`Eviction::observes`] queries, `[W, H, D]`, rotated: of the positions of the last `W` keys.
    pub queries: Option<&'a Tensor>,
    /// The layer's factor on dot products.
    pub scale: f32,
}

/// A rule that says which tokens stay.
pub trait Eviction: std::fmt::Debug + Sync {
    /// The name that plans and `--variants` take.
    fn name(&self) -> &'static str;

    /// One line for help texts.
    fn about(&self) -> &'static str;

    /// What can be set, besides the budget.
    fn settings(&self) -> &'static [Setting];

    /// Refuses settings that contradict each other or the budget; each alone is known to be from 1 to 16M.
    fn check(&self, plan: &EvictionPlan) -> Result<()>;

    /// When it evicts.
    fn when(&self, plan: &EvictionPlan) -> When;

    /// Queries that it must see, the last ones.
    fn observes(&self, _: &EvictionPlan) -> usize {
        0
    }

    /// A score for each token of each KV head; the highest stay, infinity always does. A GPU should not have to wait for the host.
    ///
    /// # Shapes
    /// f32 `[G, count]`.
    fn scores(&self, plan: &EvictionPlan, seen: &Seen) -> Result<Tensor>;

    /// Bytes that scoring `rows` tokens of `layer` takes.
    fn scratch(&self, plan: &EvictionPlan, rows: usize, layer: &LayerPlan) -> u64;
}

/// Finds a rule by name.
///
/// # Errors
/// An unknown name: lists those there are.
pub fn find(name: &str) -> Result<&'static dyn Eviction> {
    RULES.iter().find(|r| r.name() == name).copied().ok_or_else(|| {
        let names: Vec<_> = RULES.iter().map(|r| r.name()).collect();
        Error::usage("rule", format!("`{name}` is not one of {}", names.join(", ")))
    })
}

/// A plan: every full-attention layer keeps `budget` tokens for each KV head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvictionPlan {
    /// Version of this form.
    pub schema_version: u32,
    /// The rule's name.
    pub rule: String,
    /// Tokens kept for each KV head of each layer.
    pub budget: usize,
    /// The rule's settings by name; one that is absent has its default.
    pub settings: BTreeMap<String, usize>,
}

impl EvictionPlan {
    /// A plan of `rule` with what is `given` of its settings, and the defaults of the others.
    ///
    /// # Errors
    /// As [`EvictionPlan::check`].
    pub fn new(rule: &str, budget: usize, given: &[(&str, usize)]) -> Result<Self> {
        let mut settings: BTreeMap<String, usize> =
            find(rule)?.settings().iter().map(|s| (s.name.into(), s.default)).collect();
        settings.extend(given.iter().map(|(name, value)| (name.to_string(), *value)));
        let plan = Self { schema_version: EVICTION_VERSION, rule: rule.into(), budget, settings };
        plan.check()?;
        Ok(plan)
    }

    /// Refuses a form, rule or setting that this build does not know, and values that are out of range or contradict each
    /// other. Names which.
    pub fn check(&self) -> Result<()> {
        if self.schema_version != EVICTION_VERSION {
            let message = format!("is of version {}; this build reads {EVICTION_VERSION}", self.schema_version);
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

    /// The rule.
    ///
    /// # Errors
    /// As [`find`].
    pub fn find(&self) -> Result<&'static dyn Eviction> {
        find(&self.rule)
    }

    /// A setting's value.
    pub fn setting(&self, setting: &Setting) -> usize {
        self.settings.get(setting.name).copied().unwrap_or(setting.default)
    }

    /// Rows that a layer allocates for `ctx` positions before anything is evicted.
    ///
    /// # Errors
    /// An unknown rule.
    pub fn rows(&self, ctx: usize) -> Result<usize> {
        Ok(match self.find()?.when(self) {
            When::EveryBlock(block) => (self.budget + block).min(ctx),
            When::Once => ctx,
        })
    }

    /// Rows that queries at `positions` read in a layer, all together, once the context before them is over.
    ///
    /// # Errors
    /// An unknown rule.
    pub fn rows_read(&self, positions: Range<usize>) -> Result<usize> {
        let when = self.find()?.when(self);
        let mut held = self.budget.min(positions.start);
        let mut sum = 0;
        for p in positions {
            held += 1;
            sum += held;
            if matches!(when, When::EveryBlock(block) if (p + 1).is_multiple_of(block)) {
                held = held.min(self.budget);
            }
        }
        Ok(sum)
    }

    /// Bytes that an eviction takes in `layer`, provisioned for `ctx` positions, besides what the layer holds before and after:
    /// scores, and the rows that stay before they are put in their places.
    ///
    /// # Errors
    /// An unknown rule.
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
    fn a_plan_is_complete_and_reads_back() {
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
    fn what_decode_reads_is_counted() {
        let keydiff = EvictionPlan::new("keydiff", 8, &[("block", 4)]).unwrap();
        // The context of 10 leaves 8; positions 10 and 11 end a block, 12 begins the next.
        assert_eq!(keydiff.rows_read(10..13).unwrap(), 9 + 10 + 9);
        let snapkv = EvictionPlan::new("snapkv", 8, &[("window", 2)]).unwrap();
        assert_eq!(snapkv.rows_read(10..13).unwrap(), 9 + 10 + 11);
        assert_eq!(snapkv.rows_read(5..6).unwrap(), 6);
        assert_eq!((keydiff.rows(100).unwrap(), keydiff.rows(9).unwrap(), snapkv.rows(100).unwrap()), (12, 9, 100));
    }
}
