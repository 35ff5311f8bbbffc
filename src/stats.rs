//! Medians and percentiles, and means with confidence intervals: the percentile bootstrap (Efron 1979,
//! <https://doi.org/10.1214/aos/1176344552>), seeded.
//!
//! The bootstrap resamples independent units: documents, or samples of a task. Positions of one document are not
//! independent, so a document counts once, with its mean. Two variants are compared by their paired differences on the
//! same documents or samples, which removes the variance between them (an easy text, a hard question).

use crate::checkpoint::splitmix;
use serde::{Deserialize, Serialize};

/// Draws from a standard normal distribution (Box and Muller 1958).
pub(crate) fn normal(rng: &mut impl rand::Rng) -> f64 {
    let (u, v) = (1.0 - rng.random::<f64>(), rng.random::<f64>());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// Number of resamples.
const DRAWS: usize = 4000;
/// Confidence level of the interval.
const LEVEL: f64 = 0.95;

/// Returns the median of `values`, the mean of the middle two for an even count; `None` without values.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted.get(sorted.len().checked_sub(1)? / 2)?;
    Some((lower + upper) / 2.0)
}

/// Returns the `share` quantile by the nearest-rank method, such as 0.95 for the 95th percentile; `None` without
/// values.
pub fn percentile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// A mean and its 95% confidence interval; with fewer than two values the interval is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Mean of the values.
    pub mean: f64,
    /// Lower end of the interval.
    pub low: Option<f64>,
    /// Upper end of the interval.
    pub high: Option<f64>,
    /// Number of values.
    pub n: usize,
}

impl Estimate {
    /// Estimates the mean of independent `values`; `None` without values.
    pub fn of(values: &[f64]) -> Option<Self> {
        Self::of_groups(&[values])
    }

    /// Estimates the mean over `groups` of each group's mean, resampling values within their group; `None` without
    /// values.
    pub fn of_groups(groups: &[impl AsRef<[f64]>]) -> Option<Self> {
        let groups: Vec<&[f64]> = groups.iter().map(AsRef::as_ref).filter(|g| !g.is_empty()).collect();
        let n: usize = groups.iter().map(|g| g.len()).sum();
        if n == 0 {
            return None;
        }
        let mean = |of: &dyn Fn(usize, &[f64]) -> f64| {
            groups.iter().enumerate().map(|(i, g)| of(i, g) / g.len() as f64).sum::<f64>() / groups.len() as f64
        };
        let whole = mean(&|_, g| g.iter().sum());
        if n == groups.len() {
            return Some(Self { mean: whole, low: None, high: None, n });
        }
        let drawn = |draw: u64, group: usize, values: &[f64]| -> f64 {
            let key = draw << 16 | group as u64;
            (0..values.len()).map(|i| values[(splitmix(key, i as u64) % values.len() as u64) as usize]).sum()
        };
        let mut means: Vec<f64> = (0..DRAWS as u64).map(|draw| mean(&|i, g| drawn(draw, i, g))).collect();
        means.sort_by(f64::total_cmp);
        let at = |share: f64| means[((DRAWS - 1) as f64 * share).round() as usize];
        let outside = (1.0 - LEVEL) / 2.0;
        Some(Self { mean: whole, low: Some(at(outside)), high: Some(at(1.0 - outside)), n })
    }

    /// Estimates the mean of the paired differences `a - b`; `None` where the lengths differ or are 0.
    pub fn of_differences(a: &[f64], b: &[f64]) -> Option<Self> {
        let differences: Vec<f64> = a.iter().zip(b).map(|(x, y)| x - y).collect();
        (a.len() == b.len()).then(|| Self::of(&differences)).flatten()
    }

    /// Returns whether the interval excludes zero.
    pub fn differs(&self) -> bool {
        self.low.is_some_and(|low| low > 0.0) || self.high.is_some_and(|high| high < 0.0)
    }

    /// Formats the mean with its interval, such as `0.123 [0.101, 0.150]`.
    pub fn show(&self, decimals: usize) -> String {
        match (self.low, self.high) {
            (Some(low), Some(high)) => {
                format!("{:.decimals$} [{low:.decimals$}, {high:.decimals$}]", self.mean)
            }
            _ => format!("{:.decimals$}", self.mean),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_percentiles_are_those_of_the_definition() {
        let medians = [&[][..], &[3.0], &[4.0, 1.0], &[9.0, 1.0, 2.0]].map(median);
        assert_eq!(medians, [None, Some(3.0), Some(2.5), Some(2.0)]);
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!((percentile(&hundred, 0.95), percentile(&[], 0.5)), (Some(95.0), None));
    }

    #[test]
    fn the_interval_is_that_of_the_normal_for_many_values() {
        // Standard error of the mean of 400 values uniform on [0, 1): sqrt(1/12/400) = 0.01443.
        let values: Vec<f64> = (0..400).map(|i| (splitmix(9, i) >> 11) as f64 / (1u64 << 53) as f64).collect();
        let e = Estimate::of(&values).unwrap();
        let (low, high) = (e.mean - 1.96 * 0.01443, e.mean + 1.96 * 0.01443);
        assert!((e.low.unwrap() - low).abs() < 0.003 && (e.high.unwrap() - high).abs() < 0.003, "{e:?}");
    }

    #[test]
    fn the_interval_covers_the_expectation_about_as_often_as_its_level_says() {
        // Means of 20 values whose expectation is 0.5; the percentile interval is known to be a little narrow at this
        // size.
        let covered = (0..300).filter(|trial| {
            let values: Vec<f64> =
                (0..20).map(|i| (splitmix(1000 + trial, i) >> 11) as f64 / (1u64 << 53) as f64).collect();
            let e = Estimate::of(&values).unwrap();
            e.low.unwrap() <= 0.5 && 0.5 <= e.high.unwrap()
        });
        let share = covered.count() as f64 / 300.0;
        assert!((0.88..0.98).contains(&share), "{share}");
    }

    #[test]
    fn paired_differences_detect_what_separate_means_cannot() {
        // A steady difference under a large spread.
        let b: Vec<f64> = (0..12).map(|i| (i * i) as f64).collect();
        let a: Vec<f64> = b.iter().enumerate().map(|(i, x)| x + 0.5 + 0.01 * i as f64).collect();
        let (ea, eb) = (Estimate::of(&a).unwrap(), Estimate::of(&b).unwrap());
        assert!(ea.low.unwrap() < eb.high.unwrap(), "the intervals overlap");
        let d = Estimate::of_differences(&a, &b).unwrap();
        assert!(d.differs() && (d.mean - 0.555).abs() < 1e-9, "{d:?}");
        assert!(!Estimate::of_differences(&b, &b).unwrap().differs());
        assert_eq!(Estimate::of_differences(&a, &b[1..]), None);
    }

    #[test]
    fn groups_have_equal_weight_and_are_resampled_separately() {
        let e = Estimate::of_groups(&[vec![1.0; 30], vec![0.0; 3]]).unwrap();
        assert_eq!((e.mean, e.low, e.high, e.n), (0.5, Some(0.5), Some(0.5), 33), "nothing varies within a group");
        // Together they would vary with how often each is drawn.
        let all = Estimate::of(&[vec![1.0; 30], vec![0.0; 30]].concat()).unwrap();
        assert!(all.low.unwrap() < 0.4 && all.high.unwrap() > 0.6);
        let nothing: [Vec<f64>; 2] = [vec![], vec![]];
        assert_eq!(Estimate::of_groups(&nothing), None);
    }

    #[test]
    fn one_value_has_no_interval() {
        let e = Estimate::of(&[3.0]).unwrap();
        assert_eq!((e.mean, e.low, e.high, e.differs(), e.show(1).as_str()), (3.0, None, None, false, "3.0"));
        assert_eq!(Estimate::of(&[]), None);
        assert_eq!(Estimate::of(&[2.0, 2.0]).unwrap().show(2), "2.00 [2.00, 2.00]");
    }
}
