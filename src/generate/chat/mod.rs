//! Renders a checkpoint's chat template as transformers does.
//!
//! The Jinja environment follows
//! <https://github.com/huggingface/transformers/blob/main/src/transformers/utils/chat_template_utils.py>: trimmed blocks, loop
//! controls, `tojson` as `json.dumps`, `raise_exception`, `strftime_now` and `{% generation %}` blocks; no tools or
//! documents.

mod clock;
mod cycles;
mod python;
mod tags;

use crate::checkpoint::ChatTemplate;
use crate::error::{Error, ErrorKind, Result};
use crate::panics::catch_panic;
use minijinja::{context, Environment, ErrorKind as JinjaKind, Value};
use std::collections::BTreeMap;

/// Renders one user turn, after an optional system turn, with the generation prompt.
///
/// # Errors
/// The template does not parse, or refuses the messages (some models have no system turn).
pub fn render_chat(template: &ChatTemplate, system: Option<&str>, user: &str) -> Result<String> {
    let messages: Vec<_> = system.map(|s| ("system", s)).into_iter().chain([("user", user)]).collect();
    render_messages(template, &messages)
}

/// Renders messages, each a role and its content, with the generation prompt.
///
/// # Errors
/// As [`render_chat`].
pub fn render_messages(template: &ChatTemplate, messages: &[(&str, &str)]) -> Result<String> {
    let place = format!("chat template of {}", template.origin);
    let fail = |e: minijinja::Error| {
        let why = e.detail().map_or_else(|| e.to_string(), String::from);
        let line = e.line().map_or(String::new(), |n| format!(" (line {n})"));
        Error::new(ErrorKind::Tokenizer, &place, format!("{why}{line}"))
    };
    let made = catch_panic(|| render(template, messages));
    made.map_err(|why| Error::new(ErrorKind::Tokenizer, &place, why))?.map_err(fail)
}

fn render(template: &ChatTemplate, messages: &[(&str, &str)]) -> Result<String, minijinja::Error> {
    cycles::refuse_cycles(&template.source)?;
    let source = tags::replace_generation_tags(&template.source);
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(python::write);
    env.add_filter("string", |value: &Value| python::to_str(value));
    env.add_filter("title", python::title);
    env.add_filter("tojson", python::to_json);
    env.add_function("strftime_now", clock::now);
    env.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(JinjaKind::InvalidOperation, message))
    });
    env.add_template("chat", &source)?;
    let message = |(role, content): &(&str, &str)| context! { role => role, content => content };
    let messages: Vec<_> = messages.iter().map(message).collect();
    let tokens: BTreeMap<_, _> = template.tokens.iter().map(|(name, text)| (name, text)).collect();
    env.get_template("chat")?.render(context! {
        messages => messages,
        tools => (),
        documents => (),
        add_generation_prompt => true,
        ..Value::from_serialize(tokens)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>"), ("image_token", "<image>")];
        let tokens = tokens.map(|(name, text)| (name.to_string(), text.to_string())).into();
        ChatTemplate { source: source.into(), origin: "test.jinja".into(), tokens }
    }

    fn rendered(source: &str) -> String {
        render_chat(&template(source), None, "hi").unwrap()
    }

    #[test]
    fn python_string_methods_and_whitespace_follow_transformers() {
        let t = template("{{ bos_token }}{% for m in messages %}\n<{{ m.role }}>{{ m['content'].strip() }}\n{% endfor %}\n{% if add_generation_prompt %}<a>{% endif %}");
        assert_eq!(render_chat(&t, Some("S"), "  hi ").unwrap(), "<s><system>S\n<user>hi\n<a>");
    }

    #[test]
    fn messages_are_rendered_in_order() {
        let t = template("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ add_generation_prompt }}");
        let messages = [("user", "a"), ("assistant", "b"), ("user", "c")];
        assert_eq!(render_messages(&t, &messages).unwrap(), "[user]a[assistant]b[user]cTrue");
    }

    #[test]
    fn a_template_that_refuses_says_why_and_where() {
        let e = render_chat(&template("{{ raise_exception('no system turn') }}"), None, "x").unwrap_err().to_string();
        assert!(e.contains("no system turn") && e.contains("test.jinja"), "{e}");
    }

    #[test]
    fn a_template_that_does_not_parse_names_its_line() {
        let e = render_chat(&template("a\n{% if %}"), None, "x").unwrap_err().to_string();
        assert!(e.contains("test.jinja") && e.contains("line 2"), "{e}");
    }

    #[test]
    fn special_tokens_have_the_tokenizers_names() {
        assert_eq!(rendered("{{ image_token }}{{ eos_token }}{{ pad_token is defined }}"), "<image></s>False");
    }

    #[test]
    fn tools_and_documents_are_none() {
        assert_eq!(rendered("{{ tools is none }}{{ documents is none }}{{ tools is defined }}"), "TrueTrueTrue");
    }
}
