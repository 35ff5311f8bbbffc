//! `{% generation %}`, the tag that transformers adds to Jinja.
//!
//! The tag marks text for training and renders its body in its own scope, as `{% with %}` does. minijinja has no custom
//! tags (<https://github.com/mitsuhiko/minijinja/issues/815>), so the names are replaced before parsing.

use std::ops::Range;

/// Replaces the tags `generation` and `endgeneration` by `with` and `endwith`, except in text, strings, comments and
/// raw blocks.
pub fn replace_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut from = 0;
    for tag in block_tags(source) {
        let swap = match body(&source[tag.clone()]) {
            Some("generation") => ("generation", "with"),
            Some("endgeneration") => ("endgeneration", "endwith"),
            _ => continue,
        };
        out.push_str(&source[from..tag.start]);
        out.push_str(&source[tag.clone()].replacen(swap.0, swap.1, 1));
        from = tag.end;
    }
    out + &source[from..]
}

/// Returns the text between the delimiters of a closed tag, without white-space control.
pub fn body(tag: &str) -> Option<&str> {
    tag.strip_prefix("{%").and_then(|t| t.strip_suffix("%}")).map(|t| t.trim_matches(['-', '+']).trim())
}

/// Returns the ranges of all `{% .. %}` tags outside strings, comments and raw blocks.
pub fn block_tags(source: &str) -> Vec<Range<usize>> {
    let (mut tags, mut at) = (vec![], 0);
    while let Some(next) = source[at..].find('{').filter(|next| at + next + 1 < source.len()) {
        at += next;
        let tag = &source[at..];
        let length = match tag.as_bytes()[1] {
            b'#' => tag.find("#}").map_or(tag.len(), |end| end + 2),
            b'{' => expression_end(tag, "}}"),
            b'%' if name_of(tag) == "raw" => raw_end(tag),
            b'%' => {
                let length = expression_end(tag, "%}");
                tags.push(at..at + length);
                length
            }
            _ => 1,
        };
        at += length;
    }
    tags
}

/// Returns the first word of a tag.
fn name_of(tag: &str) -> &str {
    let inner = tag[2..].trim_start_matches(['-', '+']).trim_start();
    inner.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default()
}

/// Returns the length of the tag at the start of `tag`: it ends at the first `close` outside strings and brackets.
fn expression_end(tag: &str, close: &str) -> usize {
    let (mut at, mut depth, mut quote) = (2, 0usize, None);
    let bytes = tag.as_bytes();
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(q), b) if q == b => quote = None,
            (Some(_), _) => {}
            (None, b @ (b'"' | b'\'')) => quote = Some(b),
            (None, _) if depth == 0 && tag.as_bytes()[at..].starts_with(close.as_bytes()) => return at + close.len(),
            (None, b'{' | b'[' | b'(') => depth += 1,
            (None, b'}' | b']' | b')') => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    tag.len()
}

/// Returns the length of the raw block at the start of `tag`.
fn raw_end(tag: &str) -> usize {
    let mut at = 2;
    while let Some(next) = tag[at..].find("{%") {
        at += next;
        if name_of(&tag[at..]) == "endraw" {
            return at + tag[at..].find("%}").map_or(tag.len() - at, |end| end + 2);
        }
        at += 2;
    }
    tag.len()
}

#[cfg(test)]
mod tests {
    use super::replace_generation_tags;

    #[test]
    fn tags_are_replaced_and_keep_their_white_space_control() {
        for (given, want) in [
            ("a{% generation %}b{% endgeneration %}c", "a{% with %}b{% endwith %}c"),
            ("{%- generation -%} b {%- endgeneration +%}", "{%- with -%} b {%- endwith +%}"),
            ("{%generation%}{%endgeneration%}", "{%with%}{%endwith%}"),
            ("é{%\n generation\n%}ü", "é{%\n with\n%}ü"),
        ] {
            assert_eq!(replace_generation_tags(given), want);
        }
    }

    #[test]
    fn everything_else_is_unchanged() {
        for same in [
            "",
            "{",
            "text { generation } %}",
            "{# {% generation %} #}",
            "{% raw %}{% generation %}{% endraw %}",
            "{{ '{% generation %}' }}",
            r#"{{ "\"{% generation %}" }}"#,
            "{% set x = '%}{% generation %}' %}",
            "{{ {'a': {'b': '}}'}} }}{% if generation %}{% endif %}",
            "{% generation x %}",
            "{% raw %}{% generation %}",
            "{# unclosed {% generation %}",
            "{{ unclosed",
            "{%",
        ] {
            assert_eq!(replace_generation_tags(same), same);
        }
    }
}
