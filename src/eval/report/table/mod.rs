//! Plain-text tables: one per kind of results.

mod ablation;
mod answers;
mod kernels;
mod ladder;
mod layers;
mod max_context;
mod positions;
mod smoke;
mod sweep;
mod transforms;

pub use ablation::ablation_table;
pub use answers::{answers_table, grid_table};
pub use kernels::kernels_table;
pub use ladder::ladder_table;
pub use layers::layers_table;
pub use max_context::max_context_table;
pub use positions::positions_table;
pub use smoke::smoke_table;
pub use sweep::sweep_table;
pub use transforms::transforms_table;

use super::eval_set::EvalSetRecord;
use super::header::Header;
use super::trained::extrapolated;

/// Aligns `rows` of equal length: the second column, which holds names, to the left, all others to the right.
fn columns(rows: &[impl AsRef<[String]>]) -> String {
    let count = rows.first().map_or(0, |r| r.as_ref().len());
    let width = |i: usize| rows.iter().map(|r| r.as_ref()[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut out = String::new();
    for row in rows.iter().map(AsRef::as_ref) {
        let cell = |(i, text): (usize, &String)| match i {
            1 => format!("{text:<width$}", width = widths[i]),
            _ => format!("{text:>width$}", width = widths[i]),
        };
        out += row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ").trim_end();
        out.push('\n');
    }
    out
}

/// Formats the line below a table whose compared positions were all read in decode steps; empty for others.
fn stepwise(probed: &EvalSetRecord) -> &'static str {
    match probed.stepwise {
        true => "every compared position is a decode step: prefill under exact recall is the stock model's\n",
        false => "",
    }
}

/// Formats the line below a table of a model with random weights; empty for real weights.
fn random_weights(header: &Header) -> String {
    let random = |seed: u64| format!("random weights from seed {seed}: speed and memory only\n");
    header.random_weights.map_or(String::new(), random)
}
