//! Python's `str`, `repr` and `json.dumps`, for template values.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value};
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};
use std::io;

/// Writes the value of a template expression: minijinja's formatter.
pub fn write(out: &mut Output, _: &State, value: &Value) -> Result<(), Error> {
    out.write_str(&to_str(value)).map_err(|_| Error::new(ErrorKind::WriteFailure, "the text cannot be written"))
}

/// Returns Python's `str(value)`; an empty string for an undefined value, as in Jinja.
pub fn to_str(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.into(),
        None if value.is_undefined() => String::new(),
        None => repr(value),
    }
}

/// Returns Python's `repr(value)`.
fn repr(value: &Value) -> String {
    let items = |value: &Value| value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::None => "None".into(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::Number => match (value.is_integer(), f64::try_from(value.clone())) {
            (false, Ok(x)) => float(x),
            _ => value.to_string(),
        },
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq => format!("[{}]", items(value).map(|v| repr(&v)).collect::<Vec<_>>().join(", ")),
        ValueKind::Map => {
            let pair = |key: Value| {
                format!("{}: {}", repr(&key), value.get_item(&key).map_or_else(|_| String::new(), |v| repr(&v)))
            };
            format!("{{{}}}", items(value).map(pair).collect::<Vec<_>>().join(", "))
        }
        _ => value.to_string(),
    }
}

/// Jinja's `title` filter: words begin after white space, hyphens and opening brackets, but not after other
/// punctuation.
pub fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut begins = true;
    for c in text.chars() {
        match begins {
            true => out.extend(c.to_uppercase()),
            false => out.extend(c.to_lowercase()),
        }
        begins = c.is_whitespace() || "-({[<".contains(c);
    }
    out
}

fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_ascii_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// Returns Python's `repr` of a float: the shortest digits that read back, with an exponent below 1e-4 and from 1e16
/// on.
fn float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() { "nan".into() } else { format!("{}inf", if x < 0.0 { "-" } else { "" }) };
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(e) if x != 0.0 && !(-4..16).contains(&e) => {
            format!("{digits}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs())
        }
        _ => format!("{x:?}"),
    }
}

/// Python's `json.dumps` as a filter, with transformers' parameters: `ensure_ascii`, `indent`, `separators` and
/// `sort_keys`.
///
/// # Errors
/// The value is undefined or not serialisable; a parameter has the wrong type.
pub fn to_json(value: &Value, places: Rest<Value>, names: Kwargs) -> Result<String, Error> {
    let refused = |what: String| Error::new(ErrorKind::InvalidOperation, format!("tojson: {what}"));
    if value.is_undefined() {
        return Err(refused("the value is undefined".into()));
    }
    let given = |i: usize, name: &str| -> Result<Option<Value>, Error> {
        let named = if names.has(name) { Some(names.get::<Value>(name)?) } else { None };
        Ok(named.or_else(|| places.get(i).cloned()).filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let (ascii, indent, separators, sort) =
        (given(0, "ensure_ascii")?, given(1, "indent")?, given(2, "separators")?, given(3, "sort_keys")?);
    names.assert_all_used()?;
    let indent = match indent {
        None => None,
        Some(v) if v.as_str().is_some() => v.as_str().map(String::from),
        Some(v) => {
            let n = i64::try_from(v).map_err(|_| refused("indent must be a number or a string".into()))?;
            Some(" ".repeat(n.clamp(0, 64) as usize))
        }
    };
    let (item, key) = match separators {
        Some(pair) => {
            let text = |i: usize| pair.get_item_by_index(i).ok().and_then(|v| v.as_str().map(String::from));
            text(0).zip(text(1)).ok_or_else(|| refused("separators must be two strings".into()))?
        }
        // Python writes no space at the end of a line.
        None => (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
    };
    let style = Style { indent, item, key, ascii: ascii.is_some_and(|v| v.is_true()), depth: 0, filled: false };
    let mut bytes = vec![];
    let mut out = Serializer::with_formatter(&mut bytes, style);
    let done = match sort.is_some_and(|v| v.is_true()) {
        false => value.serialize(&mut out),
        true => serde_json::to_value(value).and_then(|mut v| {
            v.sort_all_objects();
            v.serialize(&mut out)
        }),
    };
    done.map_err(|e| refused(e.to_string()))?;
    String::from_utf8(bytes).map_err(|e| refused(e.to_string()))
}

/// Layout of `json.dumps` output.
struct Style {
    indent: Option<String>,
    item: String,
    key: String,
    ascii: bool,
    depth: usize,
    /// Whether the innermost open list or object has an element.
    filled: bool,
}

impl Style {
    fn line<W: ?Sized + io::Write>(&self, out: &mut W) -> io::Result<()> {
        match &self.indent {
            None => Ok(()),
            Some(indent) => out.write_all(b"\n").and_then(|()| out.write_all(indent.repeat(self.depth).as_bytes())),
        }
    }

    fn open<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.filled = false;
        out.write_all(bracket)
    }

    fn next<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.item.as_bytes())?;
        }
        self.filled = true;
        self.line(out)
    }

    fn close<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth = self.depth.saturating_sub(1);
        if std::mem::replace(&mut self.filled, true) {
            self.line(out)?;
        }
        out.write_all(bracket)
    }
}

impl Formatter for Style {
    fn write_f64<W: ?Sized + io::Write>(&mut self, out: &mut W, x: f64) -> io::Result<()> {
        out.write_all(float(x).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        if !self.ascii {
            return out.write_all(text.as_bytes());
        }
        for c in text.chars() {
            match c.is_ascii() {
                true => out.write_all(&[c as u8])?,
                false => c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}"))?,
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + io::Write>(&mut self, out: &mut W, escape: CharEscape) -> io::Result<()> {
        serde_json::ser::CompactFormatter.write_char_escape(out, escape)
    }

    fn begin_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.next(out, first)
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.next(out, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.key.as_bytes())
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (x, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (1e-5, "1e-05"),
            (0.0001, "0.0001"),
            (-0.0, "-0.0"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(float(x), text);
        }
    }

    #[test]
    fn values_are_written_as_python_writes_them() {
        let value = Value::from_serialize(serde_json::json!({"b": [true, null, 1, 2.5], "a": "it's\n"}));
        assert_eq!(to_str(&value), r#"{'b': [True, None, 1, 2.5], 'a': "it's\n"}"#);
        assert_eq!((to_str(&Value::UNDEFINED), to_str(&Value::from("x"))), (String::new(), "x".into()));
    }
}
