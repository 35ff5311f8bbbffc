//! The flags that tell what is judged, and on what.

use crate::checkpoint::OnProgress;
use crate::cli::{open_device, parse_size, short_count, Bars, ModelArgs};
use crate::error::{Error, Result};
use crate::eval::target::{Target, TargetArgs};
use crate::eval::variant::Variant;
use crate::retrofit::RetrofitPlan;
use clap::Args;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// What is judged, and on what.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// What is run: stock, retrofit, retrofit:KEY=VALUE,.. with keys as the flags of bfly-retrofit (window, sink-tokens,
    /// partner, layers, ...), plan=FILE, or kv=1/16 for the window with which the cache takes that share of a dense one; snapkv,
    /// keydiff with budget=N or kv=1/16. A KEY=VALUE belongs to the method before it. May be repeated.
    #[arg(long, value_name = "LIST", default_value = "retrofit")]
    pub variants: Vec<String>,
    /// Documents, as scripts/fetch_texts.py lays them out. Not read where the model has no tokenizer: then texts are random ids.
    #[arg(long, value_name = "DIR", default_value = "texts")]
    pub texts: PathBuf,
    /// Tokens to a prefill chunk.
    #[arg(long, value_name = "TOKENS", default_value = "4096", value_parser = parse_size)]
    pub prefill_chunk: usize,
    /// Go beyond the positions that the model was trained for; the results say so.
    #[arg(long)]
    pub allow_extrapolation: bool,
    /// No progress, only warnings and the table.
    #[arg(long, short)]
    pub quiet: bool,
    /// Where weights come from and how they are held.
    #[command(flatten)]
    pub model: ModelArgs,
}

impl EvalArgs {
    /// Opens the checkpoint; weights are not read.
    ///
    /// # Errors
    /// A device or a checkpoint that is not there, or weights that cannot be held.
    pub fn open(&self, progress: OnProgress) -> Result<Target> {
        self.model.set_threads()?;
        let device = open_device(&self.model.device)?;
        let args = TargetArgs {
            variants: self.variants.clone(),
            texts: self.texts.clone(),
            model: self.model.clone(),
            random_weights: None,
        };
        let target = Target::open(&args, device, progress)?;
        target.refuse_too_large()?;
        Ok(target)
    }

    /// The one retrofit that --variants names.
    ///
    /// # Errors
    /// None, several, or a variant of another kind.
    pub fn one_retrofit(&self, target: &Target, ctx: usize) -> Result<(Variant, RetrofitPlan)> {
        let mut variants = target.variants_at(ctx)?;
        let one = variants.pop().filter(|_| variants.is_empty());
        one.and_then(|v| v.method.plan().cloned().map(|plan| (v, plan)))
            .ok_or_else(|| Error::usage("--variants", "one retrofit is studied; name one"))
    }

    /// Refuses contexts that the model was not trained for, or warns of them where that is allowed.
    ///
    /// # Errors
    /// The first context that is too long.
    pub fn check_trained(&self, target: &Target, contexts: &[usize], bars: &Bars) -> Result<()> {
        let trained = target.checkpoint().spec.max_positions;
        let past: BTreeSet<usize> = contexts.iter().copied().filter(|c| *c > trained).collect();
        let past: Vec<_> = past.into_iter().map(short_count).collect();
        if past.is_empty() {
            return Ok(());
        }
        let (past, trained) = (past.join(", "), short_count(trained));
        if !self.allow_extrapolation {
            let message =
                format!("{past}: the model was trained for {trained} positions; --allow-extrapolation goes beyond");
            return Err(Error::usage("--ctx", message));
        }
        bars.warn(&format!("trained for {trained} positions: {past} is extrapolated"));
        Ok(())
    }
}
