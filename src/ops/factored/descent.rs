//! Launches of kernels/factored_learn.cu: Adam on many products at once.

use super::Shape;
use crate::error::{At, Error, Result};
use crate::ops::cuda::{
    address, device, mirrored, multiprocessors, shared_limit, uninitialised, upload, Kernel, Launch,
};
use crate::train::Adam as Moments;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Device, Tensor};

/// Modules of a product, at most.
const MODULES: usize = 4;
/// Largest N: a thread has a pair of each factor, and a block 1,024 threads at most.
const LARGEST: usize = 1024;
/// Vectors that a block has at a time.
const VECTORS: usize = 4;

/// A factor of a product, as the kernels read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Its parameters are a butterfly's.
    Butterfly = 0,
    /// A relaxed permutation.
    Relaxed = 1,
    /// A permutation by index.
    Permutation = 2,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Program {
    n: i32,
    levels: i32,
    modules: i32,
    tied: i32,
    kinds: [i32; MODULES],
    at: [i32; MODULES],
    index: [i32; MODULES],
    stride: i32,
    permutations: i32,
}
mirrored!(Program, 72, { kinds: 16, at: 32, index: 48, stride: 64 });

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Vectors {
    input: u64,
    target: u64,
    rows: u64,
    count: i32,
    real: i32,
}
mirrored!(Vectors, 32, { rows: 16, count: 24 });

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Adam {
    weights: u64,
    mean: u64,
    square: u64,
    used: u64,
    best: u64,
    partial: u64,
    errors: u64,
    least: u64,
    ended: u64,
    hopeless: u64,
    seed: u64,
    stride: i32,
    trained: i32,
    first_logit: i32,
    slices: i32,
    products: i32,
    step: i32,
    steps: i32,
    elements: f32,
    tolerance: f32,
    rate: f32,
    unbias_mean: f32,
    unbias_square: f32,
    logit_noise: f32,
    weight_noise: f32,
}
mirrored!(Adam, 144, { seed: 80, stride: 88, elements: 116, weight_noise: 140 });

// SAFETY: plain numbers in C's layout, as the kernels declare them.
unsafe impl DeviceRepr for Program {}
// SAFETY: as of `Program`.
unsafe impl DeviceRepr for Vectors {}
// SAFETY: as of `Program`.
unsafe impl DeviceRepr for Adam {}

/// What products are compared on, on a GPU.
pub(crate) struct Descents {
    shape: Shape,
    input: Tensor,
    target: Tensor,
    /// Whether imaginary parts of results do not count.
    real: bool,
    device: Device,
}

/// Settings of a descent.
pub(crate) struct Steps<'a> {
    /// Learning rate, scale of the noise on logits and on all parameters, of each step.
    pub rates: &'a [[f32; 3]],
    /// Where a fit of product `i` ends after a third of its steps; without, it is no fit, and logits move too.
    pub hopeless: Option<&'a [f32]>,
    /// Error at which a fit ends.
    pub tolerance: f32,
    /// Seed of the noise.
    pub seed: u64,
}

/// Where descents ended.
pub(crate) struct Descended {
    /// Parameters of each product: butterflies, then logits. Of a fit the best, otherwise the last.
    pub weights: Vec<Vec<f32>>,
    /// Least error of each.
    pub least: Vec<f32>,
}

impl Descents {
    /// Uploads vectors and what they are to become.
    ///
    /// # Shapes
    /// `input` and `target` `[vectors, planes, N]`, flat.
    ///
    /// # Errors
    /// A size that the kernels do not take; too little memory.
    pub fn new(shape: Shape, input: &[f32], target: &[f32], real: bool, device: &Device) -> Result<Self> {
        if shape.size > LARGEST {
            let message = format!("learning {} elements on a GPU, which takes up to {LARGEST}", shape.size);
            return Err(Error::unsupported("transform", message));
        }
        let tensor = |x: &[f32]| Tensor::from_slice(x, x.len(), device).at("vectors");
        Ok(Self { shape, input: tensor(input)?, target: tensor(target)?, real, device: device.clone() })
    }

    /// Runs `steps` of Adam on every product: `weights` are butterflies, then logits; `index` its permutations, one
    /// after the other; `rows` the vectors that it is compared on, as many for each.
    ///
    /// # Errors
    /// More modules than the kernels take; a launch that fails.
    pub fn run(
        &self,
        modules: &[Kind],
        weights: &[Vec<f32>],
        index: &[u16],
        rows: &[Vec<i32>],
        steps: &Steps,
    ) -> Result<Descended> {
        let (program, stride, first_logit) = self.program(modules)?;
        let (products, count) = (weights.len(), rows.first().map_or(0, Vec::len));
        let gpu = device(&self.input)?;
        let padded: Vec<f32> =
            weights.iter().flat_map(|w| w.iter().copied().chain(std::iter::repeat_n(0.0, stride - w.len()))).collect();
        let new = |values: &[f32]| Tensor::from_slice(values, values.len(), &self.device).at("products");
        let zeros = || Tensor::zeros(products * stride, DType::F32, &self.device).at("moments");
        let (now, used, mean, square) = (new(&padded)?, new(&padded)?, zeros()?, zeros()?);
        let best = steps.hopeless.map(|_| new(&padded)).transpose()?;
        let hopeless = new(steps.hopeless.unwrap_or(&vec![f32::INFINITY; products]))?;
        let least = new(&vec![f32::INFINITY; 2 * products])?;
        let ended = upload(gpu, &vec![0i32; 2 * products])?;
        // One index even where there is no permutation: an empty upload has no address.
        let index = upload(gpu, if index.is_empty() { &[0u16] } else { index })?;
        let flat: Vec<i32> = rows.iter().flatten().copied().collect();
        let rows = upload(gpu, &flat)?;
        // Two blocks a multiprocessor, of as many vectors each.
        let slices = (2 * multiprocessors(gpu)?).div_ceil(products).next_power_of_two();
        let slices = slices.clamp(1, count.div_ceil(VECTORS).max(1));
        let partial = uninitialised(gpu, DType::F32, products * slices * stride)?;
        let errors = uninitialised(gpu, DType::F32, products * slices)?;
        let (n, planes) = (self.shape.size, self.shape.planes());
        let own = if self.shape.tied { stride } else { 0 };
        let shared = 4 * (VECTORS * planes * n + 2 * 4 * planes * (n / 2) + 32 + own);
        if shared > shared_limit(gpu)? {
            return Err(Error::unsupported("transform", format!("products of {} modules on this GPU", modules.len())));
        }
        let name = if self.shape.complex { "factored_gradient_complex" } else { "factored_gradient_real" };
        let vectors = Vectors {
            input: address(&self.input)?,
            target: address(&self.target)?,
            rows: rows.address,
            count: count as i32,
            real: self.real.into(),
        };
        let state = [&now, &mean, &square, steps.hopeless.map_or(&used, |_| &now)].map(address);
        let [weights_at, mean_at, square_at, used_at] = state;
        let (weights_at, used_at) = (weights_at?, used_at?);
        let mut adam = Adam {
            weights: weights_at,
            mean: mean_at?,
            square: square_at?,
            used: used_at,
            best: best.as_ref().map_or(Ok(0), address)?,
            partial: address(&partial)?,
            errors: address(&errors)?,
            least: address(&least)?,
            ended: ended.address,
            hopeless: address(&hopeless)?,
            seed: steps.seed,
            stride: stride as i32,
            trained: if steps.hopeless.is_some() { first_logit as i32 } else { stride as i32 },
            first_logit: first_logit as i32,
            slices: slices as i32,
            products: products as i32,
            step: 0,
            steps: steps.rates.len() as i32,
            elements: (n * count) as f32,
            tolerance: steps.tolerance,
            rate: 0.0,
            unbias_mean: 0.0,
            unbias_square: 0.0,
            logit_noise: 0.0,
            weight_noise: 0.0,
        };
        let kernel = |name: &str| Kernel::load(gpu, "factored_learn", name.into());
        // Of even steps and of odd ones, which differ in the products that have ended.
        let gradient = |parity: usize| -> Result<Launch> {
            let launch = Launch::new(kernel(name)?.shared(shared)?, (slices, products, 1), (n / 2).max(32))
                .with(program)
                .with(used_at)
                .with(index.address)
                .with(vectors)
                .with(address(&partial)?)
                .with(address(&errors)?);
            Ok(launch.with(ended.address + (4 * parity * products) as u64))
        };
        let gradients = [gradient(0)?, gradient(1)?];
        let blocks = stride.div_ceil(1024).clamp(1, 16);
        for (i, [rate, logit_noise, weight_noise]) in steps.rates.iter().copied().enumerate() {
            let [unbias_mean, unbias_square] = Moments::unbias(i as i32 + 1);
            adam = Adam { step: i as i32, rate, unbias_mean, unbias_square, logit_noise, weight_noise, ..adam };
            let step = Launch::new(kernel("factored_adam")?, (blocks, products, 1), 256).with(adam);
            // SAFETY: all tensors have `products` rows of the lengths that the kernels read, and outlive the copies back.
            unsafe {
                gradients[i % 2].enqueue(false)?;
                step.enqueue(false)?;
            }
        }
        let back = |x: &Tensor| x.to_vec1::<f32>().at("products");
        let (end, least) = (back(best.as_ref().unwrap_or(&now))?, back(&least)?);
        let length = weights.first().map_or(0, Vec::len);
        let at = steps.rates.len() % 2 * products;
        Ok(Descended {
            weights: end.chunks_exact(stride).map(|row| row[..length].to_vec()).collect(),
            least: least[at..][..products].to_vec(),
        })
    }

    /// The program, floats of a row, and the first logit's place in it.
    fn program(&self, modules: &[Kind]) -> Result<(Program, usize, usize)> {
        if modules.len() > MODULES {
            let message = format!("{} modules on a GPU, which takes up to {MODULES}", modules.len());
            return Err(Error::unsupported("--product", message));
        }
        let (butterfly, permutation) = (self.shape.butterfly_len(), self.shape.permutation_len());
        let butterflies = modules.iter().filter(|m| **m == Kind::Butterfly).count();
        let first_logit = butterflies * butterfly;
        let stride = (first_logit + (modules.len() - butterflies) * permutation).next_multiple_of(4);
        let mut program = Program {
            n: self.shape.size as i32,
            levels: self.shape.levels() as i32,
            modules: modules.len() as i32,
            tied: self.shape.tied.into(),
            kinds: [0; MODULES],
            at: [0; MODULES],
            index: [0; MODULES],
            stride: stride as i32,
            permutations: (modules.len() - butterflies) as i32,
        };
        let (mut factors, mut permutations) = (0, 0);
        for (i, kind) in modules.iter().enumerate() {
            program.kinds[i] = *kind as i32;
            if *kind == Kind::Butterfly {
                program.at[i] = (factors * butterfly) as i32;
                factors += 1;
            } else {
                program.at[i] = (first_logit + permutations * permutation) as i32;
                program.index[i] = permutations as i32;
                permutations += 1;
            }
        }
        Ok((program, stride, first_logit))
    }
}
