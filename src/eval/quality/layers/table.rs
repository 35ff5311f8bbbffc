//! What a study of layers prints.

use super::{harm, Layers, RankBy, Single};
use crate::eval::bench::table::columns;
use crate::eval::quality::eval_set::Score;
use crate::eval::quality::heads::Head;
use crate::eval::quality::stats::Estimate;
use crate::eval::quality::table::extrapolated;
use crate::retrofit::ranges;

/// Heads in the table.
const HEADS: usize = 12;

/// Layers by harm, then the curve.
pub fn table(results: &Layers) -> String {
    let cells = |name: String, score: &Score| {
        let right: Vec<f64> = score.answers.iter().map(|a| 100.0 * f64::from(u8::from(a.right))).collect();
        let show = |e: Option<Estimate>, decimals| e.map_or("-".into(), |e| e.show(decimals));
        vec![
            String::new(),
            name,
            format!("{:.4}x", score.record.share_of_dense()),
            show(harm(score, &results.stock, RankBy::Answers).filter(|_| !score.answers.is_empty()), 3),
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
    let mut rows = vec![head("swapped"), cells("none".into(), &results.stock)];
    let row = |single: &Single| cells(single.layer.to_string(), &single.score);
    let order = super::by_harm(&results.single, |s| results.harm_of(s));
    rows.extend(order.iter().filter_map(|layer| results.single.iter().find(|s| s.layer == *layer)).map(row));
    let mut curve = vec![head("dense")];
    for point in &results.curve {
        let name = if point.dense.is_empty() { "none".into() } else { ranges(&point.dense) };
        curve.push(cells(name, &point.score));
    }
    let head = |h: &Head| format!("{}.{} {:.2}", h.layer, h.head, h.score);
    let heads: Vec<String> = results.heads.iter().take(HEADS).map(head).collect();
    let heads = match results.head_steps {
        0 => String::new(),
        n => format!(
            "heads (layer.head, share of {n} answer tokens attended to before they come): {}\n",
            heads.join(", ")
        ),
    };
    let kept: Vec<String> = results.order.iter().map(usize::to_string).collect();
    let remark = extrapolated(&results.header, [results.probed.ctx]);
    format!("{}\n{}kept in this order: {}\n{heads}{remark}", columns(&rows), columns(&curve), kept.join(", "))
}
