//! Placement of short labels next to marks.

use super::scene::{Anchor, Area, Coord, Scene};
use super::text::text_area;
use super::theme::{Ink, HAIR, LABEL, MARKER};

/// Returns the area of a marker, with some margin.
pub fn around(mark: Coord) -> Area {
    let r = MARKER + 1.5;
    Area { x: mark.0 - r, y: mark.1 - r, w: 2.0 * r, h: 2.0 * r }
}

/// Returns small areas along a line, which labels must not overlap.
pub fn along(from: Coord, to: Coord) -> impl Iterator<Item = Area> {
    let at = move |k: f64| (from.0 + (to.0 - from.0) * k, from.1 + (to.1 - from.1) * k);
    (0..=60).map(move |i| at(f64::from(i) / 60.0)).map(|(x, y)| Area { x: x - 2.0, y: y - 3.0, w: 4.0, h: 6.0 })
}

/// Draws `text` next to `mark` where it overlaps nothing, farther off with a leader line if necessary; nothing where no
/// room is left.
pub fn beside(scene: &mut Scene, taken: &mut Vec<Area>, plot: Area, mark: Coord, text: &str) {
    let directions =
        [(1.0, 0.0), (0.7, -0.8), (0.7, 0.8), (0.0, -1.0), (0.0, 1.0), (-0.7, -0.8), (-0.7, 0.8), (-1.0, 0.0)];
    let places = (0..6).flat_map(|ring| {
        let reach = 12.0 + 11.0 * f64::from(ring);
        directions.map(|(dx, dy)| (ring, (mark.0 + dx * reach, mark.1 + dy * reach)))
    });
    let inside = |a: &Area| a.x > plot.x && a.right() < plot.right() && a.y > plot.y && a.bottom() < plot.bottom();
    let free = |at: Coord| {
        let area = text_area(at, Anchor::Middle, LABEL, text);
        (inside(&area) && !taken.iter().any(|t| t.overlaps(&area))).then_some(area)
    };
    let found = places.into_iter().find_map(|(ring, at)| free(at).map(|area| (ring, at, area)));
    let Some((ring, at, area)) = found else { return };
    if ring > 0 {
        let length = (at.0 - mark.0).hypot(at.1 - mark.1);
        let along = |d: f64| (mark.0 + (at.0 - mark.0) * d / length, mark.1 + (at.1 - mark.1) * d / length);
        scene.line(along(MARKER), along(length - 7.0), Ink::Axis, HAIR);
    }
    // Two adjacent numbers would read as one.
    taken.push(Area { x: area.x - 4.0, w: area.w + 8.0, ..area });
    scene.text(at, Anchor::Middle, LABEL, text);
}

/// Draws `text` above a mark that spans `top..bottom` at `x`, higher with a leader line if necessary, or below it;
/// nothing where no room is left. Labels are placed vertically only, since marks may be close to each other.
pub fn above(scene: &mut Scene, taken: &mut Vec<Area>, plot: Area, (x, top, bottom): (f64, f64, f64), text: &str) {
    let up = (0..12).map(|i| (i, top - MARKER - 7.0 - 12.0 * f64::from(i), top - MARKER));
    let down = (0..12).map(|i| (i, bottom + MARKER + 7.0 + 12.0 * f64::from(i), bottom + MARKER));
    let free = |y: f64| {
        let area = text_area((x, y), Anchor::Middle, LABEL, text);
        let inside = area.y > plot.y && area.bottom() < plot.bottom();
        (inside && !taken.iter().any(|t| t.overlaps(&area))).then_some(area)
    };
    let Some((i, y, from, area)) = up.chain(down).find_map(|(i, y, from)| Some((i, y, from, free(y)?))) else { return };
    if i > 0 {
        scene.line((x, from), (x, if y < from { area.bottom() } else { area.y }), Ink::Axis, HAIR);
    }
    taken.push(Area { x: area.x - 3.0, w: area.w + 6.0, ..area });
    scene.text((x, y), Anchor::Middle, LABEL, text);
}

#[cfg(test)]
mod tests {
    use super::super::scene::Shape;
    use super::*;

    #[test]
    fn crowded_marks_are_labelled_one_above_the_other_and_never_outside() {
        let plot = Area { x: 0.0, y: 0.0, w: 100.0, h: 100.0 };
        let (mut scene, mut taken) = (Scene::new(), vec![]);
        for i in 0..3 {
            above(&mut scene, &mut taken, plot, (20.0 + 3.0 * f64::from(i), 90.0, 90.0), &i.to_string());
        }
        above(&mut scene, &mut taken, plot, (80.0, 2.0, 2.0), "edge");
        above(&mut scene, &mut taken, Area { h: 5.0, ..plot }, (50.0, 2.0, 2.0), "no room");
        let texts = scene.shapes.iter().filter_map(|s| match s {
            Shape::Text { at, text, .. } => Some((text.as_str(), at.1)),
            _ => None,
        });
        assert_eq!(texts.collect::<Vec<_>>(), [("0", 79.0), ("1", 67.0), ("2", 55.0), ("edge", 13.0)]);
    }
}
