//! Figure of the scores with the most sensitive layers kept dense, against the bytes of the cache.

use super::{read_line, title, ScoreFigure};
use crate::eval::plot::labels::{above, along, around};
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::panel::{grid, Panel};
use crate::eval::plot::scale::Scale;
use crate::eval::plot::scene::{Area, Scene};
use crate::eval::plot::target::target;
use crate::eval::plot::theme::{Ink, MARGIN};
use crate::eval::plot::Figure;
use crate::eval::report::{sensitivity, CurvePoint, Estimate, LayerStudy, RankBy, RankMethod, Score};

/// A metric as a curve over the number of layers kept dense.
struct Curve<'a> {
    /// Quantity and unit.
    title: &'static str,
    /// Metric of a score.
    of: ScoreFigure<'a>,
    /// Range of the metric.
    limits: (f64, f64),
}

/// Draws the figure; `None` where the study has no curve.
pub fn figure(layers: &LayerStudy) -> Option<Figure> {
    let mut points: Vec<&CurvePoint> = layers.curve.iter().filter(|p| share(p).is_finite()).collect();
    points.sort_by_key(|p| p.dense.len());
    let measured = |curve: &Curve| points.iter().any(|p| (curve.of)(&p.score).is_some());
    let curves: Vec<Curve> = curves(layers).into_iter().filter(measured).collect();
    if curves.is_empty() {
        return None;
    }
    let by = match layers.rank_by {
        RankBy::Answers => "the loss added on answers",
        RankBy::Text => "the KL on text",
    };
    let ranked = match layers.rank {
        RankMethod::Alone => format!("a layer's rank is {by} by swapping it alone"),
        RankMethod::Heads => "a layer's rank is that of its head that copies answers most".into(),
        RankMethod::Rounds => {
            format!("in each round, those went first whose swap on top of the others did least to {by}")
        }
    };
    let several = layers.stock.texts.len().max(layers.stock.answers.len()) > 1;
    let mut keys = vec![LegendEntry::Series(0, "number beside a point: layers kept dense".into())];
    keys.extend(several.then(|| LegendEntry::Interval("95% interval".into())));
    let heading = title(&layers.header, "What keeping the most sensitive layers dense gives, against its bytes");
    let about = format!("The most sensitive layers stay dense, one more at a time; {ranked}");
    let measured = read_line(&layers.header, &layers.probed, layers.stock.texts.len(), layers.stock.answers.len());
    let mut page = Page::new(&heading, &[target(&layers.header), measured, about], &keys);
    let x = Scale::linear(points.iter().map(|p| 100.0 * share(p)).chain([0.0, 100.0]), (0.0, f64::INFINITY))?;
    for (area, curve) in grid(curves.len(), 3, (MARGIN, CONTENT), page.y, 300.0).into_iter().zip(&curves) {
        draw(&mut page.scene, area, &x, curve, &points);
        page.y = area.bottom();
    }
    let order = layers.order.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    Some(Figure { name: "curve".into(), scene: page.finish(&[format!("Layers, the most sensitive first: {order}.")]) })
}

fn share(point: &CurvePoint) -> f64 {
    point.score.record.share_of_dense()
}

fn curves(layers: &LayerStudy) -> [Curve<'_>; 3] {
    let right = |s: &Score| -> Vec<f64> { s.answers.iter().map(|a| if a.right { 100.0 } else { 0.0 }).collect() };
    let free = (f64::NEG_INFINITY, f64::INFINITY);
    [
        Curve {
            title: "Loss added on answers, nats",
            of: Box::new(|s| sensitivity(s, &layers.stock, RankBy::Answers)),
            limits: free,
        },
        Curve {
            title: "Answers wholly right, %",
            of: Box::new(move |s| Estimate::of(&right(s))),
            limits: (0.0, 100.0),
        },
        Curve {
            title: "KL from stock on text, nats",
            of: Box::new(|s| sensitivity(s, &layers.stock, RankBy::Text)),
            limits: free,
        },
    ]
}

fn draw(scene: &mut Scene, area: Area, x: &Scale, curve: &Curve, points: &[&CurvePoint]) {
    let values: Vec<(usize, f64, Estimate)> =
        points.iter().filter_map(|p| Some((p.dense.len(), 100.0 * share(p), (curve.of)(&p.score)?))).collect();
    let ends = values.iter().flat_map(|(_, _, e)| [Some(e.mean), e.low, e.high]).flatten();
    let Some(y) = Scale::linear(ends.chain([0.0]), curve.limits) else { return };
    let panel =
        Panel { title: curve.title, x, x_name: "KV cache, % of dense", y: &y, shaded_from: None, crosses: None };
    let plot = panel.draw(scene, area);
    let at = |(_, share, e): &(usize, f64, Estimate)| plot.at(*share, e.mean);
    scene.series(0, &values.iter().map(at).collect::<Vec<_>>());
    let mut taken: Vec<Area> = values.windows(2).flat_map(|pair| along(at(&pair[0]), at(&pair[1]))).collect();
    let mut spans = vec![];
    for value in &values {
        let (x, y) = at(value);
        let end = |v: Option<f64>| v.map_or(y, |v| plot.at(value.1, v).1);
        let (top, bottom) = (end(value.2.high), end(value.2.low));
        plot.interval(scene, value.1, 0.0, &value.2, Ink::Series(0));
        scene.marker(0, (x, y));
        taken.push(around((x, y)));
        taken.push(Area { x: x - 3.0, y: top, w: 6.0, h: bottom - top });
        spans.push(((x, top, bottom), value.0.to_string()));
    }
    for (span, label) in spans {
        above(scene, &mut taken, plot.area, span, &label);
    }
}
