//! How far a product of butterflies and permutations is from a matrix or from given outputs, and the gradient.

use super::examples::Examples;
use crate::ops::factored::{backward, forward, Kept, Real, Shape, Step};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

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
        gradient.fill(T::zero());
        let shape = &self.shape;
        if self.tiles.len() < MANY {
            let all = All { shape, tiles: &self.tiles, steps, complex, gradient: Some(gradient), room };
            return (Arch::new().dispatch(all) / self.elements).sqrt();
        }
        let part = |tiles: &[Tile<T, W>]| {
            let (mut own, mut room) = (vec![T::zero(); gradient.len()], Room::default());
            let all = All { shape, tiles, steps, complex, gradient: Some(&mut own), room: &mut room };
            (Arch::new().dispatch(all), own)
        };
        // Parts of one size, so that the sum does not depend on the number of threads.
        let parts: Vec<(f64, Vec<T>)> = self.tiles.par_chunks(self.tiles.len().div_ceil(MANY)).map(part).collect();
        for (_, part) in &parts {
            gradient.iter_mut().zip(part).for_each(|(to, from)| *to += *from);
        }
        (parts.iter().map(|(sum, _)| sum).sum::<f64>() / self.elements).sqrt()
    }

    /// Root mean square of the error over all elements.
    pub fn error(&self, steps: &[Step<T>], complex: bool) -> f64 {
        let part = |tiles: &[Tile<T, W>]| {
            let (shape, room) = (&self.shape, &mut Room::default());
            Arch::new().dispatch(All { shape, tiles, steps, complex, gradient: None, room })
        };
        let parts: Vec<f64> = self.tiles.par_chunks(self.tiles.len().div_ceil(MANY)).map(part).collect();
        (parts.iter().sum::<f64>() / self.elements).sqrt()
    }
}

/// Tiles from which on threads share an evaluation, and parts that they share it in.
const MANY: usize = 16;

/// The sum of squared errors of some tiles, and the gradient where it is asked for.
struct All<'a, 'b, T, const W: usize> {
    shape: &'a Shape,
    tiles: &'a [Tile<T, W>],
    steps: &'a [Step<'b, T>],
    complex: bool,
    gradient: Option<&'a mut [T]>,
    room: &'a mut Room<T, W>,
}

impl<T: Real, const W: usize> WithSimd for All<'_, '_, T, W> {
    type Output = f64;
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        let Self { shape, tiles, steps, complex, mut gradient, room } = self;
        tiles.iter().map(|tile| tile.evaluate(shape, steps, complex, gradient.as_deref_mut(), room)).sum()
    }
}

impl<T: Real, const W: usize> Tile<T, W> {
    #[inline(always)]
    fn evaluate(
        &self,
        shape: &Shape,
        steps: &[Step<T>],
        complex: bool,
        gradient: Option<&mut [T]>,
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
        if let Some(gradient) = gradient {
            x[counted..].fill([T::zero(); W]);
            backward(shape, steps, x, kept, gradient);
        }
        sums.iter().sum()
    }
}
