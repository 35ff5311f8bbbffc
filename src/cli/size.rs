//! Token counts and sizes of memory as people write them.

/// As [`parse_count`], but zero is refused.
pub fn parse_size(text: &str) -> Result<usize, String> {
    match parse_count(text)? {
        0 => Err("0 is not a context length".into()),
        n => Ok(n),
    }
}

/// Parses a whole number from 1 up.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("not a whole number from 1 up".into()),
        Ok(n) => Ok(n),
    }
}

/// Parses `8192`, `256k` (k = 1024) or `1M` (M = 1024 k), up to 16M: positions are exact in f32 that far.
pub fn parse_count(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.trim() {
        t if t.ends_with(['k', 'K']) => (&t[..t.len() - 1], 1 << 10),
        t if t.ends_with(['m', 'M']) => (&t[..t.len() - 1], 1 << 20),
        t => (t, 1),
    };
    let n: usize =
        digits.parse().map_err(|_| format!("`{text}` is not a number of tokens such as 8192, 256k or 1M"))?;
    match n.checked_mul(unit) {
        Some(n) if n <= 1 << 24 => Ok(n),
        _ => Err(format!("`{text}` is more than 16M tokens")),
    }
}

/// Parses `10G`, `512M` or a number of bytes (G = GiB, M = MiB).
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let trimmed = text.trim().trim_end_matches("iB").trim_end_matches('B');
    let (digits, unit) = match trimmed {
        t if t.ends_with(['g', 'G']) => (&t[..t.len() - 1], 1u64 << 30),
        t if t.ends_with(['m', 'M']) => (&t[..t.len() - 1], 1 << 20),
        t => (t, 1),
    };
    let n: f64 = digits.parse().map_err(|_| format!("`{text}` is not a size such as 10G, 512M or 1000000"))?;
    match n.is_finite() && n > 0.0 && n * (unit as f64) < 1e18 {
        true => Ok((n * unit as f64) as u64),
        false => Err(format!("`{text}` is not a size of memory")),
    }
}

/// `32k`, `1M`, or the number itself: what [`parse_count`] reads.
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
    fn sizes_parse() {
        assert_eq!(parse_size("8192"), Ok(8192));
        assert_eq!(parse_size("256k"), Ok(262_144));
        assert_eq!(parse_size("1M"), Ok(1 << 20));
        for bad in ["0", "0k", "", "k", "-1", "1.5k", "8kk", "17M", "99999999M", "99999999999999999999"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn budgets_parse() {
        assert_eq!(parse_bytes("10G"), Ok(10 << 30));
        assert_eq!(parse_bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("512MB"), Ok(512 << 20));
        assert_eq!(parse_bytes("1000"), Ok(1000));
        for bad in ["", "G", "-1G", "0", "nan", "1e30G", "ten"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn counts_are_shortened_to_what_parses_back() {
        for (n, text) in [(0, "0"), (1000, "1000"), (1 << 15, "32k"), (1 << 20, "1M"), (3 << 19, "1536k")] {
            assert_eq!((short_count(n).as_str(), parse_count(text)), (text, Ok(n)));
        }
    }
}
