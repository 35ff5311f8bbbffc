//! Prompting a model with a sample: the prompt's tokens, the greedy answers, the loss on the expected answers.
//!
//! A sample has one turn or several. The context is read once; each turn then reads its question after the answers of
//! the turns before, so that every turn continues one cache:
//!
//! ```text
//! context | question, answer | question, answer | ...
//! ```

use super::metrics::{losses, LogitRows};
use super::tasks::{Sample, TokenCounter};
use crate::checkpoint::TextTokenizer;
use crate::error::{Error, Result};
use crate::eval::report::KvBytes;
use crate::generate::{render_chat, render_messages, watch, Phase, Request, Sampler, Sampling};
use crate::run::Run;
use candle_core::Tensor;
use std::ops::ControlFlow;

/// Stands for the assistant's answer in a rendered chat, to find what the template adds after it.
const ANSWER: &str = "ANSWER-OF-THE-TURN-BEFORE";

/// Builds prompts from samples and generates answers.
pub struct Prompter {
    /// Tokenizer, chat template and stop tokens.
    text: TextTokenizer,
    /// Whether prompts are rendered with the chat template.
    chat: bool,
    /// Whether eviction takes place before the question is read.
    unseen: bool,
    /// Prefill chunk in tokens.
    chunk: usize,
}

/// Token ids of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptIds {
    /// Ids read before eviction; empty where eviction may use the question.
    pub context: Vec<u32>,
    /// Ids read after `context`: the question, or the whole prompt of the first turn.
    pub rest: Vec<u32>,
    /// Ids of each later turn, read after the answer of the turn before.
    pub follow_ups: Vec<Vec<u32>>,
}

impl PromptIds {
    /// Returns the number of ids.
    pub fn tokens(&self) -> usize {
        self.context.len() + self.rest.len() + self.follow_ups.iter().map(Vec::len).sum::<usize>()
    }

    /// Returns how layers with exact recall read questions: as `question` says after a context, exactly where the
    /// question is part of one prompt.
    fn phase(&self, question: Phase) -> Phase {
        match self.context.is_empty() {
            true => Phase::Prefill,
            false => question,
        }
    }

    /// Returns the ids of the first turn in order.
    pub fn first_turn(&self) -> Vec<u32> {
        [self.context.as_slice(), &self.rest].concat()
    }

    /// Returns all ids in order, without answers.
    pub fn ids(&self) -> Vec<u32> {
        [self.first_turn(), self.follow_ups.concat()].concat()
    }

    /// Returns the ids that each turn reads after the context.
    fn turns(&self) -> impl Iterator<Item = &[u32]> {
        std::iter::once(&self.rest[..]).chain(self.follow_ups.iter().map(|turn| &turn[..]))
    }
}

impl TokenCounter for Prompter {
    /// Counts the tokens of a prompt, its chat template included.
    fn prompt(&self, text: &str) -> Result<usize> {
        let template = if self.chat { self.text.encode(&self.rendered("")?, false)?.len() } else { 0 };
        Ok(template + self.text.encode(text, !self.chat)?.len())
    }

    /// Counts the tokens of a later turn, and those that the chat template puts around it.
    fn follow_up(&self, text: &str) -> Result<usize> {
        Ok(self.text.encode(&self.continued("")?, false)?.len() + self.text.encode(text, false)?.len())
    }
}

impl Prompter {
    /// Creates a prompter with the tokenizer and chat template of `text`.
    ///
    /// # Errors
    /// `chat` for a model without a chat template.
    pub fn new(text: TextTokenizer, chat: bool, unseen: bool, chunk: usize) -> Result<Self> {
        if chat {
            text.chat_template()?;
        }
        Ok(Self { text, chat, unseen, chunk })
    }

    /// Renders `user` with the chat template, or returns it unchanged without `chat`.
    fn rendered(&self, user: &str) -> Result<String> {
        match self.chat {
            true => render_chat(self.text.chat_template()?, None, user),
            false => Ok(user.into()),
        }
    }

    /// Returns the text between the answer of a turn and the next one: the end of the answer's message, the message
    /// `user` and the start of the next answer. Without `chat` it is `user` on a line of its own.
    fn continued(&self, user: &str) -> Result<String> {
        if !self.chat {
            return Ok(format!("\n{user}"));
        }
        let messages = [("user", user), ("assistant", ANSWER), ("user", user)];
        let rendered = render_messages(self.text.chat_template()?, &messages)?;
        let after = rendered.rsplit_once(ANSWER).map(|(_, after)| after);
        after.filter(|after| after.contains(user)).map(String::from).ok_or_else(|| {
            Error::usage("--chat", "this model's chat template alters the text of a conversation of several turns")
        })
    }

    /// Returns the start of an answer as it follows a prompt.
    fn prefix<'a>(&self, answer_prefix: &'a str) -> &'a str {
        // A template ends with its own whitespace.
        if self.chat {
            answer_prefix.trim_start()
        } else {
            answer_prefix
        }
    }

    /// Tokenises the prompt of `sample`, all turns included.
    ///
    /// # Errors
    /// A template that alters the user's text, or a sample without the place of its question, where eviction must not
    /// use the question.
    pub fn prompt(&self, sample: &Sample) -> Result<PromptIds> {
        let rendered = self.rendered(&sample.input)?;
        let prefix = self.prefix(&sample.answer_prefix);
        let follow_ups = sample.follow_ups.iter().map(|turn| {
            let text = self.continued(&turn.question)? + self.prefix(&turn.answer_prefix);
            self.text.encode(&text, false)
        });
        let follow_ups = follow_ups.collect::<Result<_>>()?;
        if !self.unseen {
            let rest = self.text.encode(&(rendered + prefix), !self.chat)?;
            return Ok(PromptIds { context: vec![], rest, follow_ups });
        }
        let changed = || Error::usage("--chat", "this model's chat template alters the user's text");
        let at = rendered.find(&sample.input).ok_or_else(changed)? + sample.context()?.len();
        let (context, question) = rendered.split_at(at);
        Ok(PromptIds {
            context: self.text.encode(context, !self.chat)?,
            rest: self.text.encode(&format!("{question}{prefix}"), false)?,
            follow_ups,
        })
    }

    /// Prefills the context, evicts, and returns the number of tokens read.
    ///
    /// # Errors
    /// As [`Run::prefill`].
    pub fn read_context(&self, run: &mut Run, prompt: &PromptIds, on_tokens: &mut dyn FnMut(usize)) -> Result<usize> {
        read_context(run, prompt, self.chunk, on_tokens)
    }

    /// Generates the greedy answers in a run that has read the context, one per turn and of at most `room` tokens each;
    /// returns the text and the number of tokens of each, and the cache's bytes. Layers with exact recall read
    /// questions after a context as `question` says.
    ///
    /// Without a chat template no token separates turns, so an answer of a sample with several turns ends at its first
    /// line break after text.
    ///
    /// # Errors
    /// As [`Run::generate`].
    pub fn answer(
        &self,
        run: &mut Run,
        prompt: &PromptIds,
        (room, question): (usize, Phase),
        on_tokens: &mut dyn FnMut(usize),
    ) -> Result<(Vec<(String, usize)>, KvBytes)> {
        let answers = self.answer_tokens(run, prompt, (room, question), on_tokens)?;
        let texts = answers.iter().map(|ids| Ok((self.text.decode(ids)?, ids.len())));
        Ok((texts.collect::<Result<_>>()?, KvBytes::of(run.cache())))
    }

    /// Generates answers like [`Prompter::answer`] and returns the token ids of each.
    ///
    /// # Errors
    /// As [`Run::generate`].
    pub fn answer_tokens(
        &self,
        run: &mut Run,
        prompt: &PromptIds,
        (room, question): (usize, Phase),
        on_tokens: &mut dyn FnMut(usize),
    ) -> Result<Vec<Vec<u32>>> {
        let by_lines = !self.chat && !prompt.follow_ups.is_empty();
        // Where the text cannot be decoded, decoding the whole answer reports it.
        let line_ends = |ids: &[u32]| self.text.decode(ids).is_ok_and(|text| text.trim_start().contains('\n'));
        let ends = |ids: &[u32]| by_lines && line_ends(ids);
        let limits = AnswerLimits { room, stop: &self.text.stop, ends: &ends, chunk: self.chunk, question };
        answer_turns(run, prompt, &limits, on_tokens)
    }

    /// Tokenises an answer, without BOS.
    ///
    /// # Errors
    /// A tokenizer that fails.
    pub fn answer_ids(&self, answer: &str) -> Result<Vec<u32>> {
        self.text.encode(answer, false)
    }
}

/// Limits of each turn's answer, and the chunk in which its question is read.
pub struct AnswerLimits<'a> {
    /// Maximum tokens of an answer.
    pub room: usize,
    /// Token ids that end an answer and are no part of it.
    pub stop: &'a [u32],
    /// Whether an answer ends with the last of these ids, which is a part of it.
    pub ends: &'a dyn Fn(&[u32]) -> bool,
    /// Tokens per prefill chunk.
    pub chunk: usize,
    /// How layers with exact recall read questions after a context.
    pub question: Phase,
}

/// Answers the turns of `prompt` greedily in a run that has read its context, and returns the ids of each answer.
///
/// Every answer stays in the cache, without its stop token, and the next turn is read after it.
///
/// # Errors
/// As [`Run::generate`].
pub fn answer_turns(
    run: &mut Run,
    prompt: &PromptIds,
    limits: &AnswerLimits,
    on_tokens: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<u32>>> {
    let mut greedy = Sampler::new(Sampling::GREEDY)?;
    let (mut answers, mut unread, mut read) = (vec![], vec![], 0);
    for turn in prompt.turns() {
        let own = unread.len();
        let ids = [std::mem::take(&mut unread), turn.to_vec()].concat();
        let request = Request {
            prompt: &ids,
            max_new_tokens: limits.room,
            chunk: limits.chunk,
            stop: limits.stop,
            logits_last: 1,
            phase: prompt.phase(limits.question),
        };
        let begin = run.cache().position();
        let mut answer = vec![];
        let mut on_token = |id| {
            answer.push(id);
            if (limits.ends)(&answer) {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        let progress = |n: usize| on_tokens(read + n.saturating_sub(own));
        let made = run.generate(&request, &mut greedy, &mut watch(progress), &mut on_token)?;
        read += turn.len();
        // Decode does not read its last token, unless a stop token follows it.
        let of_answer = run.cache().position() - begin - ids.len();
        unread = made.tokens[of_answer..].to_vec();
        answers.push(made.tokens);
    }
    Ok(answers)
}

/// How [`answer_logits`] reads a question and its answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reading {
    /// The question as the phase says where it follows a context, then the answer in decode steps.
    Steps(Phase),
    /// Question and answer as one prefill.
    AtOnce,
}

/// Returns the logits that predict each token of `answers`, one answer per turn of `prompt`, in a run that has read the
/// context.
///
/// Later turns are read after the answers given here, not after the model's own.
///
/// # Shapes
/// f32 `[tokens of all answers, vocab]`.
///
/// # Errors
/// As [`Run::prefill`]; not one answer per turn; answers without a token.
pub fn answer_logits(
    run: &mut Run,
    (prompt, answers): (&PromptIds, &[Vec<u32>]),
    (chunk, reading): (usize, Reading),
    on_tokens: &mut dyn FnMut(usize),
) -> Result<Tensor> {
    if answers.len() != 1 + prompt.follow_ups.len() {
        let message = format!("{} answers do not fit {} turns", answers.len(), 1 + prompt.follow_ups.len());
        return Err(Error::usage("samples", message));
    }
    let (mut rows, mut before) = (vec![], 0);
    let mut unread: Option<u32> = None;
    for (turn, answer) in prompt.turns().zip(answers) {
        let own = usize::from(unread.is_some());
        let mut ids: Vec<u32> = unread.take().into_iter().chain(turn.iter().copied()).collect();
        let read = &answer[..answer.len().saturating_sub(1)];
        let progress = |n: usize| on_tokens(before + n.saturating_sub(own).min(turn.len()));
        let (phase, last) = match reading {
            Reading::Steps(question) => (prompt.phase(question), 1),
            Reading::AtOnce => {
                ids.extend(read);
                (Phase::Prefill, read.len() + 1)
            }
        };
        let logits = run.prefill_as(phase, &ids, chunk, last, &mut watch(progress))?;
        before += turn.len();
        run.compress()?;
        unread = answer.last().copied();
        if unread.is_some() {
            rows.push(logits);
        }
        if reading != Reading::AtOnce && !read.is_empty() {
            rows.push(run.read(read)?);
        }
    }
    match rows.is_empty() {
        true => Err(Error::usage("samples", "has answers without a token")),
        false => Ok(Tensor::cat(&rows, 0)?),
    }
}

/// Returns the mean loss on the tokens of the expected `answers` after each turn's question, in nats, and whether each
/// token is the likeliest.
///
/// # Errors
/// As [`answer_logits`].
pub fn loss(
    run: &mut Run,
    (prompt, answers): (&PromptIds, &[Vec<u32>]),
    chunk: usize,
    on_tokens: &mut dyn FnMut(usize),
) -> Result<(f64, bool)> {
    let before = read_context(run, prompt, chunk, on_tokens)?;
    let on_tokens = &mut |n: usize| on_tokens(before + n);
    let logits = answer_logits(run, (prompt, answers), (chunk, Reading::Steps(Phase::Decode)), on_tokens)?;
    let tokens = answers.concat();
    let loss = losses(&LogitRows::of(&logits)?, &tokens)?.iter().sum::<f64>() / tokens.len() as f64;
    Ok((loss, logits.argmax(1)?.to_vec1::<u32>()? == tokens))
}

/// Prefills the context, evicts, and returns the number of tokens read.
///
/// # Errors
/// As [`Run::prefill`].
pub fn read_context(
    run: &mut Run,
    prompt: &PromptIds,
    chunk: usize,
    on_tokens: &mut dyn FnMut(usize),
) -> Result<usize> {
    if !prompt.context.is_empty() {
        run.prefill(&prompt.context, chunk, 1, &mut watch(on_tokens))?;
        run.compress()?;
    }
    Ok(prompt.context.len())
}
