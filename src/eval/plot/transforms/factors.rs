//! Figure of a learned product: each of its factors as a matrix, in the order of the product, and what they multiply to.

use crate::cli::Stored;
use crate::error::{Error, ErrorKind, Result};
use crate::eval::plot::axis::brief;
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::scene::{Anchor, Area, Scene};
use crate::eval::plot::text::shorten;
use crate::eval::plot::theme::{Ink, MARGIN, PANEL, THIN, TICK, TITLE};
use crate::eval::plot::Figure;
use crate::eval::report::stem;
use crate::ops::factored::{PlanRoom, Step};
use crate::transforms::Transform;
use std::path::Path;

/// Largest size that is drawn: of larger ones a cell is smaller than a pixel.
const LARGEST: usize = 64;
/// Smallest and largest side of a matrix.
const SIDE: (f64, f64) = (112.0, 180.0);
/// Room left of a matrix, for the sign before it.
const SIGN: f64 = 24.0;
/// Room above a matrix for its name.
const NAME: f64 = 34.0;
/// Steps of the heat scale, few enough that neighbours in a row often share one and are one shape.
const HEATS: f64 = 20.0;

/// A matrix of the figure.
struct Matrix {
    name: String,
    about: String,
    /// Row, column and absolute value of what may differ from 0, row by row.
    cells: Vec<(usize, usize, f64)>,
    /// Whether its entries are 0 and 1.
    permutes: bool,
}

/// Draws the factors of a run's directory, or of a factor file; returns the first part of the figure's file name too.
///
/// # Errors
/// What cannot be read; a size above 64; a permutation of other elements; numbers that are not finite.
pub fn figure(path: &Path) -> Result<(String, Figure)> {
    let stored = Stored::read(path, "factors")?;
    let place = format!("factors {}", path.display());
    Ok((run_name(path), draw(&stored, &place)?))
}

/// Returns the name of a run: of its directory, or of a factor file with another name than runs give it.
fn run_name(path: &Path) -> String {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.into());
    let file = stem(&whole).filter(|name| !whole.is_dir() && name != "factors");
    let dir = if whole.is_dir() { Some(whole.as_path()) } else { whole.parent() };
    let dir = dir.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    file.or(dir).unwrap_or_else(|| "transform".into())
}

/// Returns the name of a transform in a title: that of a file as it is.
fn name(transform: &str) -> String {
    let known = Transform::ALL.iter().any(|t| t.name() == transform);
    match transform {
        "dft" | "dct" | "dst" => transform.to_uppercase(),
        _ if known => transform[..1].to_uppercase() + &transform[1..],
        _ => transform.into(),
    }
}

/// Draws the figure of `stored`, which errors call `place`.
fn draw(stored: &Stored, place: &str) -> Result<Figure> {
    let facts = &stored.facts;
    let n = facts.n;
    if n > LARGEST {
        return Err(Error::usage(place, format!("is of {n} elements; factors of up to {LARGEST} are drawn")));
    }
    let (product, mut matrices) = (product(stored, place)?, factors(stored));
    matrices.push(product);
    if let Some(m) = matrices.iter().find(|m| m.cells.iter().any(|cell| !cell.2.is_finite())) {
        return Err(Error::new(ErrorKind::NotFinite, place, format!("{} has an entry that is not finite", m.name)));
    }
    let field = if facts.complex { "complex" } else { "real" };
    let weights = if facts.tied { "share their weights" } else { "have weights of their own" };
    let numbers = stored.steps().iter().map(|s| if let Step::Butterfly(w) = s { w.len() } else { 0 }).sum::<usize>();
    let count = numbers / facts.shape().planes();
    let about = format!("{} · {n} elements · blocks of a factor {weights} · {count} {field} weights", facts.product);
    let keys = [
        LegendEntry::Heat("absolute value, of the largest of its matrix; blank below 2.5%".into()),
        LegendEntry::Patch(Ink::Text, "1 of a permutation".into()),
    ];
    let title = format!("{} as a product of sparse factors", name(&facts.transform));
    let mut page = Page::new(&title, &[about], &keys);
    let most = (CONTENT / (SIDE.0 + SIGN)) as usize;
    let rows = matrices.len().div_ceil(most);
    let columns = matrices.len().div_ceil(rows);
    let side = (CONTENT / columns as f64 - SIGN).min(SIDE.1);
    for (i, matrix) in matrices.iter().enumerate() {
        let (column, row) = ((i % columns) as f64, (i / columns) as f64);
        let (x, y) = (MARGIN + SIGN + column * (side + SIGN), page.y + NAME + row * (side + NAME + 14.0));
        let sign = if i + 1 == matrices.len() { "=" } else { "·" };
        if i > 0 {
            page.scene.text((x - SIGN / 2.0, y + side / 2.0), Anchor::Middle, TITLE, sign);
        }
        matrix.draw(&mut page.scene, Area { x, y, w: side, h: side }, n);
    }
    page.y += rows as f64 * (side + NAME + 14.0);
    let note =
        "Rows: elements of the result, from the top. Columns: elements of what is multiplied. The factor on the \
        right is applied first.";
    Ok(Figure { name: "factors".into(), scene: page.finish(&[note.into()]) })
}

/// The factors, left factor first: each butterfly as its factors, each permutation as one.
fn factors(stored: &Stored) -> Vec<Matrix> {
    let (shape, steps) = (stored.facts.shape(), stored.steps());
    let mut left = (0, 0);
    let mut all = vec![];
    for step in steps.iter().rev() {
        match step {
            Step::Butterfly(weights) => {
                for level in (0..shape.levels()).rev() {
                    let entries = shape.entries(level, weights).into_iter();
                    let cells = entries.map(|e| (e.row, e.column, f64::from(e.re).hypot(f64::from(e.im))));
                    let name = primed('B', left.0) + &subscript(level + 1);
                    all.push(Matrix::new(name, format!("blocks of {}", 2 << level), cells.collect(), false));
                }
                left.0 += 1;
            }
            Step::Permutation(index) => {
                let cells = index.iter().enumerate().map(|(row, column)| (row, *column as usize, 1.0)).collect();
                all.push(Matrix::new(primed('P', left.1), "permutation".into(), cells, true));
                left.1 += 1;
            }
            Step::Relaxed(_) => {}
        }
    }
    all
}

/// The product as `apply` computes it, column by column.
fn product(stored: &Stored, place: &str) -> Result<Matrix> {
    let (facts, plan) = (&stored.facts, stored.plan().map_err(|e| Error::format(place, e))?);
    let (n, mut room, mut cells) = (facts.n, PlanRoom::default(), vec![]);
    for column in 0..n {
        let (mut unit, mut re) = (vec![0f32; n], vec![0f32; n]);
        let mut im = facts.complex_target.then(|| vec![0f32; n]);
        unit[column] = 1.0;
        plan.apply((&unit, None), (&mut re, im.as_deref_mut()), &mut room)?;
        let im = im.unwrap_or_else(|| vec![0.0; n]);
        let size = |(re, im): (f32, f32)| f64::from(re).hypot(f64::from(im));
        cells.extend(re.into_iter().zip(im).map(size).enumerate().map(|(row, size)| (row, column, size)));
    }
    let part = if facts.complex && !facts.complex_target { "real part" } else { "product" };
    let mut before = [0; 2];
    let named = facts.product.chars().map(|letter| {
        let count = &mut before[usize::from(letter == 'P')];
        *count += 1;
        primed(letter, *count - 1)
    });
    Ok(Matrix::new(named.collect(), part.into(), cells, false))
}

/// Returns the name of a butterfly or permutation that has `before` others of its kind to the left.
fn primed(letter: char, before: usize) -> String {
    format!("{letter}{}", "′".repeat(before))
}

/// Formats a number in subscript digits.
fn subscript(n: usize) -> String {
    const DIGITS: [char; 10] = ['₀', '₁', '₂', '₃', '₄', '₅', '₆', '₇', '₈', '₉'];
    n.to_string().bytes().map(|digit| DIGITS[usize::from(digit - b'0')]).collect()
}

impl Matrix {
    fn new(name: String, about: String, mut cells: Vec<(usize, usize, f64)>, permutes: bool) -> Self {
        cells.sort_unstable_by_key(|cell| (cell.0, cell.1));
        Self { name, about, cells, permutes }
    }

    fn largest(&self) -> f64 {
        self.cells.iter().fold(0.0, |largest, cell| cell.2.max(largest))
    }

    /// Returns the ink of an absolute value; `None` where it is nearly 0.
    fn ink(&self, value: f64) -> Option<Ink> {
        let heat = (HEATS * value / self.largest()).round();
        match self.permutes {
            true => Some(Ink::Text),
            false => (heat >= 1.0).then_some(Ink::Heat((heat * 100.0 / HEATS) as u8)),
        }
    }

    /// Draws name, cells and frame; neighbours of one ink in a row are one rectangle.
    fn draw(&self, scene: &mut Scene, area: Area, n: usize) {
        let about = match self.permutes {
            true => self.about.clone(),
            false => format!("{}, max {}", self.about, brief(self.largest())),
        };
        scene.text((area.x, area.y - 23.0), Anchor::Start, PANEL, shorten(&self.name, PANEL, area.w));
        scene.text((area.x, area.y - 8.0), Anchor::Start, TICK, shorten(&about, TICK, area.w));
        let cell = area.w / n as f64;
        let mut open: Option<(usize, usize, usize, Ink)> = None;
        let mut rect = |(row, first, end, ink): (usize, usize, usize, Ink)| {
            let (x, y) = (area.x + first as f64 * cell, area.y + row as f64 * cell);
            scene.rect(Area { x, y, w: (end - first) as f64 * cell, h: cell }, ink);
        };
        for (row, column, value) in &self.cells {
            let Some(ink) = self.ink(*value) else { continue };
            match &mut open {
                Some(run) if (run.0, run.2, run.3) == (*row, *column, ink) => run.2 += 1,
                _ => {
                    open.replace((*row, *column, column + 1, ink)).into_iter().for_each(&mut rect);
                }
            }
        }
        open.into_iter().for_each(&mut rect);
        let (right, bottom) = (area.right(), area.bottom());
        let corners = vec![(area.x, area.y), (right, area.y), (right, bottom), (area.x, bottom), (area.x, area.y)];
        scene.path(corners, Ink::Axis, THIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Facts;
    use crate::eval::plot::scene::Shape;
    use crate::eval::plot::tests::assert_tidy;
    use crate::transforms::Product;
    use rand::{rngs::StdRng, SeedableRng};

    fn stored(n: usize, product: &str, (complex, tied, complex_target): (bool, bool, bool)) -> Stored {
        let (transform, product) = ("dft".into(), product.to_string());
        let facts = Facts { transform, n, product, complex, tied, complex_target };
        let random = Product::random(facts.shape(), &facts.product, &mut StdRng::seed_from_u64(n as u64)).unwrap();
        Stored::of(facts, &random)
    }

    fn dense(matrix: &Matrix, n: usize) -> Vec<f64> {
        let mut all = vec![0.0; n * n];
        matrix.cells.iter().for_each(|(row, column, value)| all[row * n + column] = *value);
        all
    }

    #[test]
    fn names_are_in_the_order_of_the_product() {
        let stored = stored(8, "BPBP", (true, true, true));
        let names: Vec<String> = factors(&stored).into_iter().map(|m| m.name).collect();
        assert_eq!(names, ["B₃", "B₂", "B₁", "P", "B′₃", "B′₂", "B′₁", "P′"]);
        assert_eq!(product(&stored, "x").unwrap().name, "BPB′P′");
        assert_eq!(subscript(10), "₁₀");
    }

    /// Of factors without signs, absolute values multiply as the factors do.
    #[test]
    fn what_is_drawn_left_to_right_multiplies_to_the_product() {
        for (modules, tied) in [("BP", true), ("BPP", true), ("BPBP", false), ("PB", true)] {
            let n = 16;
            let facts = stored(n, modules, (false, tied, false)).facts;
            let mut random = Product::random(facts.shape(), modules, &mut StdRng::seed_from_u64(5)).unwrap();
            random.factors_mut().iter_mut().flatten().for_each(|w| *w = w.abs());
            let stored = Stored::of(facts, &random);
            let times = |a: Vec<f64>, b: Vec<f64>| -> Vec<f64> {
                let entry = |at: usize| (0..n).map(|k| a[at / n * n + k] * b[k * n + at % n]).sum();
                (0..n * n).map(entry).collect()
            };
            let want = factors(&stored).iter().map(|m| dense(m, n)).reduce(times).unwrap();
            for (got, want) in dense(&product(&stored, "x").unwrap(), n).iter().zip(&want) {
                assert!((got - want).abs() < 1e-5 * (1.0 + want), "{modules}: {got} {want}");
            }
        }
    }

    #[test]
    fn every_size_and_product_is_tidy_and_light() {
        for n in [2, 4, 16, 64] {
            for (product, kind) in
                [("B", (false, true, false)), ("BP", (true, true, true)), ("BPBPBP", (true, false, false))]
            {
                let figure = draw(&stored(n, product, kind), "x").unwrap();
                assert_tidy(&format!("{product} of {n}"), &figure.scene);
                let butterflies = product.matches('B').count();
                let cells = n * n + 2 * n * butterflies * n.ilog2() as usize + n * (product.len() - butterflies);
                let rects = figure.scene.shapes.iter().filter(|s| matches!(s, Shape::Rect { .. })).count();
                assert!(rects < cells + 40, "{product} of {n}: {rects} for {cells} cells that are not 0");
                let ones = |s: &&Shape| matches!(s, Shape::Rect { ink: Ink::Text, .. });
                let ones = figure.scene.shapes.iter().filter(ones).count();
                assert_eq!(ones, n * (product.len() - butterflies) + 1, "cells of permutations, and the legend");
            }
        }
    }

    #[test]
    fn neighbours_of_one_ink_are_one_rectangle_and_small_values_none() {
        let cells = [(0, 0, 1.0), (0, 1, 0.99), (0, 2, 0.5), (1, 0, 0.02), (1, 1, 1.0), (2, 2, 1.0)];
        let matrix = Matrix::new("m".into(), "a".into(), cells.into(), false);
        let mut scene = Scene::new();
        matrix.draw(&mut scene, Area { x: 0.0, y: 0.0, w: 30.0, h: 30.0 }, 3);
        let rects = scene.shapes.iter().filter_map(|s| match s {
            Shape::Rect { area, ink } => Some((area.x, area.y, area.w, *ink)),
            _ => None,
        });
        let full = Ink::Heat(100);
        let want = [(0.0, 0.0, 20.0, full), (20.0, 0.0, 10.0, Ink::Heat(50)), (10.0, 10.0, 10.0, full)];
        assert_eq!(rects.collect::<Vec<_>>(), [want.as_slice(), &[(20.0, 20.0, 10.0, full)]].concat());
    }

    #[test]
    fn what_cannot_be_drawn_is_refused_by_name() {
        let refused = |stored: &Stored, words: &str| {
            let said = draw(stored, "factors a/b").err().map(|e| e.to_string()).unwrap_or_default();
            assert!(said.contains("factors a/b") && said.contains(words), "{said}");
        };
        refused(&stored(128, "BP", (true, true, true)), "is of 128 elements; factors of up to 64 are drawn");
        let facts = stored(4, "B", (false, true, false)).facts;
        let mut random = Product::random(facts.shape(), "B", &mut StdRng::seed_from_u64(1)).unwrap();
        random.factors_mut()[0][5] = f32::NAN;
        refused(&Stored::of(facts, &random), "B₂ has an entry that is not finite");
    }

    #[test]
    fn figures_are_named_after_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("dft8");
        std::fs::create_dir(&run).unwrap();
        assert_eq!([run_name(&run), run_name(&run.join("factors.safetensors"))], ["dft8", "dft8"]);
        assert_eq!(run_name(&run.join("mine.safetensors")), "mine");
    }
}
