//! `local`: no summaries, only window and sinks.

use super::{Grid, Selector};

#[derive(Debug)]
pub(super) struct Local;

impl Selector for Local {
    fn name(&self) -> &'static str {
        "local"
    }

    fn about(&self) -> &'static str {
        "no summaries, only window and sinks"
    }

    fn propose(&self, _: &Grid, _: usize, _: usize, _: usize) -> Vec<usize> {
        vec![]
    }

    fn rows(&self, _: &Grid, _: usize) -> usize {
        0
    }
}
