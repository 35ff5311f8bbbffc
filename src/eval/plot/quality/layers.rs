//! Figure of the sensitivity to swapping each layer alone.

use super::{curve, read_line, title};
use crate::error::{Error, Result};
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::panel::Panel;
use crate::eval::plot::scale::Scale;
use crate::eval::plot::scene::Area;
use crate::eval::plot::target::target;
use crate::eval::plot::theme::{Ink, MARGIN, THIN};
use crate::eval::plot::Figure;
use crate::eval::report::{sensitivity, Estimate, LayerStudy, RankBy};
use std::path::Path;

/// Draws the figures of the layer study read from `path`.
///
/// # Errors
/// A study without measured layers.
pub fn figures(layers: &LayerStudy, path: &Path) -> Result<Vec<Figure>> {
    let mut figures = vec![];
    figures.extend(figure(layers));
    figures.extend(curve::figure(layers));
    match figures.is_empty() {
        true => Err(Error::format(path.display(), "is a layer study without a measured layer")),
        false => Ok(figures),
    }
}

/// A metric of the sensitivity to each layer's swap.
struct Sensitivities {
    /// Quantity and unit.
    title: &'static str,
    /// Layers with the metric of their swaps.
    values: Vec<(usize, Estimate)>,
    /// Whether the axis is logarithmic.
    log: bool,
}

fn figure(layers: &LayerStudy) -> Option<Figure> {
    let by = |rank| -> Vec<(usize, Estimate)> {
        let single = layers.single.iter();
        single.filter_map(|s| Some((s.layer, sensitivity(&s.score, &layers.stock, rank)?))).collect()
    };
    let kl = by(RankBy::Text);
    let all = [
        Sensitivities { title: "Loss added on expected answers, nats", values: by(RankBy::Answers), log: false },
        // Layers differ by orders of magnitude; a layer with KL 0 forces a linear axis.
        Sensitivities { title: "KL from stock on text, nats", log: kl.iter().all(|(_, e)| e.mean > 0.0), values: kl },
    ];
    let all: Vec<Sensitivities> = all.into_iter().filter(|h| !h.values.is_empty()).collect();
    let numbers = || all.iter().flat_map(|h| h.values.iter().map(|(layer, _)| *layer));
    let (low, high) = (numbers().min()?, numbers().max()?);
    let x = Scale::whole(low, high, 36);
    let estimates = || all.iter().flat_map(|h| &h.values);
    let mut keys = vec![LegendEntry::Marker(0, "this layer alone swapped".into())];
    if estimates().any(|(_, e)| e.low.is_some() && !e.differs()) {
        keys.push(LegendEntry::Faint("its interval holds 0".into()));
    }
    if estimates().any(|(_, e)| e.low.is_some()) {
        keys.push(LegendEntry::Interval("95% interval".into()));
    }
    let heading = title(&layers.header, "Which layers the model cannot do without");
    let about = "One layer at a time is swapped, all others are as they came; differences from stock are paired".into();
    let measured = read_line(&layers.header, &layers.probed, layers.stock.texts.len(), layers.stock.answers.len());
    let mut page = Page::new(&heading, &[target(&layers.header), measured, about], &keys);
    for one in &all {
        let ends = one.values.iter().flat_map(|(_, e)| [Some(e.mean), e.low, e.high]).flatten();
        let y = match one.log {
            true => Scale::log(ends),
            false => Scale::linear(ends.chain([0.0]), (f64::NEG_INFINITY, f64::INFINITY)),
        };
        let Some(y) = y else { continue };
        let panel = Panel { title: one.title, x: &x, x_name: "layer", y: &y, shaded_from: None, crosses: None };
        let area = Area { x: MARGIN, y: page.y, w: CONTENT, h: 210.0 };
        let plot = panel.draw(&mut page.scene, area);
        for (layer, sensitivity) in &one.values {
            let at = plot.at(*layer as f64, sensitivity.mean);
            let significant = sensitivity.low.is_none() || sensitivity.differs();
            let ink = if significant { Ink::Series(0) } else { Ink::Muted };
            if !one.log {
                page.scene.line(plot.at(*layer as f64, 0.0), at, ink, THIN);
            }
            plot.interval(&mut page.scene, *layer as f64, 0.0, sensitivity, ink);
            match significant {
                true => page.scene.marker(0, at),
                false => page.scene.hollow(0, at, ink),
            }
        }
        page.y = area.bottom() + 14.0;
    }
    Some(Figure { name: "layers".into(), scene: page.finish(&[]) })
}
