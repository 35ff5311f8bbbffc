//! Settings of swapped layers, judged side by side.

use super::Single;
use crate::cli::Bars;
use crate::error::Result;
use crate::eval::quality::eval_set::{EvalSet, Reference, Score};
use crate::eval::quality::heads::Tally;
use crate::eval::quality::runner::{together, Runner, Runners};
use crate::eval::variant::Variant;
use crate::method::Method;
use crate::retrofit::{ranges, RetrofitPlan};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Which heads copy answers, in the model as it came.
pub fn retrieval_heads(probe: &EvalSet, runner: &Runner) -> Result<Tally> {
    let mut tally = Tally::default();
    for (prompt, wanted) in &probe.questions {
        runner.run(&Variant::stock(), probe.ctx, |run| tally.count(run, prompt, wanted, probe.chunk))?;
    }
    Ok(tally)
}

/// What is run, and how far it is.
pub struct Study<'a, P> {
    /// The model, as often as settings are judged side by side.
    pub runners: &'a mut Runners,
    /// Stock on the texts.
    pub reference: &'a Reference,
    /// The plan that swaps some layers.
    pub plan: &'a P,
    /// Progress.
    pub bars: &'a Bars,
    /// Tokens read,
    pub done: AtomicUsize,
    /// of so many.
    pub total: usize,
    /// What an earlier run judged: not judged again.
    pub known: Vec<Score>,
    /// Hears of everything that is judged anew.
    pub on_judged: &'a (dyn Fn(&Score) -> Result<()> + Sync),
}

impl<P: Fn(Vec<usize>) -> Result<RetrofitPlan>> Study<'_, P> {
    /// What is left when each of `layers` is swapped, one at a time, on top of `swapped`.
    pub fn on_top(&mut self, probe: &EvalSet, swapped: &[usize], layers: &[usize]) -> Result<Vec<Single>> {
        let and = |layer: &usize| {
            let mut all = [swapped, &[*layer]].concat();
            all.sort_unstable();
            all
        };
        let scores = self.judge(probe, &layers.iter().map(and).collect::<Vec<_>>())?;
        Ok(layers.iter().zip(scores).map(|(layer, score)| Single { layer: *layer, score }).collect())
    }

    /// What is left when these layers are swapped, for each set of them.
    pub fn judge(&mut self, probe: &EvalSet, sets: &[Vec<usize>]) -> Result<Vec<Score>> {
        let named = |layers: &Vec<usize>| {
            Ok(match layers.is_empty() {
                true => Variant::stock(),
                false => Variant {
                    name: format!("layers {}", ranges(layers)),
                    method: Method::Butterfly((self.plan)(layers.clone())?),
                },
            })
        };
        let variants = sets.iter().map(named).collect::<Result<Vec<_>>>()?;
        let (bars, done, total, reference) = (self.bars, &self.done, self.total as u64, self.reference);
        let mut scores: Vec<Option<Score>> = variants.iter().map(|v| self.known(probe, v)).collect();
        let missing: Vec<usize> = (0..scores.len()).filter(|i| scores[*i].is_none()).collect();
        done.fetch_add(probe.tokens() * (scores.len() - missing.len()), Ordering::Relaxed);
        let made = self.runners.each(missing.len(), |runner, i| {
            let show = |n| bars.show("layers", n as u64, total);
            let score = probe.judge(runner, &variants[missing[i]], reference, &mut together(done, show))?;
            (self.on_judged)(&score)?;
            Ok(score)
        })?;
        missing.into_iter().zip(made).for_each(|(i, score)| scores[i] = Some(score));
        Ok(scores.into_iter().flatten().collect())
    }

    /// What an earlier run found `variant` worth, on the same texts and questions.
    fn known(&self, probe: &EvalSet, variant: &Variant) -> Option<Score> {
        let texts = |s: &Score| s.texts.iter().map(|t| &t.document).eq(probe.parts.iter().map(|p| &p.document));
        let same = |s: &&Score| {
            s.record.plan.as_ref() == variant.method.plan() && s.answers.len() == probe.questions.len() && texts(s)
        };
        self.known.iter().find(same).cloned()
    }
}
