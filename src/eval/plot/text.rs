//! Text layout: width, area, line breaking, shortening, and thinning of labels.

use super::scene::{Anchor, Area, Coord};
use super::theme::{self, FontSpec};
use plotters::style::{register_font, FontDesc, FontFamily, FontStyle};
use std::sync::Once;

/// Line height of the DejaVu fonts in ems; ab_glyph scales by the line height.
pub(super) const EM_TO_LINE: f64 = 1.164;

/// Returns DejaVu Sans at `size` in the units of plotters.
pub(super) fn font(kind: FontSpec, size: f64) -> FontDesc<'static> {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        // A failed registration surfaces as an error when the first text is drawn.
        let _ = register_font(theme::FAMILY, FontStyle::Normal, dejavu::sans::regular());
        let _ = register_font(theme::FAMILY, FontStyle::Bold, dejavu::sans::bold());
    });
    let style = if kind.bold { FontStyle::Bold } else { FontStyle::Normal };
    FontDesc::new(FontFamily::Name(theme::FAMILY), size, style)
}

/// Returns the width of `text` in figure units.
pub fn text_width(text: &str, kind: FontSpec) -> f64 {
    // Measured at a larger size, since plotters rounds to whole pixels.
    const DETAIL: f64 = 8.0;
    let box_ = font(kind, kind.size * EM_TO_LINE * DETAIL).layout_box(text);
    box_.map_or(0.0, |((left, _), (right, _))| f64::from(right - left) / DETAIL)
}

/// Returns the rectangle that a line of text covers.
pub fn text_area(at: Coord, anchor: Anchor, kind: FontSpec, text: &str) -> Area {
    let w = text_width(text, kind);
    let x = match anchor {
        Anchor::Start => at.0,
        Anchor::Middle => at.0 - w / 2.0,
        Anchor::End => at.0 - w,
    };
    Area { x, y: at.1 - 0.6 * kind.size, w, h: 1.2 * kind.size }
}

/// Breaks `text` at spaces into lines of at most `width`; a longer word is shortened.
pub fn wrap(text: &str, kind: FontSpec, width: f64) -> Vec<String> {
    let mut lines: Vec<String> = vec![];
    for word in text.split_whitespace() {
        let word = shorten(word, kind, width);
        match lines.last_mut() {
            Some(line) if text_width(&format!("{line} {word}"), kind) <= width => {
                line.push(' ');
                line.push_str(&word);
            }
            _ => lines.push(word),
        }
    }
    lines
}

/// Shortens `text` with an ellipsis where it is wider than `width`.
pub fn shorten(text: &str, kind: FontSpec, width: f64) -> String {
    if text_width(text, kind) <= width {
        return text.into();
    }
    let mut kept: Vec<char> = text.chars().take(400).collect();
    loop {
        kept.pop();
        let cut = format!("{}…", kept.iter().collect::<String>().trim_end());
        if kept.is_empty() || text_width(&cut, kind) <= width {
            return cut;
        }
    }
}

/// Thins out labels along an axis: a label too close to the previous one is left out.
pub struct Thinning {
    /// Minimum start of the next label.
    free: f64,
    /// Minimum distance between two labels.
    gap: f64,
}

impl Thinning {
    /// Creates a thinning with at least `gap` between two labels.
    pub fn new(gap: f64) -> Self {
        Self { free: f64::NEG_INFINITY, gap }
    }

    /// Returns whether a label that extends `half` to both sides of `middle` is kept, and records it if so.
    pub fn keeps(&mut self, middle: f64, half: f64) -> bool {
        let kept = middle - half >= self.free;
        if kept {
            self.free = middle + half + self.gap;
        }
        kept
    }

    /// Returns whether `text`, centred on `middle`, is kept, and records it if so.
    pub fn keeps_text(&mut self, middle: f64, text: &str, kind: FontSpec) -> bool {
        self.keeps(middle, text_width(text, kind) / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_measured_wrapped_and_cut() {
        let wide = text_width("mmmm", theme::LABEL);
        assert!(wide > 30.0 && wide < 45.0, "{wide}");
        assert!(text_width("mmmm", theme::PANEL) > wide);
        let lines = wrap("one two three four", theme::LABEL, 60.0);
        assert!(lines.len() > 1 && lines.iter().all(|l| text_width(l, theme::LABEL) <= 60.0), "{lines:?}");
        assert_eq!(lines.join(" "), "one two three four");
        let cut = shorten("abcdefghijklmnopqrstuvwxyz", theme::LABEL, 50.0);
        assert!(cut.ends_with('…') && text_width(&cut, theme::LABEL) <= 50.0, "{cut}");
        assert_eq!(shorten("abc", theme::LABEL, 50.0), "abc");
    }

    #[test]
    fn labels_that_would_touch_the_one_before_are_left_out() {
        let mut labels = Thinning::new(4.0);
        let kept = [(0.0, 10.0), (20.0, 5.0), (20.0, 6.0), (40.0, 5.0)].map(|(at, half)| labels.keeps(at, half));
        assert_eq!(kept, [true, true, false, true]);
        let mut texts = Thinning::new(0.0);
        assert!(texts.keeps_text(0.0, "wide label", theme::TICK) && !texts.keeps_text(9.0, "x", theme::TICK));
    }
}
