//! Style of all figures: colours for light and dark pages, type sizes, line widths.
//!
//! Figures use an [`Ink`], never a colour, so that one drawing serves both themes. Tests check that the series colours
//! are distinguishable on their background with normal vision and with each of the three dichromacies. Every series
//! also has its own marker.

/// Red, green and blue.
pub type Rgb = (u8, u8, u8);

/// Role of a shape's colour; a [`Theme`] maps it to a colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ink {
    /// Background.
    Paper,
    /// Titles and names.
    Text,
    /// Subtitles, ticks and notes.
    Muted,
    /// Axes and reference lines.
    Axis,
    /// Grid lines.
    Grid,
    /// Regions beyond the trained length.
    Shade,
    /// Raw window in block diagrams.
    Band,
    /// Series of an index; beyond [`SERIES`] the colours repeat, with other markers and dashed lines.
    Series(usize),
    /// Interval band of a series, in its colour and translucent, so that bands may overlap.
    Haze(usize),
    /// Heat-map cell of a value in percent, on a scale of one hue from the paper's lightness away.
    Heat(u8),
    /// Text on a heat-map cell of a value in percent.
    OnHeat(u8),
}

/// Colours for one background.
#[derive(Debug)]
pub struct Theme {
    /// Name of the theme in file names, `light` or `dark`.
    pub name: &'static str,
    paper: u32,
    text: u32,
    muted: u32,
    axis: u32,
    grid: u32,
    shade: u32,
    band: u32,
    series: [u32; SERIES],
    heat: [u32; 6],
}

/// Number of distinct series colours.
pub const SERIES: usize = 6;

/// Themes in which every figure is drawn.
pub static THEMES: [Theme; 2] = [
    Theme {
        name: "light",
        paper: 0xFFFFFF,
        text: 0x1F2328,
        muted: 0x57606A,
        axis: 0x8C959F,
        grid: 0xE4E8EC,
        shade: 0xF1F3F5,
        band: 0xC3D3EE,
        series: [0x094BAE, 0xDA6600, 0x38999E, 0x835265, 0x484411, 0x1E2226],
        heat: [0xE9EFF9, 0xA6C7FE, 0x6E9FEF, 0x4077D2, 0x1E52A7, 0x083171],
    },
    Theme {
        name: "dark",
        paper: 0x0D1117,
        text: 0xE6EDF3,
        muted: 0x9DA7B3,
        axis: 0x6E7681,
        grid: 0x262C34,
        shade: 0x1A212B,
        band: 0x233F70,
        series: [0x5B8CF5, 0xEE7F14, 0x7FE9E0, 0xA86C84, 0xF2D27A, 0xA3A8AE],
        heat: [0x1B2433, 0x234378, 0x3666B4, 0x598CE0, 0x8BB6FB, 0xCBDFFF],
    },
];

impl Theme {
    /// Returns the colour of `ink`.
    pub fn rgb(&self, ink: Ink) -> Rgb {
        let hex = match ink {
            Ink::Paper => self.paper,
            Ink::Text => self.text,
            Ink::Muted => self.muted,
            Ink::Axis => self.axis,
            Ink::Grid => self.grid,
            Ink::Shade => self.shade,
            Ink::Band => self.band,
            Ink::Series(i) | Ink::Haze(i) => self.series[i % SERIES],
            Ink::Heat(percent) => return self.heat(percent),
            Ink::OnHeat(percent) => match contrast(self.heat(percent), BLACK) > contrast(self.heat(percent), WHITE) {
                true => return BLACK,
                false => return WHITE,
            },
        };
        parts(hex)
    }

    /// Returns the opacity of `ink`, 0 to 1.
    pub fn alpha(&self, ink: Ink) -> f64 {
        match ink {
            Ink::Haze(_) => 0.2,
            _ => 1.0,
        }
    }

    fn heat(&self, percent: u8) -> Rgb {
        let place = f64::from(percent.min(100)) / 100.0 * (self.heat.len() - 1) as f64;
        let i = (place as usize).min(self.heat.len() - 2);
        let (a, b, t) = (parts(self.heat[i]), parts(self.heat[i + 1]), place - i as f64);
        let mix = |a: u8, b: u8| (f64::from(a) * (1.0 - t) + f64::from(b) * t).round() as u8;
        (mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
    }
}

const BLACK: Rgb = (0, 0, 0);
const WHITE: Rgb = (255, 255, 255);

fn parts(hex: u32) -> Rgb {
    ((hex >> 16) as u8, (hex >> 8) as u8, hex as u8)
}

/// Converts sRGB to linear light.
fn linear(c: Rgb) -> [f64; 3] {
    [c.0, c.1, c.2].map(|v| {
        let v = f64::from(v) / 255.0;
        if v <= 0.04045 {
            v / 12.92
        } else {
            ((v + 0.055) / 1.055).powf(2.4)
        }
    })
}

/// Returns the contrast ratio of WCAG 2.
fn contrast(a: Rgb, b: Rgb) -> f64 {
    let luminance = |c| linear(c).iter().zip([0.2126, 0.7152, 0.0722]).map(|(v, k)| v * k).sum::<f64>() + 0.05;
    let (a, b) = (luminance(a), luminance(b));
    a.max(b) / a.min(b)
}

/// Size, weight and colour of a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FontSpec {
    /// Size of the em in figure units.
    pub size: f64,
    /// Whether the text is bold.
    pub bold: bool,
    /// Colour of the text.
    pub ink: Ink,
}

/// Title of the figure.
pub const TITLE: FontSpec = FontSpec { size: 16.0, bold: true, ink: Ink::Text };
/// Lines below the title.
pub const SUBTITLE: FontSpec = FontSpec { size: 11.0, bold: false, ink: Ink::Muted };
/// Names of series.
pub const LEGEND: FontSpec = FontSpec { size: 11.0, bold: false, ink: Ink::Text };
/// Title of a panel.
pub const PANEL: FontSpec = FontSpec { size: 12.0, bold: true, ink: Ink::Text };
/// Numbers along axes, and the axes' names.
pub const TICK: FontSpec = FontSpec { size: 10.0, bold: false, ink: Ink::Muted };
/// Values and names next to marks.
pub const LABEL: FontSpec = FontSpec { size: 10.0, bold: false, ink: Ink::Text };
/// Name of a row that is a heading or a mean.
pub const GROUP: FontSpec = FontSpec { size: 10.0, bold: true, ink: Ink::Text };
/// Notes at the foot.
pub const NOTE: FontSpec = FontSpec { size: 10.0, bold: false, ink: Ink::Muted };

/// Figure width in figure units; a PNG has twice as many pixels.
pub const WIDTH: f64 = 800.0;
/// Margin around the figure.
pub const MARGIN: f64 = 20.0;
/// Distance between text baselines, in ems.
pub const LEADING: f64 = 1.45;
/// Lines through medians.
pub const LINE: f64 = 1.75;
/// Axes, whiskers and secondary lines.
pub const THIN: f64 = 1.0;
/// Grid lines.
pub const HAIR: f64 = 0.75;
/// Radius of a median's marker.
pub const MARKER: f64 = 4.0;
/// Radius of a sample's dot.
pub const SAMPLE: f64 = 1.5;
/// Distance of a sample's dot from its median's marker, so that neither hides the other.
pub const SAMPLE_SHIFT: f64 = 7.5;

/// Font families of SVG files; Verdana has nearly the same widths as DejaVu Sans.
pub const FAMILY: &str = "DejaVu Sans, Verdana, sans-serif";

#[cfg(test)]
mod tests {
    use super::*;

    fn times(m: [[f64; 3]; 3], v: [f64; 3]) -> [f64; 3] {
        m.map(|row| row.iter().zip(v).map(|(a, b)| a * b).sum())
    }

    /// Normal vision, then protanopia, deuteranopia and tritanopia after Machado, Oliveira and Fernandes (2009).
    const EYES: [[[f64; 3]; 3]; 4] = [
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ];

    /// Returns the Oklab coordinates (Ottosson 2020) of a colour as seen with `eye`.
    fn seen(c: Rgb, eye: [[f64; 3]; 3]) -> [f64; 3] {
        let lms = times(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ],
            times(eye, linear(c)).map(|v| v.clamp(0.0, 1.0)),
        );
        times(
            [
                [0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660],
            ],
            lms.map(f64::cbrt),
        )
    }

    #[test]
    fn text_and_marks_have_enough_contrast_with_their_background() {
        for theme in &THEMES {
            for behind in [Ink::Paper, Ink::Shade].map(|i| theme.rgb(i)) {
                for ink in [Ink::Text, Ink::Muted] {
                    let c = contrast(theme.rgb(ink), behind);
                    assert!(c >= 4.5, "{}: {ink:?} has a contrast of {c:.2}", theme.name);
                }
                for ink in (0..SERIES).map(Ink::Series) {
                    let c = contrast(theme.rgb(ink), behind);
                    assert!(c >= 3.0, "{}: {ink:?} has a contrast of {c:.2}", theme.name);
                }
            }
            assert!(contrast(theme.rgb(Ink::Axis), theme.rgb(Ink::Paper)) >= 3.0, "{}", theme.name);
        }
    }

    #[test]
    fn series_colours_are_distinguishable_with_every_kind_of_vision() {
        for theme in &THEMES {
            for eye in EYES {
                for (i, j) in (0..SERIES).flat_map(|i| (0..i).map(move |j| (i, j))) {
                    let (a, b) = (seen(theme.rgb(Ink::Series(i)), eye), seen(theme.rgb(Ink::Series(j)), eye));
                    let distance = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
                    assert!(distance >= 0.12, "{}: series {i} and {j} are {distance:.3} apart", theme.name);
                }
            }
        }
    }

    #[test]
    fn the_heat_scale_is_even_in_lightness_and_has_readable_text() {
        for theme in &THEMES {
            let lightness = |percent| seen(theme.rgb(Ink::Heat(percent)), EYES[0])[0];
            let steps: Vec<f64> = (0..20u8).map(|i| lightness(5 * i + 5) - lightness(5 * i)).collect();
            let mean = steps.iter().sum::<f64>() / steps.len() as f64;
            for step in &steps {
                assert!((0.6..1.5).contains(&(step / mean)), "{}: steps of {steps:.3?}", theme.name);
            }
            let paper = seen(theme.rgb(Ink::Paper), EYES[0])[0];
            assert!((lightness(0) - paper).abs() < 0.15 && mean * (lightness(100) - paper) > 0.0, "{}", theme.name);
            for percent in 0..=100 {
                let c = contrast(theme.rgb(Ink::Heat(percent)), theme.rgb(Ink::OnHeat(percent)));
                assert!(c >= 4.5, "{}: a contrast of {c:.2} at {percent}%", theme.name);
            }
        }
    }
}
