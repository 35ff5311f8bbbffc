//! The evaluation set of `layers` and `ablate`: KL and loss on text, after prefill and in decode, and the loss on
//! expected answers. Exact recall prefills as the stock model does: all its compared positions are decode steps.
//!
//! Task scores would need hundreds of samples to detect small changes. The loss on the expected answer is continuous
//! and rises long before a needle is lost.

use super::documents::Excerpt;
use super::metrics::{compare, LogitRows, PositionMetrics};
use super::prompting::{loss, PromptIds};
use super::runner::Runner;
use crate::error::Result;
use crate::eval::report::{AnswerScore, KvBytes, Score, TextScore, VariantRecord};
use crate::eval::variant::Variant;
use crate::generate::watch;
use crate::run::Run;
use candle_core::Tensor;

/// Tokenised texts and questions.
pub struct EvalSet {
    /// Texts of one length.
    pub texts: Vec<Excerpt>,
    /// Samples of tasks, each with the tokens of the expected answer of every turn.
    pub questions: Vec<(PromptIds, Vec<Vec<u32>>)>,
    /// Number of prefilled positions of a text that are compared, just before the decode positions.
    pub prefill: usize,
    /// Number of positions at the end of a text that are read one by one, in decode steps.
    pub decode: usize,
    /// Whether the prefilled positions are read in decode steps too, by stock as well: two orders of summation would
    /// differ by more than one layer with exact recall does.
    pub stepwise: bool,
    /// Prefill chunk in tokens.
    pub chunk: usize,
    /// Positions that the cache is provisioned for.
    pub ctx: usize,
}

/// Logits of the stock model on the texts.
pub struct ReferenceLogits(Vec<LogitRows>);

impl EvalSet {
    /// Returns the set with its texts alone, or with its questions alone.
    pub fn only(&self, texts: bool) -> Self {
        Self {
            texts: if texts { self.texts.clone() } else { vec![] },
            questions: if texts { vec![] } else { self.questions.clone() },
            ..*self
        }
    }

    /// Returns the number of tokens that one variant reads.
    pub fn tokens(&self) -> usize {
        self.texts.iter().map(|t| t.ids.len()).sum::<usize>()
            + self.questions.iter().map(|(p, _)| p.tokens()).sum::<usize>()
    }

    /// Runs the stock model and returns its logits and score.
    ///
    /// # Errors
    /// A model that cannot be run.
    pub fn reference(&self, runner: &Runner, on_tokens: &mut dyn FnMut(usize)) -> Result<(ReferenceLogits, Score)> {
        let mut logits = vec![];
        let score = self.score_against(runner, &Variant::stock(), on_tokens, |_, rows, next| {
            let same = compare(&rows, &rows, next);
            logits.push(rows);
            same
        })?;
        Ok((ReferenceLogits(logits), score))
    }

    /// Scores `variant` against `reference`.
    ///
    /// # Errors
    /// A variant that cannot be run.
    pub fn score(
        &self,
        runner: &Runner,
        variant: &Variant,
        reference: &ReferenceLogits,
        on_tokens: &mut dyn FnMut(usize),
    ) -> Result<Score> {
        self.score_against(runner, variant, on_tokens, |i, rows, next| compare(&reference.0[i], &rows, next))
    }

    /// Scores `variant`; `against(i, logits, next)` compares its logits on text `i` with the reference's.
    fn score_against(
        &self,
        runner: &Runner,
        variant: &Variant,
        on_tokens: &mut dyn FnMut(usize),
        mut against: impl FnMut(usize, LogitRows, &[u32]) -> Result<Vec<PositionMetrics>>,
    ) -> Result<Score> {
        let (mut done, mut cache) = (0, None);
        let mut texts = vec![];
        for (i, text) in self.texts.iter().enumerate() {
            let (logits, kv) =
                runner.run(variant, self.ctx, |run| self.read(run, text, &mut |n| on_tokens(done + n)))?;
            done += text.ids.len();
            let next = &text.ids[text.ids.len() - self.prefill - self.decode..];
            texts.push(text_score(text, &against(i, LogitRows::of(&logits)?, next)?, self.prefill));
            cache = Some(kv);
        }
        let mut answers = vec![];
        for (prompt, wanted) in &self.questions {
            let (loss, right) = runner
                .run(variant, self.ctx, |run| loss(run, (prompt, wanted), self.chunk, &mut |n| on_tokens(done + n)))?;
            done += prompt.tokens();
            answers.push(AnswerScore { loss, right });
        }
        let kv = match cache {
            Some(kv) => kv,
            None => runner.run(variant, self.ctx, |run| Ok(KvBytes::of(run.cache())))?,
        };
        Ok(Score { record: VariantRecord::of(&variant.name, &variant.method, kv), texts, answers })
    }

    /// Returns the logits at the last `prefill + decode` positions of `text` that have a next token, f32
    /// `[prefill + decode, vocab]`, and the bytes of the cache.
    fn read(&self, run: &mut Run, text: &Excerpt, on_tokens: &mut dyn FnMut(usize)) -> Result<(Tensor, KvBytes)> {
        let (whole, _) = text.ids.split_at(text.ids.len() - 1);
        let prefilled = if self.stepwise { 0 } else { self.prefill };
        let (first, tail) = whole.split_at(whole.len() + prefilled - self.prefill - self.decode);
        let mut logits = vec![];
        if !first.is_empty() {
            let last = run.prefill(first, self.chunk, prefilled.max(1), &mut watch(on_tokens))?;
            logits.extend((prefilled > 0).then_some(last));
        }
        run.compress()?;
        if !tail.is_empty() {
            logits.push(run.read(tail)?);
        }
        Ok((Tensor::cat(&logits, 0)?, KvBytes::of(run.cache())))
    }
}

/// Averages `positions`, of which the first `prefill` are prefilled and the others decoded.
fn text_score(text: &Excerpt, positions: &[PositionMetrics], prefill: usize) -> TextScore {
    let (first, tail) = positions.split_at(prefill);
    let mean =
        |of: &[PositionMetrics], f: fn(&PositionMetrics) -> f64| of.iter().map(f).sum::<f64>() / of.len().max(1) as f64;
    TextScore {
        document: text.document.clone(),
        kl: mean(first, |p| p.kl),
        decode_kl: mean(tail, |p| p.kl),
        loss: mean(first, |p| p.loss),
        decode_loss: mean(tail, |p| p.loss),
        top1: mean(positions, |p| f64::from(u8::from(p.top1))),
    }
}
