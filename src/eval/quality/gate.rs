//! `--fail-below` and `--fail-above`: CI gates on the metrics of a smoke test.

use crate::cli::short_count;
use crate::error::{Error, ErrorKind, Result};
use crate::eval::report::{DocumentMetric, Estimate, Smoke, METRICS};
use clap::Args;

/// Flags of gates; a sample of a task counts as a document.
#[derive(Debug, Args)]
pub struct GateArgs {
    /// Lower bounds of metrics.
    #[arg(long, value_name = "METRIC=VALUE", help = help())]
    pub fail_below: Vec<String>,
    /// Exit with code 1 where a metric's mean over documents is above a value for any variant and context, such as
    /// kl=0.1. May be repeated. Metrics: as for --fail-below.
    #[arg(long, value_name = "METRIC=VALUE")]
    pub fail_above: Vec<String>,
}

impl GateArgs {
    /// Parses the gates of both flags.
    ///
    /// # Errors
    /// Those of [`Gate::parse`].
    pub fn parse(&self) -> Result<Vec<Gate>> {
        Gate::parse(&self.fail_below, &self.fail_above)
    }
}

/// Returns the help text of `--fail-below`.
fn help() -> String {
    format!(
        "Exit with code 1 where a metric's mean over documents is below a value for any variant and context, such as \
         top1=0.9. May be repeated. Metrics: {}",
        names()
    )
}

fn names() -> String {
    METRICS.iter().map(|(n, ..)| *n).collect::<Vec<_>>().join(", ")
}

/// A bound on a metric's mean over documents, for every variant at every context.
#[derive(Debug, Clone)]
pub struct Gate {
    name: &'static str,
    metric: DocumentMetric,
    bound: f64,
    below: bool,
}

impl Gate {
    /// Parses the gates of both flags.
    ///
    /// # Errors
    /// A value that is not `METRIC=VALUE`, or an unknown metric.
    pub fn parse(below: &[String], above: &[String]) -> Result<Vec<Self>> {
        let both = below.iter().map(|t| (t, true)).chain(above.iter().map(|t| (t, false)));
        both.map(|(text, below)| Self::one(text, below)).collect()
    }

    fn one(text: &str, below: bool) -> Result<Self> {
        let flag = if below { "--fail-below" } else { "--fail-above" };
        let parsed = text.split_once('=').and_then(|(name, value)| Some((name.trim(), value.trim().parse().ok()?)));
        let Some((name, bound)) = parsed.filter(|(_, bound): &(&str, f64)| bound.is_finite()) else {
            return Err(Error::usage(flag, format!("`{text}` is not METRIC=VALUE such as top1=0.9")));
        };
        match METRICS.iter().find(|(n, ..)| *n == name) {
            Some((name, metric, _)) => Ok(Self { name, metric: *metric, bound, below }),
            None => Err(Error::usage(flag, format!("`{name}` is not one of {}", names()))),
        }
    }

    /// Checks every run against every gate.
    ///
    /// # Errors
    /// All missed gates, in one message.
    pub fn check(gates: &[Self], smoke: &Smoke) -> Result<()> {
        let mut missed = vec![];
        for run in &smoke.runs {
            for gate in gates {
                let values: Vec<f64> = run.documents.iter().map(gate.metric).collect();
                let Some(mean) = Estimate::of(&values).map(|e| e.mean) else { continue };
                // A mean that is NaN passes no gate.
                let kept = if gate.below { mean >= gate.bound } else { mean <= gate.bound };
                if !kept {
                    let word = if gate.below { "below" } else { "above" };
                    missed.push(format!(
                        "{} of {} at {} is {mean:.4}, {word} {}",
                        gate.name,
                        run.record.variant,
                        short_count(run.ctx),
                        gate.bound
                    ));
                }
            }
        }
        match missed.is_empty() {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Quality, "quality", missed.join("; "))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::report::{DocumentScore, SmokeRun, VariantRecord};

    fn smoke(top1: &[f64]) -> Smoke {
        let one = |top1: &f64| DocumentScore { top1: *top1, kl: 1.0 - top1, ..DocumentScore::default() };
        let run =
            SmokeRun { record: VariantRecord::test("retrofit"), ctx: 4096, documents: top1.iter().map(one).collect() };
        Smoke { runs: vec![run], ..Smoke::test() }
    }

    #[test]
    fn means_are_compared_with_lower_and_upper_bounds() {
        let check = |below: &str, above: &str, top1: &[f64]| {
            let list = |text: &str| if text.is_empty() { vec![] } else { vec![text.to_string()] };
            Gate::check(&Gate::parse(&list(below), &list(above)).unwrap(), &smoke(top1))
        };
        assert!(check("top1=0.9", "", &[0.875, 0.9375]).is_ok(), "the mean counts");
        assert!(check("", "kl=0.1", &[0.9, 0.9]).is_ok());
        let missed = check("top1=0.9", "kl=0.1", &[0.8, 0.9]).unwrap_err();
        assert_eq!(missed.kind(), ErrorKind::Quality);
        let text = missed.to_string();
        assert!(text.contains("top1 of retrofit at 4k is 0.8500, below 0.9"), "{text}");
        assert!(text.contains("kl of retrofit at 4k is 0.1500, above 0.1"), "{text}");
        assert!(check("top1=0.0", "", &[f64::NAN]).is_err(), "NaN passes no gate");
    }

    #[test]
    fn mistakes_are_named() {
        for (text, words) in [
            ("top1", "is not METRIC=VALUE"),
            ("top1=x", "is not METRIC=VALUE"),
            ("top1=nan", "is not METRIC=VALUE"),
            ("top2=0.5", "`top2` is not one of kl, kl-reverse, top1"),
        ] {
            let e = Gate::parse(&[text.into()], &[]).unwrap_err().to_string();
            assert!(e.starts_with("--fail-below") && e.contains(words), "{e}");
        }
    }
}
