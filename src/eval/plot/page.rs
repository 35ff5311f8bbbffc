//! The frame of a figure around its panels: title, subtitles, legend, notes.

use super::scene::{Anchor, Area, Scene};
use super::text::{shorten, text_width, wrap};
use super::theme::{self, FontSpec, Ink, LEADING, LEGEND, MARGIN, NOTE, SUBTITLE, TITLE, WIDTH};
use crate::cli::short_count;
use crate::eval::report::Header;

/// An entry of the legend.
#[derive(Debug, Clone, PartialEq)]
pub enum LegendEntry {
    /// Line and marker of a series.
    Series(usize, String),
    /// Marker of a series without a line.
    Marker(usize, String),
    /// Hollow marker, for points whose interval contains zero.
    Faint(String),
    /// Hollow marker with a dashed line, for a second value of a point.
    Linked(String),
    /// Interval of any series.
    Interval(String),
    /// Dots, for single runs or texts.
    Dots(String),
    /// Dashed line.
    Dashes(String),
    /// Cross, for a run that failed or is missing.
    Missed(String),
    /// Patch of an ink.
    Patch(Ink, String),
    /// Scale of [`Ink::Heat`].
    Heat(String),
}

impl LegendEntry {
    fn text(&self) -> &str {
        match self {
            Self::Series(_, t) | Self::Marker(_, t) | Self::Patch(_, t) | Self::Heat(t) => t,
            Self::Faint(t)
            | Self::Linked(t)
            | Self::Interval(t)
            | Self::Dots(t)
            | Self::Dashes(t)
            | Self::Missed(t) => t,
        }
    }

    fn glyph(&self) -> f64 {
        match self {
            Self::Heat(_) => 8.0 * GLYPH,
            _ => GLYPH,
        }
    }

    fn draw(&self, scene: &mut Scene, x: f64, y: f64) {
        let (middle, end) = (x + GLYPH / 2.0, x + GLYPH);
        match self {
            Self::Series(i, _) => {
                scene.series(*i, &[(x, y), (end, y)]);
                scene.marker(*i, (middle, y));
            }
            Self::Marker(i, _) => scene.marker(*i, (middle, y)),
            Self::Faint(_) => scene.hollow(0, (middle, y), Ink::Muted),
            Self::Linked(_) => {
                scene.dashes(&[(middle, y), (end, y)], Ink::Muted, theme::THIN);
                scene.hollow(0, (x + theme::MARKER, y), Ink::Muted);
            }
            Self::Interval(_) => scene.whisker((middle, y - 6.0), (middle, y + 6.0), Ink::Muted),
            Self::Dots(_) => {
                for dy in [-4.0, 0.0, 4.0] {
                    scene.dot((middle, y + dy), theme::SAMPLE, Ink::Muted);
                }
            }
            Self::Dashes(_) => scene.dashes(&[(x, y), (end, y)], Ink::Muted, theme::THIN),
            Self::Missed(_) => scene.cross(Ink::Muted, (middle, y)),
            Self::Patch(ink, _) => scene.rect(Area { x, y: y - 6.0, w: GLYPH, h: 12.0 }, *ink),
            Self::Heat(_) => {
                let part = self.glyph() / f64::from(HEATS);
                for i in 0..HEATS {
                    let area = Area { x: x + part * f64::from(i), y: y - 7.5, w: part, h: 15.0 };
                    scene.rect(area, Ink::Heat(i * (100 / (HEATS - 1))));
                }
                let on = |percent| FontSpec { ink: Ink::OnHeat(percent), ..LEGEND };
                scene.text((x + 4.0, y), Anchor::Start, on(0), "0%");
                scene.text((x + self.glyph() - 4.0, y), Anchor::End, on(100), "100%");
            }
        }
    }
}

/// Returns the legend entry of the shade beyond the trained length, with `says` as its meaning; `None` where no value
/// up to `high` is beyond it.
pub fn trained_key(header: &Header, high: f64, says: &str) -> Option<LegendEntry> {
    let trained = header.trained_positions;
    let text = format!("beyond the trained length ({}): {says}", short_count(trained));
    (high > trained as f64).then_some(LegendEntry::Patch(Ink::Shade, text))
}

/// Width of a legend entry's glyph.
const GLYPH: f64 = 22.0;
/// Steps of the heat scale.
const HEATS: u8 = 21;

/// A figure under construction, filled from the top down.
pub struct Page {
    /// Drawing so far.
    pub scene: Scene,
    /// Top of the next part, in figure units.
    pub y: f64,
}

/// Width between the margins.
pub const CONTENT: f64 = WIDTH - 2.0 * MARGIN;

impl Page {
    /// Creates a page with title, subtitles and legend.
    pub fn new(title: &str, subtitles: &[String], keys: &[LegendEntry]) -> Self {
        let mut page = Self { scene: Scene::new(), y: MARGIN };
        page.lines(title, TITLE);
        page.y += 2.0;
        for subtitle in subtitles {
            page.lines(subtitle, SUBTITLE);
        }
        page.y += 8.0;
        page.legend(keys);
        page.y += 10.0;
        page
    }

    fn lines(&mut self, text: &str, kind: FontSpec) {
        for line in wrap(text, kind, CONTENT) {
            let height = kind.size * LEADING;
            self.scene.text((MARGIN, self.y + height / 2.0), Anchor::Start, kind, line);
            self.y += height;
        }
    }

    fn legend(&mut self, keys: &[LegendEntry]) {
        if keys.is_empty() {
            return;
        }
        let row = LEGEND.size * 1.7;
        let mut x = MARGIN;
        for key in keys {
            let glyph = key.glyph() + 6.0;
            let text = shorten(key.text(), LEGEND, CONTENT - glyph);
            let width = glyph + text_width(&text, LEGEND);
            if x > MARGIN && x + width > WIDTH - MARGIN {
                (x, self.y) = (MARGIN, self.y + row);
            }
            key.draw(&mut self.scene, x, self.y + row / 2.0);
            self.scene.text((x + glyph, self.y + row / 2.0), Anchor::Start, LEGEND, text);
            x += width + 20.0;
        }
        self.y += row;
    }

    /// Adds `notes` at the foot, each on its own line, and returns the drawing.
    pub fn finish(mut self, notes: &[String]) -> Scene {
        if !notes.is_empty() {
            self.y += 6.0;
        }
        for note in notes {
            self.lines(note, NOTE);
        }
        self.scene.height = (self.y + MARGIN * 0.8).ceil();
        self.scene
    }
}
