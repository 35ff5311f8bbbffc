//! The factors of a butterfly as sparse matrices.

use super::tile::{pair_of, Shape};

/// An entry of a factor as an `N x N` matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entry {
    /// Row, the element of the result.
    pub row: usize,
    /// Column, the element that it is multiplied with.
    pub column: usize,
    /// Real part.
    pub re: f32,
    /// Imaginary part, 0 of a real factor.
    pub im: f32,
}

impl Shape {
    /// The entries of factor `level` of a butterfly that may differ from 0, two in each row: of the blocks of
    /// `2^(level + 1)` rows the four of every `[[d1, d2], [d3, d4]]`.
    ///
    /// # Shapes
    /// `butterfly [butterfly_len]`, of which what is beyond the end counts as 0.
    pub fn entries(&self, level: usize, butterfly: &[f32]) -> Vec<Entry> {
        let (half, planes) = (1 << level, self.planes());
        let first: usize = (0..level).map(|before| self.factor_len(before)).sum();
        let number = |at: usize| butterfly.get(first + at).copied().unwrap_or(0.0);
        let places = (0..self.size).step_by(2 * half).flat_map(|block| (0..half).map(move |j| (block, j)));
        let entry = |((block, j), i): ((usize, usize), usize)| {
            let at = planes * (4 * pair_of(self, block, j) + i);
            Entry {
                row: block + j + i / 2 * half,
                column: block + j + i % 2 * half,
                re: number(at),
                im: if self.complex { number(at + 1) } else { 0.0 },
            }
        };
        places.flat_map(|place| (0..4).map(move |i| (place, i))).map(entry).collect()
    }
}
