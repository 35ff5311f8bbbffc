//! Token counts as people write them, and bytes as they read them.

/// As [`parse_count`], but zero is refused.
pub fn parse_size(text: &str) -> Result<usize, String> {
    match parse_count(text)? {
        0 => Err("0 is not a context length".into()),
        n => Ok(n),
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

/// `1.4 GiB`, `12.5 MiB`, `980 B`.
pub fn human_bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.2} GiB")
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
    fn bytes_read_well() {
        assert_eq!(human_bytes(980), "980 B");
        assert_eq!(human_bytes(13_107_200), "12.5 MiB");
        assert_eq!(human_bytes(3 << 29), "1.50 GiB");
    }
}
