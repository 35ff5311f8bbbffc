//! Tables of a layer study: layers by falling sensitivity, then scores by layers kept dense.

use super::{columns, extrapolated, stepwise};
use crate::eval::report::{
    by_sensitivity, sensitivity, Estimate, LayerScore, LayerStudy, RankBy, RetrievalHead, Score,
};
use crate::retrofit::ranges;

/// Retrieval heads that the table lists.
const HEADS: usize = 12;

/// Renders `study`.
pub fn layers_table(study: &LayerStudy) -> String {
    let cells = |name: String, score: &Score| {
        let right: Vec<f64> = score.answers.iter().map(|a| 100.0 * f64::from(u8::from(a.right))).collect();
        let show = |e: Option<Estimate>, decimals| e.map_or("-".into(), |e| e.show(decimals));
        vec![
            String::new(),
            name,
            format!("{:.4}x", score.record.share_of_dense()),
            show(sensitivity(score, &study.stock, RankBy::Answers).filter(|_| !score.answers.is_empty()), 3),
            show(Estimate::of(&right), 0),
            show(Estimate::of(&score.texts(|t| t.kl)), 4),
            show(Estimate::of(&score.texts(|t| t.decode_kl)), 4),
            show(Estimate::of(&score.texts(|t| t.top1)), 3),
        ]
    };
    let head = |what: &str| {
        ["", what, "KV of dense", "answer loss added", "right, %", "KL", "KL in decode", "top1"]
            .map(String::from)
            .to_vec()
    };
    let mut rows = vec![head("swapped"), cells("none".into(), &study.stock)];
    let row = |single: &LayerScore| cells(single.layer.to_string(), &single.score);
    let order = by_sensitivity(&study.single, |s| study.sensitivity_of(s));
    rows.extend(order.iter().filter_map(|layer| study.single.iter().find(|s| s.layer == *layer)).map(row));
    let mut curve = vec![head("dense")];
    for point in &study.curve {
        let name = if point.dense.is_empty() { "none".into() } else { ranges(&point.dense) };
        curve.push(cells(name, &point.score));
    }
    let head = |h: &RetrievalHead| format!("{}.{} {:.2}", h.layer, h.head, h.score);
    let heads: Vec<String> = study.heads.iter().take(HEADS).map(head).collect();
    let heads = match study.head_steps {
        0 => String::new(),
        n => format!(
            "retrieval heads (layer.head, share of {n} answer tokens that the head attends to before they are generated): {}\n",
            heads.join(", ")
        ),
    };
    let kept: Vec<String> = study.order.iter().map(usize::to_string).collect();
    let remark = stepwise(&study.probed).to_string() + &extrapolated(&study.header, [study.probed.ctx]);
    format!("{}\n{}layers, most sensitive first: {}\n{heads}{remark}", columns(&rows), columns(&curve), kept.join(", "))
}
