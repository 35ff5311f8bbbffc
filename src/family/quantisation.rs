//! MLX's affine quantisation as a configuration states it: under `quantization`, or its copy `quantization_config`.
//!
//! ```text
//! { "group_size": 64, "bits": 4, "mode": "affine", "model.layers.0.mlp.gate_proj": { "bits": 8, "group_size": 64 } | false }
//! ```

use crate::error::{Error, Result};
use crate::spec::Config;
use serde_json::Value;
use std::collections::BTreeMap;

/// Numbers of bits that MLX packs values in.
pub const BITS: [u64; 6] = [2, 3, 4, 5, 6, 8];
/// Sizes of groups with a scale and a bias.
pub const GROUPS: [u64; 3] = [32, 64, 128];

/// Bits of a value, and values to a scale and a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// Bits of a value.
    pub bits: u8,
    /// Values of a group.
    pub size: u8,
}

/// Quantisation of a checkpoint's matrices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantisation {
    default: Group,
    /// By the name of a layer in the file; `None` where it is not quantised.
    overrides: BTreeMap<String, Option<Group>>,
}

impl Quantisation {
    /// Reads the settings; `None` where there are none, or those of another method.
    ///
    /// # Errors
    /// A mode, number of bits or group size that is not supported, by name; two copies that differ.
    pub fn read(config: &Config) -> Result<Option<Self>> {
        let of = |key: &str| -> Result<Option<Self>> {
            let Some(section) = config.get(key) else { return Ok(None) };
            match section.get("quant_method").is_none() && section.get("bits").is_some() {
                true => Self::parse(&format!("{}: `{key}`", config.origin()), section).map(Some),
                false => Ok(None),
            }
        };
        match (of("quantization")?, of("quantization_config")?) {
            (Some(a), Some(b)) if a != b => {
                Err(Error::format(config.origin(), "`quantization` and `quantization_config` contradict each other"))
            }
            (a, b) => Ok(a.or(b)),
        }
    }

    fn parse(origin: &str, section: &Value) -> Result<Self> {
        let default = group(origin, section, None)?;
        let mut overrides = BTreeMap::new();
        for (name, value) in section.as_object().into_iter().flatten() {
            match value {
                Value::Object(_) => {
                    let group = group(&format!("{origin}: {name}"), value, Some(default))?;
                    overrides.insert(name.clone(), Some(group));
                }
                Value::Bool(false) => drop(overrides.insert(name.clone(), None)),
                Value::Bool(true) => drop(overrides.insert(name.clone(), Some(default))),
                _ if ["group_size", "bits", "mode"].contains(&name.as_str()) => {}
                other => {
                    return Err(Error::unsupported(origin, format!("`{name}` is {other}; it may change the weights")))
                }
            }
        }
        Ok(Self { default, overrides })
    }

    /// Returns the quantisation of layer `name`, or `None` where it is not quantised.
    pub fn of(&self, name: &str) -> Option<Group> {
        self.overrides.get(name).copied().unwrap_or(Some(self.default))
    }
}

fn group(origin: &str, section: &Value, default: Option<Group>) -> Result<Group> {
    match section.get("mode").map(|m| m.as_str().unwrap_or("")) {
        None | Some("affine") => {}
        Some(mode) => {
            return Err(Error::unsupported(origin, format!("quantisation mode `{mode}`; supported: affine")));
        }
    }
    let read = |key: &str, default: Option<u8>, known: &[u64]| -> Result<u8> {
        let value = section.get(key).map(Value::as_u64);
        match (value, default) {
            (None, Some(default)) => Ok(default),
            (Some(Some(n)), _) if known.contains(&n) => Ok(n as u8),
            _ => {
                let got = section.get(key).map_or("missing".into(), Value::to_string);
                let known = known.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
                Err(Error::unsupported(origin, format!("`{key}` is {got}; supported: {known}")))
            }
        }
    };
    Ok(Group {
        bits: read("bits", default.map(|d| d.bits), &BITS)?,
        size: read("group_size", default.map(|d| d.size), &GROUPS)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value) -> Result<Option<Quantisation>> {
        Quantisation::read(&Config::new("config.json", value)?)
    }

    #[test]
    fn a_layer_may_have_its_own_bits_or_none() -> Result<()> {
        let own = json!({ "bits": 4, "group_size": 64, "a.b": { "bits": 8 }, "a.c": false, "a.d": true });
        let settings = read(json!({ "quantization": own, "quantization_config": own }))?;
        let of = |name: &str| settings.as_ref().and_then(|s| s.of(name)).map(|g| (g.bits, g.size));
        assert_eq!([of("x"), of("a.b"), of("a.c"), of("a.d")], [Some((4, 64)), Some((8, 64)), None, Some((4, 64))]);
        assert_eq!(read(json!({ "quantization_config": own }))?, settings);
        assert_eq!(read(json!({ "quantization_config": { "quant_method": "awq", "bits": 4 } }))?, None);
        Ok(())
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (value, says) in [
            (json!({ "quantization": { "bits": 7, "group_size": 64 } }), "`bits` is 7; supported: 2, 3, 4, 5, 6, 8"),
            (json!({ "quantization": { "bits": 4, "group_size": 16 } }), "`group_size` is 16; supported: 32, 64, 128"),
            (json!({ "quantization": { "bits": 4 } }), "`group_size` is missing"),
            (
                json!({ "quantization": { "bits": 4, "group_size": 32, "mode": "mxfp4" } }),
                "mode `mxfp4`; supported: affine",
            ),
            (
                json!({ "quantization": { "bits": 4, "group_size": 32, "a": { "bits": 9 } } }),
                "`quantization`: a: `bits` is 9",
            ),
            (json!({ "quantization": { "bits": 4, "group_size": 32, "novel": 1 } }), "`novel` is 1"),
            (
                json!({
                    "quantization": { "bits": 4, "group_size": 32 },
                    "quantization_config": { "bits": 8, "group_size": 32 }
                }),
                "contradict",
            ),
        ] {
            let error = read(value).err().map_or(String::new(), |e| e.to_string());
            assert!(error.contains(says), "should say {says}: {error}");
        }
    }
}
