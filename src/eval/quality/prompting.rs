//! Prompting a model with a sample: the prompt's tokens, the greedy answer, the loss on the expected answer.

use super::metrics::{losses, LogitRows};
use super::tasks::Sample;
use crate::checkpoint::TextTokenizer;
use crate::error::{Error, Result};
use crate::eval::report::KvBytes;
use crate::generate::{render_chat, watch, Phase, Request, Sampler, Sampling};
use crate::run::Run;

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
    /// Ids read after `context`: the question, or the whole prompt.
    pub rest: Vec<u32>,
}

impl PromptIds {
    /// Returns the number of ids.
    pub fn tokens(&self) -> usize {
        self.context.len() + self.rest.len()
    }

    /// Returns all ids in order.
    pub fn ids(&self) -> Vec<u32> {
        [self.context.as_slice(), &self.rest].concat()
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

    /// Counts the tokens of a prompt, its chat template included.
    ///
    /// # Errors
    /// A tokenizer or template that fails.
    pub fn count(&self, prompt: &str) -> Result<usize> {
        let template = if self.chat { self.text.encode(&self.rendered("")?, false)?.len() } else { 0 };
        Ok(template + self.text.encode(prompt, !self.chat)?.len())
    }

    /// Renders `user` with the chat template, or returns it unchanged without `chat`.
    fn rendered(&self, user: &str) -> Result<String> {
        match self.chat {
            true => render_chat(self.text.chat_template()?, None, user),
            false => Ok(user.into()),
        }
    }

    /// Tokenises the prompt of `sample`.
    ///
    /// # Errors
    /// A template that alters the user's text, or a sample without the place of its question, where eviction must not
    /// use the question.
    pub fn prompt(&self, sample: &Sample) -> Result<PromptIds> {
        let rendered = self.rendered(&sample.input)?;
        // A template ends with its own whitespace.
        let prefix = if self.chat { sample.answer_prefix.trim_start() } else { &sample.answer_prefix };
        if !self.unseen {
            let rest = self.text.encode(&(rendered + prefix), !self.chat)?;
            return Ok(PromptIds { context: vec![], rest });
        }
        let changed = || Error::usage("--chat", "this model's chat template alters the user's text");
        let at = rendered.find(&sample.input).ok_or_else(changed)? + sample.context()?.len();
        let (context, question) = rendered.split_at(at);
        Ok(PromptIds {
            context: self.text.encode(context, !self.chat)?,
            rest: self.text.encode(&format!("{question}{prefix}"), false)?,
        })
    }

    /// Generates the greedy answer of at most `room` tokens; returns its text, its number of tokens and the cache's
    /// bytes.
    ///
    /// # Errors
    /// As [`Run::generate`].
    pub fn answer(
        &self,
        run: &mut Run,
        prompt: &PromptIds,
        room: usize,
        on_tokens: &mut dyn FnMut(usize),
    ) -> Result<(String, usize, KvBytes)> {
        let before = read_context(run, prompt, self.chunk, on_tokens)?;
        let request = Request {
            prompt: &prompt.rest,
            max_new_tokens: room,
            chunk: self.chunk,
            stop: &self.text.stop,
            logits_last: 1,
            phase: Phase::Prefill,
        };
        let mut greedy = Sampler::new(Sampling::GREEDY)?;
        let made = run.generate(&request, &mut greedy, &mut watch(|n| on_tokens(before + n)), &mut watch(|_| ()))?;
        Ok((self.text.decode(&made.tokens)?, made.tokens.len(), KvBytes::of(run.cache())))
    }

    /// Tokenises an answer, without BOS.
    ///
    /// # Errors
    /// A tokenizer that fails.
    pub fn answer_ids(&self, answer: &str) -> Result<Vec<u32>> {
        self.text.encode(answer, false)
    }
}

/// Returns the mean loss on the tokens of `answer` after the prompt, in nats, and whether each token is the likeliest.
///
/// # Errors
/// As [`Run::prefill`]; an answer without tokens.
pub fn loss(
    run: &mut Run,
    (prompt, answer): (&PromptIds, &[u32]),
    chunk: usize,
    on_tokens: &mut dyn FnMut(usize),
) -> Result<(f64, bool)> {
    let Some((_, read)) = answer.split_last() else {
        return Err(Error::usage("samples", "an expected answer has no tokens"));
    };
    let before = read_context(run, prompt, chunk, on_tokens)?;
    let mut logits = run.prefill(&prompt.rest, chunk, 1, &mut watch(|n| on_tokens(before + n)))?;
    run.compress()?;
    if !read.is_empty() {
        logits = candle_core::Tensor::cat(&[&logits, &run.read(read)?], 0)?;
    }
    let losses = losses(&LogitRows::of(&logits)?, answer)?;
    let likeliest = logits.argmax(1)?.to_vec1::<u32>()? == answer;
    Ok((losses.iter().sum::<f64>() / losses.len() as f64, likeliest))
}

/// Prefills the context, evicts, and returns the number of tokens read.
fn read_context(run: &mut Run, prompt: &PromptIds, chunk: usize, on_tokens: &mut dyn FnMut(usize)) -> Result<usize> {
    if !prompt.context.is_empty() {
        run.prefill(&prompt.context, chunk, 1, &mut watch(on_tokens))?;
        run.compress()?;
    }
    Ok(prompt.context.len())
}
