//! The model under test in one line, the first of every figure's subtitles.

use super::axis::grouped;
use crate::eval::report::Header;

/// Formats model, types and device of a result.
pub fn target(header: &Header) -> String {
    format!(
        "{}, {} parameters · weights {}, KV {} · {}",
        header.name,
        millions(header.parameters),
        header.dtype,
        header.kv_dtype,
        header.machine.device
    )
}

/// Formats a number of parameters in millions or billions, such as `494M` or `1.5B`.
fn millions(n: u64) -> String {
    match n as f64 / 1e6 {
        m if m >= 9995.0 => format!("{}B", grouped(m / 1e3, 0)),
        m if m >= 999.5 => format!("{}B", grouped(m / 1e3, 1)),
        m if m >= 9.95 => format!("{}M", grouped(m, 0)),
        m if m >= 0.1 => format!("{}M", grouped(m, 1)),
        _ => n.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_read_well() {
        assert_eq!(
            [494_032_768, 1_543_714_304, 7_000_000, 12_000_000_000, 90].map(millions),
            ["494M", "1.5B", "7.0M", "12B", "90"]
        );
    }
}
