//! Descents on a GPU: those of all starts, and of several changes of each, at once.

use super::examples::Examples;
use super::product::Product;
use super::search::{Change, Search};
use super::{Settings, HOPELESS};
use crate::error::Result;
use crate::ops::factored::{Descents, Kind, Shape, Steps};
use candle_core::Device;
use rand::Rng;

/// Examples on a GPU.
pub(super) struct Gpu {
    descents: Descents,
}

impl Gpu {
    pub fn new(shape: Shape, examples: &Examples, device: &Device) -> Result<Self> {
        let row = shape.planes() * shape.size;
        let (mut input, mut target) = (vec![0f32; examples.len() * row], vec![0f32; examples.len() * row]);
        for (i, (x, y)) in input.chunks_exact_mut(row).zip(target.chunks_exact_mut(row)).enumerate() {
            examples.input(i, |at, value| x[at] = value as f32);
            examples.output(i, |at, value| y[at] = value as f32);
        }
        Ok(Self { descents: Descents::new(shape, &input, &target, !examples.complex(), device)? })
    }

    /// Fits the factors of products with hardened permutations.
    fn fits(
        &self,
        mut products: Vec<Product>,
        columns: &[Vec<i32>],
        hopeless: &[f32],
        (settings, steps): (&Settings, usize),
    ) -> Result<Vec<(Product, f64)>> {
        let Some(first) = products.first() else { return Ok(vec![]) };
        let kinds = first.kinds(Kind::Permutation);
        let weights: Vec<Vec<f32>> = products.iter().map(Product::flat).collect();
        let index: Vec<u16> = products.iter().flat_map(Product::permuted).flatten().map(|i| i as u16).collect();
        let rates: Vec<[f32; 3]> = (0..steps).map(|i| [settings.fit_rate(i, steps), 0.0, 0.0]).collect();
        let steps = Steps {
            rates: &rates,
            hopeless: Some(hopeless),
            tolerance: settings.tolerance as f32,
            seed: settings.seed,
        };
        let found = self.descents.run(&kinds, &weights, &index, columns, &steps)?;
        for (product, weights) in products.iter_mut().zip(&found.weights) {
            product.set_flat(weights);
        }
        Ok(products.into_iter().zip(found.least.into_iter().map(f64::from)).collect())
    }

    /// Descends on the relaxed products of all starts.
    pub fn relax(&self, searches: &mut [Search], settings: &Settings) -> Result<()> {
        let Some(first) = searches.first_mut() else { return Ok(()) };
        let (kinds, seed) = (first.now.0.kinds(Kind::Relaxed), first.rng.random());
        let columns: Vec<Vec<i32>> = searches.iter().map(columns_of).collect();
        let weights: Vec<Vec<f32>> = searches.iter().map(|s| s.now.0.flat()).collect();
        let rates: Vec<[f32; 3]> = (0..settings.relaxed_steps).map(|i| settings.relaxed_rates(i)).collect();
        let steps = Steps { rates: &rates, hopeless: None, tolerance: 0.0, seed };
        let relaxed = self.descents.run(&kinds, &weights, &[], &columns, &steps)?;
        searches.iter_mut().zip(&relaxed.weights).for_each(|(search, weights)| search.now.0.set_flat(weights));
        Ok(())
    }

    /// Fits the factors of all starts with hardened permutations, `settings.batch` at once; `done` is called as they end.
    pub fn fit(&self, searches: &mut [Search], settings: &Settings, steps: usize, done: impl Fn(usize)) -> Result<()> {
        let mut ended = 0;
        for batch in searches.chunks_mut(settings.batch.max(1)) {
            let columns: Vec<Vec<i32>> = batch.iter().map(columns_of).collect();
            let products = batch.iter().map(|s| s.now.0.clone()).collect();
            let hopeless = vec![f32::INFINITY; batch.len()];
            let found = self.fits(products, &columns, &hopeless, (settings, steps))?;
            ended += batch.len();
            batch.iter_mut().zip(found).for_each(|(search, found)| search.begin(found));
            done(ended);
        }
        Ok(())
    }

    /// Tries the changes of a round, `settings.batch` at once over all starts.
    pub fn anneal(&self, searches: &mut [Search], settings: &Settings) -> Result<()> {
        let each = (settings.batch / searches.len().max(1)).max(1);
        for _ in 0..settings.changes.div_ceil(each) {
            let mut changes: Vec<(usize, Change)> = vec![];
            for (i, search) in searches.iter_mut().enumerate() {
                changes.extend((0..each).map_while(|_| search.change(settings)).map(|c| (i, c)));
            }
            let columns: Vec<Vec<i32>> = changes.iter().map(|(i, _)| columns_of(&searches[*i])).collect();
            let hopeless: Vec<f32> = changes.iter().map(|(_, c)| (HOPELESS * c.bound) as f32).collect();
            let (owners, products): (Vec<_>, Vec<_>) =
                changes.into_iter().map(|(i, c)| ((i, c.bound), c.product)).unzip();
            let fitted = self.fits(products, &columns, &hopeless, (settings, settings.change_steps))?;
            // Of the changes of a start the best alone is considered: the others were fitted from the same product.
            let mut best: Vec<Option<((Product, f64), f64)>> = searches.iter().map(|_| None).collect();
            for ((i, bound), fitted) in owners.into_iter().zip(fitted) {
                if best[i].as_ref().is_none_or(|(b, _)| fitted.1 < b.1) {
                    best[i] = Some((fitted, bound));
                }
            }
            for (search, best) in searches.iter_mut().zip(best) {
                if let Some((fitted, bound)) = best {
                    search.consider(fitted, bound);
                }
            }
        }
        Ok(())
    }
}

fn columns_of(search: &Search) -> Vec<i32> {
    search.columns.iter().map(|c| *c as i32).collect()
}
