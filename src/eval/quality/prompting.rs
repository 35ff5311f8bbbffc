//! Prompting a model with a sample: the prompt as tokens, the greedy answer, the loss on the expected one.

use super::metrics::{losses, Rows};
use super::tasks::Sample;
use crate::checkpoint::TextTokenizer;
use crate::error::{Error, Result};
use crate::eval::report::Kv;
use crate::generate::{render_chat, watch, Request, Sampler, Sampling};
use crate::run::Run;

/// How samples become prompts.
pub struct Prompting {
    /// Tokenizer, chat template and stop tokens.
    text: TextTokenizer,
    /// Whether prompts are rendered with the chat template.
    chat: bool,
    /// Whether a method that evicts must do so before it reads the question.
    unseen: bool,
    /// Tokens to a prefill chunk.
    chunk: usize,
}

/// A sample as tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Ids that are read before the cache is told that the context is over; empty where methods that evict may see the
    /// question.
    pub context: Vec<u32>,
    /// Ids that are read after the context.
    pub rest: Vec<u32>,
}

impl Prompt {
    /// The number of all ids.
    pub fn tokens(&self) -> usize {
        self.context.len() + self.rest.len()
    }

    /// All ids in order.
    pub fn ids(&self) -> Vec<u32> {
        [self.context.as_slice(), &self.rest].concat()
    }
}

impl Prompting {
    /// Prompting with the tokenizer and template of `text`.
    ///
    /// # Errors
    /// `chat` without a template.
    pub fn new(text: TextTokenizer, chat: bool, unseen: bool, chunk: usize) -> Result<Self> {
        if chat {
            text.chat_template()?;
        }
        Ok(Self { text, chat, unseen, chunk })
    }

    /// The number of tokens of a prompt, its chat template included.
    ///
    /// # Errors
    /// A tokenizer or template that fails.
    pub fn count(&self, prompt: &str) -> Result<usize> {
        let template = if self.chat { self.text.encode(&self.rendered("")?, false)?.len() } else { 0 };
        Ok(template + self.text.encode(prompt, !self.chat)?.len())
    }

    /// `user` in the chat template, or as it is.
    fn rendered(&self, user: &str) -> Result<String> {
        match self.chat {
            true => render_chat(self.text.chat_template()?, None, user),
            false => Ok(user.into()),
        }
    }

    /// The prompt of `sample`.
    ///
    /// # Errors
    /// A template that changes the text it is given; a sample that does not say where its question begins, where that
    /// is needed.
    pub fn prompt(&self, sample: &Sample) -> Result<Prompt> {
        let rendered = self.rendered(&sample.input)?;
        // A template brings its own space.
        let prefix = if self.chat { sample.answer_prefix.trim_start() } else { &sample.answer_prefix };
        if !self.unseen {
            let rest = self.text.encode(&(rendered + prefix), !self.chat)?;
            return Ok(Prompt { context: vec![], rest });
        }
        let changed = || Error::usage("--chat", "this model's template changes the text it is given");
        let at = rendered.find(&sample.input).ok_or_else(changed)? + sample.context()?.len();
        let (context, question) = rendered.split_at(at);
        Ok(Prompt {
            context: self.text.encode(context, !self.chat)?,
            rest: self.text.encode(&format!("{question}{prefix}"), false)?,
        })
    }

    /// The greedy answer of at most `room` tokens: its text, its tokens, and the bytes of the cache.
    ///
    /// # Errors
    /// As [`Run::generate`].
    pub fn answer(
        &self,
        run: &mut Run,
        prompt: &Prompt,
        room: usize,
        on_tokens: &mut dyn FnMut(usize),
    ) -> Result<(String, usize, Kv)> {
        let before = read_context(run, prompt, self.chunk, on_tokens)?;
        let request = Request {
            prompt: &prompt.rest,
            max_new_tokens: room,
            chunk: self.chunk,
            stop: &self.text.stop,
            logits_last: 1,
        };
        let mut greedy = Sampler::new(Sampling::GREEDY)?;
        let made = run.generate(&request, &mut greedy, &mut watch(|n| on_tokens(before + n)), &mut watch(|_| ()))?;
        Ok((self.text.decode(&made.tokens)?, made.tokens.len(), Kv::of(run.cache())))
    }

    /// The ids of an answer.
    ///
    /// # Errors
    /// A tokenizer that fails.
    pub fn answer_ids(&self, answer: &str) -> Result<Vec<u32>> {
        self.text.encode(answer, false)
    }
}

/// The mean loss on the tokens of `answer` after the prompt, in nats, and whether each is the likeliest.
///
/// # Errors
/// As [`Run::prefill`]; an answer without tokens.
pub fn loss(
    run: &mut Run,
    (prompt, answer): (&Prompt, &[u32]),
    chunk: usize,
    on_tokens: &mut dyn FnMut(usize),
) -> Result<(f64, bool)> {
    let Some((_, read)) = answer.split_last() else {
        return Err(Error::usage("samples", "an expected answer is empty"));
    };
    let before = read_context(run, prompt, chunk, on_tokens)?;
    let mut logits = run.prefill(&prompt.rest, chunk, 1, &mut watch(|n| on_tokens(before + n)))?;
    run.compress()?;
    if !read.is_empty() {
        logits = candle_core::Tensor::cat(&[&logits, &run.read(read)?], 0)?;
    }
    let losses = losses(&Rows::of(&logits)?, answer)?;
    let likeliest = logits.argmax(1)?.to_vec1::<u32>()? == answer;
    Ok((losses.iter().sum::<f64>() / losses.len() as f64, likeliest))
}

/// Reads the context, tells the cache that it is over, and returns the number of tokens read.
fn read_context(run: &mut Run, prompt: &Prompt, chunk: usize, on_tokens: &mut dyn FnMut(usize)) -> Result<usize> {
    if !prompt.context.is_empty() {
        run.prefill(&prompt.context, chunk, 1, &mut watch(on_tokens))?;
        run.compress()?;
    }
    Ok(prompt.context.len())
}
