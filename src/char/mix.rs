//! What a training step reads: windows of text, and among them windows with copy recall.

use super::{Batch, RecallTask, Windows};
use crate::error::{Error, Result};

/// Windows by number, the same however steps are cut into micro-batches.
#[derive(Debug, Clone)]
pub struct Mix {
    text: Option<Windows>,
    recall: Option<(RecallTask, f64)>,
}

impl Mix {
    /// Windows of `text`, of which the share in `recall` hold pairs to recall. Without text all windows are letters and pairs,
    /// and only what is to be recalled is predicted.
    ///
    /// # Errors
    /// Neither, or a share that is not in (0, 1].
    pub fn new(text: Option<Windows>, recall: Option<(RecallTask, f64)>) -> Result<Self> {
        match (&text, &recall) {
            (None, None) => return Err(Error::usage("PATH", "no text to train on")),
            (_, Some((_, share))) if !(*share > 0.0 && *share <= 1.0) => {
                return Err(Error::usage("--mix", format!("recall:{share} is not a share in (0, 1]")));
            }
            _ => {}
        }
        Ok(Self { text, recall })
    }

    /// Whether window `i` holds pairs: the share of them, evenly spread.
    fn recalls(&self, i: u64) -> Option<&RecallTask> {
        let (task, share) = self.recall.as_ref()?;
        let before = |i: u64| (i as f64 * share).floor();
        (self.text.is_none() || before(i + 1) > before(i)).then_some(task)
    }

    /// The windows `first .. first + count`.
    pub fn batch(&mut self, first: u64, count: usize) -> Batch {
        let mut batch = Batch { symbols: vec![], targets: vec![], sequences: count };
        for i in first..first + count as u64 {
            let task = self.recalls(i).cloned();
            let own = match (task, &mut self.text) {
                (Some(task), Some(text)) => {
                    let window: Vec<u8> = text.batch(i, 1).targets.iter().map(|s| *s as u8).collect();
                    let symbols = task.window(i, Some(&window)).0;
                    let targets: Vec<u32> = symbols.iter().map(|s| u32::from(*s)).collect();
                    let mut own = Batch { symbols: vec![], targets: vec![], sequences: 1 };
                    own.push(&symbols, &targets);
                    own
                }
                (Some(task), None) => task.batch(i, 1, None).0,
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

    #[test]
    fn a_tenth_of_the_windows_hold_pairs_in_any_cut() -> Result<()> {
        let text = Windows::new(&[vec![b'x'; 64 * 40]], 64, 0)?;
        let mut mix = Mix::new(Some(text), Some((RecallTask::new(64, (22, 42), 0)?, 0.1)))?;
        let whole = mix.batch(0, 40);
        let with = whole.targets.chunks(64).filter(|w| w.iter().any(|s| *s != u32::from(b'x'))).count();
        assert_eq!(with, 4);
        let parts: Vec<Batch> = (0..8).map(|i| mix.batch(5 * i, 5)).collect();
        assert_eq!(parts.iter().flat_map(|b| b.symbols.clone()).collect::<Vec<_>>(), whole.symbols);
        Ok(())
    }
}
