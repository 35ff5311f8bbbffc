//! Matrices of MLX's affine quantisation: three tensors `NAME.weight` (u32, a little-endian bit stream a row), `NAME.scales`
//! and `NAME.biases`, read as one whose rows are groups of scale, bias and packed values ([`Storage::Affine`]).

use super::safetensors::Shards;
use super::TensorInfo;
use crate::error::{Error, Result};
use crate::family::{Group, Quantisation};
use crate::storage::{Affine, Storage};

/// Names of the scales and biases of a matrix.
#[derive(Debug, Clone)]
pub struct Parts {
    scales: String,
    biases: String,
    affine: Affine,
    columns: usize,
}

/// Replaces the three tensors of each quantised matrix by one.
///
/// # Errors
/// A shape that does not follow from the settings; a layer that the settings call quantised and the file does not hold so, or
/// the other way round.
pub fn join(shards: &mut Shards, settings: &Quantisation) -> Result<()> {
    let packed: Vec<String> = shards.names().filter_map(|n| n.strip_suffix(".scales").map(String::from)).collect();
    for layer in packed {
        let group = settings
            .of(&layer)
            .ok_or_else(|| Error::tensor(&layer, "has scales, and the configuration says that it is not quantised"))?;
        let (info, parts) = joined(shards, &layer, group)?;
        shards.replace(info, parts);
    }
    Ok(())
}

fn joined(shards: &Shards, layer: &str, group: Group) -> Result<(TensorInfo, Parts)> {
    let [name, scales, biases] = ["weight", "scales", "biases"].map(|part| format!("{layer}.{part}"));
    let info = |name: &str| shards.info(name).ok_or_else(|| Error::tensor(name, "missing"));
    let (weight, scale, bias) = (info(&name)?, info(&scales)?, info(&biases)?);
    let (bits, size) = (usize::from(group.bits), usize::from(group.size));
    let shape = |info: &TensorInfo| match info.shape[..] {
        [rows, columns] => Ok((rows, columns)),
        _ => Err(Error::tensor(&info.name, format!("has shape {:?}, where a matrix is expected", info.shape))),
    };
    let (rows, words) = shape(weight)?;
    let columns = words * 32 / bits;
    if words * 32 % bits != 0 || columns % size != 0 {
        let message = format!("{words} words a row are no groups of {size} values of {bits} bits");
        return Err(Error::tensor(&name, message));
    }
    for part in [scale, bias] {
        if shape(part)? != (rows, columns / size) {
            let wanted = [rows, columns / size];
            let message = format!("has shape {:?}, where {bits} bits in groups of {size} make {wanted:?}", part.shape);
            return Err(Error::tensor(&part.name, message));
        }
    }
    let float = match (&scale.storage, &bias.storage) {
        (Ok(Storage::Dense(a)), Ok(Storage::Dense(b))) if a == b => *a,
        _ => return Err(Error::unsupported(&scales, "scales and biases of different types, or of no float type")),
    };
    let affine = Affine { bits: group.bits, group: group.size, scale: float };
    let info = TensorInfo { name, shape: vec![rows, columns], storage: Ok(Storage::Affine(affine)) };
    Ok((info, Parts { scales, biases, affine, columns }))
}

impl Parts {
    /// Names of the scales and the biases.
    pub fn names(&self) -> [&str; 2] {
        [&self.scales, &self.biases]
    }

    /// Reads `length` bytes of whole rows of the joined matrix, from byte `start` on; `read` reads a stored tensor.
    ///
    /// # Errors
    /// Those of `read`; a part of a row.
    pub fn read(
        &self,
        name: &str,
        (start, length): (u64, usize),
        read: impl Fn(&str, u64, usize) -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let row = Storage::Affine(self.affine).row_bytes(self.columns);
        if start % row as u64 != 0 || length % row != 0 {
            return Err(Error::tensor(name, "is read by whole rows"));
        }
        let (first, rows) = (start / row as u64, length / row);
        let groups = self.columns / usize::from(self.affine.group);
        let (element, values) = (self.affine.scale.dtype().size_in_bytes(), self.affine.value_bytes());
        let part = |name: &str, width: usize| read(name, first * (groups * width) as u64, rows * groups * width);
        let (scales, biases) = (part(&self.scales, element)?, part(&self.biases, element)?);
        let packed = part(name, values)?;
        let mut out = Vec::with_capacity(length);
        for ((scale, bias), values) in
            scales.chunks_exact(element).zip(biases.chunks_exact(element)).zip(packed.chunks_exact(values))
        {
            out.extend_from_slice(scale);
            out.extend_from_slice(bias);
            out.extend_from_slice(values);
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Blocks, Linear, Weight};
    use crate::spec::Config;
    use candle_core::{Device, Tensor};
    use serde_json::json;
    use std::path::Path;

    const CASES: &str = "tests/fixtures/forms/affine";

    fn joined(settings: serde_json::Value) -> Result<Shards> {
        let mut shards = Shards::open(Path::new(CASES), &mut vec![])?;
        let config = Config::new("config.json", json!({ "quantization": settings }))?;
        let settings = Quantisation::read(&config)?.ok_or_else(|| Error::tensor("case", "no settings"))?;
        join(&mut shards, &settings)?;
        Ok(shards)
    }

    /// Settings of every case, which are in its name: `b4_g64_bf16`.
    fn settings() -> Result<serde_json::Value> {
        let mut settings = json!({ "bits": 4, "group_size": 64 });
        for name in Shards::open(Path::new(CASES), &mut vec![])?.names() {
            let Some(layer) = name.strip_suffix(".weight") else { continue };
            let number = |part: Option<&str>| part.and_then(|p| p[1..].parse::<u64>().ok());
            let mut parts = layer.split('_');
            settings[layer] = json!({ "bits": number(parts.next()), "group_size": number(parts.next()) });
        }
        Ok(settings)
    }

    /// Written by MLX (integrations/mlx/parity.py).
    #[test]
    fn every_format_gives_mlxs_values() -> Result<()> {
        let shards = joined(settings()?)?;
        let layers: Vec<&str> = shards.names().filter_map(|n| n.strip_suffix(".weight")).collect();
        assert_eq!(layers.len(), 22);
        for layer in layers {
            let (got, want) = (shards.values(&format!("{layer}.weight"))?, shards.values(&format!("{layer}.values"))?);
            assert_eq!(got.len(), 3 * 256, "{layer}");
            let off = got.iter().zip(&want).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
            assert!(off < 1e-6, "{layer} is {off:.1e} off");
            // Products of a few rows decode as they go, of many into a part of the matrix.
            let name = format!("{layer}.weight");
            let storage =
                shards.info(&name).and_then(|i| i.storage.clone().ok()).ok_or_else(|| Error::tensor(&name, "?"))?;
            let bytes = shards.read(&name, 0, 3 * storage.row_bytes(256))?;
            let encoded = Linear::new(Weight::Blocks(Blocks::new(storage, (3, 256), bytes, &Device::Cpu)?), None);
            let dense = Linear::new(Weight::Dense(Tensor::from_vec(want, (3, 256), &Device::Cpu)?), None);
            for rows in [1, 5, 70] {
                let x = Tensor::randn(0f32, 1.0, (rows, 256), &Device::Cpu)?;
                let apart = (encoded.forward(&x)? - dense.forward(&x)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(apart < 2e-4, "{layer}, {rows} rows: {apart:.1e} off");
            }
        }
        Ok(())
    }

    #[test]
    fn settings_that_do_not_fit_the_tensors_are_refused_by_name() -> Result<()> {
        for (layer, own, says) in [
            ("b4_g64_bf16", json!({ "bits": 4, "group_size": 32 }), "b4_g64_bf16.scales: has shape [3, 4]"),
            ("b8_g32_bf16", json!({ "bits": 6, "group_size": 32 }), "b8_g32_bf16.weight: 64 words a row"),
            ("b3_g64_bf16", json!(false), "b3_g64_bf16: has scales"),
        ] {
            let mut settings = settings()?;
            settings[layer] = own;
            let error = joined(settings).err().map_or(String::new(), |e| e.to_string());
            assert!(error.contains(says), "should say {says}: {error}");
        }
        Ok(())
    }
}
