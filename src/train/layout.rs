//! Parameters as one flat vector: names, shapes and places.

use crate::error::{At, Error, ErrorKind, Result};
use crate::stats::normal;
use candle_core::{Device, Tensor};
use rand::Rng;

/// How a parameter is initialised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Ones.
    Ones,
    /// A normal distribution with this standard deviation.
    Normal(f32),
    /// Matrices `[[c, -s], [s, c]]` of random rotations, times this number.
    Rotations(f32),
}

/// A named parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// Name, as in the checkpoint.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// How it is initialised.
    pub init: Init,
    /// Whether weight decay applies.
    pub decay: bool,
}

impl Parameter {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// All parameters of a model, one after the other.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Layout {
    parameters: Vec<Parameter>,
    starts: Vec<usize>,
    len: usize,
}

impl Layout {
    /// Adds a parameter and returns where it starts.
    pub fn push(&mut self, parameter: Parameter) -> usize {
        let start = self.len;
        self.len += parameter.len();
        self.starts.push(start);
        self.parameters.push(parameter);
        start
    }

    /// The parameters and their first elements' places.
    pub fn iter(&self) -> impl Iterator<Item = (&Parameter, usize)> {
        self.parameters.iter().zip(self.starts.iter().copied())
    }

    /// Number of elements of all parameters.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no parameters.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Initial values from `seed`, f32 `[len]`.
    ///
    /// # Errors
    /// A backend's failure.
    pub fn initial(&self, seed: u64, device: &Device) -> Result<Tensor> {
        let mut values = Vec::with_capacity(self.len);
        for (i, parameter) in self.parameters.iter().enumerate() {
            // A stream of its own for each parameter: adding one leaves the others' values.
            let mut rng = super::random(seed, i as u64 + 1);
            match parameter.init {
                Init::Ones => values.extend(std::iter::repeat_n(1f32, parameter.len())),
                Init::Normal(std) => values.extend((0..parameter.len()).map(|_| std * normal(&mut rng) as f32)),
                Init::Rotations(gain) => values.extend((0..parameter.len() / 4).flat_map(|_| {
                    let (sin, cos) = (std::f64::consts::TAU * rng.random::<f64>()).sin_cos();
                    [cos, -sin, sin, cos].map(|x| gain * x as f32)
                })),
            }
        }
        Tensor::from_vec(values, self.len, device).at("initial weights")
    }

    /// Multipliers of the weight decay: 1 or 0 for each element, f32 `[len]`.
    ///
    /// # Errors
    /// A backend's failure.
    pub fn decays(&self, device: &Device) -> Result<Tensor> {
        let of = |p: &Parameter| std::iter::repeat_n(if p.decay { 1f32 } else { 0f32 }, p.len());
        let decays: Vec<f32> = self.parameters.iter().flat_map(of).collect();
        Tensor::from_vec(decays, self.len, device).at("weight decay")
    }

    /// The part of the flat vector from `start` on, in `shape`.
    ///
    /// # Errors
    /// A vector that is too short.
    pub fn part(flat: &Tensor, start: usize, shape: &[usize]) -> Result<Tensor> {
        let part = flat.narrow(0, start, shape.iter().product()).and_then(|part| part.reshape(shape));
        part.at("parameters")
    }

    /// Refuses a vector of another length.
    ///
    /// # Errors
    /// As said.
    pub fn check(&self, flat: &Tensor, what: &str) -> Result<()> {
        if flat.dims() == [self.len] {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Tensor, what, format!("is {:?}, the model has {} parameters", flat.dims(), self.len)))
    }
}
