//! The cache's size is a function of the settings, and a run stays within weights, cache and a fixed allowance.

use crate::common::*;
use bfly::cache::Cache;
use bfly::eviction::EvictionPlan;
use bfly::generate::watch;
use bfly::layout::Layout;
use bfly::method::Method;
use bfly::retrofit::{RetrofitPlan, Settings};
use bfly::selector::{find, reach, rows_needed, stages_of};
use candle_core::{DType, Device};
use proptest::prelude::*;

/// The design's own example: 24 full-attention layers.
fn ratio(settings: &Settings, ctx: usize) -> Any<f64> {
    let dir = variant("llama", |c| c["num_hidden_layers"] = 24.into())?;
    let spec = open(&dir.path().to_string_lossy())?.spec;
    let plan = RetrofitPlan::new(&spec, None, settings.clone())?;
    let cache = Cache::new(&Layout::new(&spec, &plan, ctx)?, candle_core::DType::F32, &Device::Cpu)?;
    Ok(cache.capacity_bytes().total() as f64 / cache.dense_bytes() as f64)
}

#[test]
fn default_caches_are_as_small_as_promised() -> Any {
    for (ctx, limit) in [(8 << 10, 0.083), (64 << 10, 0.0115), (256 << 10, 0.0036), (1 << 20, 0.0016)] {
        let got = ratio(&Settings::default(), ctx)?;
        println!("{ctx}: {got:.5} of dense");
        assert!(got <= limit, "{ctx}: {got} of dense");
    }
    Ok(())
}

/// What a layout plans is what a cache allocates, by pool and layer, whatever the method.
#[test]
fn planned_bytes_are_allocated_bytes() -> Any {
    for name in ["llama", "gemma3", "qwen3_d128"] {
        let spec = open(&golden_dir(name).to_string_lossy())?.spec;
        for ctx in [1, 40, 700] {
            let mut methods = vec![Method::Stock];
            for (block, window, sinks, partner) in
                [(16, 32, 4, "causal_shift"), (7, 0, 0, "all"), (128, 512, 4, "local")]
            {
                let settings =
                    Settings { block, window, sink_tokens: sinks, partner: partner.into(), ..Settings::default() };
                methods.push((&RetrofitPlan::new(&spec, None, settings)?).into());
            }
            methods.push((&EvictionPlan::new("keydiff", 30, &[("block", 16)])?).into());
            methods.push((&EvictionPlan::new("snapkv", 30, &[("window", 8)])?).into());
            for method in methods {
                let layout = Layout::new(&spec, &method, ctx)?;
                for dtype in [DType::F32, DType::BF16] {
                    let cache = Cache::new(&layout, dtype, &Device::Cpu)?;
                    for (plan, state) in layout.layers.iter().zip(&cache.layers) {
                        assert_eq!(plan.bytes(dtype), state.capacity_bytes(), "{name} at {ctx}: {method:?}");
                    }
                    assert_eq!(layout.bytes(dtype).dense, cache.dense_bytes());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn capacity_does_not_depend_on_the_text() -> Any {
    let settings = Settings { block: 16, window: 64, ..Settings::default() };
    let model = load_golden("llama", Some(&settings), 8 << 10)?;
    let mut session = model.run()?;
    let (empty, mut used) = (session.cache().capacity_bytes(), 0);
    for _ in 0..8 {
        session.prefill(&vec![7; 1 << 10], 512, 1, &mut watch(|_| ()))?;
        assert_eq!(session.cache().capacity_bytes(), empty, "after {} tokens", session.cache().position());
        let now = session.cache().used_bytes().total();
        assert!(now >= used && now <= empty.total(), "{now} bytes used of {}", empty.total());
        used = now;
    }
    let error = session.prefill(&[7], 512, 1, &mut watch(|_| ())).unwrap_err().to_string();
    assert!(error.contains("1 tokens after 8192 exceed the context length of 8192"), "{error}");
    assert_eq!(session.cache().position(), 8 << 10, "a refused token must change nothing");
    Ok(())
}

#[test]
fn stock_caches_hold_the_whole_context_and_sliding_layers_their_window() -> Any {
    let model = load_golden("gemma3", None, 1000)?;
    let run = model.run()?;
    let cache = run.cache();
    // One full layer of 1000 positions, five sliding ones of 64; one KV head of 32, keys and values, f32.
    assert_eq!(cache.capacity_bytes().total(), (1000 + 5 * 64) * 32 * 2 * 4);
    assert_eq!(cache.dense_bytes(), cache.capacity_bytes().total());
    Ok(())
}

/// Every block's state reaches every later block within `S_t + 1` swapped layers, wherever the cycle of stages starts.
///
/// For all N at once: distances, not blocks, are walked, since a far hop needs only that the block exists.
#[test]
fn causal_shift_reaches_every_earlier_block_up_to_4096() -> Any {
    let rule = find("causal_shift")?;
    for window in 0..=8 {
        for blocks in 1..=4096usize {
            let grid = Settings { block: 1, window, ..Settings::default() }.grid(blocks);
            let layers = grid.stages() + 1;
            for start in 0..grid.stages() {
                // Bit d: the block at distance d behind is reached.
                let mut reached = Bits::new(blocks);
                for layer in start..start + layers {
                    let offset = grid.offset(stages_of(rule, &grid, layer, 1)[0]);
                    let mut next = reached.clone();
                    (1..=window).chain([offset]).for_each(|hop| next.or_shifted(&reached, hop));
                    reached = next;
                }
                assert!(reached.all(), "N {blocks}, w {window}, first stage {start}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_walk_over_blocks_agrees_with_the_walk_over_distances() -> Any {
    for (window, blocks) in [(0, 9), (2, 40), (4, 64), (4, 65), (8, 512)] {
        let grid = Settings { block: 1, window, ..Settings::default() }.grid(blocks);
        let rule = find("causal_shift")?;
        assert_eq!(reach(rule, &grid, grid.stages() + 1, 1), 1.0);
        assert!(rows_needed(rule, &grid, 0, 1) <= grid.unit);
    }
    Ok(())
}

#[derive(Clone)]
struct Bits(Vec<u64>, usize);

impl Bits {
    fn new(len: usize) -> Self {
        let mut words = vec![0; len.div_ceil(64)];
        words[0] = 1;
        Self(words, len)
    }

    fn or_shifted(&mut self, other: &Self, by: usize) {
        let (words, bits) = (by / 64, by % 64);
        for i in (words..self.0.len()).rev() {
            let low = other.0[i - words] << bits;
            let high = if bits > 0 && i > words { other.0[i - words - 1] >> (64 - bits) } else { 0 };
            self.0[i] |= low | high;
        }
    }

    fn all(&self) -> bool {
        (0..self.1).all(|d| self.0[d / 64] >> (d % 64) & 1 == 1)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn capacity_is_the_same_before_during_and_after_any_text(
        block in 1usize..64, window_blocks in 0usize..6, sink_tokens in 0usize..20, length in 1usize..600, chunk in 1usize..300,
    ) {
        let fail = |e: bfly::Error| TestCaseError::fail(e.to_string());
        let settings = Settings { block, window: window_blocks * block, sink_tokens, ..Settings::default() };
        let model = load_golden("llama", Some(&settings), 600).map_err(fail)?;
        let mut session = model.run().map_err(fail)?;
        let empty = session.cache().capacity_bytes();
        session.prefill(&vec![9; length], chunk, 1, &mut watch(|_| ())).map_err(fail)?;
        prop_assert_eq!(session.cache().capacity_bytes(), empty);
        prop_assert!(session.cache().used_bytes().total() <= empty.total());
    }
}
