//! Cache of a layer with exact recall: sinks and local ring, codes of every position, and every exact key and value in
//! host memory.

#[cfg(feature = "cuda")]
use super::GpuCodes;
use super::{CpuCodes, HostMemory, HostStore, PoolBytes, Ring, Sinks, TwoPool};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{LayerPlan, RecallLayer};
use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use std::sync::Arc;

/// Cache of a layer with exact recall.
#[derive(Debug)]
pub struct RecallKv {
    /// Local ring of `(w + 1) B` raw positions: the window and the query's own block.
    pub local: Ring,
    /// Sinks, positions `0..S`.
    sinks: Sinks,
    /// Every position's exact key and value.
    pub(crate) store: HostStore,
    /// Codes of every position.
    pub codes: Codes,
    /// Window, sinks and block summaries that a prompt is read by, and the position up to which they are complete.
    prompt: Option<(Box<TwoPool>, usize)>,
    /// Bytes of all pools, as the layout computes them.
    bytes: PoolBytes,
    ctx: usize,
    /// Rows that steps on a CPU have fetched, and by KV head the positions that the last one fetched, a bit each.
    fetched: (Fetched, Vec<Vec<u64>>),
}

/// Rows of keys and values that the decode steps of a layer have fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Fetched {
    /// Rows of all KV heads and steps.
    pub rows: u64,
    /// Rows that the step before had fetched too.
    pub repeated: u64,
}

impl std::ops::AddAssign for Fetched {
    fn add_assign(&mut self, other: Self) {
        self.rows += other.rows;
        self.repeated += other.repeated;
    }
}

/// Codes of a layer, where its queries are.
#[derive(Debug)]
pub enum Codes {
    /// In ordinary memory.
    Cpu(CpuCodes),
    /// On a GPU.
    #[cfg(feature = "cuda")]
    Gpu(Box<GpuCodes>),
}

/// Memory that the layers of a run share: scratch memory, one piece per shape of layer, of which steps on a CPU need
/// none; and where their host stores come from.
#[derive(Debug)]
pub(super) struct Workspace {
    pub memory: Arc<HostMemory>,
    #[cfg(feature = "cuda")]
    pub scratch: Vec<Arc<super::recall_gpu::Scratch>>,
}

impl Workspace {
    /// Creates a workspace without scratch memory.
    pub fn new(memory: Arc<HostMemory>) -> Self {
        Self {
            memory,
            #[cfg(feature = "cuda")]
            scratch: vec![],
        }
    }
}

impl Codes {
    /// Returns the codes in ordinary memory, if that is where they are.
    pub fn in_memory(&self) -> Option<&CpuCodes> {
        match self {
            Self::Cpu(codes) => Some(codes),
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => None,
        }
    }

    /// Whether a decode step appends its token to the codes.
    fn append(&self) -> bool {
        match self {
            Self::Cpu(_) => false,
            #[cfg(feature = "cuda")]
            Self::Gpu(codes) => codes.appends(),
        }
    }

    /// Whether the kernels that code tokens store their rows.
    fn store_rows(&self) -> bool {
        match self {
            Self::Cpu(_) => false,
            #[cfg(feature = "cuda")]
            Self::Gpu(codes) => codes.stores_rows(),
        }
    }
}

impl RecallKv {
    /// Allocates the cache of `layer`; `local` is its ring.
    pub(super) fn new(
        layer: &RecallLayer,
        local: Ring,
        plan: &LayerPlan,
        workspace: &mut Workspace,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        let Some(tables) = layer.tables.clone() else {
            return Err(Error::new(ErrorKind::Usage, "recall", "needs a calibration of this model"));
        };
        let row = plan.row();
        let store = HostStore::new(layer.ctx, row, dtype, device, &workspace.memory)?;
        let codes = match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                Codes::Gpu(Box::new(GpuCodes::new(layer, plan, &tables, store.gpu()?, workspace, (dtype, device))?))
            }
            _ => Codes::Cpu(CpuCodes::new(layer, tables, row.1)),
        };
        let prompt = layer.summaries.as_ref().map(|summaries| -> Result<_> {
            let local = Ring::new(summaries.settings.ring_rows(), row, dtype, device)?;
            Ok((Box::new(TwoPool::new(summaries, local, row, dtype, device)?), 0))
        });
        Ok(Self {
            local,
            sinks: Sinks::new(layer.sink_rows, layer.settings.sink_tokens, row, dtype, device)?,
            store,
            codes,
            prompt: prompt.transpose()?,
            bytes: plan.bytes(dtype),
            ctx: layer.ctx,
            fetched: (Fetched::default(), vec![vec![]; row.0]),
        })
    }

    /// Returns the sinks, if the layer has any.
    pub fn sinks(&self) -> Option<&Ring> {
        self.sinks.rows()
    }

    /// Returns the summaries that a chunk of `tokens` at `start` is read by, which it must be stored in. `None` where prefill
    /// is exact: also after a decode step, which they lack.
    pub fn summaries(&mut self, start: usize, tokens: usize) -> Option<&mut TwoPool> {
        let (pools, complete) = self.prompt.as_mut().filter(|(_, complete)| *complete == start)?;
        *complete += tokens;
        Some(pools)
    }

    /// Returns the exact keys and values of every position.
    pub fn store(&self) -> &HostStore {
        &self.store
    }

    /// Counts the positions that a step on a CPU has fetched for each KV head.
    pub(crate) fn count(&mut self, chosen: &[Vec<u32>]) {
        let (all, before) = &mut self.fetched;
        for (chosen, before) in chosen.iter().zip(before) {
            let mut now = vec![0; self.ctx.div_ceil(64)];
            chosen.iter().for_each(|p| now[*p as usize / 64] |= 1u64 << (p % 64));
            all.rows += chosen.len() as u64;
            all.repeated += now.iter().zip(before.iter()).map(|(a, b)| u64::from((a & b).count_ones())).sum::<u64>();
            *before = now;
        }
    }

    /// Returns the rows that decode steps have fetched.
    ///
    /// # Errors
    /// The device fails.
    pub fn fetched(&self) -> Result<Fetched> {
        match &self.codes {
            Codes::Cpu(_) => Ok(self.fetched.0),
            #[cfg(feature = "cuda")]
            Codes::Gpu(codes) => codes.fetched(),
        }
    }

    /// Whether a captured step can hold the layer.
    #[cfg(feature = "cuda")]
    pub(crate) fn captured(&self) -> bool {
        matches!(&self.codes, Codes::Gpu(codes) if codes.captured())
    }

    /// Stores `T` tokens of a prompt from position `start` on, after attention.
    ///
    /// # Shapes
    /// `k`, `v` `[T, G, D]`, keys rotated.
    ///
    /// # Errors
    /// Positions beyond the context.
    pub fn push(&mut self, k: &Tensor, v: &Tensor, start: usize) -> Result<()> {
        self.store_coded(k, v, start, true)
    }

    /// Stores tokens; `prompt` tokens are among those that codes are refitted to.
    fn store_coded(&mut self, k: &Tensor, v: &Tensor, start: usize, prompt: bool) -> Result<()> {
        self.push_near(k, v, start)?;
        self.push_rows(k, v, start)?;
        match &mut self.codes {
            Codes::Cpu(codes) => codes.push(&self.store, start, k.dim(0)?, prompt),
            #[cfg(feature = "cuda")]
            Codes::Gpu(codes) => codes.push(k, v, start, prompt),
        }
    }

    /// Stores the rows of `T` tokens in host memory, and the block means that kernels cannot read them for, where the
    /// kernels that code the tokens do neither.
    fn push_rows(&mut self, k: &Tensor, v: &Tensor, start: usize) -> Result<()> {
        if self.codes.store_rows() {
            return Ok(());
        }
        self.store.write(k, v, start)?;
        #[cfg(feature = "cuda")]
        if let Codes::Gpu(codes) = &mut self.codes {
            codes.average(self.store.gpu()?, start..start + k.dim(0)?)?;
        }
        Ok(())
    }

    /// Stores `T` tokens in the ring and among the sinks alone.
    ///
    /// # Errors
    /// Those of [`Ring::write`].
    pub fn push_near(&mut self, k: &Tensor, v: &Tensor, start: usize) -> Result<()> {
        self.sinks.keep(k, v, start)?;
        self.local.write(k, v, start)
    }

    /// Stores the token of a decode step, `[1, G, D]`, where the step's kernels have not.
    ///
    /// # Errors
    /// Those of [`RecallKv::push`].
    pub fn push_step(&mut self, k: &Tensor, v: &Tensor, position: usize) -> Result<()> {
        match self.codes.append() {
            true => {
                self.push_near(k, v, position)?;
                self.push_rows(k, v, position)
            }
            false => self.store_coded(k, v, position, false),
        }
    }

    /// Returns the allocated bytes by pool.
    pub fn capacity_bytes(&self) -> PoolBytes {
        let (key_codes, values) = match &self.codes {
            Codes::Cpu(codes) => codes.bytes(),
            #[cfg(feature = "cuda")]
            Codes::Gpu(codes) => codes.bytes(),
        };
        PoolBytes {
            local: self.local.capacity_bytes(),
            sink: self.sinks.capacity_bytes(),
            key_codes,
            values,
            host: self.store.capacity_bytes(),
            ..self.bytes
        }
    }

    /// Returns the bytes in use by pool after `position` tokens.
    pub fn used_bytes(&self, position: usize) -> PoolBytes {
        let all = self.capacity_bytes();
        let share = |bytes: u64| (bytes as u128 * position.min(self.ctx) as u128 / self.ctx as u128) as u64;
        PoolBytes {
            local: self.local.used_bytes(position),
            sink: self.sinks.used_bytes(position),
            key_codes: share(all.key_codes),
            values: share(all.values),
            host: self.store.used_bytes(position),
            ..all
        }
    }
}
