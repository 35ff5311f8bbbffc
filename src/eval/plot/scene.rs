//! Drawings as plain data: shapes in figure units with y downwards, in inks instead of colours. [`super::render`]
//! writes them to files.

use super::text::text_area;
use super::theme::{self, FontSpec, Ink};

/// Coordinates x and y in figure units.
pub type Coord = (f64, f64);

/// Horizontal alignment of a text to its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anchor {
    /// The left end is at the position.
    Start,
    /// The middle is at the position.
    Middle,
    /// The right end is at the position.
    End,
}

/// One mark of a drawing.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    /// An open path.
    Path {
        /// Corners of the path.
        points: Vec<Coord>,
        /// Colour of the stroke.
        ink: Ink,
        /// Width of the stroke.
        width: f64,
    },
    /// A filled polygon.
    Polygon {
        /// Corners of the polygon.
        points: Vec<Coord>,
        /// Colour of the filling.
        ink: Ink,
    },
    /// A filled rectangle.
    Rect {
        /// Place and size.
        area: Area,
        /// Colour of the filling.
        ink: Ink,
    },
    /// A filled circle.
    Dot {
        /// Centre of the circle.
        at: Coord,
        /// Radius of the circle.
        radius: f64,
        /// Colour of the filling.
        ink: Ink,
    },
    /// A line of text, its capitals vertically centred on `at.1`.
    Text {
        /// Position of the text.
        at: Coord,
        /// Horizontal alignment.
        anchor: Anchor,
        /// Size, weight and colour.
        kind: FontSpec,
        /// Content of the text.
        text: String,
    },
}

/// A rectangle.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Area {
    /// Left edge.
    pub x: f64,
    /// Top edge.
    pub y: f64,
    /// Width.
    pub w: f64,
    /// Height.
    pub h: f64,
}

impl Area {
    /// Returns the right edge.
    pub fn right(&self) -> f64 {
        self.x + self.w
    }

    /// Returns the lower edge.
    pub fn bottom(&self) -> f64 {
        self.y + self.h
    }

    /// Returns whether two rectangles share more than an edge.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.x < other.right() && other.x < self.right() && self.y < other.bottom() && other.y < self.bottom()
    }
}

/// A drawing: shapes in drawing order.
#[derive(Debug, Clone, PartialEq)]
pub struct Scene {
    /// Height in figure units; the width is always [`theme::WIDTH`].
    pub height: f64,
    /// Shapes, from the back to the front.
    pub shapes: Vec<Shape>,
}

impl Scene {
    /// Creates an empty drawing.
    pub fn new() -> Self {
        Self { height: 0.0, shapes: vec![] }
    }

    /// Draws a path through `points`.
    pub fn path(&mut self, points: Vec<Coord>, ink: Ink, width: f64) {
        self.shapes.push(Shape::Path { points, ink, width });
    }

    /// Draws a straight line.
    pub fn line(&mut self, from: Coord, to: Coord, ink: Ink, width: f64) {
        self.path(vec![from, to], ink, width);
    }

    /// Draws a dashed path.
    pub fn dashes(&mut self, points: &[Coord], ink: Ink, width: f64) {
        const DASH: [f64; 2] = [5.0, 3.5];
        let (mut part, mut left) = (0, DASH[0]);
        for pair in points.windows(2) {
            let (from, to) = (pair[0], pair[1]);
            let length = (to.0 - from.0).hypot(to.1 - from.1);
            let at = |d: f64| (from.0 + (to.0 - from.0) * d / length, from.1 + (to.1 - from.1) * d / length);
            let mut gone = 0.0;
            while gone < length {
                let step = left.min(length - gone);
                if part == 0 {
                    self.line(at(gone), at(gone + step), ink, width);
                }
                (gone, left) = (gone + step, left - step);
                if left <= 0.0 {
                    (part, left) = (1 - part, DASH[1 - part]);
                }
            }
        }
    }

    /// Draws a filled rectangle.
    pub fn rect(&mut self, area: Area, ink: Ink) {
        self.shapes.push(Shape::Rect { area, ink });
    }

    /// Draws a filled polygon.
    pub fn polygon(&mut self, points: Vec<Coord>, ink: Ink) {
        self.shapes.push(Shape::Polygon { points, ink });
    }

    /// Draws a filled circle.
    pub fn dot(&mut self, at: Coord, radius: f64, ink: Ink) {
        self.shapes.push(Shape::Dot { at, radius, ink });
    }

    /// Draws a line of text.
    pub fn text(&mut self, at: Coord, anchor: Anchor, kind: FontSpec, text: impl Into<String>) {
        // Messages of other programs may have control characters, which XML does not allow.
        let text = text.into().replace(char::is_control, " ");
        self.shapes.push(Shape::Text { at, anchor, kind, text });
    }

    /// Draws a line of text on a patch of the ink `behind`, which hides grid lines.
    pub fn text_on(&mut self, behind: Ink, at: Coord, anchor: Anchor, kind: FontSpec, text: &str) {
        self.rect(text_area(at, anchor, kind, text), behind);
        self.text(at, anchor, kind, text);
    }

    /// Draws the line of series `i`, dashed once the colours repeat.
    pub fn series(&mut self, i: usize, points: &[Coord]) {
        match i < theme::SERIES {
            true => self.path(points.to_vec(), Ink::Series(i), theme::LINE),
            false => self.dashes(points, Ink::Series(i), theme::LINE),
        }
    }

    /// Draws the marker of series `i`.
    pub fn marker(&mut self, i: usize, at: Coord) {
        self.mark(i, at, theme::MARKER, Ink::Series(i));
    }

    /// Draws the marker of series `i` hollow.
    pub fn hollow(&mut self, i: usize, at: Coord, ink: Ink) {
        self.mark(i, at, theme::MARKER, ink);
        self.mark(i, at, theme::MARKER * 0.55, Ink::Paper);
    }

    fn mark(&mut self, i: usize, (x, y): Coord, r: f64, ink: Ink) {
        let round = i / theme::SERIES;
        let corners: &[Coord] = match (i + round) % theme::SERIES {
            0 => return self.dot((x, y), r, ink),
            1 => &[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            2 => &[(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)],
            3 => &[(0.0, -1.2), (1.2, 0.9), (-1.2, 0.9)],
            4 => &[(0.0, 1.2), (1.2, -0.9), (-1.2, -0.9)],
            _ => &[(-1.3, -0.5), (1.3, -0.5), (1.3, 0.5), (-1.3, 0.5)],
        };
        self.polygon(corners.iter().map(|c| (x + c.0 * r, y + c.1 * r)).collect(), ink);
    }

    /// Draws an interval from `a` to `b`, with caps across it.
    pub fn whisker(&mut self, a: Coord, b: Coord, ink: Ink) {
        const CAP: f64 = 3.0;
        let (dx, dy) = if (b.0 - a.0).abs() > (b.1 - a.1).abs() { (0.0, CAP) } else { (CAP, 0.0) };
        self.line(a, b, ink, theme::THIN);
        for (x, y) in [a, b] {
            self.line((x - dx, y - dy), (x + dx, y + dy), ink, theme::THIN);
        }
    }

    /// Draws a small ×, the mark of a run that failed.
    pub fn cross(&mut self, ink: Ink, (x, y): Coord) {
        let r = 3.2;
        self.line((x - r, y - r), (x + r, y + r), ink, theme::LINE);
        self.line((x - r, y + r), (x + r, y - r), ink, theme::LINE);
    }
}

impl Default for Scene {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dashes_cover_a_line_from_its_start_without_touching() {
        let mut scene = Scene::new();
        scene.dashes(&[(0.0, 0.0), (20.0, 0.0)], Ink::Text, 1.0);
        let spans: Vec<_> = scene
            .shapes
            .iter()
            .map(|s| match s {
                Shape::Path { points, .. } => (points[0].0, points[1].0),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(spans, [(0.0, 5.0), (8.5, 13.5), (17.0, 20.0)]);
    }

    #[test]
    fn every_series_index_has_a_unique_pair_of_colour_and_marker() {
        let look = |i| {
            let mut scene = Scene::new();
            scene.marker(i, (0.0, 0.0));
            let light = &theme::THEMES[0];
            match scene.shapes.remove(0) {
                Shape::Polygon { points, ink } => (format!("{points:?}"), light.rgb(ink)),
                Shape::Dot { ink, .. } => ("dot".into(), light.rgb(ink)),
                other => panic!("{other:?}"),
            }
        };
        for (i, j) in (0..30).flat_map(|i| (0..i).map(move |j| (i, j))) {
            assert_ne!(look(i), look(j), "{i} and {j}");
        }
    }

    #[test]
    fn control_characters_in_text_become_spaces() {
        let mut scene = Scene::new();
        scene.text((0.0, 0.0), Anchor::Start, theme::NOTE, "a\u{7}b\nc");
        assert!(matches!(&scene.shapes[0], Shape::Text { text, .. } if text == "a b c"));
    }
}
