//! Changes of an ablation: every value of every setting that differs from the base's.

use crate::error::{Error, Result};
use crate::eval::kv_budget::widest_window;
use crate::eval::report::AblationAxis;
use crate::layout::Layout;
use crate::recall::KeyCodeChoice;
use crate::retrofit::{CodeFit, FarPosition, KeyPooling, RestKind, RetrofitPlan, Settings};
use crate::selector::SELECTORS;
use crate::spec::ModelSpec;
use candle_core::DType;

/// A changed setting, its new value, and all settings with the change.
pub type Changed = (AblationAxis, String, Settings);

/// Returns the axes to change for a base with or without exact recall: `given`, or all that apply where none is given.
///
/// # Errors
/// An axis that has no effect on the base.
pub fn axes_of(given: &[AblationAxis], recalls: bool) -> Result<Vec<AblationAxis>> {
    let all = AblationAxis::of_base(recalls);
    let Some(foreign) = given.iter().find(|axis| !all.contains(axis)) else {
        return Ok(if given.is_empty() { all.to_vec() } else { given.to_vec() });
    };
    let names: Vec<&str> = all.iter().map(|axis| axis.name()).collect();
    let why = match recalls {
        true => "a setting of block summaries, which a base with exact recall does not read",
        false => "a setting of exact recall, which the base lacks: give --variants recall",
    };
    let message = format!("`{}` is {why}; the base has {}", foreign.name(), names.join(", "));
    Err(Error::usage("--axes", message))
}

/// Returns every change of `base` along `axes` to another value, and the reasons why others are left out: partner rules
/// that do not fit into the base's bytes, and settings under which exact recall would read all of `ctx` exactly.
///
/// # Errors
/// A plan that does not fit the model.
pub fn changes(
    axes: &[AblationAxis],
    base: &RetrofitPlan,
    spec: &ModelSpec,
    ctx: usize,
) -> Result<(Vec<Changed>, Vec<String>)> {
    let s = &base.settings;
    let bytes = |settings: &Settings| -> Result<u64> {
        let plan = RetrofitPlan::new(spec, Some(base.layers.clone()), settings.clone())?;
        Ok(Layout::new(spec, &plan, ctx)?.bytes(DType::BF16).peak)
    };
    let target = bytes(s)?;
    let (mut all, mut left_out) = (vec![], vec![]);
    for &axis in axes {
        let with = |value: String, settings: Settings| (axis, value, settings);
        match axis {
            AblationAxis::Partner => {
                for rule in SELECTORS.iter().filter(|r| r.name() != s.partner) {
                    let other = Settings { partner: rule.name().into(), ..s.clone() };
                    match widest_window(&other, target, ctx, bytes)? {
                        Some(settings) => {
                            all.push(with(format!("{}, window {}", rule.name(), settings.window), settings));
                        }
                        None => left_out.push(format!(
                            "partner {} is left out: its summaries and a window of one block exceed the base's bytes",
                            rule.name()
                        )),
                    }
                }
            }
            AblationAxis::Window => {
                let windows = [s.block, 128, 256, 512, 1024, 2048, 4096];
                let windows = windows.into_iter().filter(|w| w.is_multiple_of(s.block) && *w != s.window && *w < ctx);
                let mut windows: Vec<usize> = windows.collect();
                windows.sort_unstable();
                windows.dedup();
                all.extend(windows.into_iter().map(|w| with(w.to_string(), Settings { window: w, ..s.clone() })));
            }
            AblationAxis::Sinks => {
                let sinks = [0, 1, 4, 16, 64].into_iter().filter(|n| *n != s.sink_tokens);
                all.extend(sinks.map(|n| with(n.to_string(), Settings { sink_tokens: n, ..s.clone() })));
            }
            AblationAxis::Block => {
                let blocks =
                    [16, 32, 64, 128, 256].into_iter().filter(|b| *b != s.block && s.window.is_multiple_of(*b));
                all.extend(blocks.map(|b| with(b.to_string(), Settings { block: b, ..s.clone() })));
            }
            AblationAxis::Pool => {
                let own = (s.pool, s.far_position);
                for (name, pool, far) in [
                    ("post-rope", KeyPooling::PostRope, FarPosition::True),
                    ("pre-rope", KeyPooling::PreRope, FarPosition::True),
                    ("pre-rope, clamp", KeyPooling::PreRope, FarPosition::Clamp),
                ] {
                    if (pool, far) != own {
                        all.push(with(name.into(), Settings { pool, far_position: far, ..s.clone() }));
                    }
                }
            }
            AblationAxis::Bias => {
                let biases = [0.0, 0.5, 1.0].into_iter().filter(|b| *b != s.summary_bias);
                all.extend(biases.map(|b| with(b.to_string(), Settings { summary_bias: b, ..s.clone() })));
            }
            AblationAxis::Count => {
                let counts = [1, 2, 4].into_iter().filter(|n| *n != s.partner_count);
                all.extend(counts.map(|n| with(n.to_string(), Settings { partner_count: n, ..s.clone() })));
            }
            AblationAxis::Recall => {
                let tokens = [512, 1024, 2048].into_iter().filter(|n| *n != s.recall);
                all.extend(tokens.map(|n| with(n.to_string(), Settings { recall: n, ..s.clone() })));
            }
            AblationAxis::Code => {
                let own = KeyCodeChoice::parse(&s.key_code)?.name();
                let codes = KeyCodeChoice::all().map(|code| code.name()).filter(|name| *name != own);
                all.extend(codes.map(|name| with(name.clone(), Settings { key_code: name, ..s.clone() })));
            }
            AblationAxis::Rest => {
                let kinds = [("codes", RestKind::Codes), ("means", RestKind::Means), ("none", RestKind::None)];
                let kinds = kinds.into_iter().filter(|(_, rest)| *rest != s.rest);
                all.extend(kinds.map(|(name, rest)| with(name.into(), Settings { rest, ..s.clone() }.widened())));
            }
            AblationAxis::Fit => {
                let fits = [("calibration", CodeFit::Calibration), ("text", CodeFit::Text)];
                let fits = fits.into_iter().filter(|(_, fit)| *fit != s.code_fit);
                all.extend(fits.map(|(name, code_fit)| with(name.into(), Settings { code_fit, ..s.clone() })));
            }
        }
    }
    let covers = |s: &Settings| s.recall > 0 && ctx <= s.exact_tokens();
    let (covered, all): (Vec<Changed>, Vec<Changed>) = all.into_iter().partition(|(_, _, s)| covers(s));
    left_out.extend(covered.into_iter().map(|(axis, value, s)| {
        let axis = axis.name();
        format!("{axis} {value} is left out: its layers are dense up to {} tokens", s.exact_tokens())
    }));
    Ok((all, left_out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;

    fn spec() -> ModelSpec {
        Checkpoint::random("tests/fixtures/shapes/qwen2.5-0.5b", 0).unwrap().spec
    }

    #[test]
    fn rules_are_compared_at_the_same_bytes_and_no_change_equals_the_base() -> Result<()> {
        let spec = spec();
        let settings = Settings { block: 16, window: 512, partner_count: 2, ..Settings::default() };
        let base = RetrofitPlan::new(&spec, None, settings)?;
        let ctx = 8192;
        let bytes = |s: &Settings| -> Result<u64> {
            let plan = RetrofitPlan::new(&spec, None, s.clone())?;
            Ok(Layout::new(&spec, &plan, ctx)?.bytes(DType::BF16).peak)
        };
        let target = bytes(&base.settings)?;
        let (partners, left_out) = changes(&[AblationAxis::Partner], &base, &spec, ctx)?;
        assert_eq!(left_out, Vec::<String>::new());
        assert_eq!(partners.len(), SELECTORS.len() - 1, "every rule but the base's");
        for (_, value, settings) in &partners {
            let took = bytes(settings)?;
            // Less by at most one block of every layer.
            let block = 2 * 2 * 24 * 16 * 2 * 64;
            assert!(took <= target && took + block > target, "{value}: {took} of {target}");
        }
        for (_, value, settings) in changes(&AblationAxis::of_base(false)[1..], &base, &spec, ctx)?.0 {
            assert_ne!(settings, base.settings, "{value}");
            settings.validate()?;
        }
        // A summary of every 16 tokens takes more than a window of one block leaves.
        let small = RetrofitPlan::new(&spec, None, Settings { window: 16, ..base.settings })?;
        assert!(changes(&[AblationAxis::Partner], &small, &spec, ctx)?.1.iter().any(|why| why.contains("partner all")));
        Ok(())
    }

    #[test]
    fn each_change_of_recall_sets_one_setting_to_another_value() -> Result<()> {
        let spec = spec();
        let settings = Settings { recall: 1024, key_code: "pair".into(), ..Settings::default() };
        let base = RetrofitPlan::new(&spec, None, settings)?;
        let (all, left_out) = changes(&axes_of(&[], true)?, &base, &spec, 32 << 10)?;
        assert_eq!(left_out, Vec::<String>::new());
        let of = |axis: AblationAxis| -> Vec<&str> {
            all.iter().filter(|c| c.0 == axis).map(|(_, value, _)| value.as_str()).collect()
        };
        assert_eq!(of(AblationAxis::Recall), ["512", "2048"]);
        let codes = [
            "pair:2bit",
            "pair:1.25bit",
            "pair:1bit",
            "pair:1/2bit",
            "qpq:1bit",
            "qpq:2bit",
            "qpq:1/2bit",
            "scalar2",
            "page",
            "exact",
        ];
        assert_eq!(of(AblationAxis::Code), codes, "all but the base's, which is pair:1.5bit by its default");
        assert_eq!(of(AblationAxis::Rest), ["means", "none"]);
        assert_eq!(of(AblationAxis::Fit), ["text"]);
        assert_eq!(of(AblationAxis::Window), ["128", "256", "1024", "2048", "4096"]);
        assert_eq!((of(AblationAxis::Sinks).len(), of(AblationAxis::Block).len()), (4, 4));
        for (axis, value, settings) in &all {
            settings.validate()?;
            let fields = |s: &Settings| serde_json::to_value(s).unwrap().as_object().unwrap().clone();
            let (was, is) = (fields(&base.settings), fields(settings));
            let changed: Vec<&String> = was.keys().filter(|k| was[*k] != is[*k]).collect();
            assert_eq!(changed.len(), 1, "{} {value}: {changed:?}", axis.name());
        }
        // A window of 2048 with its block, 4 sinks and 1024 fetched tokens covers all of 3200.
        let (all, left_out) = changes(&[AblationAxis::Window, AblationAxis::Recall], &base, &spec, 3200)?;
        assert_eq!(left_out, ["window 2048 is left out: its layers are dense up to 3204 tokens"]);
        assert_eq!(all.iter().filter(|c| c.0 == AblationAxis::Recall).count(), 2);
        Ok(())
    }

    #[test]
    fn axes_without_effect_on_the_base_are_refused_by_name() {
        let refused = |axis: AblationAxis, recalls: bool| axes_of(&[axis], recalls).unwrap_err().to_string();
        for axis in [AblationAxis::Partner, AblationAxis::Pool, AblationAxis::Bias, AblationAxis::Count] {
            let e = refused(axis, true);
            let words = format!("--axes: `{}` is a setting of block summaries", axis.name());
            assert!(e.contains(&words) && e.contains("recall, code, rest, fit, window, sinks, block"), "{e}");
        }
        for axis in [AblationAxis::Recall, AblationAxis::Code, AblationAxis::Rest, AblationAxis::Fit] {
            let e = refused(axis, false);
            let words = format!("--axes: `{}` is a setting of exact recall", axis.name());
            assert!(e.contains(&words) && e.contains("give --variants recall"), "{e}");
        }
        assert_eq!(axes_of(&[AblationAxis::Block], true).unwrap(), [AblationAxis::Block]);
    }
}
