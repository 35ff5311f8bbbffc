//! Seeded random choices, the same on every machine.

use crate::checkpoint::splitmix;
use sha2::{Digest, Sha256};
use std::collections::HashMap;

/// A random stream.
pub struct Rng {
    key: u64,
    next: u64,
}

impl Rng {
    /// Creates the stream of `seed`, `names` and `index`; streams with other names or indices are independent.
    pub fn new(seed: u64, names: &[&str], index: u64) -> Self {
        let start = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(index.to_le_bytes());
        let hash = names.iter().fold(start, |h, name| h.chain_update(name).chain_update([0])).finalize();
        Self { key: hash.iter().take(8).fold(0, |key, byte| key << 8 | u64::from(*byte)), next: 0 }
    }

    /// Returns 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.next += 1;
        splitmix(self.key, self.next - 1)
    }

    /// Returns a random number in `0..n`, or 0 where `n` is 0; the bias is at most `n / 2^64`.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// Returns a random number in `range`.
    pub fn range(&mut self, range: std::ops::Range<usize>) -> usize {
        range.start + self.below(range.len())
    }

    /// Returns a random item; `None` where `items` is empty.
    pub fn choose<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        (!items.is_empty()).then(|| &items[self.below(items.len())])
    }

    /// Shuffles `items`.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// Returns up to `k` different numbers of `0..n` in random order; a smaller `k` gives a prefix.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        // The first k steps of a Fisher-Yates shuffle of 0..n that stores the moved entries only.
        let mut moved = HashMap::new();
        let mut draw = |i: usize| {
            let j = self.range(i..n);
            let (at_i, at_j) = (*moved.get(&i).unwrap_or(&i), *moved.get(&j).unwrap_or(&j));
            moved.insert(j, at_i);
            at_j
        };
        (0..k.min(n)).map(&mut draw).collect()
    }

    /// Returns a UUID of version 4 (RFC 9562), in lower case.
    pub fn uuid(&mut self) -> String {
        let (high, low) = (self.bits() & !0xf000 | 0x4000, self.bits() & !(3 << 62) | 2 << 62);
        let (a, b, c) = (high >> 32, high >> 16 & 0xffff, high & 0xffff);
        format!("{a:08x}-{b:04x}-{c:04x}-{:04x}-{:012x}", low >> 48, low & 0xffff_ffff_ffff)
    }

    /// Returns `letters` random letters of the 26 from `first` on.
    pub fn letters(&mut self, first: u8, letters: usize) -> String {
        (0..letters).map(|_| char::from(first + self.below(26) as u8)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rng(index: u64) -> Rng {
        Rng::new(3, &["task", "part"], index)
    }

    #[test]
    fn a_stream_is_set_by_seed_names_and_index_alone() {
        // Computed independently in Python. A change of the generator changes every sample.
        assert_eq!(rng(0).bits(), 800_849_947_835_864_917);
        let first = |seed, names: &[&str], index| Rng::new(seed, names, index).bits();
        let all = [
            first(3, &["task", "part"], 0),
            first(4, &["task", "part"], 0),
            first(3, &["taskpart"], 0),
            first(3, &["tas", "kpart"], 0),
            first(3, &["task", "part"], 1),
        ];
        assert!(all.iter().enumerate().all(|(i, x)| !all[..i].contains(x)), "{all:?}");
    }

    #[test]
    fn choices_are_even_and_within_bounds() {
        let mut r = rng(0);
        let mut counts = [0; 7];
        (0..70_000).for_each(|_| counts[r.range(3..10) - 3] += 1);
        assert!(counts.iter().all(|c| (9_500..10_500).contains(c)), "{counts:?}");
        assert_eq!((r.below(1), r.below(0)), (0, 0));
        assert_eq!(r.choose::<u8>(&[]), None);
        let mut firsts = [0; 5];
        for i in 0..5_000 {
            let mut items = [0, 1, 2, 3, 4];
            rng(i).shuffle(&mut items);
            firsts[items[0]] += 1;
            items.sort_unstable();
            assert_eq!(items, [0, 1, 2, 3, 4]);
        }
        assert!(firsts.iter().all(|c| (900..1_100).contains(c)), "{firsts:?}");
    }

    #[test]
    fn samples_have_distinct_numbers_and_smaller_ones_are_prefixes() {
        let mut seen = [0; 40];
        for i in 0..1_000 {
            let mut ten = rng(i).sample(40, 10);
            assert_eq!(ten[..4], rng(i).sample(40, 4));
            ten.iter().for_each(|n| seen[*n] += 1);
            ten.sort_unstable();
            ten.dedup();
            assert!(ten.len() == 10 && ten[9] < 40);
        }
        assert!(seen.iter().all(|c| (190..310).contains(c)), "{seen:?}");
        let mut all = rng(0).sample(9, 20);
        all.sort_unstable();
        assert_eq!(all, (0..9).collect::<Vec<_>>());
    }

    #[test]
    fn uuids_have_their_version_and_variant() {
        for i in 0..200 {
            let id = rng(i).uuid();
            let parts: Vec<usize> = id.split('-').map(str::len).collect();
            assert_eq!(parts, [8, 4, 4, 4, 12], "{id}");
            assert!(id.chars().all(|c| c == '-' || c.is_ascii_digit() || ('a'..='f').contains(&c)), "{id}");
            assert!(id.as_bytes()[14] == b'4' && b"89ab".contains(&id.as_bytes()[19]), "{id}");
        }
    }
}
