//! Speed and memory: end-to-end ladders, the largest contexts within memory budgets, and single kernels.
//!
//! ```text
//! args --> ladder --> schedule --> engine (bfly) ---------------------> report (saved after every timed run)
//!            |                `--> peer (another engine, by pipe) ---^
//!            `------> texts: prompts are prefixes of one stream of documents
//! args --> max_context --> engine, which verifies the computed context
//! args --> kernel --> cases --> ops
//! ```
//!
//! # A ladder
//!
//! At each context, in rising order, every variant and every peer runs once per repeat, and the order rotates from one
//! repeat to the next, so that drift of the machine affects all of them alike. A run prefills `ctx - decode` tokens and
//! generates `decode` more, greedily; end-of-text tokens do not stop it. All variants share one copy of the weights; a
//! cache exists only during its run. The first run at a context is preceded by an untimed warm-up, except for bfly
//! where the next smaller context took several seconds.
//!
//! | figure | from | to |
//! |---|---|---|
//! | `prefill_s` | ids on the host, cache allocated | logits of the last position |
//! | `ttft_s` | the same | the first new token on the host |
//! | `end_to_end_s` | the same | the last new token on the host |
//! | `inter_token_s` | a token on the host | the next one; within a batch fetched by one host sync, the batch's mean |
//! | `prompt_s` | | copying the prompt from the stream; not part of the figures above |
//!
//! `peak_device_bytes` is the peak of the device allocator during the run: weights, cache and activations, without the
//! driver's own memory. On a CPU it is the peak resident memory of the process, code and mapped files included.
//!
//! `decode_gb_s` is the bytes that a decode step must read, divided by the median time between tokens. They are every
//! weight matrix once, as stored (the embedding table only where it is also the head), and every key and value that the
//! token may attend to, once per KV head (all earlier positions, a sliding window, or a retrofit's window, sinks and
//! routed summaries). Norms, biases, activations and writes are not counted.
//!
//! A run that is out of memory is recorded with the allocator's message, and that entry skips larger contexts.
//!
//! # The largest context
//!
//! The largest context of a variant within a budget is the largest `ctx`, a multiple of 1024 tokens, for which
//!
//! ```text
//! weights + cache(ctx) + buffers + 128 · activations of a token  <=  budget        (bytes; see generate::MemoryNeeds)
//! ```
//!
//! Bisection finds it, since a cache never shrinks as its context grows. A run then verifies it: its cache is
//! provisioned for exactly that context, its prefill chunk is as large as the rest of the budget allows, and its peak
//! is compared with the budget. The run may read fewer tokens than are provisioned: the cache is allocated in full
//! before the first token and activations depend on the chunk alone, so the peak equals that of a longer run; the time
//! does not. (A rule that evicts once copies the tokens it keeps into a cache with room for the remaining context:
//! `cache(ctx)` is the maximum over both.) Memory is released between runs, so that each starts with the weights alone.
//!
//! # Kernels
//!
//! A sample is the mean of a batch of launches between two device synchronisations; batches take at least 20 ms on a
//! GPU. Launches rotate over input sets whose total size exceeds the L2 cache. FLOP and bytes are those of the
//! definition: masked positions do not count, each input is read once and each output is written once.
//!
//! # Transforms
//!
//! `bfly-transforms bench` times products with single vectors, one thread, data in the cache. A sample is the mean of
//! as many products as take a millisecond; every method takes one sample in each round.

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
pub mod sweep;
pub mod transforms;
