//! Measurements: end-to-end ladders, the largest contexts within memory budgets, and single kernels, written as the JSON from which figures are drawn.
//!
//! ```text
//! args --> ladder --> engine (this one) --> file (whole after every sample) --> table
//!            |  `---> peer (another one, over a pipe) ---^
//!            `------> prompt: prefixes of one stream of documents
//! args --> fit --> engine, for as long as it fits
//! args --> kernel --> cases --> ops
//! ```
//!
//! # A ladder
//!
//! At each context, rising, every variant and every peer takes its turn, and the order rotates from one repeat to the next: what
//! drifts in the machine falls on all of them alike. A run reads `ctx - decode` tokens and makes `decode` more, greedily and
//! past any end of text. Weights are held once for all variants; a cache lives only while its run does. Before its first run at a
//! context each gets an untimed one, but for this engine where the next smaller context took it several seconds.
//!
//! | figure | from | to |
//! |---|---|---|
//! | `prefill_s` | ids on the host, cache allocated | logits of the last position |
//! | `ttft_s` | the same | the first new token on the host |
//! | `end_to_end_s` | the same | the last new token on the host |
//! | `inter_token_s` | a token on the host | the next one, or the mean within a batch that is fetched at once |
//! | `prompt_s` | | taking the prompt from the stream, outside all of these |
//!
//! `peak_device_bytes` is the highest that the device's allocator held during the run: weights, cache and activations, but not what
//! a driver takes for itself. On a CPU it is the highest resident memory of the process, its code and files included.
//!
//! `decode_gb_s` is what a new token has to read, over the median time between tokens. That is every matrix once in the
//! form it is held, without the embedding table unless the head reads it too, and every key and value that the token may see,
//! once per KV head: all earlier positions, a sliding window, or a retrofit's window, sinks and routed summaries. Norms, biases,
//! activations and what the step writes are left out.
//!
//! A run that does not fit is recorded with what its allocator said, and not tried at larger contexts.
//!
//! # A fit
//!
//! The largest context of a variant within a budget is the largest `ctx`, in whole multiples of 1024 tokens, for which
//!
//! ```text
//! weights + cache(ctx) + buffers + 128 · activations of a token  <=  budget        (bytes; see generate::Needs)
//! ```
//!
//! It is found by bisection, since no cache shrinks as its context grows, and then verified: a cache for exactly that context, as
//! large a prefill chunk as the rest of the budget has room for, and a run whose peak is compared with the budget. The run may read
//! fewer tokens than are provisioned. A cache is allocated whole before the first token, and activations depend on the chunk alone, so
//! its peak is that of a longer run; its seconds are not. (A rule that evicts once copies what it keeps, with room for what may follow:
//! `cache(ctx)` counts the most that this can be.) Memory is handed back between runs: each begins with the weights alone.
//!
//! # Kernels
//!
//! A sample is the mean of a batch of launches between two waits for the device; batches take at least 20 ms on a GPU. Inputs
//! rotate over sets that are larger than its second-level cache together. FLOP and bytes are those of the definition: masked
//! positions are no work, each input is read once and each output written once.

pub mod args;
mod cases;
pub mod engine;
pub mod file;
pub mod format;
pub mod kernel;
pub mod ladder;
pub mod ladder_args;
pub mod machine;
pub mod max_context;
pub mod peer;
pub mod prompt;
mod schedule;
pub mod summary;
pub(crate) mod table;
