//! Retrieval heads, which copy the answer from the context (Wu et al. 2024, <https://arxiv.org/abs/2404.15574>).
//!
//! The model reads the expected answer token by token. A step counts for a head where the position it attends to most
//! is that of the next answer token inside the needle. A head's score is its share of such steps, 0 to 1; most heads
//! score 0. Only dense layers are observed, since the cache of a swapped layer may not hold the needle.

use super::prompting::PromptIds;
use crate::cache::LayerState;
use crate::error::Result;
use crate::eval::report::RetrievalHead;
use crate::run::{Observed, Run};
use candle_core::{DType, Device, Tensor, D};
use std::collections::BTreeMap;

/// Counts, per head, the steps at which it attended most to the next token, and all steps.
#[derive(Debug, Default)]
pub struct HeadCounter {
    hits: BTreeMap<(usize, usize), usize>,
    steps: usize,
}

impl HeadCounter {
    /// Returns the heads with a score above 0, best first.
    pub fn heads(&self) -> Vec<RetrievalHead> {
        let score = |hits: usize| hits as f64 / self.steps.max(1) as f64;
        let one = |((layer, head), hits): (&(usize, usize), &usize)| RetrievalHead {
            layer: *layer,
            head: *head,
            score: score(*hits),
        };
        let mut heads: Vec<RetrievalHead> = self.hits.iter().map(one).collect();
        heads.sort_by(|a, b| b.score.total_cmp(&a.score));
        heads
    }

    /// Returns the number of observed steps.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Reads the first turn of `prompt`, then `answer` token by token, and counts the heads that copy. A prompt without
    /// the tokens of `answer` is skipped.
    ///
    /// # Errors
    /// As [`Run::forward`].
    pub fn count(&mut self, run: &mut Run, prompt: &PromptIds, answer: &[u32], chunk: usize) -> Result<()> {
        let ids = prompt.first_turn();
        let Some(needle) = ids.windows(answer.len().max(1)).position(|w| w == answer) else { return Ok(()) };
        // The query of the prompt's last token retrieves the first token of the answer.
        let (first, last) = ids.split_at(ids.len() - 1);
        for piece in first.chunks(chunk) {
            run.forward(piece, &[])?;
        }
        let queries = last.iter().chain(&answer[..answer.len() - 1]);
        for (i, id) in queries.enumerate() {
            let (hits, wanted) = (&mut self.hits, (needle + i) as u32);
            run.forward_observed(&[*id], &[0], &mut |seen| {
                for (head, position) in most_attended(seen)?.into_iter().enumerate() {
                    if position == wanted {
                        *hits.entry((seen.layer, head)).or_default() += 1;
                    }
                }
                Ok(())
            })?;
            self.steps += 1;
        }
        Ok(())
    }
}

/// Returns the earlier position that each query head of a dense layer attends to most; empty for other layers.
fn most_attended(seen: &Observed) -> Result<Vec<u32>> {
    let (LayerState::Dense(ring), p) = (seen.state, seen.projections) else { return Ok(vec![]) };
    let qkv = p.project(seen.x, &seen.chunk.tables[p.rope], false)?;
    let (group, past) = (p.heads / p.kv_heads, seen.chunk.start);
    // [G, H / G, D] and [G, D, past]. Scale and softmax do not change the argmax.
    let q = qkv.q.reshape((p.kv_heads, group, p.head_dim))?.to_dtype(DType::F32)?;
    let k = ring.rows().k.narrow(0, 0, past)?.permute((1, 2, 0))?.contiguous()?.to_dtype(DType::F32)?;
    let most: Tensor = q.matmul(&k)?.argmax(D::Minus1)?;
    Ok(most.flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_shares_of_steps_and_the_best_comes_first() {
        let tally = HeadCounter { hits: [((3, 1), 2), ((0, 5), 4), ((7, 0), 1)].into(), steps: 4 };
        let heads = tally.heads();
        assert_eq!(heads[0], RetrievalHead { layer: 0, head: 5, score: 1.0 });
        assert_eq!(heads.iter().map(|h| (h.layer, h.score)).collect::<Vec<_>>(), [(0, 1.0), (3, 0.5), (7, 0.25)]);
    }
}
