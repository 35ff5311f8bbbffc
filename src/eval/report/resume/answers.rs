//! Resumable answers file.

use super::another;
use crate::cli::short_count;
use crate::error::{Error, Result};
use crate::eval::report::{check_writable, read, save, Answers, Cell, Header, PromptSettings, ANSWERS};
use crate::method::Method;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time between two writes of the file while answers are added: what an interruption loses at most.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);

/// Answers, with the path of their file if they are saved.
pub struct AnswersFile {
    path: Option<PathBuf>,
    /// Time of the last write.
    saved: Instant,
    /// Whether answers have been added since.
    unsaved: bool,
    /// Content of the file.
    pub answers: Answers,
}

impl AnswersFile {
    /// Creates the answers, or resumes those of an earlier process at `path`.
    ///
    /// # Errors
    /// A path that cannot be written; an existing file that is not an answers file, or of another measurement, with the
    /// difference.
    pub fn open(path: Option<&Path>, header: Header, prompting: PromptSettings) -> Result<Self> {
        let fresh = Answers { header, joined: vec![], prompting, cells: vec![] };
        let saved = Instant::now();
        let Some(place) = path else { return Ok(Self { path: None, saved, unsaved: false, answers: fresh }) };
        check_writable(place)?;
        if !place.exists() {
            return Ok(Self { path: path.map(Into::into), saved, unsaved: false, answers: fresh });
        }
        let mut answers: Answers = read(place, ANSWERS)?;
        if let Some(differs) = answers.difference(&fresh) {
            return Err(another(place, differs));
        }
        answers.header.resumed.push(fresh.header.started);
        Ok(Self { path: path.map(Into::into), saved, unsaved: false, answers })
    }

    /// Returns the cell of `variant` for `task` at `length`.
    pub fn cell(&self, variant: &str, task: &str, length: usize) -> Option<&Cell> {
        self.position(variant, task, length).map(|at| &self.answers.cells[at])
    }

    fn position(&self, variant: &str, task: &str, length: usize) -> Option<usize> {
        let key = (variant, task, length);
        self.answers.cells.iter().position(|c| (c.record.variant.as_str(), c.task.as_str(), c.length) == key)
    }

    /// Returns how many samples of `task` at `length` the variant `variant` has answered; `prompts` are the hashes of
    /// their prompts.
    ///
    /// # Errors
    /// Answers of a variant of this name to other prompts, or with another plan than that of `method`.
    pub fn answered(
        &self,
        (variant, method): (&str, &Method),
        (task, length): (&str, usize),
        prompts: impl Iterator<Item = String>,
    ) -> Result<usize> {
        let Some(cell) = self.cell(variant, task, length) else { return Ok(0) };
        let plans = (cell.record.plan.as_ref(), cell.record.eviction.as_ref());
        if cell.answers.iter().zip(prompts).any(|(a, hash)| a.sha256 != hash)
            || plans != (method.plan(), method.eviction())
        {
            let at = short_count(length);
            let message = format!(
                "has answers of {variant} to {task} at {at} with other prompts or another plan; choose another --out"
            );
            return Err(Error::usage("--out", message));
        }
        Ok(cell.answers.len())
    }

    /// Adds the answers of `more` to the cell of the same variant, task and length, or adds `more` as a new cell.
    /// Writes the file if the last write is ten seconds ago.
    ///
    /// # Errors
    /// A path that cannot be written.
    pub fn add(&mut self, more: Cell) -> Result<()> {
        match self.position(&more.record.variant, &more.task, more.length) {
            Some(at) => {
                let cell = &mut self.answers.cells[at];
                cell.record = more.record;
                cell.answers.extend(more.answers);
                cell.seconds += more.seconds;
            }
            None => self.answers.cells.push(more),
        }
        self.unsaved = true;
        match self.saved.elapsed() >= SAVE_INTERVAL {
            true => self.save(),
            false => Ok(()),
        }
    }

    /// Writes the file atomically, if there are answers that it lacks.
    ///
    /// # Errors
    /// A path that cannot be written.
    pub fn save(&mut self) -> Result<()> {
        if let (Some(path), true) = (&self.path, self.unsaved) {
            save(path, &self.answers)?;
        }
        (self.saved, self.unsaved) = (Instant::now(), false);
        Ok(())
    }
}
