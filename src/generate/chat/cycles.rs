//! Refuses namespaces that contain themselves: `{% set ns.x = ns %}`.
//!
//! Such a value has no finite text, and minijinja 2.24 overflows the stack when it prints or compares one, which ends the
//! process. The check is on the source: the attribute of a namespace must not be set to an expression that names a
//! namespace without an attribute, directly or through another variable.

use super::tags::{block_tags, body};
use minijinja::{Error, ErrorKind};
use std::collections::BTreeSet;

/// Checks that no namespace becomes an attribute of a namespace.
///
/// # Errors
/// The line of the assignment.
pub fn refuse_cycles(source: &str) -> Result<(), Error> {
    let assignments: Vec<_> = block_tags(source)
        .into_iter()
        .filter_map(|range| {
            let (target, value) = body(&source[range.clone()])?.strip_prefix("set ")?.split_once('=')?;
            Some((range.start, target.trim(), value))
        })
        .collect();
    let mut namespaces: BTreeSet<&str> =
        assignments.iter().filter_map(|(_, t, _)| Some(t.split_once('.')?.0)).collect();
    // Other names of them, and values that contain them.
    loop {
        let named = |(_, target, value): &&(usize, &str, &str)| !target.contains('.') && names_any(value, &namespaces);
        let aliases: Vec<_> = assignments.iter().filter(named).map(|(_, target, _)| *target).collect();
        let before = namespaces.len();
        namespaces.extend(aliases);
        if namespaces.len() == before {
            break;
        }
    }
    match assignments.iter().find(|(_, target, value)| target.contains('.') && names_any(value, &namespaces)) {
        None => Ok(()),
        Some((at, target, _)) => {
            let line = source[..*at].matches('\n').count() + 1;
            let message = format!("line {line} sets `{target}` to a namespace, which may then contain itself");
            Err(Error::new(ErrorKind::InvalidOperation, message))
        }
    }
}

/// Whether an expression contains one of `names` outside strings, and not as `name.attribute`, `x.name` or `name=..`.
fn names_any(expression: &str, names: &BTreeSet<&str>) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut rest = expression;
    let mut after_dot = false;
    while let Some(c) = rest.chars().next() {
        let length = match c {
            '"' | '\'' => string_length(rest, c),
            c if part_of_word(c) => {
                let end = rest.find(|c| !part_of_word(c)).unwrap_or(rest.len());
                let next = rest[end..].trim_start();
                let attribute = next.starts_with('.') || next.starts_with('=') && !next.starts_with("==");
                if !after_dot && !attribute && names.contains(&rest[..end]) {
                    return true;
                }
                end
            }
            c => c.len_utf8(),
        };
        if !c.is_whitespace() {
            after_dot = c == '.';
        }
        rest = &rest[length..];
    }
    false
}

/// Length of the string at the start of `text`, with its quotes.
fn string_length(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match (escaped, c) {
            (false, '\\') => escaped = true,
            (false, c) if c == quote => return at + 1,
            _ => escaped = false,
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::refuse_cycles;

    #[test]
    fn a_namespace_in_an_attribute_is_refused_with_its_line() {
        for source in [
            "{% set ns = namespace(n=0) %}\n{%- set ns.n = ns -%}{{ ns.n }}",
            "\n{% set ns.n = [1, ns] %}",
            "{% set other = ns %}\n{% set ns.n = {'a': other} %}",
            "\n{% set ns.n = ns if ns.found == 'ns' else 0 %}",
        ] {
            let error = refuse_cycles(source).unwrap_err().to_string();
            assert!(error.contains("line 2 sets `ns.n` to a namespace"), "{error}");
        }
    }

    #[test]
    fn attributes_strings_and_arguments_are_not_namespaces() {
        for source in [
            "",
            "{% set ns = namespace(found=false, n=0) %}{% set ns.n = ns.n + 1 %}",
            "{% set ns.text = 'ns' ~ \"it's ns\" ~ message.ns %}",
            "{% set ns.x = f(ns=1) %}{% set y = ns.x %}{% set ns.z = y %}",
            "{# {% set ns.n = ns %} #}{% raw %}{% set ns.n = ns %}{% endraw %}",
            "{% set ns.x %}ns{% endset %}{{ ns }}{% set é = 1 %}",
        ] {
            assert!(refuse_cycles(source).is_ok(), "{source}");
        }
    }
}
