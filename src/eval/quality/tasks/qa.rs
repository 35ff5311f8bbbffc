//! Questions about documents (`qa`): the document with the answer among others. The user provides the file of
//! questions.

use super::length_search::{Draft, PromptMaker, SampleRequest};
use super::rng::Rng;
use crate::error::{At, Error, Result};
use serde::{de::DeserializeOwned, Deserialize};
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// Start of the question, and of the whole prompt.
pub(super) const ASK: &str =
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.";

/// Questions of a file, with all of its documents.
pub struct Questions {
    documents: Vec<String>,
    questions: Vec<Question>,
}

/// Index of each document.
type Numbers = HashMap<String, usize>;

struct Question {
    query: String,
    outputs: Vec<String>,
    /// Documents of the question, that with the answer among them.
    own: Vec<usize>,
    /// Other documents of the same article, which are used before documents of other articles.
    related: Vec<usize>,
}

#[derive(Deserialize)]
struct Squad {
    data: Vec<Article>,
}

#[derive(Deserialize)]
struct Article {
    paragraphs: Vec<Paragraph>,
}

#[derive(Deserialize)]
struct Paragraph {
    context: String,
    qas: Vec<SquadQuestion>,
}

#[derive(Deserialize)]
struct SquadQuestion {
    question: String,
    answers: Vec<SquadAnswer>,
    #[serde(default)]
    is_impossible: bool,
}

#[derive(Deserialize)]
struct SquadAnswer {
    text: String,
}

#[derive(Deserialize)]
struct HotpotQuestion {
    question: String,
    answer: String,
    /// Title and sentences of each document.
    context: Vec<(String, Vec<String>)>,
}

fn parse<T: DeserializeOwned>(path: &Path, form: &str) -> Result<T> {
    let text = std::fs::read_to_string(path).at(path.display())?;
    serde_json::from_str(&text).map_err(|e| Error::format(path.display(), format!("not in the format of {form}: {e}")))
}

impl Questions {
    /// Reads a file in the format of SQuAD 2.0 or 1.1, such as `dev-v2.0.json`; questions without an answer are
    /// skipped.
    ///
    /// # Errors
    /// A file that cannot be read, has another format, or has no question with an answer.
    pub fn squad(path: &Path) -> Result<Self> {
        let mut made = Self { documents: vec![], questions: vec![] };
        let mut numbers = Numbers::default();
        for article in parse::<Squad>(path, "SQuAD 2.0")?.data {
            let contexts: Vec<usize> =
                article.paragraphs.iter().map(|p| made.number(&p.context, &mut numbers)).collect();
            for (paragraph, own) in article.paragraphs.into_iter().zip(&contexts) {
                let mut related: Vec<usize> = contexts.iter().copied().filter(|c| c != own).collect();
                related.sort_unstable();
                related.dedup();
                made.questions.extend(paragraph.qas.into_iter().filter(|q| !q.is_impossible).map(|q| Question {
                    query: q.question,
                    outputs: q.answers.into_iter().map(|a| a.text).collect(),
                    own: vec![*own],
                    related: related.clone(),
                }));
            }
        }
        made.checked(path)
    }

    /// Reads a file in the format of HotpotQA, such as `hotpot_dev_distractor_v1.json`.
    ///
    /// # Errors
    /// A file that cannot be read, has another format, or has no question.
    pub fn hotpot(path: &Path) -> Result<Self> {
        let mut made = Self { documents: vec![], questions: vec![] };
        let mut numbers = Numbers::default();
        for q in parse::<Vec<HotpotQuestion>>(path, "HotpotQA")? {
            let document = |(title, sentences): &(String, Vec<String>)| format!("{title}\n{}", sentences.concat());
            let mut own: Vec<usize> = q.context.iter().map(|d| made.number(&document(d), &mut numbers)).collect();
            own.sort_unstable();
            own.dedup();
            made.questions.push(Question { query: q.question, outputs: vec![q.answer], own, related: vec![] });
        }
        made.checked(path)
    }

    /// Returns the index of a document; equal documents are stored once.
    fn number(&mut self, document: &str, numbers: &mut Numbers) -> usize {
        *numbers.entry(document.into()).or_insert_with(|| {
            self.documents.push(document.into());
            self.documents.len() - 1
        })
    }

    fn checked(self, path: &Path) -> Result<Self> {
        if self.questions.is_empty() {
            return Err(Error::format(path.display(), "has no question with an answer"));
        }
        match self.questions.iter().find(|q| q.outputs.is_empty() || q.own.is_empty()) {
            Some(q) => {
                Err(Error::format(path.display(), format!("the question {:?} has no answer or no document", q.query)))
            }
            None => Ok(self),
        }
    }

    /// Returns the number of questions.
    pub fn len(&self) -> usize {
        self.questions.len()
    }

    /// Returns whether there is no question; false for every file that was read.
    pub fn is_empty(&self) -> bool {
        self.questions.is_empty()
    }

    /// Returns all documents in the order in which `q` uses them: its own, then related ones, then others.
    fn order(&self, q: &Question, mut rng: Rng) -> Vec<usize> {
        let mut related = q.related.clone();
        rng.shuffle(&mut related);
        let mut order = [&q.own[..], &related].concat();
        let taken: HashSet<usize> = order.iter().copied().collect();
        let mut others: Vec<usize> = (0..self.documents.len()).filter(|i| !taken.contains(i)).collect();
        rng.shuffle(&mut others);
        order.extend(others);
        order
    }
}

/// Returns the maker of one sample. The seed draws its question; samples of one seed have different questions.
///
/// # Errors
/// Fewer questions than samples.
pub(super) fn start<'a>(call: &SampleRequest<'a>, from: &'a Questions) -> Result<PromptMaker<'a>> {
    let index = call.draw.index;
    let drawn = Rng::new(call.draw.seed, &[call.task, "questions"], 0).sample(from.len(), index + 1);
    let Some(q) = drawn.get(index).map(|i| &from.questions[*i]) else {
        let message =
            format!("sample {index} does not exist: the file has {} questions; give fewer --samples", from.len());
        return Err(Error::usage(call.task, message));
    };
    let order = from.order(q, call.rng("documents"));
    let places = call.rng("places").bits();
    let draft = move |n: usize| {
        // Where `n` exceeds the number of documents, they repeat.
        let mut chosen: Vec<usize> = (0..n).map(|i| order[i % order.len()]).collect();
        Rng::new(places, &["places"], 0).shuffle(&mut chosen);
        let document = |(i, d): (usize, &usize)| format!("Document {}:\n{}", i + 1, from.documents[*d]);
        let documents: Vec<String> = chosen.iter().enumerate().map(document).collect();
        Ok(Draft {
            context: format!("{ASK}\n\nThe following are given documents.\n\n{}\n\n", documents.join("\n\n")),
            question: format!("{ASK}\n\nQuestion: {}", q.query),
            answer_prefix: " Answer:".into(),
            outputs: q.outputs.clone(),
            depth: None,
            follow_ups: vec![],
        })
    };
    Ok(PromptMaker { least: q.own.len(), most: usize::MAX, step: 10, draft: Box::new(draft) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::quality::tasks::fixture::words;
    use crate::eval::quality::tasks::{find, SampleKey, Sources};
    use serde_json::json;

    /// Three articles of 8 paragraphs; paragraph `j` of article `i` says what colour thing `i.j` has.
    fn squad() -> serde_json::Value {
        let paragraph = |i: usize, j: usize| {
            json!({"context": format!("Article {i}: thing-{i}-{j} has the colour c{i}{j}c. {}", "and so on ".repeat(10)), "qas": [
                {"question": format!("Which colour has thing-{i}-{j} today?"), "answers": [{"text": format!("c{i}{j}c")}], "is_impossible": false},
                {"question": "What is unknown?", "answers": [], "is_impossible": true}]})
        };
        let article = |i| json!({"title": "t", "paragraphs": (0..8).map(|j| paragraph(i, j)).collect::<Vec<_>>()});
        json!({"version": "v2.0", "data": (0..3).map(article).collect::<Vec<_>>()})
    }

    fn hotpot() -> serde_json::Value {
        let question = |i: usize| {
            let context: Vec<_> =
                (0..3).map(|j| json!([format!("Title {i}{j}"), [format!("One {i}{j}."), " Two."]])).collect();
            json!({"_id": "x", "question": format!("Why {i}?"), "answer": format!("One {i}1"), "context": context})
        };
        json!((0..6).map(question).collect::<Vec<_>>())
    }

    fn open(value: serde_json::Value, how: fn(&Path) -> Result<Questions>) -> Result<Questions> {
        let file = tempfile::NamedTempFile::new().at("temporary file")?;
        std::fs::write(file.path(), value.to_string()).at("temporary file")?;
        how(file.path())
    }

    #[test]
    fn the_answers_document_is_in_the_context_once_and_its_articles_come_first() -> Result<()> {
        let sources = Sources { squad: Some(open(squad(), Questions::squad)?), ..Sources::default() };
        assert_eq!(sources.squad.as_ref().map(Questions::len), Some(24), "impossible questions are left out");
        let task = find("qa_1")?;
        for (length, index) in [(150, 0), (200, 9), (300, 10), (900, 23)] {
            let s = task.sample(&sources, SampleKey { length, seed: 1, index }, &words)?;
            let context = s.context()?;
            assert_eq!(context.matches(&s.outputs[0]).count(), 1);
            let (article, thing) = (&s.outputs[0][1..2], &s.outputs[0][2..3]);
            let own = format!("Article {article}:");
            let others = context.matches("Article ").count() - context.matches(&own).count();
            assert!(others == 0 || context.matches(&own).count() == 8, "{length}: {others} others too early");
            assert!(length < 900 || others > 8, "{others}");
            let numbers: Vec<_> = context.lines().filter(|l| l.starts_with("Document ")).collect();
            assert!(numbers.iter().enumerate().all(|(i, line)| **line == format!("Document {}:", i + 1)));
            let query = format!("Question: Which colour has thing-{article}-{thing} today?");
            assert!(s.input.ends_with(&query) && !context.contains(&query));
            assert!(s.question()?.starts_with("Answer the question") && s.answer_prefix == " Answer:");
        }
        // Longer than all documents together: they repeat.
        let long = task.sample(&sources, SampleKey { length: 3_000, seed: 1, index: 0 }, &words)?;
        assert!(long.context()?.matches("Document ").count() > 24 && long.length > 2_900);
        let beyond = task.sample(&sources, SampleKey { length: 300, seed: 1, index: 24 }, &words);
        let error = beyond.expect_err("too many").to_string();
        assert!(error.contains("qa_1") && error.contains("24 questions"), "{error}");
        Ok(())
    }

    #[test]
    fn questions_are_drawn_by_the_seed_each_once() -> Result<()> {
        let sources = Sources { squad: Some(open(squad(), Questions::squad)?), ..Sources::default() };
        let asked = |seed| -> Result<Vec<String>> {
            let sample = |index| find("qa_1")?.sample(&sources, SampleKey { length: 150, seed, index }, &words);
            (0..24).map(|index| Ok(sample(index)?.outputs.concat())).collect()
        };
        let (one, two) = (asked(1)?, asked(2)?);
        let file: Vec<String> = (0..3).flat_map(|i| (0..8).map(move |j| format!("c{i}{j}c"))).collect();
        let sorted = |mut all: Vec<String>| (all.sort(), all).1;
        assert_eq!((sorted(one.clone()), sorted(two.clone())), (file.clone(), file.clone()), "each question once");
        assert!(one != two && one != file && two != file, "another seed draws them in another order");
        Ok(())
    }

    #[test]
    fn hotpot_questions_bring_their_own_documents() -> Result<()> {
        let sources = Sources { hotpot: Some(open(hotpot(), Questions::hotpot)?), ..Sources::default() };
        let s = find("qa_2")?.sample(&sources, SampleKey { length: 130, seed: 1, index: 4 }, &words)?;
        let i = s.input.rsplit("Why ").next().unwrap_or_default().trim_end_matches('?');
        assert!(
            (0..3).all(|j| s.context().is_ok_and(|c| c.contains(&format!("Title {i}{j}\nOne {i}{j}. Two.")))),
            "{}",
            s.input
        );
        assert_eq!(s.outputs, [format!("One {i}1")]);
        assert!(s.context()?.matches("Document ").count() > 3);
        let small = find("qa_2")?.sample(&sources, SampleKey { length: 70, seed: 1, index: 4 }, &words);
        assert!(small.expect_err("too small").to_string().contains("qa_2"));
        Ok(())
    }

    #[test]
    fn files_of_another_form_are_refused() -> Result<()> {
        let says = |value: serde_json::Value, how: fn(&Path) -> Result<Questions>, what: &str| {
            let error = open(value, how).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains(what), "{error:?} should say {what:?}");
        };
        says(hotpot(), Questions::squad, "SQuAD 2.0");
        says(squad(), Questions::hotpot, "HotpotQA");
        says(json!([]), Questions::hotpot, "no question");
        says(json!({"data": []}), Questions::squad, "no question");
        let mut unanswered = squad();
        unanswered["data"][0]["paragraphs"][0]["qas"][0]["answers"] = json!([]);
        says(unanswered, Questions::squad, "thing-0-0");
        assert!(Questions::squad(Path::new("/no/such/file"))
            .err()
            .is_some_and(|e| e.to_string().contains("/no/such/file")));
        Ok(())
    }
}
