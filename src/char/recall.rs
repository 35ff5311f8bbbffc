//! Copy recall: values of marked keys, asked for at a distance. No statistics of the text help: what is right was read, or is
//! a guess among 26 letters.
//!
//! ```text
//! .. STORE k k k k VALUE v × 16 ..  (distance)  .. ASK k k k k VALUE v × 16 ..
//! ```

use super::{Batch, Windows};
use crate::error::{Error, Result};
use crate::ops::training::NO_TARGET;
use rand::{rngs::StdRng, Rng};

/// Symbols that mark a key to keep, a value, and a key to look up. Control characters, which texts do not use.
const STORE: u8 = 1;
const VALUE: u8 = 2;
const ASK: u8 = 3;
/// Letters of a key and of a value.
const KEY: usize = 4;
const LETTERS: usize = 16;
/// Characters of a marked pair.
const PAIR: usize = 1 + KEY + 1 + LETTERS;
/// Pairs in a window, at most, unless more are asked for.
const PAIRS: usize = 8;
/// Attempts at a place for a pair before the window is begun anew.
const ATTEMPTS: usize = 200;

/// Where a window's pairs lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// Characters from a letter of the value to where it is asked for.
    pub distance: usize,
    /// Place in the window of the first letter to recall.
    pub at: usize,
}

/// Windows with pairs to recall.
#[derive(Debug, Clone)]
pub struct RecallTask {
    window: usize,
    distances: (usize, usize),
    pairs: usize,
    seed: u64,
}

impl RecallTask {
    /// Windows of `window` characters with up to 8 pairs, at distances uniform over `distances` (both included).
    ///
    /// # Errors
    /// Distances that no pair in the window can have.
    pub fn new(window: usize, distances: (usize, usize), seed: u64) -> Result<Self> {
        let (least, most) = distances;
        if least < PAIR || least > most || most + PAIR > window {
            let message = format!(
                "distances of {least} to {most} characters: a window of {window} holds {PAIR} to {}",
                window.saturating_sub(PAIR)
            );
            return Err(Error::usage("recall", message));
        }
        Ok(Self { window, distances, pairs: 0, seed }.pairs(PAIRS))
    }

    /// The task with up to `count` pairs in a window: at most half of the places where stores or questions can lie, so that
    /// random places are found.
    #[must_use]
    pub fn pairs(self, count: usize) -> Self {
        let room = (self.window / (4 * PAIR)).min((self.window - self.distances.0) / (2 * PAIR));
        Self { pairs: count.min(room).max(1), ..self }
    }

    /// The task with a pair per 1,024 characters, 8 at least: a long window then trains on as much as a short one.
    #[must_use]
    pub fn denser(self) -> Self {
        let count = PAIRS.max(self.window / 1024);
        self.pairs(count)
    }

    /// Windows with all distances that a pair can have.
    ///
    /// # Errors
    /// A window that holds no pair and its question.
    pub fn over(window: usize, seed: u64) -> Result<Self> {
        Self::new(window, (PAIR, window.saturating_sub(PAIR)), seed)
    }

    /// The window `index`: its characters, with lower-case letters where there is no pair and `text` is not given, and what is
    /// asked for.
    pub fn window(&self, index: u64, text: Option<&[u8]>) -> (Vec<u8>, Vec<Asked>) {
        let mut rng = crate::train::random(self.seed, index.wrapping_add(1));
        let letter = |rng: &mut StdRng| rng.random_range(b'a'..=b'z');
        let mut symbols: Vec<u8> = match text {
            Some(text) => text[..self.window].to_vec(),
            None => (0..self.window).map(|_| letter(&mut rng)).collect(),
        };
        let asked = loop {
            if let Some(places) = self.places(&mut rng) {
                break places;
            }
        };
        for place in &asked {
            let pair: Vec<u8> = (0..KEY + LETTERS).map(|_| letter(&mut rng)).collect();
            let ask = place.at + LETTERS - PAIR;
            for (start, mark) in [(ask - place.distance, STORE), (ask, ASK)] {
                symbols[start] = mark;
                symbols[start + 1..][..KEY].copy_from_slice(&pair[..KEY]);
                symbols[start + 1 + KEY] = VALUE;
                symbols[start + PAIR - LETTERS..][..LETTERS].copy_from_slice(&pair[KEY..]);
            }
        }
        (symbols, asked)
    }

    /// Places that do not overlap, if they are found.
    fn places(&self, rng: &mut StdRng) -> Option<Vec<Asked>> {
        let mut taken = vec![false; self.window];
        let mut asked = vec![];
        for _ in 0..self.pairs {
            let free = (0..ATTEMPTS).find_map(|_| {
                let distance = rng.random_range(self.distances.0..=self.distances.1);
                let ask = rng.random_range(distance..=self.window - PAIR);
                let free = [ask - distance, ask].iter().all(|s| !taken[*s..*s + PAIR].contains(&true));
                free.then_some((distance, ask))
            });
            let (distance, ask) = free?;
            taken[ask - distance..][..PAIR].fill(true);
            taken[ask..][..PAIR].fill(true);
            asked.push(Asked { distance, at: ask + PAIR - LETTERS });
        }
        Some(asked)
    }

    /// The windows `first .. first + count` as a batch that predicts the letters to recall alone, and what is asked for in each;
    /// in windows of `texts`, or of letters.
    pub fn batch(&self, first: u64, count: usize, mut texts: Option<&mut Windows>) -> (Batch, Vec<Vec<Asked>>) {
        let (mut batch, mut asked) = (Batch { symbols: vec![], targets: vec![], sequences: count }, vec![]);
        for i in first..first + count as u64 {
            let text = texts.as_mut().map(|t| t.batch(i, 1).targets.iter().map(|s| *s as u8).collect::<Vec<u8>>());
            let (symbols, places) = self.window(i, text.as_deref());
            let mut targets = vec![NO_TARGET; self.window];
            for place in &places {
                for t in place.at..place.at + LETTERS {
                    targets[t] = u32::from(symbols[t]);
                }
            }
            batch.push(&symbols, &targets);
            asked.push(places);
        }
        (batch, asked)
    }
}

/// Of letters asked for, those whose logit is the largest, by distance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recalled(Vec<(Asked, usize)>);

impl Recalled {
    /// Adds the windows of a batch, given for every row the symbol with the largest logit.
    pub fn add(&mut self, batch: &Batch, asked: &[Vec<Asked>], best: &[u32]) {
        let window = batch.symbols.len() / batch.sequences;
        for (i, places) in asked.iter().enumerate() {
            for place in places {
                let at = i * window + place.at..i * window + place.at + LETTERS;
                let right = at.filter(|t| best[*t] == batch.targets[*t]).count();
                self.0.push((*place, right));
            }
        }
    }

    /// Every value, and how many of its letters are right.
    pub fn iter(&self) -> impl Iterator<Item = (Asked, usize)> + '_ {
        self.0.iter().copied()
    }

    /// Share of right letters, and the number of values, at distances in `range`.
    pub fn share(&self, range: std::ops::Range<usize>) -> (f64, usize) {
        self.of(|asked| range.contains(&asked.distance))
    }

    /// Share of right letters, and the number of values, whose distance in chunks of `chunk` characters has `bits` set bits.
    pub fn share_of_bits(&self, bits: u32, chunk: usize) -> (f64, usize) {
        self.of(|asked| (asked.at / chunk - (asked.at - asked.distance) / chunk).count_ones() == bits)
    }

    fn of(&self, counts: impl Fn(&Asked) -> bool) -> (f64, usize) {
        let own: Vec<usize> = self.0.iter().filter(|(asked, _)| counts(asked)).map(|(_, right)| *right).collect();
        let right: usize = own.iter().sum();
        (right as f64 / (LETTERS * own.len()).max(1) as f64, own.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_asked_for_was_stored_at_its_distance() -> Result<()> {
        for (window, distances) in [(1024, (22, 1002)), (1024, (900, 1000)), (64, (22, 42)), (4096, (1000, 4000))] {
            let task = RecallTask::new(window, distances, 3)?;
            let mut seen = vec![];
            for index in 0..50 {
                let (symbols, asked) = task.window(index, None);
                assert_eq!((symbols.len(), asked.len()), (window, task.pairs));
                for Asked { distance, at } in asked {
                    let (ask, stored) = (at + LETTERS - PAIR, at + LETTERS - PAIR - distance);
                    assert_eq!(symbols[stored + 1..stored + PAIR], symbols[ask + 1..ask + PAIR]);
                    assert_eq!((symbols[stored], symbols[ask], symbols[at - 1]), (STORE, ASK, VALUE));
                    assert!((distances.0..=distances.1).contains(&distance));
                    seen.push(distance);
                }
                assert_eq!(symbols.iter().filter(|s| **s == STORE).count(), task.pairs);
            }
            let (least, most) = (seen.iter().min(), seen.iter().max());
            let span = distances.1 - distances.0;
            assert!(
                least.is_some_and(|d| *d < distances.0 + span / 4) && most.is_some_and(|d| *d > distances.1 - span / 2),
                "{least:?} {most:?}"
            );
        }
        assert!(RecallTask::new(1024, (22, 1003), 0).is_err_and(|e| e.to_string().contains("1024 holds 22 to 1002")));
        Ok(())
    }

    #[test]
    fn shares_count_letters() -> Result<()> {
        let task = RecallTask::new(256, (22, 200), 1)?;
        let (batch, asked) = task.batch(0, 3, None);
        assert_eq!(batch.predicted(), 3 * task.pairs * LETTERS);
        let mut best = batch.targets.clone();
        let mut recalled = Recalled::default();
        recalled.add(&batch, &asked, &best);
        assert_eq!(recalled.share(0..256), (1.0, 3 * task.pairs));
        let first = asked[0][0];
        best[first.at] ^= 1;
        let mut recalled = Recalled::default();
        recalled.add(&batch, &asked[..1], &best);
        assert_eq!(recalled.share(first.distance..first.distance + 1).0, 15.0 / 16.0);
        let all: usize = (0..8).map(|bits| recalled.share_of_bits(bits, 16).1).sum();
        assert_eq!(all, task.pairs);
        Ok(())
    }
}
