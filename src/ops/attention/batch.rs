//! The batch axis: each item is a call of its own, on views of the batch's tensors.

use super::{fail, Attended, AttentionArgs, KeyValues, RowList, Segment, Store, StoreRows};
use crate::error::Result;
use candle_core::Tensor;

/// A segment's tensors for one item.
struct Item {
    rows: Option<(Tensor, Tensor)>,
    q: Option<Tensor>,
    index: Option<Tensor>,
}

/// Returns item `b` of a tensor with a batch axis before three others.
fn item(x: &Tensor, (b, items): (usize, usize)) -> Result<Tensor> {
    match x.rank() == 4 && x.dims()[0] == items {
        true => Ok(x.get(b)?),
        false => fail(format!("a tensor {:?} in a batch of {items}", x.dims())),
    }
}

fn item_of(segment: &Segment, at: (usize, usize)) -> Result<Item> {
    let pair = |rows: &KeyValues| -> Result<_> { Ok((item(rows.k, at)?, item(rows.v, at)?)) };
    match segment {
        Segment::Chunk(rows) | Segment::Ring(rows) | Segment::Sinks(rows, _) => {
            Ok(Item { rows: Some(pair(rows)?), q: None, index: None })
        }
        Segment::Store(store) => {
            let rows = match &store.rows {
                StoreRows::Tensors(rows) => Some(pair(rows)?),
                #[cfg(feature = "cuda")]
                StoreRows::Host(_) => return fail("rows in host memory have no batch axis".into()),
            };
            let index = match store.read {
                RowList::Table { index, .. } => Some(item(index, at)?),
                RowList::Blocks { .. } => None,
            };
            Ok(Item { rows, q: store.q.map(|q| item(q, at)).transpose()?, index })
        }
    }
}

/// `segment` with the tensors of `item`.
fn with<'a>(segment: &Segment<'a>, item: &'a Item) -> Segment<'a> {
    let rows = item.rows.as_ref().map(|(k, v)| KeyValues { k, v });
    match (*segment, rows) {
        (Segment::Chunk(_), Some(rows)) => Segment::Chunk(rows),
        (Segment::Ring(_), Some(rows)) => Segment::Ring(rows),
        (Segment::Sinks(_, count), Some(rows)) => Segment::Sinks(rows, count),
        (Segment::Store(store), rows) => {
            let read = match (store.read, &item.index) {
                (RowList::Table { block, .. }, Some(index)) => RowList::Table { block, index },
                (read, _) => read,
            };
            Segment::Store(Store { rows: rows.map_or(store.rows, StoreRows::Tensors), read, q: item.q.as_ref() })
        }
        (segment, None) => segment,
    }
}

/// Calls `one` for each item where the queries have a batch axis, and once where they have none.
pub(super) fn each(args: &AttentionArgs, one: impl Fn(&AttentionArgs) -> Result<Attended>) -> Result<Attended> {
    let items = match args.q.rank() {
        4 => args.q.dims()[0],
        _ => return one(args),
    };
    let attended = (0..items).map(|b| {
        let q = args.q.get(b)?;
        let parts = args.segments.iter().map(|s| item_of(s, (b, items))).collect::<Result<Vec<_>>>()?;
        let segments: Vec<_> = args.segments.iter().zip(&parts).map(|(s, item)| with(s, item)).collect();
        one(&AttentionArgs { q: &q, segments: &segments, ..*args })
    });
    let attended = attended.collect::<Result<Vec<_>>>()?;
    let lse: Option<Vec<_>> = attended.iter().map(|a| a.lse.as_ref()).collect();
    let out: Vec<_> = attended.iter().map(|a| &a.out).collect();
    if out.is_empty() {
        return fail("a batch of nothing".into());
    }
    Ok(Attended { out: Tensor::stack(&out, 0)?, lse: lse.map(|l| Tensor::stack(&l, 0)).transpose()? })
}
