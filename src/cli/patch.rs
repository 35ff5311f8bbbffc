//! A patch: a small directory with a plan and the identity of the checkpoint it belongs to, and no weights.

use super::output::write_into;
use crate::checkpoint::{Checkpoint, Identity, OnProgress, OpenOptions};
use crate::error::{At, Error, Result};
use crate::layout::MAX_CONTEXT;
use crate::retrofit::RetrofitPlan;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The file that makes a directory a patch.
const FILE: &str = "bfly.json";
const VERSION: u32 = 1;

/// A saved retrofit.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Patch {
    schema_version: u32,
    /// The checkpoint.
    pub base: Identity,
    /// Context provisioned when it was saved.
    pub ctx: usize,
    /// Layers and settings.
    pub plan: RetrofitPlan,
}

impl Patch {
    /// Writes a patch to `dir`.
    pub fn save(
        dir: &Path,
        checkpoint: &Checkpoint,
        ctx: usize,
        plan: &RetrofitPlan,
        progress: OnProgress,
    ) -> Result<()> {
        let base = checkpoint.identity.hashed(&checkpoint.files(), progress)?;
        let patch = Self { schema_version: VERSION, base, ctx, plan: plan.clone() };
        let json = serde_json::to_vec_pretty(&patch).map_err(|e| Error::format(dir.display(), e))?;
        let fault = |_| {
            Ok(Self::load(&dir.join(FILE))
                .err()
                .map(|_| "is no patch that this build reads; only such a one is replaced".into()))
        };
        write_into(dir, "--save", (FILE, &json), fault)
    }

    /// Reads the patch in `dir`, or `None` where there is none.
    pub fn open(dir: &str) -> Result<Option<Self>> {
        let path = Path::new(dir).join(FILE);
        path.exists().then(|| Self::load(&path)).transpose()
    }

    fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).at(path.display())?;
        let patch: Self = serde_json::from_str(&text).map_err(|e| Error::format(path.display(), e))?;
        if patch.schema_version != VERSION {
            let message = format!("is a patch of version {}; this build reads {VERSION}", patch.schema_version);
            return Err(Error::format(path.display(), message));
        }
        if patch.ctx == 0 || patch.ctx > MAX_CONTEXT {
            return Err(Error::format(
                path.display(),
                format!("`ctx` must be from 1 to {MAX_CONTEXT}, not {}", patch.ctx),
            ));
        }
        patch.plan.settings.validate().map_err(|e| e.within(path.display()))?;
        Ok(patch)
    }

    /// Opens the base checkpoint and refuses one whose content has changed.
    pub fn base(&self, options: &OpenOptions, progress: OnProgress) -> Result<Checkpoint> {
        let mut options = options.clone();
        if let Identity::Hub { revision, .. } = &self.base {
            options.revision = Some(revision.clone());
        }
        let checkpoint = Checkpoint::open(&self.base.reference(), &options, progress)?;
        let now = checkpoint.identity.hashed(&checkpoint.files(), progress)?;
        if now != self.base {
            return Err(Error::format(
                self.base.place(),
                "has changed since the patch was saved; save the patch again",
            ));
        }
        Ok(checkpoint)
    }
}
