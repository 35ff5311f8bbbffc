//! Figure of copy recall: right letters by distance, and by set bits of the distance in chunks.

use super::{estimates, middle, model, octaves};
use crate::cli::short_count;
use crate::error::{Error, Result};
use crate::eval::plot::axis::grouped;
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::panel::{grid, Panel};
use crate::eval::plot::scale::Scale;
use crate::eval::plot::theme::{Ink, MARGIN, THIN};
use crate::eval::plot::Figure;
use crate::eval::report::{CharRecall, Estimate};
use std::collections::BTreeMap;
use std::path::Path;

/// Right letters in percent of a guess among 26.
const CHANCE: f64 = 100.0 / 26.0;

/// Right letters of each value in percent, by octave of the distance or by set bits.
type Groups = BTreeMap<u32, Vec<f64>>;

/// Draws the figure of the recall read from `path`.
///
/// # Errors
/// A file without values, or an inconsistent one.
pub fn figures(recall: &CharRecall, path: &Path) -> Result<Vec<Figure>> {
    let fail = |message: String| Error::format(path.display(), message);
    let (octave, bits) = groups(recall).map_err(fail)?;
    let (Some((first, _)), Some((last, _))) = (octave.first_key_value(), octave.last_key_value()) else {
        return Err(fail("holds no values".into()));
    };
    let edges: Vec<usize> = (*first..=*last + 1).map(|e| 1usize.checked_shl(e).unwrap_or(usize::MAX)).collect();
    let x = octaves(&edges);
    let by_distance = points(&octave, |e| middle(&x, (e - first) as usize));
    let ends = |ends: &Groups| {
        let end = |e: Option<(&u32, &Vec<f64>)>| e.map_or(0, |(bits, _)| *bits as usize);
        (end(ends.first_key_value()), end(ends.last_key_value()))
    };
    let (fewest, most) = ends(&bits);
    let panels = [
        ("Right letters, %, by distance", "distance, characters (octaves)", x, by_distance),
        (
            "Right letters, %, by set bits",
            "set bits of the distance in chunks",
            Scale::whole(fewest, most, 12),
            points(&bits, f64::from),
        ),
    ];
    let mut keys = vec![LegendEntry::Series(0, "mean over values".into())];
    if panels.iter().any(|(.., points)| points.iter().any(|(_, e)| e.low.is_some())) {
        keys.push(LegendEntry::Interval("95% interval over values".into()));
    }
    keys.push(LegendEntry::Dashes("chance: 1 letter in 26, 3.8%".into()));
    let about = [
        format!(
            "{}{} values of {} letters each · windows of {} characters · chunks of {}",
            model(&recall.command),
            grouped(recall.values.len() as f64, 0),
            recall.letters().unwrap_or_default(),
            short_count(recall.window),
            recall.chunk
        ),
        "A distance in chunks that is a power of two is one read of one layer; other distances need several".into(),
    ];
    let mut page = Page::new("Copy recall: letters right after a distance", &about, &keys);
    let y = Scale::percent();
    for (area, (title, x_name, x, points)) in grid(2, 2, (MARGIN, CONTENT), page.y, 300.0).into_iter().zip(&panels) {
        let panel = Panel { title, x, x_name, y: &y, shaded_from: None, crosses: None };
        let plot = panel.draw(&mut page.scene, area);
        page.scene.dashes(&[plot.at(x.low, CHANCE), plot.at(x.high, CHANCE)], Ink::Muted, THIN);
        estimates(&mut page.scene, &plot, points);
        page.y = area.bottom();
    }
    let counts = |groups: &Groups| groups.values().map(|v| v.len().to_string()).collect::<Vec<_>>().join(", ");
    let notes = [format!(
        "Values of the points, left to right: by distance {}; by set bits {}.",
        counts(&octave),
        counts(&bits)
    )];
    Ok(vec![Figure { name: "recall".into(), scene: page.finish(&notes) }])
}

fn points(groups: &Groups, place: impl Fn(u32) -> f64) -> Vec<(f64, Estimate)> {
    groups.iter().filter_map(|(key, shares)| Some((place(*key), Estimate::of(shares)?))).collect()
}

/// Groups values by the octave of their distance, and by the set bits of their distance in chunks.
fn groups(recall: &CharRecall) -> std::result::Result<(Groups, Groups), String> {
    let letters = recall.letters().ok_or_else(|| format!("has the columns {}", recall.columns.join(", ")))?;
    if recall.chunk == 0 {
        return Err("has chunks of 0 characters".into());
    }
    let (mut octave, mut bits) = (Groups::new(), Groups::new());
    for (number, &[place, distance, right]) in (1..).zip(&recall.values) {
        let fail = |what: String| Err(format!("value {number} {what}"));
        if right > letters {
            return fail(format!("has {right} right letters of {letters}"));
        }
        let Some(log) = distance.checked_ilog2().filter(|_| distance <= place) else {
            return fail(format!("is at place {place}, a distance of {distance} after it was stored"));
        };
        let share = 100.0 * right as f64 / letters as f64;
        octave.entry(log).or_default().push(share);
        let chunks = place / recall.chunk - (place - distance) / recall.chunk;
        bits.entry(chunks.count_ones()).or_default().push(share);
    }
    Ok((octave, bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recall(values: &[[usize; 3]]) -> CharRecall {
        let columns = ["place", "distance", "letters_right_of_16"].map(String::from);
        CharRecall { command: vec![], window: 1024, chunk: 16, columns, values: values.into() }
    }

    #[test]
    fn values_are_grouped_by_octave_and_by_set_bits_of_chunks() {
        // The distances are 4, 4, 1 and 6 chunks.
        let (octave, bits) = groups(&recall(&[[80, 63, 16], [80, 64, 8], [40, 23, 4], [100, 96, 0]])).unwrap();
        assert_eq!(octave, Groups::from([(4, vec![25.0]), (5, vec![100.0]), (6, vec![50.0, 0.0])]));
        assert_eq!(bits, Groups::from([(1, vec![100.0, 50.0, 25.0]), (2, vec![0.0])]));
    }

    #[test]
    fn impossible_values_are_refused_by_number() {
        let refused = |values: &[[usize; 3]], change: fn(&mut CharRecall), words: &str| {
            let mut recall = recall(values);
            change(&mut recall);
            let said = figures(&recall, Path::new("a/recall.json")).unwrap_err().to_string();
            assert!(said.starts_with("a/recall.json") && said.contains(words), "{said}");
        };
        refused(&[], |_| (), "holds no values");
        refused(&[[40, 20, 16], [40, 20, 17]], |_| (), "value 2 has 17 right letters of 16");
        refused(&[[40, 41, 3]], |_| (), "value 1 is at place 40, a distance of 41");
        refused(&[[40, 0, 3]], |_| (), "a distance of 0");
        refused(&[[40, 20, 3]], |r| r.chunk = 0, "chunks of 0");
        refused(&[[40, 20, 3]], |r| r.columns[2] = "right".into(), "has the columns place, distance, right");
    }
}
