//! How far a product of butterflies and permutations is from a matrix or from given outputs, and the gradient.

use super::examples::Examples;
use crate::ops::factored::{backward, forward, Kept, Real, Shape, Step};
use pulp::{Arch, Simd, WithSimd};

/// Vectors that a product is compared on, in tiles of `W`.
pub struct Objective<T, const W: usize> {
    shape: Shape,
    tiles: Vec<Tile<T, W>>,
    /// Elements of all results.
    elements: f64,
}

struct Tile<T, const W: usize> {
    input: Vec<[T; W]>,
    target: Vec<[T; W]>,
}

/// Memory that [`Objective::evaluate`] uses again.
#[derive(Default)]
pub struct Room<T, const W: usize> {
    x: Vec<[T; W]>,
    kept: Kept<T, W>,
}

impl<T: Real, const W: usize> Objective<T, W> {
    /// Compares on the `chosen` examples: unit vectors with columns of a matrix, or inputs with their outputs.
    pub fn of_columns(shape: Shape, examples: &Examples, chosen: &[usize]) -> Self {
        let n = shape.size;
        let of = |x: f64| T::from(x).unwrap_or_else(T::nan);
        let tile = |chosen: &[usize]| {
            let mut tile = Tile { input: vec![[T::zero(); W]; shape.planes() * n], target: vec![] };
            tile.target = tile.input.clone();
            for (lane, example) in chosen.iter().copied().enumerate() {
                examples.input(example, |row, x| tile.input[row][lane] = of(x));
                examples.output(example, |row, x| tile.target[row][lane] = of(x));
            }
            tile
        };
        let tiles = chosen.chunks(W).map(tile).collect();
        Self { shape, tiles, elements: (n * chosen.len()) as f64 }
    }

    /// Root mean square of the error over all elements; adds the gradient of half the sum of squares to `gradient`, whose
    /// layout is that of [`backward`]. With complex factors and a real target only real parts count.
    pub fn evaluate(&self, steps: &[Step<T>], complex: bool, gradient: &mut [T], room: &mut Room<T, W>) -> f64 {
        struct All<'a, 'b, T, const W: usize> {
            objective: &'a Objective<T, W>,
            steps: &'a [Step<'b, T>],
            complex: bool,
            gradient: &'a mut [T],
            room: &'a mut Room<T, W>,
        }
        impl<T: Real, const W: usize> WithSimd for All<'_, '_, T, W> {
            type Output = f64;
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) -> f64 {
                let Self { objective, steps, complex, gradient, room } = self;
                let of = |tile: &Tile<T, W>| tile.evaluate(&objective.shape, steps, complex, gradient, room);
                objective.tiles.iter().map(of).sum()
            }
        }
        gradient.fill(T::zero());
        let sum = Arch::new().dispatch(All { objective: self, steps, complex, gradient, room });
        (sum / self.elements).sqrt()
    }
}

impl<T: Real, const W: usize> Tile<T, W> {
    #[inline(always)]
    fn evaluate(
        &self,
        shape: &Shape,
        steps: &[Step<T>],
        complex: bool,
        gradient: &mut [T],
        room: &mut Room<T, W>,
    ) -> f64 {
        let Room { x, kept } = room;
        x.clear();
        x.extend_from_slice(&self.input);
        forward(shape, steps, x, kept);
        let counted = if complex { x.len() } else { shape.size };
        let mut sums = [0f64; W];
        for (x, want) in x[..counted].iter_mut().zip(&self.target) {
            for t in 0..W {
                x[t] = x[t] - want[t];
                let e = x[t].to_f64().unwrap_or(f64::NAN);
                sums[t] += e * e;
            }
        }
        x[counted..].fill([T::zero(); W]);
        backward(shape, steps, x, kept, gradient);
        sums.iter().sum()
    }
}
