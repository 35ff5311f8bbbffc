//! RoPE settings of `config.json`: `rope_theta` with `rope_scaling` (transformers 4), or `rope_parameters`
//! (transformers 5).

use crate::error::{Error, Result};
use crate::spec::{Config, RopeScaling, RopeSpec};

/// Reads the rotary embedding of a family with one for all layers.
///
/// # Errors
/// A setting is malformed or not supported; `rope_scaling` and `rope_parameters` differ.
pub fn one(config: &Config, dim: usize) -> Result<RopeSpec> {
    let read = |section: Option<&Config>| {
        // In transformers 5 the top-level key takes precedence over the one inside the section.
        let top_level = config.opt_size("original_max_position_embeddings")?;
        section_or(config, section, "rope_theta", top_level, dim)
    };
    let (scaling, parameters) = sections(config)?;
    match (scaling, parameters) {
        (Some(a), Some(b)) => match (read(Some(&a))?, read(Some(&b))?) {
            (a, b) if a == b => Ok(a),
            _ => Err(Error::format(config.origin(), "`rope_scaling` and `rope_parameters` contradict each other")),
        },
        (a, b) => read(a.or(b).as_ref()),
    }
}

/// Reads the rotary embeddings of full-attention and of sliding-window layers.
///
/// # Errors
/// A setting is malformed or not supported; both `rope_scaling` and `rope_parameters` are given.
pub fn two(config: &Config, dim: usize) -> Result<(RopeSpec, RopeSpec)> {
    let (scaling, parameters) = sections(config)?;
    if scaling.is_some() && parameters.is_some() {
        return Err(Error::unsupported(config.origin(), "has both `rope_scaling` and `rope_parameters`"));
    }
    let kind = |name: &str| parameters.as_ref().map_or(Ok(None), |p| p.section(name));
    let (full, sliding) = (kind("full_attention")?.or(scaling), kind("sliding_attention")?);
    Ok((
        section_or(config, full.as_ref(), "rope_theta", None, dim)?,
        section_or(config, sliding.as_ref(), "rope_local_base_freq", None, dim)?,
    ))
}

/// Returns the objects `rope_scaling` and `rope_parameters`, each if present and not empty.
fn sections(config: &Config) -> Result<(Option<Config>, Option<Config>)> {
    let filled = |key: &str| Ok::<_, Error>(config.section(key)?.filter(|s| s.entries().next().is_some()));
    Ok((filled("rope_scaling")?, filled("rope_parameters")?))
}

/// Reads one rotary embedding from `section`; without `rope_theta` there, the base is key `theta` of `config`.
fn section_or(
    config: &Config,
    section: Option<&Config>,
    theta: &str,
    original: Option<usize>,
    dim: usize,
) -> Result<RopeSpec> {
    let own = section.map_or(Ok(None), |s| s.opt_number("rope_theta"))?;
    let theta = own.map_or_else(|| config.number(theta), Ok)?;
    if theta <= 0.0 {
        return Err(Error::format(config.origin(), format!("`rope_theta` must be positive, not {theta}")));
    }
    let scaling = match section {
        Some(s) => scaling(s, original, config.size("max_position_embeddings")?)?,
        None => RopeScaling::None,
    };
    Ok(RopeSpec { theta, dim, rotated: dim, scaling })
}

fn scaling(s: &Config, original: Option<usize>, max_positions: usize) -> Result<RopeScaling> {
    let name = s.opt_str("rope_type")?.or(s.opt_str("type")?).unwrap_or("default");
    let factor = || match s.opt_number("factor")? {
        Some(f) if f >= 1.0 => Ok(f),
        _ => Err(Error::format(s.origin(), "`factor` must be a number of at least 1")),
    };
    let original =
        || Ok::<_, Error>(original.or(s.opt_size("original_max_position_embeddings")?).unwrap_or(max_positions));
    // transformers treats 0 as absent for these keys.
    let nonzero = |key: &str| Ok::<_, Error>(s.opt_number(key)?.filter(|x| *x != 0.0));
    match name {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: factor()?,
            low_freq_factor: s.number_or("low_freq_factor", 1.0)?,
            high_freq_factor: s.number_or("high_freq_factor", 4.0)?,
            original: original()?,
        }),
        "yarn" => {
            let factor = factor()?;
            let mscale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
            let attention_factor =
                match (s.opt_number("attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?) {
                    (Some(a), _, _) => a,
                    (None, Some(m), Some(all)) => mscale(m) / mscale(all),
                    _ => mscale(1.0),
                };
            Ok(RopeScaling::Yarn {
                factor,
                original: original()?,
                beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
                beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
                attention_factor,
                truncate: s.bool_or("truncate", true)?,
            })
        }
        other => Err(Error::unsupported(
            s.origin(),
            format!("rope scaling `{other}` is not supported; supported: default, linear, llama3, yarn"),
        )),
    }
}
