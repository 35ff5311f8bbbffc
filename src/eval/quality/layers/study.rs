//! Scores of sets of swapped layers, computed in parallel.

use crate::cli::Bars;
use crate::error::Result;
use crate::eval::quality::eval_set::{EvalSet, ReferenceLogits};
use crate::eval::quality::heads::HeadCounter;
use crate::eval::quality::runner::{shared_progress, Runner, Workers};
use crate::eval::report::{LayerScore, Score};
use crate::eval::variant::Variant;
use crate::method::Method;
use crate::retrofit::{ranges, RetrofitPlan};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the steps at which each head of the stock model copies the answers of `eval_set`, of several turns the first.
pub fn retrieval_heads(eval_set: &EvalSet, runner: &Runner) -> Result<HeadCounter> {
    let mut tally = HeadCounter::default();
    for (prompt, answer) in eval_set.questions.iter().filter_map(|(p, answers)| Some((p, answers.first()?))) {
        runner.run(&Variant::stock(), eval_set.ctx, |run| tally.count(run, prompt, answer, eval_set.chunk))?;
    }
    Ok(tally)
}

/// Scores sets of swapped layers, reusing the scores of an earlier process.
pub struct LayerScorer<'a, P> {
    /// Workers that compute scores in parallel.
    pub runners: &'a mut Workers,
    /// Logits of the stock model on the texts.
    pub reference: &'a ReferenceLogits,
    /// Builds the plan that swaps the given layers.
    pub plan: &'a P,
    /// Progress bars.
    pub bars: &'a Bars,
    /// Tokens read so far.
    pub done: AtomicUsize,
    /// Tokens of the whole study.
    pub total: usize,
    /// Scores of an earlier process, to be reused.
    pub known: Vec<Score>,
    /// Called with every new score.
    pub on_score: &'a (dyn Fn(&Score) -> Result<()> + Sync),
}

impl<P: Fn(Vec<usize>) -> Result<RetrofitPlan>> LayerScorer<'_, P> {
    /// Scores each of `layers`, swapped one at a time in addition to `swapped`.
    ///
    /// # Errors
    /// A plan that does not fit the model; an error of `on_score`.
    pub fn on_top(&mut self, eval_set: &EvalSet, swapped: &[usize], layers: &[usize]) -> Result<Vec<LayerScore>> {
        let and = |layer: &usize| {
            let mut all = [swapped, &[*layer]].concat();
            all.sort_unstable();
            all
        };
        let scores = self.scores(eval_set, &layers.iter().map(and).collect::<Vec<_>>())?;
        Ok(layers.iter().zip(scores).map(|(layer, score)| LayerScore { layer: *layer, score }).collect())
    }

    /// Scores each of `sets` of swapped layers.
    ///
    /// # Errors
    /// A plan that does not fit the model; an error of `on_score`.
    pub fn scores(&mut self, eval_set: &EvalSet, sets: &[Vec<usize>]) -> Result<Vec<Score>> {
        let named = |layers: &Vec<usize>| {
            Ok(match layers.is_empty() {
                true => Variant::stock(),
                false => {
                    Variant::new(format!("layers {}", ranges(layers)), Method::Butterfly((self.plan)(layers.clone())?))
                }
            })
        };
        let variants = sets.iter().map(named).collect::<Result<Vec<_>>>()?;
        let (bars, done, total, reference) = (self.bars, &self.done, self.total as u64, self.reference);
        let mut scores: Vec<Option<Score>> = variants.iter().map(|v| self.known(eval_set, v)).collect();
        let missing: Vec<usize> = (0..scores.len()).filter(|i| scores[*i].is_none()).collect();
        done.fetch_add(eval_set.tokens() * (scores.len() - missing.len()), Ordering::Relaxed);
        let made = self.runners.each(missing.len(), |runner, i| {
            let show = |n| bars.show("layers", n as u64, total);
            let score = eval_set.score(runner, &variants[missing[i]], reference, &mut shared_progress(done, show))?;
            (self.on_score)(&score)?;
            Ok(score)
        })?;
        missing.into_iter().zip(made).for_each(|(i, score)| scores[i] = Some(score));
        Ok(scores.into_iter().flatten().collect())
    }

    /// Returns the earlier score of `variant` on the texts and questions of `eval_set`, if there is one.
    fn known(&self, eval_set: &EvalSet, variant: &Variant) -> Option<Score> {
        let texts = |s: &Score| s.texts.iter().map(|t| &t.document).eq(eval_set.texts.iter().map(|t| &t.document));
        let same = |s: &&Score| {
            s.record.plan.as_ref() == variant.method.plan() && s.answers.len() == eval_set.questions.len() && texts(s)
        };
        self.known.iter().find(same).cloned()
    }
}
