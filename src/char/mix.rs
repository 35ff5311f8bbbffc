//! What a training step reads: windows of text, or in some steps windows with copy recall.

use super::{Batch, RecallTask, Windows};
use crate::error::{Error, Result};

/// Windows by number, the same however steps are cut into micro-batches.
#[derive(Debug, Clone)]
pub struct Mix {
    text: Option<Windows>,
    recall: Option<(RecallTask, f64)>,
    per_step: u64,
}

impl Mix {
    /// Steps of `per_step` windows of `text`. The share of steps in `recall` puts pairs into its windows and predicts the
    /// letters to recall alone: among the characters of a long window they would weigh nothing. Without text all windows are
    /// letters and pairs.
    ///
    /// # Errors
    /// Neither, or a share that is not in (0, 1].
    pub fn new(text: Option<Windows>, recall: Option<(RecallTask, f64)>, per_step: usize) -> Result<Self> {
        match (&text, &recall) {
            (None, None) => return Err(Error::usage("PATH", "no text to train on")),
            (_, Some((_, share))) if !(*share > 0.0 && *share <= 1.0) => {
                return Err(Error::usage("--mix", format!("recall:{share} is not a share in (0, 1]")));
            }
            _ => {}
        }
        Ok(Self { text, recall, per_step: per_step.max(1) as u64 })
    }

    /// The task of step `step`, counted from 0, if it recalls: the share of steps, evenly spread.
    pub fn recalls(&self, step: u64) -> Option<&RecallTask> {
        let (task, share) = self.recall.as_ref()?;
        let before = |step: u64| (step as f64 * share).floor();
        (self.text.is_none() || before(step + 1) > before(step)).then_some(task)
    }

    /// The windows `first .. first + count`.
    pub fn batch(&mut self, first: u64, count: usize) -> Batch {
        let mut batch = Batch { symbols: vec![], targets: vec![], sequences: count };
        for i in first..first + count as u64 {
            let own = match (self.recalls(i / self.per_step).cloned(), &mut self.text) {
                (Some(task), text) => task.batch(i, 1, text.as_mut()).0,
                (None, Some(text)) => text.batch(i, 1),
                (None, None) => continue,
            };
            batch.symbols.extend(own.symbols);
            batch.targets.extend(own.targets);
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::training::NO_TARGET;

    #[test]
    fn a_tenth_of_the_steps_recall_in_any_cut() -> Result<()> {
        let text = Windows::new(&[vec![b'x'; 64 * 80]], 64, 0)?;
        let mut mix = Mix::new(Some(text), Some((RecallTask::new(64, (22, 42), 0)?, 0.1)), 2)?;
        let whole = mix.batch(0, 80);
        let windows: Vec<_> = whole.targets.chunks(64).collect();
        let recall: Vec<usize> = (0..80).filter(|i| windows[*i].contains(&NO_TARGET)).collect();
        assert_eq!(recall, [18, 19, 38, 39, 58, 59, 78, 79]);
        assert!(recall.iter().all(|i| windows[*i].iter().filter(|t| **t != NO_TARGET).count() == 16));
        let parts: Vec<Batch> = (0..16).map(|i| mix.batch(5 * i, 5)).collect();
        assert_eq!(parts.iter().flat_map(|b| b.symbols.clone()).collect::<Vec<_>>(), whole.symbols);
        Ok(())
    }
}
