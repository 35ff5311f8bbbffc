//! Contexts beyond the length that a model was trained for: what measures, tables and figures warn of.

use super::header::Header;
use crate::cli::short_count;
use std::collections::BTreeSet;

/// Those of `contexts` that are beyond `trained` positions, as text such as `64k, 128k`; `None` where none is.
pub fn beyond_trained(trained: usize, contexts: impl IntoIterator<Item = usize>) -> Option<String> {
    let beyond: BTreeSet<usize> = contexts.into_iter().filter(|c| *c > trained).collect();
    let list: Vec<String> = beyond.into_iter().map(short_count).collect();
    (!list.is_empty()).then(|| list.join(", "))
}

/// The line below a table in which a context is beyond the trained length; empty where none is.
pub(super) fn extrapolated(header: &Header, contexts: impl IntoIterator<Item = usize>) -> String {
    let trained = header.trained_positions;
    match beyond_trained(trained, contexts) {
        Some(_) => format!("trained for {} positions: what is beyond is extrapolated\n", short_count(trained)),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_beyond_the_trained_length_are_listed_once_and_rising() {
        assert_eq!(beyond_trained(4096, [8192, 1024, 6000, 8192, 4096]).as_deref(), Some("6000, 8k"));
        assert_eq!(beyond_trained(4096, [4096, 1]), None);
    }
}
