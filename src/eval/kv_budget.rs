//! `kv=SHARE`: the largest window or eviction budget whose cache takes at most a given share of a dense cache's bytes.

use crate::cli::short_count;
use crate::error::{Error, Result};
use crate::eviction::EvictionPlan;
use crate::layout::Layout;
use crate::method::Method;
use crate::ops::human_bytes;
use crate::retrofit::{RetrofitPlan, Settings};
use crate::spec::ModelSpec;
use candle_core::DType;

/// Element type for which shares are computed; the running sums, a few rows, are f32 at any element type.
const DTYPE: DType = DType::BF16;

/// Parses a share such as `1/16` or `0.25`: more than 0, at most 1.
///
/// # Errors
/// Text that is neither a fraction nor a decimal number in this range.
pub fn parse_share(text: &str) -> std::result::Result<f64, String> {
    let number = |t: &str| t.trim().parse::<f64>().ok();
    let share = match text.split_once('/') {
        Some((of, whole)) => number(of).zip(number(whole)).map(|(of, whole)| of / whole),
        None => number(text),
    };
    match share {
        Some(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => Err("not a share of a dense cache such as 1/16 or 0.25".into()),
    }
}

/// Returns the largest `n` from 1 to `most` for which `fits(n)` holds, by bisection; `None` where `fits(1)` does not.
/// `fits` must be monotone: true up to some `n`, false beyond it.
///
/// # Errors
/// Those of `fits`.
pub fn bisect(most: usize, fits: impl Fn(usize) -> Result<bool>) -> Result<Option<usize>> {
    let (mut last, mut beyond) = (0, most + 1);
    while beyond - last > 1 {
        let middle = usize::midpoint(last, beyond);
        match fits(middle)? {
            true => last = middle,
            false => beyond = middle,
        }
    }
    Ok((last > 0).then_some(last))
}

/// Returns `settings` with the widest window of up to `most` tokens for which `bytes` is at most `target`; `None` where
/// a window of one block exceeds it.
///
/// # Errors
/// Those of `bytes`.
pub fn widest_window(
    settings: &Settings,
    target: u64,
    most: usize,
    bytes: impl Fn(&Settings) -> Result<u64>,
) -> Result<Option<Settings>> {
    let with = |blocks: usize| Settings { window: blocks * settings.block, ..settings.clone() };
    Ok(bisect(most.div_ceil(settings.block), |blocks| Ok(bytes(&with(blocks))? <= target))?.map(with))
}

/// Returns `plan` with the widest window whose cache for `ctx` positions takes at most `share` of a dense one.
///
/// # Errors
/// A share that a window of one block exceeds.
pub fn retrofit(plan: &RetrofitPlan, spec: &ModelSpec, ctx: usize, share: f64) -> Result<RetrofitPlan> {
    let with = |settings: &Settings| RetrofitPlan::new(spec, Some(plan.layers.clone()), settings.clone());
    let bytes = |settings: &Settings| Ok(Layout::new(spec, &with(settings)?, ctx)?.bytes(DTYPE).peak);
    let target = target(spec, ctx, share)?;
    match widest_window(&plan.settings, target, ctx, bytes)? {
        Some(settings) => with(&settings),
        None => {
            let least = bytes(&Settings { window: plan.settings.block, ..plan.settings.clone() })?;
            let what = format!("a window of one block of {}", plan.settings.block);
            Err(too_small(ctx, &what, least, target, "smaller blocks, or fewer layers kept dense, take less"))
        }
    }
}

/// Returns `plan` with the largest budget whose cache for `ctx` positions takes at most `share` of a dense one: at the
/// peak for a rule that evicts block by block, after eviction for a rule that evicts once, since the whole context is
/// cached before that.
///
/// # Errors
/// A share that the smallest budget of the rule exceeds.
pub fn eviction(plan: &EvictionPlan, spec: &ModelSpec, ctx: usize, share: f64) -> Result<EvictionPlan> {
    let with = |budget: usize| EvictionPlan { budget, ..plan.clone() };
    let bytes = |budget: usize| Layout::new(spec, &with(budget), ctx).map(|l| l.bytes(DTYPE).settled);
    let target = target(spec, ctx, share)?;
    // The smallest budget that the rule allows; where it allows none, `check` returns the error.
    let least = bisect(ctx, |budget| Ok(with(budget).check().is_err()))?.map_or(1, |refused| refused + 1);
    with(least.min(ctx)).check()?;
    match bisect(ctx, |budget| Ok(budget < least || bytes(budget)? <= target))?.filter(|budget| *budget >= least) {
        Some(budget) => Ok(with(budget)),
        None => {
            let what = format!("a budget of {least} for each KV head");
            let remedy = "a smaller block or observation window takes less";
            Err(too_small(ctx, &what, bytes(least)?, target, remedy))
        }
    }
}

/// Bytes of `share` of a dense cache.
fn target(spec: &ModelSpec, ctx: usize, share: f64) -> Result<u64> {
    Ok((share * Layout::new(spec, Method::Stock, ctx)?.bytes(DTYPE).dense as f64) as u64)
}

fn too_small(ctx: usize, what: &str, least: u64, target: u64, remedy: &str) -> Error {
    let (least, target) = (human_bytes(least), human_bytes(target));
    Error::usage("kv", format!("{what} takes {least} at {}, the share is {target}; {remedy}", short_count(ctx)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::eviction::{When, RULES};
    use crate::selector::SELECTORS;

    fn spec() -> ModelSpec {
        Checkpoint::random("tests/fixtures/shapes/qwen2.5-0.5b", 0).unwrap().spec
    }

    #[test]
    fn shares_are_fractions_or_decimals() {
        for (text, want) in [("1/64", 1.0 / 64.0), ("0.25", 0.25), ("1", 1.0), (" 3 / 8 ", 0.375)] {
            assert_eq!(parse_share(text), Ok(want), "{text}");
        }
        for text in ["", "0", "2", "-1/4", "1/0", "0/0", "x", "1/2/3", "nan", "25%"] {
            assert!(parse_share(text).unwrap_err().contains("not a share"), "{text}");
        }
    }

    #[test]
    fn every_share_is_kept_to_and_used() -> Result<()> {
        let (spec, ctx) = (spec(), 8192);
        let dense = Layout::new(&spec, Method::Stock, ctx)?.bytes(DTYPE).dense;
        for share in [1.0, 0.5, 0.25, 1.0 / 16.0, 1.0 / 64.0] {
            let allowed = (dense as f64 * share) as u64;
            for rule in SELECTORS {
                let settings = Settings { block: 16, partner: rule.name().into(), ..Settings::default() };
                let plan = RetrofitPlan::new(&spec, None, settings)?;
                let bytes = |plan: &RetrofitPlan| Ok::<_, Error>(Layout::new(&spec, plan, ctx)?.bytes(DTYPE).peak);
                // Rules that may read any summary need the room for all.
                if let Ok(got) = retrofit(&plan, &spec, ctx, share) {
                    let wider = Settings { window: got.settings.window + 16, ..got.settings.clone() };
                    let wider = bytes(&RetrofitPlan::new(&spec, None, wider)?)?;
                    let took = bytes(&got)?;
                    assert!(took <= allowed, "{} at {share}: {took} of {allowed}", rule.name());
                    assert!(wider > allowed || got.settings.window >= ctx, "{} at {share}: more fits", rule.name());
                } else {
                    assert!(share < 0.1 && ["all", "random"].contains(&rule.name()), "{} at {share}", rule.name());
                }
            }
            for rule in RULES {
                let plan = EvictionPlan::new(rule.name(), 100, &[])?;
                let Ok(got) = eviction(&plan, &spec, ctx, share) else {
                    assert!(share < 0.02, "{} at {share}", rule.name());
                    continue;
                };
                let took = match rule.when(&got) {
                    When::Once => Layout::new(&spec, &got, ctx)?.bytes(DTYPE).settled,
                    When::EveryBlock(_) => Layout::new(&spec, &got, ctx)?.bytes(DTYPE).peak,
                };
                let row = 24 * 2 * 2 * 2 * 64;
                assert!(took <= allowed && took + row > allowed, "{} at {share}: {took} of {allowed}", rule.name());
            }
        }
        Ok(())
    }

    #[test]
    fn a_plan_with_dense_layers_gives_them_their_room_first() -> Result<()> {
        let (spec, ctx) = (spec(), 8192);
        let swapped: Vec<usize> = (0..24).filter(|l| ![9, 16].contains(l)).collect();
        let plan = RetrofitPlan::new(&spec, Some(swapped), Settings::default())?;
        let all = retrofit(&RetrofitPlan::new(&spec, None, Settings::default())?, &spec, ctx, 0.25)?;
        let some = retrofit(&plan, &spec, ctx, 0.25)?;
        assert!(some.settings.window < all.settings.window);
        // Two layers of 24 are more than 1/16.
        let e = retrofit(&plan, &spec, ctx, 1.0 / 16.0).unwrap_err().to_string();
        assert!(e.contains("kv: a window of one block of 128 takes") && e.contains("at 8k, the share is 6"), "{e}");
        let e = eviction(&EvictionPlan::new("keydiff", 9, &[])?, &spec, ctx, 1.0 / 64.0).unwrap_err().to_string();
        assert!(e.contains("a budget of 1 for each KV head takes") && e.contains("a smaller block"), "{e}");
        Ok(())
    }
}
