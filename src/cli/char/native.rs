//! `bfly-retrofit` on a character model: no layer of it can be swapped, and its text is continued as by `bfly-char generate`.

use super::trained::continue_text;
use crate::char::{checkpoint, MODEL_TYPE};
use crate::cli::{RetrofitArgs, RunArgs};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Returns the directory with the weights where `model` is a directory of a character model.
pub(in crate::cli) fn character_model(model: &str) -> Option<PathBuf> {
    let dir = checkpoint::resolve(Path::new(model)).ok()?;
    let text = std::fs::read_to_string(dir.join("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_str(&text).ok()?;
    (config["model_type"] == MODEL_TYPE).then_some(dir)
}

/// Continues the prompt.
///
/// # Errors
/// A flag that has no meaning for a character model; those of `bfly-char generate`.
pub(in crate::cli) fn run_character_model(args: &RunArgs, dir: &Path) -> Result<()> {
    let given = [
        ("flags of butterfly attention and recall", args.retrofit != RetrofitArgs::default()),
        ("--ctx", args.ctx.is_some()),
        ("--dtype", args.model.dtype != "auto"),
        ("--tie-embeddings", args.model.tie_embeddings),
        ("--revision", args.model.revision.is_some()),
        ("--token-ids", args.prompt.token_ids.is_some()),
        ("--chat", args.prompt.chat),
        ("--prefill-chunk", args.prefill_chunk.is_some()),
        ("--memory-budget", args.memory_budget.is_some()),
        ("--json", args.json.is_some()),
        ("--logits-out", args.logits_out.is_some()),
        ("--save", args.save.is_some()),
    ];
    if let Some((flag, _)) = given.iter().find(|(_, given)| *given) {
        let why = "not for a character model, whose layers and memory its config.json sets; see `bfly-char --help`";
        return Err(Error::usage(flag, why));
    }
    args.model.set_threads()?;
    let prompt = args.prompt.text()?.unwrap_or_default();
    continue_text(dir, &args.model.device, &prompt, &args.sampling, !args.quiet)
}
