//! Flags shared by all quality measurements: the model under test, its variants and its texts.

use crate::checkpoint::OnProgress;
use crate::cli::{open_device, parse_size, short_count, Bars, ModelArgs};
use crate::error::{Error, Result};
use crate::eval::report::beyond_trained;
use crate::eval::target::{Target, TargetArgs};
use crate::eval::variant::Variant;
use crate::retrofit::RetrofitPlan;
use clap::Args;
use std::path::PathBuf;

/// Flags shared by all quality measurements.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Variants to run, comma-separated: stock; retrofit, or retrofit:KEY=VALUE,.. with the flags of bfly-retrofit as
    /// keys (window, sink-tokens, partner, layers, plan, ..), or kv=1/16 for the widest window whose cache takes at
    /// most that share of a dense one; recall, with the same flags, or question=exact, with which ruler, fidelity and
    /// needle read an unseen question exactly instead of token by token; snapkv or keydiff with budget=TOKENS or
    /// kv=1/16. A KEY=VALUE belongs to the method before it. May be repeated.
    #[arg(long, value_name = "LIST", default_value = "retrofit")]
    pub variants: Vec<String>,
    /// Folder of documents, as scripts/fetch_texts.py writes it; a model without a tokenizer gets random ids instead.
    #[arg(long, value_name = "DIR", default_value = "texts")]
    pub texts: PathBuf,
    /// Prefill chunk in tokens: more use more memory for activations, fewer run slower.
    #[arg(long, value_name = "TOKENS", default_value = "4096", value_parser = parse_size)]
    pub prefill_chunk: usize,
    /// Allow contexts beyond the trained length of the model, which are refused otherwise; tables and figures mark
    /// them.
    #[arg(long)]
    pub allow_extrapolation: bool,
    /// Print no progress, only warnings and the table.
    #[arg(long, short)]
    pub quiet: bool,
    /// Source and format of the weights.
    #[command(flatten)]
    pub model: ModelArgs,
}

impl EvalArgs {
    /// Opens the model under test without reading its weights.
    ///
    /// # Errors
    /// A device or a checkpoint that does not exist, or weights that are larger than the memory.
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

    /// Returns the one retrofit that `--variants` names.
    ///
    /// # Errors
    /// No variant, several variants, or a variant that is not a retrofit; exact recall that reads all of `ctx` exactly.
    pub fn one_retrofit(&self, target: &Target, ctx: usize) -> Result<(Variant, RetrofitPlan)> {
        let mut variants = target.variants_at(ctx)?;
        let one = variants.pop().filter(|_| variants.is_empty());
        let (variant, plan) = one
            .and_then(|v| v.method.plan().cloned().map(|plan| (v, plan)))
            .ok_or_else(|| Error::usage("--variants", "give exactly one retrofit, with or without recall"))?;
        let exact = plan.settings.exact_tokens();
        if plan.settings.recall > 0 && ctx <= exact {
            let message = format!(
                "{} is {ctx} tokens: its window, sinks and fetched tokens cover up to {exact}, where every layer is \
                 dense; give more, or a smaller recall",
                short_count(ctx)
            );
            return Err(Error::usage("--ctx", message));
        }
        Ok((variant, plan))
    }

    /// Refuses contexts beyond the trained length, or warns of them with `--allow-extrapolation`.
    ///
    /// # Errors
    /// Contexts beyond the trained length without `--allow-extrapolation`.
    pub fn check_trained(&self, target: &Target, contexts: &[usize], bars: &Bars) -> Result<()> {
        target.warn(bars);
        let trained = target.checkpoint().spec.max_positions;
        let Some(beyond) = beyond_trained(trained, contexts.iter().copied()) else { return Ok(()) };
        let trained = short_count(trained);
        if !self.allow_extrapolation {
            let message = format!(
                "{beyond}: the model was trained for {trained} positions; give --allow-extrapolation to exceed them"
            );
            return Err(Error::usage("--ctx", message));
        }
        bars.warn(&format!("the model was trained for {trained} positions: {beyond} is extrapolation"));
        Ok(())
    }
}
