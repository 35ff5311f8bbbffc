//! The model's own chat template, rendered as transformers renders it.

use crate::checkpoint::ChatTemplate;
use crate::error::{Error, ErrorKind, Result};
use minijinja::{context, Environment, ErrorKind as JinjaKind};

/// Renders one user turn (after an optional system turn) up to where the answer begins.
///
/// # Errors
/// A template that does not parse, or that refuses the messages (some models take no system turn).
pub fn render_chat(template: &ChatTemplate, system: Option<&str>, user: &str) -> Result<String> {
    let fail = |e: minijinja::Error| {
        let why = e.detail().map_or_else(|| e.to_string(), String::from);
        Error::new(ErrorKind::Tokenizer, "chat template", why)
    };
    let mut env = Environment::new();
    // As transformers sets up Jinja: https://huggingface.co/docs/transformers/chat_templating
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(JinjaKind::InvalidOperation, message))
    });
    env.add_template("chat", &template.source).map_err(fail)?;
    let turn = |role: &str, content: &str| context! { role => role, content => content };
    let messages: Vec<_> = system.map(|s| turn("system", s)).into_iter().chain([turn("user", user)]).collect();
    let chat = env.get_template("chat").map_err(fail)?;
    chat.render(context! {
        messages => messages,
        add_generation_prompt => true,
        bos_token => template.bos,
        eos_token => template.eos,
    })
    .map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate { source: source.into(), bos: "<s>".into(), eos: "</s>".into() }
    }

    #[test]
    fn python_string_methods_and_whitespace_follow_transformers() {
        let t = template("{{ bos_token }}{% for m in messages %}\n<{{ m.role }}>{{ m['content'].strip() }}\n{% endfor %}\n{% if add_generation_prompt %}<a>{% endif %}");
        assert_eq!(render_chat(&t, Some("S"), "  hi ").unwrap(), "<s><system>S\n<user>hi\n<a>");
    }

    #[test]
    fn a_template_that_refuses_says_why() {
        let t = template("{{ raise_exception('no system turn') }}");
        assert!(render_chat(&t, None, "x").unwrap_err().to_string().contains("no system turn"));
    }
}
