//! Launches the products of one row with matrices in device memory: `kernels/decode.cu` for 16-bit types,
//! `kernels/quantised.cu` for GGML's blocks, `kernels/affine.cu` for MLX's groups.

use crate::error::{Error, Result};
use crate::nn::Blocks;
use crate::ops::cuda::{address, device, suffix, uninitialised, Kernel, Launch};
use crate::spec::Activation;
use crate::storage::{Affine, Float, Ggml, Storage};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Tensor};

/// Most matrices of a launch.
pub(crate) const MOST: usize = 4;
/// Thread blocks of the product with the output matrix: four for each of 132 multiprocessors.
const BLOCKS: usize = 528;

/// `MatvecParams` of kernels/matvec.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Params {
    w: [u64; MOST],
    bias: [u64; MOST],
    rows: [i32; MOST],
    columns: i32,
    x: u64,
    norm: u64,
    eps: f32,
    activation: i32,
    out: u64,
    logits: u64,
    state: u64,
    group: i32,
    scale: i32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for Params {}
crate::ops::cuda::mirrored!(Params, 144, {
    w: 0, bias: 32, rows: 64, columns: 80, x: 88, norm: 96, eps: 104, activation: 108, out: 112, logits: 120, state: 128,
    group: 136, scale: 140,
});

/// The epilogue of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Writes the result.
    Store,
    /// Adds the result to `out`.
    Add,
    /// Writes `act(first matrix's) * second's`.
    Gated,
    /// Keeps the index of the largest element.
    Largest,
}

/// An encoding that the products of one row have a kernel for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// bf16 or f16.
    Dense(DType),
    /// GGML's blocks.
    Ggml(Ggml),
    /// MLX's groups.
    Affine(Affine),
}

impl Format {
    /// The format of contiguous rows of `columns` elements, if it has a kernel.
    pub fn new(storage: Storage, columns: usize) -> Option<Self> {
        match storage {
            Storage::Ggml(format) => storage.fits(columns).then_some(Self::Ggml(format)),
            Storage::Affine(affine) => storage.fits(columns).then_some(Self::Affine(affine)),
            // A thread loads 16 bytes.
            Storage::Dense(t) => (t != Float::F32 && columns.is_multiple_of(8)).then_some(Self::Dense(t.dtype())),
        }
    }

    /// The format of blocks.
    ///
    /// # Errors
    /// A dense encoding, which a GPU keeps as a tensor.
    pub fn of_blocks(w: &Blocks) -> Result<Self> {
        match w.storage() {
            Storage::Ggml(format) => Ok(Self::Ggml(format)),
            Storage::Affine(affine) => Ok(Self::Affine(affine)),
            dense => Err(Error::unsupported("quantised matrix", format!("{dense} on a GPU"))),
        }
    }

    /// Loads kernel `stem` for this format, with what follows its name.
    pub fn kernel(self, gpu: &CudaDevice, stem: &str, end: &str) -> Result<Kernel> {
        let (module, name) = match self {
            Self::Dense(dtype) => ("decode".to_string(), suffix(dtype)?.to_string()),
            Self::Ggml(format) => {
                let name = Storage::Ggml(format).name();
                (format!("quantised_{name}"), name.to_string())
            }
            Self::Affine(affine) => (format!("affine_{}", affine.bits), format!("affine{}", affine.bits)),
        };
        Kernel::load(gpu, &module, format!("{stem}_{name}{end}"))
    }

    /// Elements of a row that a thread reads at a time.
    pub fn unit(self) -> usize {
        match self {
            Self::Dense(_) | Self::Ggml(Ggml::Q8_0) => 8,
            Self::Ggml(_) => 32,
            // `Affine::LOG` in kernels/affine.cu.
            Self::Affine(affine) => match affine.bits {
                8 => 8,
                4 | 6 => 16,
                _ => 32,
            },
        }
    }

    /// What a kernel is told of the format when it runs, besides its name: `group` and `scale` of kernels/affine.cu.
    fn settings(self) -> Option<(i32, i32)> {
        let Self::Affine(affine) = self else { return None };
        let scale = match affine.scale {
            Float::F32 => 0,
            Float::F16 => 1,
            Float::BF16 => 2,
        };
        Some((affine.group.into(), scale))
    }

    /// Adds the last arguments of the kernels but products, which have them in [`Params`].
    pub fn add_settings(self, launch: Launch) -> Launch {
        match self.settings() {
            Some((group, scale)) => launch.with(group).with(scale),
            None => launch,
        }
    }

    /// Bytes of shared memory for a vector of `n`.
    fn shared(self, n: usize) -> usize {
        match self {
            Self::Dense(_) => 4 * n,
            // With gaps against bank conflicts: `place` in kernels/quantised.cuh.
            Self::Ggml(_) => 16 * (n / 4 + n / 32 + n / 128),
            // And a sum for each unit.
            Self::Affine(_) => 16 * (n / 4 + n / 32) + 4 * (n / self.unit()),
        }
    }
}

/// A matrix `[rows, columns]` on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceMatrix {
    pub format: Format,
    pub rows: usize,
    pub columns: usize,
    /// Address; blocks are followed by at least four readable bytes.
    pub at: u64,
    /// Address of the bias, f32 `[rows]`; 0 for none.
    pub bias: u64,
}

/// A product of one f32 vector, or of its RMS norm, with up to four matrices of one format. An address of 0 means
/// none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matvec {
    pub form: Form,
    pub x: u64,
    /// Weight and epsilon.
    pub norm: Option<(u64, f32)>,
    pub activation: Option<Activation>,
    pub out: u64,
    pub logits: u64,
    pub state: u64,
}

impl Matvec {
    /// Returns the launch for `matrices`, of one format and width.
    ///
    /// # Errors
    /// Matrices that differ, more than four, or with [`Form::Gated`] other than two.
    pub fn launch(&self, gpu: &CudaDevice, matrices: &[DeviceMatrix]) -> Result<Launch> {
        let differ = |m: &DeviceMatrix| (m.format, m.columns) != (matrices[0].format, matrices[0].columns);
        let odd = self.form == Form::Gated && (matrices.len() != 2 || matrices[0].rows != matrices[1].rows);
        if !(1..=MOST).contains(&matrices.len()) || odd || matrices.iter().any(differ) {
            return Err(Error::unsupported("product", format!("{:?} of {matrices:?}", self.form)));
        }
        let (format, columns) = (matrices[0].format, matrices[0].columns);
        let (norm, eps) = self.norm.unwrap_or_default();
        let (group, scale) = format.settings().unwrap_or_default();
        let mut p = Params {
            w: [0; MOST],
            bias: [0; MOST],
            rows: [0; MOST],
            columns: columns as i32,
            x: self.x,
            norm,
            eps,
            activation: matches!(self.activation, Some(Activation::GeluTanh)).into(),
            out: self.out,
            logits: self.logits,
            state: self.state,
            group,
            scale,
        };
        for (i, m) in matrices.iter().enumerate() {
            (p.w[i], p.bias[i], p.rows[i]) = (m.at, m.bias, m.rows as i32);
        }
        let total: usize = matrices.iter().map(|m| m.rows).sum();
        // One row per warp while that fills the GPU; more rows per warp, for more bytes in flight, beyond.
        let (name, rows) = match (self.form, total > 1 << 13) {
            (Form::Store, false) => ("decode_store", 1),
            (Form::Store, true) => ("decode_store", 4),
            (Form::Add, false) => ("decode_add", 1),
            (Form::Add, true) => ("decode_add", 4),
            (Form::Gated, false) => ("decode_gated", 2),
            (Form::Gated, true) => ("decode_gated", 4),
            (Form::Largest, _) => ("decode_largest", 4),
        };
        let kernel = format.kernel(gpu, name, &format!("_{rows}"))?.shared(format.shared(columns))?;
        let grid = total.div_ceil(8 * rows).min(if self.form == Form::Largest { BLOCKS } else { usize::MAX });
        Ok(Launch::new(kernel, (grid, 1, 1), 256).with(p))
    }
}

/// Rows `ids` of a dense matrix, on the stream of `ids`.
///
/// # Shapes
/// `w [rows, cols]`, `ids` u32 `[n]`; the result `[n, cols]` in `w`'s type.
pub(crate) fn gather(w: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (gpu, (_, columns), n) = (device(ids)?, w.dims2()?, ids.dim(0)?);
    let out = uninitialised(gpu, w.dtype(), (n, columns))?;
    let kernel = Kernel::load(gpu, "pointwise", format!("gather_{}", suffix(w.dtype())?))?;
    let launch = Launch::new(kernel, (n, 1, 1), 256).with(address(w)?).with(w.stride()[0] as i64);
    let launch = launch.with(address(ids)?).with(address(&out)?).with(columns as i32);
    // SAFETY: `ids` are below `rows`, as the run checks before any launch; frees are ordered after the launch on the
    // one stream.
    unsafe { launch.enqueue(false)? };
    Ok(out)
}

/// Rows `ids` of a matrix of blocks, on the stream of `ids`.
///
/// # Shapes
/// `w [rows, cols]`, `ids` u32 `[n]`; the result `[n, cols]` in `dtype`.
pub(crate) fn gather_blocks(w: &Blocks, ids: &Tensor, dtype: DType) -> Result<Tensor> {
    let (gpu, (_, columns), n) = (device(ids)?, w.dims(), ids.dim(0)?);
    let format = Format::of_blocks(w)?;
    let out = uninitialised(gpu, dtype, (n, columns))?;
    let kernel = format.kernel(gpu, "gather", &format!("_{}", suffix(dtype)?))?;
    let units = columns / format.unit();
    let launch = Launch::new(kernel, ((n * units).div_ceil(256), 1, 1), 256).with(address(w.data())?);
    let launch = launch.with(address(ids)?).with(address(&out)?).with((n * units) as i64).with(units as i32);
    // SAFETY: as in `gather`; blocks are followed by padding.
    unsafe { format.add_settings(launch).enqueue(false)? };
    Ok(out)
}

/// `x Wᵀ` of one row on a GPU, in f32 from the blocks as stored.
///
/// # Shapes
/// `x [1, cols]`, `w [rows, cols]`; the result `[1, rows]` in `x`'s type.
pub(crate) fn quantised_row(x: &Tensor, w: &Blocks) -> Result<Tensor> {
    let (width, (rows, columns)) = (x.dims2()?, w.dims());
    if width != (1, columns) {
        return Err(Error::unsupported("quantised product", format!("{width:?} times {rows} x {columns}")));
    }
    let (gpu, format) = (device(x)?, Format::of_blocks(w)?);
    let mut wide = x.to_dtype(DType::F32)?.contiguous()?;
    // The kernel reads 16 bytes at a time; a view may begin anywhere.
    if !address(&wide)?.is_multiple_of(16) {
        wide = wide.force_contiguous()?;
    }
    let out = uninitialised(gpu, DType::F32, (1, rows))?;
    let (form, norm, activation) = (Form::Store, None, None);
    let product = Matvec { form, x: address(&wide)?, norm, activation, out: address(&out)?, logits: 0, state: 0 };
    let launch = product.launch(gpu, &[DeviceMatrix { format, rows, columns, at: address(w.data())?, bias: 0 }])?;
    // SAFETY: `columns` f32 in, `rows` f32 out, and the matrix with its padding; frees are ordered after the launch on
    // the one stream.
    unsafe { launch.enqueue(false)? };
    Ok(out.to_dtype(x.dtype())?)
}
