//! Axes: mapping values to places, ticks, and number formats. [`super::scale`] chooses the range of a linear axis,
//! [`nice_range`] that of a logarithmic one.

use super::scene::{Anchor, Area, Scene};
use super::text::Thinning;
use super::theme::{Ink, HAIR, THIN, TICK};

/// An axis from place `from` to place `to`; a logarithmic axis has positive values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Axis {
    /// Value at `from`.
    pub low: f64,
    /// Value at `to`.
    pub high: f64,
    /// Start of the axis, in figure units.
    pub from: f64,
    /// End of the axis, in figure units.
    pub to: f64,
    /// Whether the axis is logarithmic.
    pub log: bool,
}

impl Axis {
    /// Returns the place of `value`, in figure units.
    pub fn at(&self, value: f64) -> f64 {
        let share = match self.log {
            true => (value / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        self.from + (self.to - self.from) * share
    }
}

/// A labelled mark on an axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Tick {
    /// Marked value.
    pub value: f64,
    /// Text of the mark.
    pub label: String,
}

/// Returns the range, with ends among 1, 2, 5, 10, .., that contains every positive value with some margin; `None`
/// without a positive value.
pub fn nice_range(values: impl IntoIterator<Item = f64>) -> Option<(f64, f64)> {
    let (mut low, mut high) = (f64::INFINITY, 0.0f64);
    // Powers of ten beyond these overflow or underflow.
    for v in values.into_iter().filter(|v| (1e-300..1e300).contains(v)) {
        (low, high) = (low.min(v), high.max(v));
    }
    if low > high {
        return None;
    }
    let (low, high) = (low / 1.12, high * 1.12);
    let from = steps(low, high, &[1, 2, 5]).rfind(|(m, e)| value(*m, *e) <= low);
    let to = steps(low, high, &[1, 2, 5]).find(|(m, e)| value(*m, *e) >= high);
    from.zip(to).map(|(a, b)| (value(a.0, a.1), value(b.0, b.1)))
}

/// Returns `(m, e)` of `m · 10^e` for every `m` of `ms` and every decade that `low..high` touches.
fn steps(low: f64, high: f64, ms: &[u32]) -> std::vec::IntoIter<(u32, i32)> {
    let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
    decades.flat_map(|e| ms.iter().map(move |m| (*m, e))).collect::<Vec<_>>().into_iter()
}

/// Returns `m · 10^e`.
fn value(m: u32, e: i32) -> f64 {
    // Parsed from text, so that 3e-1 is the double nearest to 0.3.
    format!("{m}e{e}").parse().unwrap_or(f64::NAN)
}

/// Returns the ticks of a logarithmic axis: 1, 2 and 5 of each decade, powers of ten over many decades, every few
/// powers of ten over very many.
pub fn ticks(low: f64, high: f64) -> Vec<Tick> {
    let ms: &[u32] = if high / low > 500.0 { &[1] } else { &[1, 2, 5] };
    let every = ((high / low).log10() / 8.0).ceil().max(1.0) as i32;
    let inside = |(m, e): (u32, i32)| {
        let v = value(m, e);
        let slack = 1.0 + 1e-9;
        (v * slack >= low && v <= high * slack).then(|| Tick { value: v, label: number(m, e) })
    };
    steps(low, high, ms).filter(|(_, e)| e % every == 0).filter_map(inside).collect()
}

/// Formats `m · 10^e` as a label.
fn number(m: u32, e: i32) -> String {
    if (-4..7).contains(&e) {
        return grouped(value(m, e), (-e).max(0) as usize);
    }
    let raised = |c: char| c.to_digit(10).map_or('⁻', |d| SUPERSCRIPTS[d as usize]);
    let power: String = e.to_string().chars().map(raised).collect();
    if m == 1 {
        format!("10{power}")
    } else {
        format!("{m}·10{power}")
    }
}

/// Formats a number with commas between thousands, such as `12,345.6`.
pub fn grouped(v: f64, decimals: usize) -> String {
    let text = format!("{v:.decimals$}");
    let (whole, fraction) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut out = String::new();
    for (i, c) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) && !out.ends_with('-') {
            out.push(',');
        }
        out.push(c);
    }
    out + fraction
}

/// Formats a number with three significant digits, such as `0.00234`, `7.58`, `790` or `4,012`.
pub fn brief(v: f64) -> String {
    match v.abs() {
        0.0 => return "0".into(),
        size if !(1e-4..1e7).contains(&size) => return format!("{v:.2e}"),
        _ => {}
    }
    grouped(v, (2 - v.abs().log10().floor() as i32).max(0) as usize)
}

const SUPERSCRIPTS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];

/// Draws grid, axes and labels of a plot; a label that would touch the previous one is left out.
pub fn draw(scene: &mut Scene, plot: Area, x: (&Axis, &[Tick]), y: (&Axis, &[Tick])) {
    for tick in y.1 {
        let at = y.0.at(tick.value);
        scene.line((plot.x, at), (plot.right(), at), Ink::Grid, HAIR);
        scene.text((plot.x - 6.0, at), Anchor::End, TICK, &tick.label);
    }
    let mut labels = Thinning::new(4.0);
    for tick in x.1 {
        let at = x.0.at(tick.value);
        scene.line((at, plot.y), (at, plot.bottom()), Ink::Grid, HAIR);
        if labels.keeps_text(at, &tick.label, TICK) {
            scene.line((at, plot.bottom()), (at, plot.bottom() + 4.0), Ink::Axis, THIN);
            scene.text((at, plot.bottom() + 12.0), Anchor::Middle, TICK, &tick.label);
        }
    }
    scene.line((plot.x, plot.bottom()), (plot.right(), plot.bottom()), Ink::Axis, THIN);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_linear_in_the_value_or_in_its_logarithm() {
        let axis = Axis { low: 1.0, high: 100.0, from: 300.0, to: 100.0, log: true };
        assert_eq!(axis.at(1.0), 300.0);
        assert!((axis.at(10.0) - 200.0).abs() < 1e-9 && (axis.at(100.0) - 100.0).abs() < 1e-9);
        let axis = Axis { low: -1.0, high: 1.0, from: 0.0, to: 10.0, log: false };
        assert_eq!([-1.0, 0.0, 1.0].map(|v| axis.at(v)), [0.0, 5.0, 10.0]);
    }

    #[test]
    fn a_range_holds_its_values_and_ends_on_round_numbers() {
        assert_eq!(nice_range([0.26, 7.58]), Some((0.2, 10.0)));
        assert_eq!(nice_range([3.0]), Some((2.0, 5.0)));
        assert_eq!(nice_range([1.0]), Some((0.5, 2.0)));
        assert_eq!(nice_range([0.0, f64::NAN, -1.0, 1e308, 5e-324]), None);
        assert_eq!(nice_range([0.0014, 0.54]), Some((0.001, 1.0)));
    }

    #[test]
    fn labels_thin_out_over_many_decades() {
        let labels = |low, high| ticks(low, high).into_iter().map(|t| t.label).collect::<Vec<_>>();
        assert_eq!(labels(0.2, 10.0), ["0.2", "0.5", "1", "2", "5", "10"]);
        assert_eq!(labels(0.001, 1.0), ["0.001", "0.01", "0.1", "1"]);
        assert_eq!(labels(1000.0, 5000.0), ["1,000", "2,000", "5,000"]);
        assert_eq!(labels(1e-6, 2e-5), ["10⁻⁶", "2·10⁻⁶", "5·10⁻⁶", "10⁻⁵", "2·10⁻⁵"]);
        assert_eq!(labels(1e-12, 1e9), ["10⁻¹²", "10⁻⁹", "10⁻⁶", "0.001", "1", "1,000", "1,000,000", "10⁹"]);
    }

    #[test]
    fn numbers_are_written_shortly() {
        assert_eq!(
            [0.00234, 7.584, 790.4, 4012.3, 0.0, 2e-7].map(brief),
            ["0.00234", "7.58", "790", "4,012", "0", "2.00e-7"]
        );
        assert_eq!(grouped(-1234567.0, 1), "-1,234,567.0");
    }
}
