//! Search for the largest prompt within a length: how many units of hay (sentences, lines, documents) fit.

use super::sample::FollowUp;
use super::{CountTokens, SampleKey, Sources};
use crate::error::Result;

/// Request for one sample.
pub(super) struct SampleRequest<'a> {
    /// Name of the task.
    pub task: &'a str,
    /// Words, texts and questions that the sample is drawn from.
    pub sources: &'a Sources,
    /// Length, seed and index of the sample.
    pub draw: SampleKey,
    /// Counts the tokens of a text.
    pub count: CountTokens<'a>,
}

impl SampleRequest<'_> {
    /// Returns the random stream of one part of the sample, which is the same at every length.
    pub fn rng(&self, part: &str) -> super::rng::Rng {
        super::rng::Rng::new(self.draw.seed, &[self.task, part], self.draw.index as u64)
    }
}

/// A prompt, split at the start of its question, and its expected answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Draft {
    /// Text before the question.
    pub context: String,
    /// Question at the end of the prompt.
    pub question: String,
    /// Start of the answer, which the model continues.
    pub answer_prefix: String,
    /// Strings that the answer should contain.
    pub outputs: Vec<String>,
    /// Depth of the needle, 0 to 1; `None` outside depth grids.
    pub depth: Option<f64>,
    /// Questions asked in later turns.
    pub follow_ups: Vec<FollowUp>,
}

impl Draft {
    /// Returns the tokens of the prompt, the questions of later turns included.
    fn tokens(&self, count: CountTokens) -> Result<usize> {
        let first = count.prompt(&[&self.context, self.question.as_str(), &self.answer_prefix].concat())?;
        self.follow_ups.iter().try_fold(first, |all, turn| Ok(all + count.follow_up(&turn.prompt())?))
    }
}

/// Generates one sample with any amount of hay, deterministically.
pub(super) struct PromptMaker<'a> {
    /// Minimum units of hay.
    pub least: usize,
    /// Maximum units of hay that the source has.
    pub most: usize,
    /// Units added in the first step, from which the tokens per unit are estimated.
    pub step: usize,
    /// Generates the sample with a given number of units.
    pub draft: Box<dyn Fn(usize) -> Result<Draft> + 'a>,
}

/// A draft and its length in tokens.
pub(super) struct CountedDraft {
    /// Draft of the sample.
    pub draft: Draft,
    /// Tokens of the draft's prompt.
    pub tokens: usize,
}

/// Rounds of interpolation before the search falls back to bisection, for texts whose tokens are not linear in the
/// units.
const ROUNDS: usize = 6;

/// Finds the draft with the most hay whose prompt has at most `limit` tokens, to within `limit / 512`; returns the
/// smallest draft where none fits.
///
/// Tokens are nearly linear in units, so the next size is interpolated between two known ones (regula falsi). A long
/// text is then tokenised two or three times, not at every step of a bisection.
pub(super) fn largest(maker: &PromptMaker, limit: usize, count: CountTokens) -> Result<CountedDraft> {
    let make = |units: usize| -> Result<CountedDraft> {
        let draft = (maker.draft)(units)?;
        let tokens = draft.tokens(count)?;
        Ok(CountedDraft { draft, tokens })
    };
    let mut best = make(maker.least)?;
    let mut low = (maker.least, best.tokens);
    // The smallest size known not to fit, and its tokens where they are known. A unit has at least one token.
    let mut high = (maker.most.min(maker.least.saturating_add(limit.saturating_mul(2))).saturating_add(1), None);
    let slack = limit / 512;
    let mut slope = None;
    let mut round = 0;
    while best.tokens <= limit && limit - best.tokens > slack && high.0 - low.0 > 1 {
        round += 1;
        let rise = high.1.map(|tokens: usize| (tokens - low.1.min(tokens)) as f64 / (high.0 - low.0) as f64);
        let units = match rise.or(slope).filter(|s| *s > 0.0) {
            None => low.0 + maker.step,
            Some(_) if round > ROUNDS && high.1.is_none() => low.0 * 2,
            Some(_) if round > ROUNDS => low.0 + (high.0 - low.0) / 2,
            Some(s) => low.0 + ((limit - low.1 - slack / 2) as f64 / s) as usize,
        };
        let units = units.clamp(low.0 + 1, high.0 - 1);
        let made = make(units)?;
        match made.tokens <= limit {
            true => {
                slope = Some((made.tokens.max(low.1) - low.1) as f64 / (units - low.0) as f64);
                low = (units, made.tokens);
                best = made;
            }
            false => high = (units, Some(made.tokens)),
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::quality::tasks::fixture::{words, Counter};

    fn maker(least: usize, most: usize, text: impl Fn(usize) -> String + 'static) -> PromptMaker<'static> {
        let empty = |context| Draft {
            context,
            question: String::new(),
            answer_prefix: String::new(),
            outputs: vec![],
            depth: None,
            follow_ups: vec![],
        };
        PromptMaker { least, most, step: 10, draft: Box::new(move |n| Ok(empty(text(n)))) }
    }

    #[test]
    fn the_largest_that_fits_is_found_with_few_counts() -> Result<()> {
        // (tokens of n units, limit).
        type Tokens = fn(usize) -> usize;
        let cases: [(Tokens, usize); 4] =
            [(|n| 50 + 7 * n, 130_000), (|n| n, 4_000), (|n| 300 + 26 * n + n % 3, 16_000), (|n| 900 + 500 * n, 8_000)];
        for (i, (tokens, limit)) in cases.into_iter().enumerate() {
            let m = maker(1, usize::MAX, move |n| "w ".repeat(tokens(n)));
            let counter = Counter::default();
            let found = largest(&m, limit, &|t: &str| counter.count(t))?;
            let unit = tokens(2) - tokens(1);
            assert!(found.tokens <= limit && found.tokens + unit.max(limit / 512 + 1) > limit, "{i}: {}", found.tokens);
            assert!(counter.counts() <= 7, "{i}: counted {} times", counter.counts());
        }
        Ok(())
    }

    #[test]
    fn the_search_finds_limits_across_a_jump_in_tokens_per_unit() -> Result<()> {
        // From 500 units on, each unit has ten times the tokens, so linear interpolation misses the limit.
        let m = maker(3, usize::MAX, |n| "w ".repeat(if n < 500 { n } else { 10 * n }));
        for limit in [40, 499, 2_000, 4_999, 5_000, 9_000, 50_000] {
            let found = largest(&m, limit, &words)?.tokens;
            let exact = if limit < 5_000 { limit.min(499) } else { limit / 10 * 10 };
            assert!(found <= exact && found + limit / 512 + 10 >= exact, "{limit}: {found} of {exact}");
        }
        Ok(())
    }

    #[test]
    fn the_bounds_of_a_source_are_kept() -> Result<()> {
        let text = |n: usize| {
            assert!((20..=30).contains(&n), "{n}");
            "w ".repeat(n)
        };
        assert_eq!(largest(&maker(20, 30, text), 1_000, &words)?.tokens, 30);
        assert_eq!(largest(&maker(20, 30, text), 25, &words)?.tokens, 25);
        assert_eq!(largest(&maker(20, 30, text), 5, &words)?.tokens, 20, "the smallest, which does not fit");
        Ok(())
    }

    #[test]
    fn errors_of_the_counter_are_returned() {
        let fail = |_: &str| Err(crate::Error::usage("counter", "broken"));
        assert!(largest(&maker(1, 9, |n| "w ".repeat(n)), 5, &fail).is_err());
    }
}
