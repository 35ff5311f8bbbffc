//! Adam on a slice, for vectors of some thousand numbers, where [`AdamW`](super::AdamW)'s tensors cost more than the step.

/// Adam (Kingma and Ba 2014, arXiv:1412.6980) without weight decay, with decays 0.9 and 0.99.
#[derive(Debug, Clone)]
pub struct Adam {
    mean: Vec<f32>,
    square: Vec<f32>,
    steps: i32,
}

impl Adam {
    /// Decays of the mean gradient and of the mean squared gradient.
    pub const DECAYS: [f32; 2] = [0.9, 0.99];

    /// Moments of zero for `len` weights.
    pub fn new(len: usize) -> Self {
        Self { mean: vec![0.0; len], square: vec![0.0; len], steps: 0 }
    }

    /// What the moments are multiplied by in step `step`, which counts from 1, so that zeros at the start do not count.
    pub fn unbias(step: i32) -> [f32; 2] {
        Self::DECAYS.map(|decay| 1.0 / (1.0 - decay.powi(step)))
    }

    /// One step at `rate`, of as many weights as there are in `gradient`.
    pub fn step<'a>(&mut self, weights: impl Iterator<Item = &'a mut f32>, gradient: &[f32], rate: f32) {
        self.steps += 1;
        let ([a, b], [mean_scale, square_scale]) = (Self::DECAYS, Self::unbias(self.steps));
        for (((w, g), mean), square) in weights.zip(gradient).zip(&mut self.mean).zip(&mut self.square) {
            *mean = a * *mean + (1.0 - a) * g;
            *square = b * *square + (1.0 - b) * g * g;
            *w -= rate * (*mean * mean_scale) / ((*square * square_scale).sqrt() + 1e-12);
        }
    }
}
