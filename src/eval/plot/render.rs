//! Rendering of scenes to SVG and PNG.
//!
//! plotters rounds coordinates to whole units, so both formats are drawn at [`DETAIL`] times their size: the header of
//! an SVG states the display size, and each pixel of a PNG is the mean of four.

use super::scene::{Anchor, Scene, Shape};
use super::text::{font, EM_TO_LINE};
use super::theme::{Ink, Rgb, Theme, WIDTH};
use plotters::backend::{BitMapBackend, DrawingBackend, SVGBackend};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, RGBColor, ShapeStyle, TextStyle};
use std::fmt::Display;
use std::path::Path;

/// Drawn units per figure unit.
pub const DETAIL: i32 = 4;
/// Pixels of a PNG per figure unit.
const PNG_SCALE: u32 = 2;

/// Text metrics of a backend: its size per em, and the distance in ems from its reference line to the middle of the
/// capitals.
struct TextMetrics {
    size: f64,
    drop: f64,
}

/// Metrics of plotters-svg, which divides sizes by 1.24 and centres lower-case letters on the position.
const SVG_TEXT: TextMetrics = TextMetrics { size: 1.24, drop: 0.09 };
/// Metrics of ab_glyph, whose size is the line height; the baseline of plotters lies 0.113 em below the position.
const PNG_TEXT: TextMetrics = TextMetrics { size: EM_TO_LINE, drop: 0.25 };

/// Renders the figure as SVG; `name` is its title for screen readers.
pub fn svg(scene: &Scene, theme: &Theme, name: &str) -> Result<String, String> {
    let (w, h) = size(scene);
    let mut out = String::new();
    let mut backend = SVGBackend::with_string(&mut out, (w, h));
    play(scene, theme, &mut backend, &SVG_TEXT)?;
    backend.present().map_err(plain)?;
    drop(backend);
    let detail = DETAIL as u32;
    let drawn = format!("width=\"{w}\" height=\"{h}\"");
    let shown = format!("width=\"{}\" height=\"{}\" role=\"img\"", w / detail, h / detail);
    let name = name.replace('&', "&amp;").replace('<', "&lt;").replace(char::is_control, " ");
    Ok(out.replacen(&drawn, &shown, 1).replacen('\n', &format!("\n<title>{name}</title>\n"), 1))
}

/// Renders the figure as PNG to `path`.
pub fn png(scene: &Scene, theme: &Theme, path: &Path) -> Result<(), String> {
    let (w, h) = size(scene);
    let mut fine = vec![0; 3 * w as usize * h as usize];
    let mut backend = BitMapBackend::with_buffer(&mut fine, (w, h));
    play(scene, theme, &mut backend, &PNG_TEXT)?;
    backend.present().map_err(plain)?;
    drop(backend);
    let by = DETAIL as u32 / PNG_SCALE;
    let small = shrink(&fine, w as usize, by as usize);
    let file = std::fs::File::create(path).map_err(plain)?;
    let mut encoder = png::Encoder::new(std::io::BufWriter::new(file), w / by, h / by);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // Areas of flat colour compress better without a filter.
    encoder.set_filter(png::FilterType::NoFilter);
    encoder.set_compression(png::Compression::Best);
    let mut writer = encoder.write_header().map_err(plain)?;
    writer.write_image_data(&small).map_err(plain)?;
    writer.finish().map_err(plain)
}

fn size(scene: &Scene) -> (u32, u32) {
    let detail = DETAIL as u32;
    (WIDTH as u32 * detail, scene.height.ceil().max(1.0) as u32 * detail)
}

fn plain(e: impl Display) -> String {
    e.to_string()
}

/// Downscales by averaging squares of `by` × `by` pixels; `width` is the width of a row.
fn shrink(rgb: &[u8], width: usize, by: usize) -> Vec<u8> {
    let height = rgb.len() / 3 / width;
    let mut out = Vec::with_capacity(rgb.len() / (by * by));
    for (y, x, c) in (0..height / by)
        .flat_map(|y| (0..width / by).map(move |x| (y, x)))
        .flat_map(|(y, x)| (0..3).map(move |c| (y, x, c)))
    {
        let pixel = |i: usize| u32::from(rgb[3 * ((y * by + i / by) * width + x * by + i % by) + c]);
        let sum: u32 = (0..by * by).map(pixel).sum();
        out.push(((sum as usize + by * by / 2) / (by * by)) as u8);
    }
    out
}

fn play<B: DrawingBackend>(scene: &Scene, theme: &Theme, backend: &mut B, metrics: &TextMetrics) -> Result<(), String> {
    let unit = |v: f64| (v * f64::from(DETAIL)).round() as i32;
    let at = |p: (f64, f64)| (unit(p.0), unit(p.1));
    let rgb = |(r, g, b): Rgb| RGBColor(r, g, b);
    let color = |ink| rgb(theme.rgb(ink)).mix(theme.alpha(ink));
    let style = |ink, width: f64| ShapeStyle::from(color(ink)).filled().stroke_width(unit(width).max(1) as u32);
    let (w, h) = size(scene);
    backend.draw_rect((0, 0), (w as i32, h as i32), &style(Ink::Paper, 0.0), true).map_err(plain)?;
    for shape in &scene.shapes {
        let drawn = match shape {
            Shape::Path { points, ink, width } => {
                let mut points: Vec<_> = points.iter().map(|p| at(*p)).collect();
                points.dedup();
                match points.len() {
                    0 | 1 => Ok(()),
                    _ => backend.draw_path(points, &style(*ink, *width)),
                }
            }
            Shape::Polygon { points, ink } => backend.fill_polygon(points.iter().map(|p| at(*p)), &style(*ink, 0.0)),
            Shape::Rect { area, ink } => {
                let (low, high) = (at((area.x, area.y)), at((area.right(), area.bottom())));
                backend.draw_rect(low, high, &style(*ink, 0.0), true)
            }
            Shape::Dot { at: centre, radius, ink } => {
                backend.draw_circle(at(*centre), unit(*radius) as u32, &style(*ink, 0.0), true)
            }
            Shape::Text { at: place, anchor, kind, text } => {
                let h_pos = match anchor {
                    Anchor::Start => HPos::Left,
                    Anchor::Middle => HPos::Center,
                    Anchor::End => HPos::Right,
                };
                let size = kind.size * metrics.size * f64::from(DETAIL);
                let (font, color) = (font(*kind, size), color(kind.ink));
                let style = TextStyle::from(font).color(&color).pos(Pos::new(h_pos, VPos::Center));
                backend.draw_text(text, &style, at((place.0, place.1 + metrics.drop * kind.size)))
            }
        };
        drawn.map_err(plain)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::theme::{LABEL, THEMES};
    use super::*;

    fn scene() -> Scene {
        let mut scene = Scene::new();
        scene.height = 60.0;
        scene.text((10.0, 30.0), Anchor::Start, LABEL, "a < b & c");
        scene.dot((100.0, 30.0), 5.0, Ink::Series(0));
        scene.path(vec![(5.0, 5.0), (5.0, 5.0)], Ink::Text, 1.0);
        scene
    }

    #[test]
    fn an_svg_has_its_size_and_title_and_escapes_text() {
        let svg = svg(&scene(), &THEMES[0], "x < y").unwrap();
        assert!(svg.starts_with("<svg width=\"800\" height=\"60\" role=\"img\" viewBox=\"0 0 3200 240\""), "{svg}");
        assert!(svg.contains("<title>x &lt; y</title>") && svg.contains("a &lt; b &amp; c"), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 1);
        assert_eq!(svg.matches("<polyline").count(), 0, "a path without length is left out");
    }

    #[test]
    fn a_pixel_is_the_mean_of_its_square() {
        let rows: Vec<u8> = [[0, 100, 8, 8], [100, 200, 8, 12]].iter().flatten().flat_map(|v| [*v; 3]).collect();
        assert_eq!(shrink(&rows, 4, 2), [100, 100, 100, 9, 9, 9]);
    }
}
