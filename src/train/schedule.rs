//! Learning rate: linear warm-up, then half a cosine down to a floor.

/// Learning rate by step.
///
/// ```
/// use bfly::train::Schedule;
/// let s = Schedule { peak: 1.0, floor: 0.1, warmup: 10, steps: 110 };
/// assert_eq!((s.rate(0), s.rate(9), s.rate(60), s.rate(110)), (0.1, 1.0, 0.55, 0.1));
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Largest rate.
    pub peak: f64,
    /// Last rate.
    pub floor: f64,
    /// Steps of the warm-up.
    pub warmup: u64,
    /// Steps in all.
    pub steps: u64,
}

impl Schedule {
    /// The rate of step `step`, from 0.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1);
        let done = ((step - self.warmup) as f64 / span as f64).min(1.0);
        self.floor + (self.peak - self.floor) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
    }
}
