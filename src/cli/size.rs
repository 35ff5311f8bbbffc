//! Parsing and formatting of token counts (`256k`) and memory sizes (`10GiB`).

use crate::layout::MAX_CONTEXT;

/// Parses a token count like [`parse_count`], and refuses 0.
pub fn parse_size(text: &str) -> Result<usize, String> {
    match parse_count(text)? {
        0 => Err("0 is not a context length".into()),
        n => Ok(n),
    }
}

/// Parses a whole number from 1 to [`MAX_CONTEXT`], so that sums of a few such counts cannot overflow.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if (1..=MAX_CONTEXT).contains(&n) => Ok(n),
        _ => Err(format!("not a whole number from 1 to {MAX_CONTEXT}")),
    }
}

/// Parses a token count such as `8192`, `256k` (k = 1024) or `1M` (M = 1024 k), up to [`MAX_CONTEXT`].
pub fn parse_count(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.trim() {
        t if t.ends_with(['k', 'K']) => (&t[..t.len() - 1], 1 << 10),
        t if t.ends_with(['m', 'M']) => (&t[..t.len() - 1], 1 << 20),
        t => (t, 1),
    };
    let n: usize =
        digits.parse().map_err(|_| format!("`{text}` is not a number of tokens such as 8192, 256k or 1M"))?;
    match n.checked_mul(unit) {
        Some(n) if n <= MAX_CONTEXT => Ok(n),
        _ => Err(format!("`{text}` is more than 16M tokens")),
    }
}

/// Parses a memory size in bytes: `10GiB` and `10G` use powers of two, `10GB` powers of ten; likewise K, M and T. A
/// bare number is bytes.
///
/// The crates `bytesize` and `parse-size` are not used: they read `10G` as a power of ten, or `10GB` as a power of two.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let at = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (digits, unit) = trimmed.split_at(at);
    let wrong = || format!("`{text}` is not a size such as 10G, 10GB, 512MiB or 1000000");
    let unit = unit.trim_start().to_ascii_lowercase();
    let (letter, base) = match unit.strip_suffix("ib") {
        Some(letter) if !letter.is_empty() => (letter, 1024),
        _ => match unit.strip_suffix('b') {
            Some(letter) => (letter, 1000),
            None => (unit.as_str(), 1024),
        },
    };
    let power = match letter {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        _ => return Err(wrong()),
    };
    let n = digits.parse::<f64>().map_err(|_| wrong())? * f64::from(base).powi(power);
    match (1.0..1e18).contains(&n) {
        true => Ok(n as u64),
        false => Err(format!("`{text}` is not a memory size from 1 byte to 10^18")),
    }
}

/// Formats a token count so that [`parse_count`] reads it back: `32k`, `1M`, or the number itself.
pub fn short_count(n: usize) -> String {
    match n {
        n if n > 0 && n.is_multiple_of(1 << 20) => format!("{}M", n >> 20),
        n if n > 0 && n.is_multiple_of(1 << 10) => format!("{}k", n >> 10),
        n => n.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_counts_parse() {
        assert_eq!(parse_size("8192"), Ok(8192));
        assert_eq!(parse_size("256k"), Ok(262_144));
        assert_eq!(parse_size("1M"), Ok(1 << 20));
        for bad in ["0", "0k", "", "k", "-1", "1.5k", "8kk", "17M", "99999999M", "99999999999999999999"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_sizes_parse() {
        for (text, bytes) in [
            ("10G", 10 << 30),
            ("10g", 10 << 30),
            ("1.5GiB", 3 << 29),
            ("10GB", 10_000_000_000),
            ("512MB", 512_000_000),
            ("512MiB", 512 << 20),
            ("512 M", 512 << 20),
            ("3k", 3 << 10),
            ("3kB", 3000),
            ("2TB", 2_000_000_000_000),
            ("1000", 1000),
            ("1000B", 1000),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for bad in [
            "", "G", "GB", "iB", "1iB", "-1G", "0", "0.1", "nan", "inf", "1e30G", "9999999T", "ten", "1.2.3G", "5X",
            "5GiBB",
        ] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn short_counts_parse_back() {
        for (n, text) in [(0, "0"), (1000, "1000"), (1 << 15, "32k"), (1 << 20, "1M"), (3 << 19, "1536k")] {
            assert_eq!((short_count(n).as_str(), parse_count(text)), (text, Ok(n)));
        }
    }
}
