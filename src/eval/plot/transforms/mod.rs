//! Figures of learned transforms: how near they come, how long it takes, and what one consists of.
//!
//! | file | draws |
//! |---|---|
//! | `rmse` | the error of every transform by size, with the authors' beside it |
//! | `seconds` | seconds of a seed by size, a panel a device |
//! | `factors` | the factors of one product as matrices, and what they multiply to |
//!
//! Sweeps that are given together share these figures, so that runs on a CPU and on a GPU can be compared.

mod factors;
mod rmse;
mod seconds;
#[cfg(test)]
mod tests;

pub use factors::figure as factors;

use super::kinds::FiguresAndNotes;
use super::scale::Scale;
use crate::cli::short_count;
use crate::error::{Error, Result};
use crate::eval::report::{read, stem, Sweep, SweepRun, SWEEP};
use crate::transforms::Transform;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The runs of all sweeps of a figure.
struct Learned {
    runs: Vec<SweepRun>,
    /// Names of the machines by device.
    machines: BTreeMap<String, BTreeSet<String>>,
}

/// Draws the figures of the sweeps at `paths`.
///
/// # Errors
/// A sweep that cannot be read, holds no runs or an impossible one, or holds a run that another one holds too.
pub fn figures(paths: &[&Path]) -> Result<FiguresAndNotes> {
    let learned = Learned::read(paths)?;
    Ok((vec![rmse::figure(&learned)?, seconds::figure(&learned)?], vec![]))
}

/// Returns the name of the figures of one sweep, that of its file.
pub fn sweep_name(path: &Path) -> String {
    stem(path).unwrap_or_else(|| "sweep".into())
}

impl Learned {
    fn read(paths: &[&Path]) -> Result<Self> {
        let (mut runs, mut machines) = (vec![], BTreeMap::<String, BTreeSet<String>>::new());
        let mut held = BTreeMap::new();
        for path in paths {
            let fail = |message: String| Error::format(path.display(), message);
            let sweep: Sweep = read(path, SWEEP)?;
            if sweep.runs.is_empty() {
                return Err(fail("holds no runs".into()));
            }
            for run in sweep.runs {
                let what = format!("{} of size {} with seed {} on {}", run.transform, run.n, run.seed, run.device);
                check(&run).map_err(|why| fail(format!("{what} {why}")))?;
                // A median over two runs of one seed would count it twice.
                if let Some(other) = held.insert(what.clone(), path.display()) {
                    return Err(fail(format!("holds {what}, which {other} holds too")));
                }
                machines.entry(run.device.clone()).or_default().insert(sweep.machine.device.clone());
                runs.push(run);
            }
        }
        Ok(Self { runs, machines })
    }

    /// Returns the transforms in the order of tables, each with its place there; unknown names follow.
    fn transforms(&self) -> Vec<(usize, &str)> {
        let mut order: Vec<&str> = Transform::ALL.iter().map(|t| t.name()).collect();
        for run in &self.runs {
            if !order.contains(&run.transform.as_str()) {
                order.push(&run.transform);
            }
        }
        let present = |(_, name): &(usize, &str)| self.runs.iter().any(|run| run.transform == *name);
        order.into_iter().enumerate().filter(present).collect()
    }

    /// Returns the devices, `cpu` before `cuda`.
    fn devices(&self) -> Vec<&str> {
        self.machines.keys().map(String::as_str).collect()
    }

    /// Returns the seeds of a transform on a device by size.
    fn seeds(&self, transform: &str, device: &str) -> BTreeMap<usize, Vec<&SweepRun>> {
        let mut seeds = BTreeMap::<usize, Vec<&SweepRun>>::new();
        for run in self.runs.iter().filter(|run| run.transform == transform && run.device == device) {
            seeds.entry(run.n).or_default().push(run);
        }
        seeds
    }

    /// Formats a line with the machine of each device, and how many seeds a point has.
    fn about(&self) -> String {
        let device = |(device, machines): (&String, &BTreeSet<String>)| {
            let machines: Vec<&str> = machines.iter().map(String::as_str).collect();
            let runs = self.runs.iter().filter(|run| run.device == *device);
            let threads: BTreeSet<usize> = runs.map(|run| run.threads).collect();
            let transforms = self.transforms();
            let points = transforms.iter().flat_map(|(_, transform)| self.seeds(transform, device).into_values());
            let seeds: BTreeSet<usize> = points.map(|seeds| seeds.len()).collect();
            format!(
                "{device}: {}, {}, {}",
                machines.join(" and "),
                count(&threads, "CPU thread"),
                count(&seeds, "seed")
            )
        };
        self.machines.iter().map(device).collect::<Vec<_>>().join(" · ")
    }
}

/// Says what is impossible about a run.
fn check(run: &SweepRun) -> std::result::Result<(), String> {
    if run.n < 2 || !run.n.is_power_of_two() {
        return Err("is not of a power of two from 2 on".into());
    }
    if !(0.0..1e9).contains(&run.rmse) {
        return Err(format!("has an error of {}", run.rmse));
    }
    if !(run.seconds > 0.0 && run.seconds < 1e12) {
        return Err(format!("took {} seconds", run.seconds));
    }
    Ok(())
}

/// Formats the range of counts, such as `1 seed` or `3 to 5 seeds`.
fn count(counts: &BTreeSet<usize>, what: &str) -> String {
    match (counts.first(), counts.last()) {
        (Some(1), Some(1)) => format!("1 {what}"),
        (Some(low), Some(high)) if low < high => format!("{low} to {high} {what}s"),
        (low, _) => format!("{} {what}s", low.copied().unwrap_or(0)),
    }
}

/// Returns a logarithmic scale of sizes, each labelled as it is written on the command line while it is short.
fn sizes(sizes: &BTreeSet<usize>) -> Scale {
    let sizes: Vec<usize> = sizes.iter().copied().collect();
    let mut scale = Scale::contexts(&sizes);
    for (tick, n) in scale.ticks.iter_mut().zip(sizes) {
        tick.label = if n < 10_000 { n.to_string() } else { short_count(n) };
    }
    scale
}
