//! Variable tracking (`vt`): a chain of assignments scattered through noise, and the question for all variables with
//! its value.

use super::hay::NOISE;
use super::length_search::{largest, Draft, PromptMaker, SampleRequest};
use super::niah::insert;
use super::rng::Rng;
use crate::error::Result;

/// Assignments after the first of a chain.
const HOPS: usize = 4;
/// Start of the question.
pub(super) const ASK: &str = "Question: Find all variables that are assigned the value ";
/// Maximum tokens of the example in front.
const EXAMPLE: usize = 500;

/// A chain of assignments.
struct Chain {
    /// Variables in the order of their assignments.
    names: Vec<String>,
    /// Value of the first assignment.
    value: usize,
}

impl Chain {
    /// Draws a chain of different names with `letters` letters each, and a value other than `not`.
    fn new(rng: &mut Rng, letters: usize, not: Option<usize>) -> Self {
        let mut names: Vec<String> = vec![];
        while names.len() <= HOPS {
            let name = rng.letters(b'A', letters);
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let mut value = rng.range(10_000..99_999);
        while Some(value) == not {
            value = rng.range(10_000..99_999);
        }
        Self { names, value }
    }

    /// Builds RULER's prompt with this chain in `n` lines of noise.
    fn draft(&self, n: usize, places: &mut Rng) -> Draft {
        let mut lines = vec![format!("VAR {} = {}", self.names[0], self.value)];
        // The blank at the end is RULER's.
        lines.extend(self.names.windows(2).map(|pair| format!("VAR {} = VAR {} ", pair[1], pair[0])));
        let mut at = places.sample(n, lines.len());
        at.sort_unstable();
        let text = insert(&vec![NOISE; n], &lines, &at, "\n");
        let value = self.value;
        Draft {
            context: format!(
                "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}\n"
            ),
            question: format!("{ASK}{value} in the text above."),
            answer_prefix: format!(
                " Answer: According to the chain(s) of variable assignment in the text above, {} variables are assigned the \
                 value {value}, they are: ",
                self.names.len()
            ),
            outputs: self.names.clone(),
            depth: None,
            follow_ups: vec![],
        }
    }
}

/// Returns the maker of one sample: an example with its answer, then the chain.
///
/// # Errors
/// A tokenizer that fails.
pub(super) fn start<'a>(call: &SampleRequest<'a>) -> Result<PromptMaker<'a>> {
    let chain = Chain::new(&mut call.rng("chain"), 5, None);
    let shown = Chain::new(&mut call.rng("example"), 3, Some(chain.value));
    let (places, shown_places) = (call.rng("places").bits(), call.rng("example places").bits());
    let maker = |chain: Chain, places: u64| {
        let draft = move |n| Ok(chain.draft(n, &mut Rng::new(places, &["places"], 0)));
        PromptMaker { least: HOPS + 1, most: usize::MAX, step: 25, draft: Box::new(draft) }
    };
    let e = largest(&maker(shown, shown_places), EXAMPLE, call.count)?.draft;
    let example = format!("{}{}{} {}\n\n", e.context, e.question, e.answer_prefix, e.outputs.join(" "));
    let plain = maker(chain, places);
    let draft = move |n| {
        let draft = (plain.draft)(n)?;
        Ok(Draft { context: format!("{example}{}", draft.context), ..draft })
    };
    Ok(PromptMaker { draft: Box::new(draft), least: HOPS + 1, most: usize::MAX, step: 25 })
}

#[cfg(test)]
mod tests {
    use crate::eval::quality::tasks::fixture::{sources, words};
    use crate::eval::quality::tasks::{find, SampleKey};
    use std::collections::HashMap;

    /// Executes the assignments of `text` and returns the variables with `value` at the end, in order.
    fn interpret(text: &str, value: &str) -> Vec<String> {
        let (mut held, mut order) = (HashMap::new(), vec![]);
        for line in text.lines().filter_map(|l| l.strip_prefix("VAR ")) {
            let (name, right) = line.split_once(" = ").expect("an assignment");
            let value = match right.trim().strip_prefix("VAR ") {
                Some(other) => held.get(other).cloned().unwrap_or_else(|| panic!("{other} is used before it is set")),
                None => right.to_string(),
            };
            assert!(held.insert(name.to_string(), value).is_none(), "{name} is set twice");
            order.push(name.to_string());
        }
        order.into_iter().filter(|name| held[name] == value).collect()
    }

    #[test]
    fn chains_resolve_to_the_outputs() {
        for index in 0..20 {
            let draw = SampleKey { length: 2_500, seed: 1, index };
            let s = find("vt").expect("vt").sample(&sources(), draw, &words).expect("sample");
            let parts: Vec<&str> = s.context().expect("context").split("Memorize and track").collect();
            let [_, example, context] = parts[..] else { panic!("an example and a context") };
            let question = s.question().expect("question");
            let value = |text: &str| text.split("assigned the value ").nth(1).expect("value")[..5].to_string();
            assert_eq!(interpret(context, &value(&question)), s.outputs);
            assert!(s.outputs.len() == 5 && s.outputs.iter().all(|o| o.len() == 5));
            let answer: Vec<_> = example.split("they are: ").nth(1).expect("answer").split_whitespace().collect();
            assert_eq!(interpret(example, &value(example)), answer, "the example is right");
            assert!(answer.iter().all(|name| name.len() == 3));
            assert_ne!(value(example), value(&question));
            assert!(s
                .answer_prefix
                .ends_with(&format!(" 5 variables are assigned the value {}, they are: ", value(&question))));
            let tokens = words(&format!("Memorize and track{example}")).expect("tokens");
            assert!((440..=505).contains(&tokens), "the example takes {tokens} tokens");
        }
    }
}
