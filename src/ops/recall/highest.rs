//! The `k` highest of many weights.

/// Low bits of a weight that the histogram leaves out: it counts by exponent and three bits of the mantissa.
const SHIFT: u32 = 20;
/// Bins of the histogram.
const BINS: usize = 1 << (32 - SHIFT);

/// Returns the places of the `count` highest of `weights`, ascending; of equals the earlier goes first. Weights are not
/// negative.
///
/// A histogram finds the bin of the last one; only that bin's weights are sorted.
pub(super) fn highest(weights: &[f32], count: usize) -> Vec<u32> {
    let n = weights.len();
    if count >= n {
        return (0..n as u32).collect();
    }
    if count == 0 {
        return vec![];
    }
    // The bits of numbers that are not negative are in the numbers' order. Neighbours count in histograms of their own,
    // since an increment waits for the one before it of the same bin.
    let mut counts = vec![[0u32; 2]; BINS];
    let mut pairs = weights.chunks_exact(2);
    for pair in &mut pairs {
        counts[(pair[0].to_bits() >> SHIFT) as usize][0] += 1;
        counts[(pair[1].to_bits() >> SHIFT) as usize][1] += 1;
    }
    pairs.remainder().iter().for_each(|w| counts[(w.to_bits() >> SHIFT) as usize][0] += 1);
    let (mut bin, mut left) = (BINS - 1, count);
    while let Some(rest) = left.checked_sub((counts[bin][0] + counts[bin][1]) as usize).filter(|rest| *rest > 0) {
        (bin, left) = (bin - 1, rest);
    }
    let key = |(i, w): (usize, &f32)| u64::from(!w.to_bits()) << 32 | i as u64;
    let inside = |(_, w): &(usize, &f32)| (w.to_bits() >> SHIFT) as usize == bin;
    let mut border: Vec<u64> = weights.iter().enumerate().filter(inside).map(key).collect();
    let last = *border.select_nth_unstable(left - 1).1;
    // Every place is written and the next one overwrites it unless it is chosen: no branch to predict.
    let (mut chosen, mut at) = (vec![0u32; count + 1], 0);
    for (i, w) in weights.iter().enumerate() {
        chosen[at] = i as u32;
        at += usize::from(key((i, w)) <= last);
    }
    chosen.truncate(count);
    chosen
}

#[cfg(test)]
mod tests {
    use super::highest;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_sort_chooses_the_same(
            exponents in prop::collection::vec((-40i32..1, 0u32..6), 0..600), coarse in any::<bool>(), count in 0usize..700,
        ) {
            let weight = |(e, m): &(i32, u32)| match (coarse, m) {
                (_, 5) => 0.0,
                (true, m) => *m as f32,
                (false, m) => (1.0 + *m as f32 / 64.0) * 2f32.powi(*e),
            };
            let weights: Vec<f32> = exponents.iter().map(weight).collect();
            let mut order: Vec<u32> = (0..weights.len() as u32).collect();
            order.sort_by(|a, b| weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b)));
            order.truncate(count);
            order.sort_unstable();
            prop_assert_eq!(highest(&weights, count), order);
        }
    }
}
