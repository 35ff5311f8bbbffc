//! Range and ticks of axes, chosen from the values.

use super::axis::{grouped, nice_range, ticks, Axis, Tick};
use crate::cli::short_count;

/// Range and ticks of an axis, without its place in the figure.
#[derive(Debug, Clone, PartialEq)]
pub struct Scale {
    /// Lowest value.
    pub low: f64,
    /// Highest value.
    pub high: f64,
    /// Whether the axis is logarithmic.
    pub log: bool,
    /// Labelled marks.
    pub ticks: Vec<Tick>,
}

/// Approximate number of labels of a linear axis.
const LABELS: f64 = 5.0;

impl Scale {
    /// Places the scale on an axis from `from` to `to`, in figure units.
    pub fn on(&self, from: f64, to: f64) -> Axis {
        Axis { low: self.low, high: self.high, from, to, log: self.log }
    }

    /// Creates a logarithmic scale with round ends; `None` where no value is positive.
    pub fn log(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let (low, high) = nice_range(values)?;
        Some(Self { low, high, log: true, ticks: ticks(low, high) })
    }

    /// Creates a linear scale with some margin at both ends, clamped to `limits`, the range of the quantity; `None`
    /// without values.
    pub fn linear(values: impl IntoIterator<Item = f64>, limits: (f64, f64)) -> Option<Self> {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        // The difference of larger values could overflow.
        for v in values.into_iter().filter(|v| v.abs() <= 1e300) {
            (low, high) = (low.min(v), high.max(v));
        }
        if low > high {
            return None;
        }
        // Equal values get a scale of some width; a smallest or largest value of zero is the end of the axis.
        let room = if high > low { 0.04 * (high - low) } else { (0.1 * high.abs()).max(1e-3) };
        let step = step((high - low).max(2.0 * room) / LABELS);
        let half = step / 2.0;
        let low = if low == 0.0 { 0.0 } else { ((low - room) / half).floor() * half }.max(limits.0);
        let high = if high == 0.0 && low < 0.0 { 0.0 } else { ((high + room) / half).ceil() * half }.min(limits.1);
        let (first, last) = ((low / step - 1e-6).ceil(), (high / step + 1e-6).floor());
        let count = (last - first).clamp(0.0, 100.0) as i32;
        let ticks = (0..=count).map(|i| linear_tick((first + f64::from(i)) * step, step)).collect();
        Some(Self { low, high, log: false, ticks })
    }

    /// Creates the linear scale from 0 to 100.
    pub fn percent() -> Self {
        let ticks = [0, 25, 50, 75, 100].map(|p| Tick { value: f64::from(p), label: p.to_string() }).into();
        Self { low: 0.0, high: 100.0, log: false, ticks }
    }

    /// Creates a logarithmic scale of rising contexts, each labelled, with margins on both sides.
    pub fn contexts(contexts: &[usize]) -> Self {
        let ends = |i: Option<&usize>| i.map_or(1.0, |c| (*c).max(1) as f64);
        let room = 2f64.powf(0.4);
        let ticks = contexts.iter().map(|c| Tick { value: *c as f64, label: short_count(*c) }).collect();
        Self { low: ends(contexts.first()) / room, high: ends(contexts.last()) * room, log: true, ticks }
    }

    /// Creates a linear scale of positions from 0 to `end`, labelled at multiples of a power of two.
    pub fn positions(end: usize) -> Self {
        let step = (end / 8).max(1).next_power_of_two();
        let ticks = (0..=end / step).map(|i| Tick { value: (i * step) as f64, label: short_count(i * step) }).collect();
        Self { low: 0.0, high: end.max(1) as f64, log: false, ticks }
    }

    /// Creates a linear scale of integers, extended by 0.5 at each end, with at most `most` labels.
    pub fn whole(low: usize, high: usize, most: usize) -> Self {
        let powers = std::iter::successors(Some(10), |p: &usize| p.checked_mul(10));
        let steps = [1, 2, 4, 5].into_iter().chain(powers.flat_map(|p| [1, 2, 5].map(|m| p.saturating_mul(m))));
        let step = steps.into_iter().find(|s| (high - low) / s < most.max(1)).unwrap_or(usize::MAX);
        // A single integer is labelled whether or not it is a multiple of the step.
        let first = if high == low { low } else { low.checked_next_multiple_of(step).unwrap_or(high) };
        let labelled = (first..=high).step_by(step);
        let ticks = labelled.map(|i| Tick { value: i as f64, label: i.to_string() }).collect();
        Self { low: low as f64 - 0.5, high: high as f64 + 0.5, log: false, ticks }
    }

    /// Creates a logarithmic scale of shares, labelled at powers of 1/2 from `1/64` to `1`, or wider.
    pub fn shares(values: impl IntoIterator<Item = f64>) -> Self {
        let (mut low, mut high) = (1.0f64 / 64.0, 1.0f64);
        for v in values.into_iter().filter(|v| v.is_finite() && *v > 0.0) {
            (low, high) = (low.min(v), high.max(v));
        }
        let halvings = (-low.log2()).ceil() as i32;
        let label = |h: i32| if h == 0 { "1".into() } else { format!("1/{}", grouped(2f64.powi(h), 0)) };
        let ticks = (0..=halvings).rev().map(|h| Tick { value: 0.5f64.powi(h), label: label(h) }).collect();
        Self { low: 0.5f64.powi(halvings) / 1.2, high: high * 1.2, log: true, ticks }
    }
}

/// Returns the smallest of 1, 2 and 5 times powers of ten that is at least `least`.
fn step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= least * (1.0 - 1e-9)).unwrap_or(least)
}

/// Returns the tick of `value`, with the decimals that ticks `step` apart need.
fn linear_tick(value: f64, step: f64) -> Tick {
    let decimals = (-step.log10() - 1e-9).ceil().max(0.0) as usize;
    let value = if value.abs() < step / 2.0 { 0.0 } else { value };
    let label = match value {
        0.0 => "0".into(),
        v if decimals > 4 || v.abs() >= 1e7 => format!("{v:.1e}"),
        v => grouped(v, decimals),
    };
    Tick { value, label: label.replace('-', "−") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: &Scale) -> Vec<&str> {
        scale.ticks.iter().map(|t| t.label.as_str()).collect()
    }

    fn linear(values: &[f64], limits: (f64, f64)) -> Scale {
        Scale::linear(values.iter().copied(), limits).unwrap()
    }

    const FREE: (f64, f64) = (f64::NEG_INFINITY, f64::INFINITY);

    #[test]
    fn a_linear_scale_contains_its_values_and_has_round_ticks() {
        let scale = linear(&[-0.02, 0.31], FREE);
        assert_eq!(labels(&scale), ["0", "0.1", "0.2", "0.3"]);
        assert!((scale.low + 0.05).abs() < 1e-12 && (scale.high - 0.35).abs() < 1e-12);
        let scale = linear(&[0.0, 100.0], FREE);
        assert_eq!((labels(&scale).join(" "), scale.low, scale.high), ("0 20 40 60 80 100".into(), 0.0, 110.0));
        assert_eq!(labels(&linear(&[97.0, 100.0], (0.0, 100.0))), ["97", "98", "99", "100"]);
        assert_eq!(labels(&linear(&[100.0], (0.0, 100.0))), ["90", "95", "100"]);
        assert_eq!(labels(&linear(&[0.0], (0.0, 100.0))), ["0", "0.0005", "0.0010"]);
        assert_eq!(labels(&linear(&[1e4, 3e4], FREE)), ["10,000", "15,000", "20,000", "25,000", "30,000"]);
        assert_eq!(labels(&linear(&[0.0, 1e-5], FREE))[..2], ["0", "2.0e−6"]);
        assert_eq!(Scale::linear([f64::NAN], FREE), None);
        for (low, high) in [(0.0, 1e-12), (-3e8, 1e300), (5.0, 5.0 + 1e-9), (-7.0, -6.99)] {
            let scale = linear(&[low, high], FREE);
            assert!(scale.low <= low && scale.high >= high && (1..=101).contains(&scale.ticks.len()), "{scale:?}");
        }
    }

    #[test]
    fn counts_and_shares_are_labelled_where_people_expect_it() {
        assert_eq!(labels(&Scale::positions(8192)), ["0", "1k", "2k", "3k", "4k", "5k", "6k", "7k", "8k"]);
        assert_eq!(labels(&Scale::positions(300)), ["0", "64", "128", "192", "256"]);
        assert_eq!(
            labels(&Scale::whole(0, 23, 12)),
            ["0", "2", "4", "6", "8", "10", "12", "14", "16", "18", "20", "22"]
        );
        assert_eq!(labels(&Scale::whole(7, 7, 12)), ["7"]);
        assert!((1..=12).contains(&Scale::whole(3, usize::MAX, 12).ticks.len()));
        assert_eq!(labels(&Scale::shares([0.3])), ["1/64", "1/32", "1/16", "1/8", "1/4", "1/2", "1"]);
        assert_eq!(labels(&Scale::shares([0.0014]))[0], "1/1,024");
        assert!(Scale::shares([1.3]).high > 1.3);
    }
}
