//! Launching the kernels of `kernels/` on candle's device, stream and allocator.
//!
//! Everything runs on one stream, so that a launch sees what earlier ones wrote and memory freed after a launch is
//! reused only after it. That is what makes handing plain device addresses to a kernel sound.

use crate::error::{At, Error, ErrorKind, Result};
use candle_core::cuda_backend::cudarc::driver::{
    sys, sys::CUfunction_attribute, CudaFunction, CudaGraph, CudaSlice, CudaStream, DevicePtr, DeviceRepr,
};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Shape, Storage, Tensor};
use std::sync::Arc;

/// Asserts the size of a struct that a kernel reads and the offset of each field, as `MIRRORED` and `FIELD` of
/// kernels/common.cuh do.
macro_rules! mirrored {
    ($name:ty, $size:expr, { $($field:ident: $offset:expr),* $(,)? }) => {
        const _: () = {
            assert!(std::mem::size_of::<$name>() == $size);
            $(assert!(std::mem::offset_of!($name, $field) == $offset);)*
        };
    };
}
pub(crate) use mirrored;

mod ptx {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// A kernel about to be launched.
pub(crate) struct Kernel {
    function: CudaFunction,
    stream: Arc<CudaStream>,
    name: String,
    shared: u32,
}

impl Kernel {
    /// Loads kernel `name` of `module`: a file of `kernels/` (`pointwise`) or its part for one head dim or format
    /// (`attention_decode_64`, `quantised_q4_k`), compiled by the driver on first use.
    pub fn load(device: &CudaDevice, module: &str, name: String) -> Result<Self> {
        let source = ptx::module(module);
        let source = source.ok_or_else(|| Error::unsupported("kernel", format!("{module} is not compiled")))?;
        let function = device.get_or_load_custom_func(&name, module, source).map_err(|e| explain(&name, &e))?;
        Ok(Self { function: function.into_cuda_function(), stream: device.cuda_stream(), name, shared: 0 })
    }

    /// Sets the dynamic shared memory, bytes.
    pub fn shared(mut self, bytes: usize) -> Result<Self> {
        let bytes = bytes as i32;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // Also below 48 KiB: what a kernel declares itself counts towards that limit, which needs no attribute. Never down,
        // since the attribute is the function's, and launches of it with more shared memory may be waiting.
        let before = self.function.get_attribute(attribute).map_err(|e| self.error(e))?;
        self.function.set_attribute(attribute, before.max(bytes)).map_err(|e| self.error(e))?;
        self.shared = bytes as u32;
        Ok(self)
    }

    fn error(&self, e: impl std::fmt::Display) -> Error {
        Error::new(ErrorKind::Backend, format!("kernel {}", self.name), e)
    }
}

/// Opens GPU `index` with a new stream; candle's default stream cannot be captured into a graph.
pub(crate) fn open(index: usize) -> Result<Device> {
    let place = format!("--device cuda:{index}");
    // The driver's library is loaded on first use, and its absence is a panic in the layer below.
    let opened = std::panic::catch_unwind(|| Device::new_cuda_with_stream(index));
    let device = match opened {
        Ok(Ok(device)) => device,
        Ok(Err(e)) => return Err(Error::unsupported(place, format!("cannot be opened: {}", crate::plain(&e)))),
        Err(_) => return Err(Error::unsupported(place, "there is no NVIDIA driver on this machine")),
    };
    if let Device::Cuda(gpu) = &device {
        // SAFETY: all work goes through this one stream, so that nothing needs an event to wait for.
        unsafe { gpu.disable_event_tracking() };
        // Freed memory stays with the process: unmapping and remapping it at every synchronisation costs milliseconds.
        let keep = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        super::memory::pool::set(gpu, keep, u64::MAX);
    }
    Ok(device)
}

/// Captures launches into a graph, each but the first overlapping the one before it if `overlap`.
///
/// # Errors
/// The first launch that fails, by its kernel; a stream that does not capture.
///
/// # Safety
/// As of [`Launch::enqueue`], until the graph's last launch has ended.
pub(crate) unsafe fn capture(gpu: &CudaDevice, launches: &[Launch], overlap: bool) -> Result<CudaGraph> {
    let fail = |e: &dyn std::fmt::Display| Error::new(ErrorKind::Backend, "decode graph", e);
    let stream = gpu.cuda_stream();
    stream.synchronize().map_err(|e| fail(&e))?;
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(|e| fail(&e))?;
    let enqueued = launches.iter().enumerate().try_for_each(|(i, l)| l.enqueue(overlap && i > 0));
    let ended = stream.end_capture(sys::CUgraphInstantiate_flags(0));
    // A launch that failed also invalidates the capture, whose own error does not say why.
    enqueued?;
    let graph = ended.map_err(|e| fail(&e))?.ok_or_else(|| fail(&"nothing was captured"))?;
    graph.upload().map_err(|e| fail(&e))?;
    Ok(graph)
}

/// Explains the failure to load a kernel.
fn explain(name: &str, error: &candle_core::Error) -> Error {
    let text = crate::plain(error);
    let place = format!("kernel {name}");
    if text.contains("UNSUPPORTED_PTX_VERSION") {
        return Error::unsupported(
            place,
            "the driver is older than the toolkit this was built with; update the driver",
        );
    }
    if text.contains("NO_BINARY_FOR_GPU") || text.contains("INVALID_PTX") {
        return Error::unsupported(place, "built for a newer GPU than this one; rebuild with its CUDA_COMPUTE_CAP");
    }
    Error::new(ErrorKind::Backend, place, text)
}

/// Returns a tensor's GPU.
pub(crate) fn device(tensor: &Tensor) -> Result<&CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device),
        _ => Err(Error::new(ErrorKind::Backend, "kernel", "the tensor is not on a GPU")),
    }
}

/// Number of the GPU's multiprocessors.
pub(crate) fn multiprocessors(device: &CudaDevice) -> Result<usize> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    let count = device.cuda_stream().context().attribute(attribute);
    Ok(count.map_err(|e| Error::new(ErrorKind::Backend, "GPU", e))? as usize)
}

/// Most shared memory of a thread block, bytes.
pub(crate) fn shared_limit(device: &CudaDevice) -> Result<usize> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    let bytes = device.cuda_stream().context().attribute(attribute);
    Ok(bytes.map_err(|e| Error::new(ErrorKind::Backend, "GPU", e))? as usize)
}

/// Whether the GPU has the warpgroup instructions of compute capability 9.0.
pub(crate) fn is_hopper(device: &CudaDevice) -> bool {
    device.cuda_stream().context().compute_capability().is_ok_and(|c| c == (9, 0))
}

/// The element type in a kernel's name: `bf16`, `f16` or `f32`.
pub(crate) fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::BF16 => Ok("bf16"),
        DType::F16 => Ok("f16"),
        DType::F32 => Ok("f32"),
        other => Err(Error::unsupported("kernel", format!("no kernel for {other:?}; use bf16, f16 or f32"))),
    }
}

/// The device address of a tensor's first element. The last dimension must be contiguous; the caller passes the other
/// strides.
pub(crate) fn address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::new(ErrorKind::Backend, "kernel", "the tensor is not on a GPU"));
    };
    if layout.stride().last().is_some_and(|s| *s != 1) && layout.dims().last() != Some(&1) {
        return Err(Error::new(ErrorKind::Backend, "kernel", "the tensor's last dimension is strided"));
    }
    let stream = storage.device.cuda_stream();
    let base = match &storage.slice {
        CudaStorageSlice::BF16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F64(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::U32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::I64(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::U8(s) => s.device_ptr(&stream).0,
        _ => return Err(Error::unsupported("kernel", "no kernel takes this element type")),
    };
    Ok(base + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}

/// The address of an optional tensor; 0 for none.
pub(crate) fn address_or_null(tensor: Option<&Tensor>) -> Result<u64> {
    tensor.map_or(Ok(0), address)
}

/// Allocates a tensor for a kernel's output, with undefined content.
pub(crate) fn uninitialised(device: &CudaDevice, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    let n = shape.elem_count();
    // SAFETY: every kernel writes its whole output before anything reads it (kernels/check.py poisons outputs and
    // looks).
    let storage = unsafe {
        match dtype {
            DType::BF16 => CudaStorage::wrap_cuda_slice(device.alloc::<half::bf16>(n)?, device.clone()),
            DType::F16 => CudaStorage::wrap_cuda_slice(device.alloc::<half::f16>(n)?, device.clone()),
            DType::F32 => CudaStorage::wrap_cuda_slice(device.alloc::<f32>(n)?, device.clone()),
            DType::U32 => CudaStorage::wrap_cuda_slice(device.alloc::<u32>(n)?, device.clone()),
            other => return Err(Error::unsupported("kernel", format!("no kernel for {other:?}"))),
        }
    };
    Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
}

/// Copies values to the device, ordered before later launches.
pub(crate) fn upload<T: DeviceRepr + 'static>(device: &CudaDevice, values: &[T]) -> Result<Uploaded<T>> {
    let slice = device.clone_htod(values).at("upload")?;
    let address = slice.device_ptr(&device.cuda_stream()).0;
    Ok(Uploaded { address, _slice: slice })
}

/// Values on the device, freed (in stream order) when dropped.
pub(crate) struct Uploaded<T> {
    /// Device address.
    pub address: u64,
    _slice: CudaSlice<T>,
}

/// A kernel with its grid and arguments, which can be enqueued any number of times; a captured step is a list of these.
pub(crate) struct Launch {
    kernel: Kernel,
    grid: (usize, usize, usize),
    threads: usize,
    /// The arguments' bytes, each aligned to a word.
    words: Vec<u64>,
    /// Offset of each argument in `bytes`.
    arguments: Vec<usize>,
}

impl Launch {
    /// A launch without arguments.
    pub fn new(kernel: Kernel, grid: (usize, usize, usize), threads: usize) -> Self {
        Self { kernel, grid, threads, words: vec![], arguments: vec![] }
    }

    /// Adds an argument of the kernel's signature: an address on the device (0 for none), a number, or a struct by
    /// value.
    pub fn with<T: DeviceRepr + Copy>(mut self, value: T) -> Self {
        let size = std::mem::size_of::<T>();
        let at = self.words.len();
        self.arguments.push(at);
        self.words.resize(at + size.div_ceil(8), 0);
        // SAFETY: room for a T's bytes was just made; `DeviceRepr` says that these bytes are what the device expects.
        unsafe {
            std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), self.words[at..].as_mut_ptr().cast(), size)
        };
        self
    }

    /// Enqueues the launch on the run's stream.
    ///
    /// With `overlap` it is a programmatic dependent launch: it may start while the one before it still runs and waits
    /// for it itself (`await_previous` in kernels/decode.cuh).
    ///
    /// # Safety
    /// The arguments must be those of the kernel's signature, in order, and every address must stay allocated, with
    /// what the kernel's header asks for, until the stream has passed this launch.
    pub unsafe fn enqueue(&self, overlap: bool) -> Result<()> {
        let stream = &self.kernel.stream;
        stream.context().bind_to_thread().map_err(|e| self.kernel.error(e))?;
        let mut pointers: Vec<*mut std::ffi::c_void> =
            self.arguments.iter().map(|at| self.words[*at..].as_ptr().cast_mut().cast()).collect();
        let mut value: sys::CUlaunchAttributeValue = std::mem::zeroed();
        value.programmaticStreamSerializationAllowed = 1;
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value,
        };
        let config = sys::CUlaunchConfig {
            gridDimX: self.grid.0 as u32,
            gridDimY: self.grid.1 as u32,
            gridDimZ: self.grid.2 as u32,
            blockDimX: self.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.kernel.shared,
            hStream: stream.cu_stream(),
            attrs: &mut attribute,
            numAttrs: overlap.into(),
        };
        let function = self.kernel.function.cu_function();
        let code = sys::cuLaunchKernelEx(&config, function, pointers.as_mut_ptr(), std::ptr::null_mut());
        code.result().map_err(|e| self.kernel.error(e))
    }
}
