//! Undo log of a batch of captured steps: saves the cache rows that the batch overwrites.
//!
//! The host fetches a batch's tokens together and may stop at any of them, but later steps of the batch have already
//! written to rings, summary rows, running sums and recurrent states that earlier positions still need. A batch that is cut off is
//! undone, and its delivered steps run again: the same launches on the same state, so the cache holds exactly what was
//! delivered. Dense caches need no undo: rows beyond the position are not read.

use super::{driver, State, BATCH};
use crate::cache::{LayerState, Ring};
use crate::error::Result;
use crate::ops::cuda::{address, address_or_null, uninitialised, upload, Kernel, Launch, Uploaded};
use crate::run::Run;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};
use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Tensor};

/// Thread blocks that share a layer's running sums or recurrent state.
const PARTS: usize = 16;

/// Mirrors struct `Journal` of kernels/decode.cu.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Entry {
    ring_k: u64,
    ring_v: u64,
    mean_k: u64,
    mean_v: u64,
    /// Running sums, or the state of a recurrent layer.
    running: u64,
    saved: u64,
    capacity: i32,
    row: i32,
    mean_rows: i32,
    block: i32,
    readable: i32,
    width: i32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for Entry {}
crate::ops::cuda::mirrored!(Entry, 72, {
    ring_k: 0, ring_v: 8, mean_k: 16, mean_v: 24, running: 32, saved: 40, capacity: 48, row: 52, mean_rows: 56, block: 60,
    readable: 64, width: 68,
});

/// Device memory for the rows that one batch overwrites.
pub(super) struct Journal {
    /// One entry per layer that overwrites rows, and their number; `None` if no layer does.
    table: Option<(Uploaded<Entry>, usize)>,
    _saved: Vec<Tensor>,
}

impl Journal {
    /// Allocates the journal for the layers of `run`.
    pub fn new(run: &Run, gpu: &CudaDevice) -> Result<Self> {
        let (mut entries, mut saved) = (vec![], vec![]);
        for (plan, state) in run.layout().layers.iter().zip(&run.cache().layers) {
            let Some(mut entry) = overwritten(state)? else { continue };
            if let Some(b) = plan.butterfly() {
                (entry.block, entry.readable) = (b.settings.block as i32, b.grid.readable() as i32);
            }
            let floats = 4 * BATCH * entry.row as usize / 4 + entry.width as usize;
            let room = uninitialised(gpu, DType::F32, floats)?;
            entry.saved = address(&room)?;
            saved.push(room);
            entries.push(entry);
        }
        let table = (!entries.is_empty()).then(|| upload(gpu, &entries)).transpose()?.map(|t| (t, entries.len()));
        Ok(Self { table, _saved: saved })
    }

    /// Saves the rows that `count` steps from `state`'s position on overwrite, or restores them.
    pub fn exchange(&self, gpu: &CudaDevice, state: &CudaSlice<State>, count: usize, restore: bool) -> Result<()> {
        let Some((table, layers)) = &self.table else { return Ok(()) };
        let kernel = Kernel::load(gpu, "decode", "decode_journal".into())?;
        let at = state.device_ptr(&gpu.cuda_stream()).0;
        let launch = Launch::new(kernel, (*layers, PARTS, 1), 256).with(table.address).with(at);
        let launch = launch.with(count as i32).with(i32::from(restore));
        // SAFETY: the table names memory of the run's cache and of `_saved`, which outlive the step; at most BATCH
        // steps.
        unsafe { launch.enqueue(false) }
    }

    /// Undoes a batch of `launched` steps that began at state `begin`, and runs its first `delivered` steps again.
    pub fn rewind(
        &self,
        gpu: &CudaDevice,
        state: &mut CudaSlice<State>,
        (begin, launched): (State, usize),
        mut step: impl FnMut() -> Result<()>,
        delivered: usize,
    ) -> Result<()> {
        gpu.memcpy_htod(&[begin], state)?;
        self.exchange(gpu, state, launched, true)?;
        (0..delivered).try_for_each(|_| step())?;
        gpu.cuda_stream().synchronize().map_err(driver)
    }
}

/// Returns the journal entry of a layer whose later steps overwrite rows that earlier positions need; `None` if there
/// are none.
fn overwritten(state: &LayerState) -> Result<Option<Entry>> {
    let ring = |ring: &Ring| -> Result<Entry> {
        let k = ring.rows().k;
        let row = k.elem_count() / ring.capacity() * k.dtype().size_in_bytes();
        let (ring_k, ring_v) = (address(k)?, address(ring.rows().v)?);
        Ok(Entry { ring_k, ring_v, capacity: ring.capacity() as i32, row: row as i32, block: 1, ..Entry::default() })
    };
    match state {
        LayerState::Dense(_) | LayerState::CompressedKv(_) => Ok(None),
        LayerState::Recurrent(layer) => {
            let memory = layer.on_gpu().map(|state| state.memory());
            let width = memory.map_or(0, |m| m.elem_count() as i32);
            Ok(Some(Entry { running: address_or_null(memory)?, width, block: 1, mean_rows: 1, ..Entry::default() }))
        }
        LayerState::Ring(rows) => ring(rows).map(Some),
        // Codes and host rows past the end are written again.
        LayerState::Recall(cache) => ring(&cache.local).map(Some),
        LayerState::TwoPool(pools) => {
            let mut entry = ring(&pools.local)?;
            if let Some(means) = pools.summary_rows() {
                (entry.mean_k, entry.mean_v) = (address(means.rows().k)?, address(means.rows().v)?);
                entry.mean_rows = means.capacity() as i32;
            }
            entry.running = address_or_null(pools.running.on_device())?;
            entry.width = pools.running.on_device().map_or(0, |sums| sums.elem_count() as i32);
            Ok(Some(entry))
        }
    }
}
