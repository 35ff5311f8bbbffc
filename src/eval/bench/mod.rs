//! Speed and memory: end-to-end ladders, the largest contexts within memory budgets, and single kernels.
//!
//! ```text
//! args --> ladder --> schedule --> engine (this one) ------------> report (saved after every timed run)
//!            |                `--> peer (another one, by pipe) ---^
//!            `------> texts: prompts are prefixes of one stream of documents
//! args --> max_context --> engine, verifying what arithmetic found
//! args --> kernel --> cases --> ops
//! ```
//!
//! # A ladder
//!
//! At each context, rising, every variant and every peer takes its turn, and the order rotates from one repeat to the
//! next, so that a drift of the machine falls on all of them alike. A run reads `ctx - decode` tokens and generates
//! `decode` more, greedily and past any end of text. Weights are held once for all variants; a cache exists only while
//! its run does. Before its first run at a context each gets an untimed one, except this engine where the next smaller
//! context took it several seconds.
//!
//! | figure | from | to |
//! |---|---|---|
//! | `prefill_s` | ids on the host, cache allocated | logits of the last position |
//! | `ttft_s` | the same | the first new token on the host |
//! | `end_to_end_s` | the same | the last new token on the host |
//! | `inter_token_s` | a token on the host | the next one; within a batch fetched by one host sync, the batch's mean |
//! | `prompt_s` | | taking the prompt from the stream, outside all of these |
//!
//! `peak_device_bytes` is the most that the device's allocator held during the run: weights, cache and activations, but
//! not the driver's own memory. On a CPU it is the highest resident memory of the process, its code and files included.
//!
//! `decode_gb_s` is the bytes that a decode step has to read over the median time between tokens: every matrix once in
//! the form it is held, without the embedding table unless the head reads it too, and every key and value that the
//! token may see, once per KV head (all earlier positions, a sliding window, or a retrofit's window, sinks and routed
//! summaries). Norms, biases, activations and writes are left out.
//!
//! A run that is out of memory is recorded with the allocator's message, and larger contexts are skipped.
//!
//! # The largest context
//!
//! The largest context of a variant within a budget is the largest `ctx`, in whole multiples of 1024 tokens, for which
//!
//! ```text
//! weights + cache(ctx) + buffers + 128 · activations of a token  <=  budget        (bytes; see generate::MemoryNeeds)
//! ```
//!
//! Bisection finds it, since no cache shrinks as its context grows, and a run verifies it: with a cache for exactly
//! that context and as large a prefill chunk as the rest of the budget has room for, its peak is compared with the
//! budget. The run may read fewer tokens than are provisioned. A cache is allocated whole before the first token, and
//! activations depend on the chunk alone, so its peak is that of a longer run; its seconds are not. (A rule that evicts
//! once copies what it keeps, with room for what may follow: `cache(ctx)` counts the most that this can be.) Memory is
//! handed back between runs, so that each begins with the weights alone.
//!
//! # Kernels
//!
//! A sample is the mean of a batch of launches between two device synchronisations; batches take at least 20 ms on a
//! GPU. Inputs rotate over sets that are together larger than the second-level cache. FLOP and bytes are those of the
//! definition: masked positions are no work, each input is read once and each output written once.

pub mod args;
mod cases;
mod ceilings;
pub mod engine;
pub mod kernel;
pub mod ladder;
pub mod ladder_args;
pub mod max_context;
pub mod peak;
pub mod peer;
mod schedule;
