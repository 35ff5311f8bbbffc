//! What layers and settings are judged by, together: distributions on text, in prefill and in decode, and the loss on the answers
//! that needles ask for.
//!
//! A score per sample would need hundreds of samples to tell small changes apart; the loss on the expected answer changes smoothly, and
//! long before a needle is lost.

use super::documents::Part;
use super::format::VariantRecord;
use super::metrics::{compare, Position, Rows};
use super::prompting::{loss, Prompt};
use super::runner::Runner;
use crate::error::Result;
use crate::eval::bench::summary::kv;
use crate::eval::variant::Variant;
use crate::generate::watch;
use crate::run::Run;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// What is read.
pub struct EvalSet {
    /// Texts of one length.
    pub parts: Vec<Part>,
    /// Questions, each with the tokens of the answer that is expected.
    pub questions: Vec<(Prompt, Vec<u32>)>,
    /// Last positions of a text that are compared after prefill,
    pub prefill: usize,
    /// and after them, read one by one as decode does.
    pub decode: usize,
    /// Tokens to a prefill chunk.
    pub chunk: usize,
    /// Positions provisioned.
    pub ctx: usize,
}

/// Stock's logits on the texts.
pub struct Reference(Vec<Rows>);

/// What a variant is worth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// What was run, and what it held.
    #[serde(flatten)]
    pub record: VariantRecord,
    /// One entry per text.
    pub texts: Vec<TextScore>,
    /// One entry per question.
    pub answers: Vec<AnswerScore>,
}

/// A variant against stock on one text; means over positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextScore {
    /// The document.
    pub document: String,
    /// KL from stock after prefill, in nats,
    pub kl: f64,
    /// and in decode.
    pub decode_kl: f64,
    /// Loss on the next token, in nats,
    pub loss: f64,
    /// and in decode.
    pub decode_loss: f64,
    /// Share of all positions with stock's likeliest token.
    pub top1: f64,
}

/// A variant on one question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AnswerScore {
    /// Mean loss on the expected answer's tokens, in nats.
    pub loss: f64,
    /// Whether each of them was the likeliest.
    pub right: bool,
}

impl Score {
    /// A figure of every text.
    pub fn texts(&self, f: impl Fn(&TextScore) -> f64) -> Vec<f64> {
        self.texts.iter().map(f).collect()
    }

    /// The loss on every answer.
    pub fn answer_losses(&self) -> Vec<f64> {
        self.answers.iter().map(|a| a.loss).collect()
    }
}

impl EvalSet {
    /// The texts of it alone, or the questions: what a ranking by either needs.
    pub fn only(&self, texts: bool) -> Self {
        Self {
            parts: if texts { self.parts.clone() } else { vec![] },
            questions: if texts { vec![] } else { self.questions.clone() },
            ..*self
        }
    }

    /// Tokens that one variant reads.
    pub fn tokens(&self) -> usize {
        self.parts.iter().map(|p| p.ids.len()).sum::<usize>()
            + self.questions.iter().map(|(p, _)| p.tokens()).sum::<usize>()
    }

    /// Stock's logits and score.
    ///
    /// # Errors
    /// A model that cannot be run.
    pub fn reference(&self, runner: &Runner, on_tokens: &mut dyn FnMut(usize)) -> Result<(Reference, Score)> {
        let mut logits = vec![];
        let score = self.score(runner, &Variant::stock(), on_tokens, |_, rows, next| {
            let same = compare(&rows, &rows, next);
            logits.push(rows);
            same
        })?;
        Ok((Reference(logits), score))
    }

    /// What `variant` is worth.
    ///
    /// # Errors
    /// A variant that cannot be run.
    pub fn judge(
        &self,
        runner: &Runner,
        variant: &Variant,
        reference: &Reference,
        on_tokens: &mut dyn FnMut(usize),
    ) -> Result<Score> {
        self.score(runner, variant, on_tokens, |i, rows, next| compare(&reference.0[i], &rows, next))
    }

    /// Reads everything as `variant`; `against` compares the logits on a text with those that they are held against.
    fn score(
        &self,
        runner: &Runner,
        variant: &Variant,
        on_tokens: &mut dyn FnMut(usize),
        mut against: impl FnMut(usize, Rows, &[u32]) -> Result<Vec<Position>>,
    ) -> Result<Score> {
        let (mut done, mut held) = (0, None);
        let mut texts = vec![];
        for (i, part) in self.parts.iter().enumerate() {
            let (logits, kv) =
                runner.run(variant, self.ctx, |run| self.read(run, part, &mut |n| on_tokens(done + n)))?;
            done += part.ids.len();
            let next = &part.ids[part.ids.len() - self.prefill - self.decode..];
            texts.push(TextScore::of(part, &against(i, Rows::of(&logits)?, next)?, self.prefill));
            held = Some(kv);
        }
        let mut answers = vec![];
        for (prompt, wanted) in &self.questions {
            let (loss, right) = runner
                .run(variant, self.ctx, |run| loss(run, (prompt, wanted), self.chunk, &mut |n| on_tokens(done + n)))?;
            done += prompt.tokens();
            answers.push(AnswerScore { loss, right });
        }
        let kv = match held {
            Some(kv) => kv,
            None => runner.run(variant, self.ctx, |run| Ok(kv(run.cache())))?,
        };
        Ok(Score { record: VariantRecord::of(variant, kv), texts, answers })
    }

    /// Logits at the last `prefill + decode` positions that have a next token, and what the cache holds.
    fn read(
        &self,
        run: &mut Run,
        part: &Part,
        on_tokens: &mut dyn FnMut(usize),
    ) -> Result<(Tensor, crate::eval::bench::format::Kv)> {
        let (whole, _) = part.ids.split_at(part.ids.len() - 1);
        let (first, tail) = whole.split_at(whole.len() - self.decode);
        let mut logits = run.prefill(first, self.chunk, self.prefill, &mut watch(on_tokens))?;
        run.compress()?;
        if !tail.is_empty() {
            logits = Tensor::cat(&[&logits, &run.read(tail)?], 0)?;
        }
        Ok((logits, kv(run.cache())))
    }
}

impl TextScore {
    fn of(part: &Part, positions: &[Position], prefill: usize) -> Self {
        let (first, tail) = positions.split_at(prefill);
        let mean = |of: &[Position], f: fn(&Position) -> f64| of.iter().map(f).sum::<f64>() / of.len().max(1) as f64;
        Self {
            document: part.document.clone(),
            kl: mean(first, |p| p.kl),
            decode_kl: mean(tail, |p| p.kl),
            loss: mean(first, |p| p.loss),
            decode_loss: mean(tail, |p| p.loss),
            top1: mean(positions, |p| f64::from(u8::from(p.top1))),
        }
    }
}
