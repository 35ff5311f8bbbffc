//! Patches: a directory with a retrofit plan, the identity of its base checkpoint and, for exact recall, its calibration;
//! without weights.

use super::output::{check_into, write_into};
use crate::checkpoint::{Checkpoint, Identity, OnProgress, OpenOptions};
use crate::error::{At, Error, Result};
use crate::layout::MAX_CONTEXT;
use crate::recall::Calibration;
use crate::retrofit::RetrofitPlan;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Name of a patch's file in its directory.
const FILE: &str = "bfly.json";
/// Name of the file with the calibration of exact recall.
const CALIBRATION: &str = "recall.safetensors";
const VERSION: u32 = 1;

/// A saved retrofit: plan, context length and base checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Patch {
    schema_version: u32,
    /// Origin of the base checkpoint, with its content hash or commit.
    pub base: Identity,
    /// Context length of the run that saved the patch, in tokens.
    pub ctx: usize,
    /// Swapped layers and settings.
    pub plan: RetrofitPlan,
    /// Directory that the patch was read from.
    #[serde(skip)]
    dir: PathBuf,
}

impl Patch {
    /// Checks that a patch can be written to `dir`, before the work that its content takes.
    ///
    /// # Errors
    /// `dir` exists and is not a patch, or cannot be written to.
    pub fn check(dir: &Path, flag: &'static str) -> Result<()> {
        check_into(dir, flag, FILE, |_| Ok(Self::fault(dir)))
    }

    /// Returns why the directory `dir` is not to be overwritten, if it is no patch.
    fn fault(dir: &Path) -> Option<String> {
        let fault = Self::load(&dir.join(FILE)).err();
        fault.map(|_| "is not a patch that this build reads; only a patch is overwritten".into())
    }

    /// Writes a patch to `dir`: a new directory, or one that already is a patch.
    ///
    /// # Errors
    /// `dir` exists and is not a patch, or cannot be written to; a file of the checkpoint cannot be read.
    pub fn save(
        dir: &Path,
        checkpoint: &Checkpoint,
        ctx: usize,
        plan: &RetrofitPlan,
        calibration: Option<&Calibration>,
        flag: &'static str,
        progress: OnProgress,
    ) -> Result<()> {
        let base = checkpoint.identity.hashed(&checkpoint.files(), progress)?;
        let patch = Self { schema_version: VERSION, base, ctx, plan: plan.clone(), dir: dir.into() };
        let json = serde_json::to_vec_pretty(&patch).map_err(|e| Error::format(dir.display(), e))?;
        let tables = calibration.map(Calibration::to_bytes).transpose()?;
        let mut files = vec![(FILE, json.as_slice())];
        files.extend(tables.as_ref().map(|t| (CALIBRATION, t.as_slice())));
        write_into(dir, flag, &files, |_| Ok(Self::fault(dir)))
    }

    /// Reads the patch in `dir`; returns `None` if `dir` has no `bfly.json`.
    ///
    /// # Errors
    /// The file cannot be read, is malformed, has another schema version, or holds invalid settings.
    pub fn open(dir: &str) -> Result<Option<Self>> {
        let path = Path::new(dir).join(FILE);
        path.exists().then(|| Self::load(&path)).transpose()
    }

    /// Returns the file with the calibration of exact recall, if the patch has one.
    pub fn calibration(&self) -> Option<PathBuf> {
        Some(self.dir.join(CALIBRATION)).filter(|path| path.exists())
    }

    fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).at(path.display())?;
        let mut patch: Self = serde_json::from_str(&text).map_err(|e| Error::format(path.display(), e))?;
        patch.dir = path.parent().unwrap_or(Path::new(".")).into();
        if patch.schema_version != VERSION {
            let message = format!("is a patch of version {}; this build reads version {VERSION}", patch.schema_version);
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

    /// Checks that `checkpoint`, wherever it lies, has the content of the patch's base.
    ///
    /// # Errors
    /// Another checkpoint, or a file that cannot be read.
    pub fn check_base(&self, checkpoint: &Checkpoint, progress: OnProgress) -> Result<()> {
        let place = self.dir.join(FILE);
        match self.base.same_content(&checkpoint.identity.hashed(&checkpoint.files(), progress)?) {
            true => Ok(()),
            false => {
                let message = format!("was made for another model than {}", checkpoint.identity.place());
                Err(Error::format(place.display(), message))
            }
        }
    }

    /// Opens the base checkpoint.
    ///
    /// # Errors
    /// The checkpoint cannot be opened, or its content has changed since the patch was saved.
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
