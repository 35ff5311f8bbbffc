//! Contexts beyond the trained length of a model, for the warnings of measurements, tables and figures.

use super::header::Header;
use crate::cli::short_count;
use std::collections::BTreeSet;

/// Lists those of `contexts` that exceed `trained` positions, such as `64k, 128k`; `None` where none does.
pub fn beyond_trained(trained: usize, contexts: impl IntoIterator<Item = usize>) -> Option<String> {
    let beyond: BTreeSet<usize> = contexts.into_iter().filter(|c| *c > trained).collect();
    let list: Vec<String> = beyond.into_iter().map(short_count).collect();
    (!list.is_empty()).then(|| list.join(", "))
}

/// Formats the line below a table with a context beyond the trained length; empty without one.
pub(super) fn extrapolated(header: &Header, contexts: impl IntoIterator<Item = usize>) -> String {
    let trained = header.trained_positions;
    match beyond_trained(trained, contexts) {
        Some(_) => format!("trained for {} positions: contexts beyond are extrapolation\n", short_count(trained)),
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
