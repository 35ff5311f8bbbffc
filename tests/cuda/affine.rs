//! Matrices of MLX's affine quantisation on a GPU, as stored, and the captured step made of them.

use crate::common::attention::values;
use crate::common::*;
use crate::quantised::{as_on_the_cpu, check_many_rows, check_one_row, error, read, text};
use bfly::checkpoint::{WeightDtype, WeightFormat};
use bfly::generate::watch;
use bfly::nn::{Blocks, Linear, Weight};
use bfly::storage::{Affine, Float, Storage};
use candle_core::{DType, Device, Tensor};
use serde_json::json;
use std::collections::HashMap;
use std::path::Path;

/// Every format with a kernel.
fn formats() -> impl Iterator<Item = Affine> {
    let scales = [Float::BF16, Float::F16, Float::F32];
    let groups = |bits| [32, 64, 128].into_iter().map(move |group| (bits, group));
    let all = [2, 3, 4, 5, 6, 8].into_iter().flat_map(groups);
    all.flat_map(move |(bits, group)| scales.into_iter().map(move |scale| Affine { bits, group, scale }))
}

/// What the file calls weight, scales and biases of a matrix `[rows, cols]`: values nearest to its own.
struct Quantised {
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
}

fn quantise(w: &Tensor, affine: Affine) -> Any<Quantised> {
    let ((rows, cols), group, bits) = (w.dims2()?, usize::from(affine.group), usize::from(affine.bits));
    let (values, most) = (w.flatten_all()?.to_vec1::<f32>()?, (1u32 << bits) - 1);
    let (mut scales, mut biases, mut packed) = (vec![], vec![], vec![0u32; rows * cols * bits / 32]);
    for (g, values) in values.chunks(group).enumerate() {
        let (low, high) = values.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
        let scale = ((high - low) / most as f32).max(1e-6);
        for (i, v) in values.iter().enumerate() {
            let q = ((v - low) / scale).round().clamp(0.0, most as f32) as u32;
            // Rows and groups hold whole words.
            let at = (g * group + i) * bits;
            packed[at / 32] |= q << (at % 32);
            if at % 32 + bits > 32 {
                packed[at / 32 + 1] |= q >> (32 - at % 32);
            }
        }
        scales.push(scale);
        biases.push(low);
    }
    let part = |v: Vec<f32>| Tensor::from_vec(v, (rows, cols / group), &Device::Cpu)?.to_dtype(affine.scale.dtype());
    let packed = Tensor::from_vec(packed, (rows, cols * bits / 32), &Device::Cpu)?;
    Ok(Quantised { packed, scales: part(scales)?, biases: part(biases)? })
}

fn bytes_of(tensor: &Tensor) -> Any<Vec<u8>> {
    Ok(match tensor.dtype() {
        DType::U32 => tensor.flatten_all()?.to_vec1::<u32>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::BF16 => tensor.flatten_all()?.to_vec1::<half::bf16>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F16 => tensor.flatten_all()?.to_vec1::<half::f16>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
        _ => tensor.flatten_all()?.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
    })
}

/// A random matrix on the CPU and on `device`.
fn matrix(affine: Affine, (rows, cols): (usize, usize), device: &Device) -> Any<(Weight, Weight)> {
    let q = quantise(&values((1, rows, cols), 7 + rows as u64, 2.0)?.squeeze(0)?, affine)?;
    let (scales, biases, packed) = (bytes_of(&q.scales)?, bytes_of(&q.biases)?, bytes_of(&q.packed)?);
    let element = affine.scale.dtype().size_in_bytes();
    let groups = scales.chunks(element).zip(biases.chunks(element)).zip(packed.chunks(affine.value_bytes()));
    let data: Vec<u8> = groups.flat_map(|((s, b), q)| [s, b, q].concat()).collect();
    let on = |device| Blocks::new(Storage::Affine(affine), (rows, cols), data.clone(), device).map(Weight::Blocks);
    Ok((on(&Device::Cpu)?, on(device)?))
}

/// The values that the CPU decodes, f32 `[rows, cols]`.
fn decoded(w: &Weight) -> Any<Tensor> {
    let ids: Vec<u32> = (0..w.dims()?.0 as u32).collect();
    Ok(w.rows(&Tensor::new(ids, &Device::Cpu)?, DType::F32)?)
}

/// Fewer units than lanes and many times as many, and more rows than warps take one by one.
#[test]
fn products_of_one_row_are_those_of_the_decoded_matrix() -> Any {
    let Some(device) = gpu("affine products") else { return Ok(()) };
    for affine in formats() {
        let shapes = [
            (1, 32),
            (7, 96),
            (2, 128),
            (33, 576),
            (70, 896),
            (300, 640),
            (130, 1024),
            (9, 4864),
            (5, 18_944),
            (8200, 256),
            (8195, 384),
        ];
        for shape in shapes.into_iter().filter(|(_, cols)| Storage::Affine(affine).fits(*cols)) {
            let (host, there) = matrix(affine, shape, &device)?;
            let wide = decoded(&host)?.to_dtype(DType::F64)?;
            check_one_row(&format!("{affine:?}"), &Linear::new(there, None), &wide, &device)?;
        }
    }
    Ok(())
}

#[test]
fn products_of_many_rows_are_those_of_the_decoded_matrix() -> Any {
    let Some(device) = gpu("affine products of many rows") else { return Ok(()) };
    for affine in formats() {
        let shapes = [(2, 7, 96), (130, 70, 896), (5, 130, 1024), (33, 9, 4864)];
        // In parts.
        let wide = (affine.bits == 4 && affine.group == 64).then_some((3, 2000, 18_944));
        let fits = |(_, _, cols): &(usize, usize, usize)| Storage::Affine(affine).fits(*cols);
        for (tokens, rows, cols) in shapes.into_iter().filter(fits).chain(wide) {
            let (host, there) = matrix(affine, (rows, cols), &device)?;
            let wide = decoded(&host)?;
            check_many_rows(&format!("{affine:?}"), tokens, &Linear::new(there, None), &wide, &device)?;
        }
    }
    Ok(())
}

#[test]
fn rows_are_those_of_the_cpu() -> Any {
    let Some(device) = gpu("rows of affine matrices") else { return Ok(()) };
    for affine in formats() {
        for shape in [(1, 128), (50, 384), (300, 896)] {
            let (host, there) = matrix(affine, shape, &device)?;
            let ids: Vec<u32> = (0..77).map(|i| i * i * 7 % shape.0 as u32).collect();
            let want = host.rows(&Tensor::new(ids.as_slice(), &Device::Cpu)?, DType::F32)?;
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let got = there.rows(&Tensor::new(ids.as_slice(), &device)?, dtype)?;
                assert_eq!((got.dtype(), got.dims()), (dtype, &[77, shape.1][..]));
                let (off, rounding) =
                    (error(&got, &want)?, error(&want.to_dtype(dtype)?, &want.to_dtype(DType::F64)?)?);
                assert!(off <= 1.01 * rounding + 1e-6, "{affine:?} {dtype:?} {shape:?}: {off:.2e}, {rounding:.2e}");
            }
        }
    }
    Ok(())
}

/// Writes `tensors` as mlx-lm writes a checkpoint: matrices in the format that `format` gives a layer's name, if any.
fn write(
    dir: &Path,
    mut config: serde_json::Value,
    tensors: HashMap<String, Tensor>,
    format: impl Fn(&str) -> Option<Affine>,
) -> Any {
    let (mut all, mut settings) = (HashMap::new(), json!({ "bits": 4, "group_size": 64 }));
    for (name, tensor) in tensors {
        let Some(layer) = name.strip_suffix(".weight").filter(|_| tensor.rank() == 2) else {
            all.insert(name, tensor);
            continue;
        };
        let Some(affine) = format(layer) else {
            settings[layer] = json!(false);
            all.insert(name, tensor);
            continue;
        };
        settings[layer] = json!({ "bits": affine.bits, "group_size": affine.group });
        let q = quantise(&tensor.to_dtype(DType::F32)?, affine)?;
        for (part, tensor) in [("weight", q.packed), ("scales", q.scales), ("biases", q.biases)] {
            all.insert(format!("{layer}.{part}"), tensor);
        }
    }
    config["quantization"] = settings;
    std::fs::write(dir.join("config.json"), config.to_string())?;
    Ok(candle_core::safetensors::save(&all, dir.join("model.safetensors"))?)
}

fn golden(name: &str) -> Any<(serde_json::Value, HashMap<String, Tensor>)> {
    let config = serde_json::from_str(&std::fs::read_to_string(golden_dir(name).join("config.json"))?)?;
    Ok((config, candle_core::safetensors::load(golden_dir(name).join("model.safetensors"), &Device::Cpu)?))
}

/// A model of golden `qwen3`'s make whose rows are wide enough for every group, with random weights.
fn write_wide(dir: &Path, format: impl Fn(&str) -> Option<Affine>) -> Any {
    let (hidden, intermediate, dim) = (256, 512, 32);
    let (mut config, mut tensors) = golden("qwen3")?;
    for (key, value) in [("hidden_size", hidden), ("intermediate_size", intermediate), ("head_dim", dim)] {
        config[key] = json!(value);
    }
    for (name, tensor) in &mut tensors {
        let (rows, cols) = match name.rsplit('.').nth(1).unwrap_or_default() {
            "embed_tokens" | "lm_head" => (384, hidden),
            "q_proj" => (8 * dim, hidden),
            "k_proj" | "v_proj" => (4 * dim, hidden),
            "o_proj" => (hidden, 8 * dim),
            "gate_proj" | "up_proj" => (intermediate, hidden),
            "down_proj" => (hidden, intermediate),
            "q_norm" | "k_norm" => (1, dim),
            _ => (1, hidden),
        };
        let seed = name.bytes().fold(3, |seed: u64, b| seed.wrapping_mul(31).wrapping_add(b.into()));
        *tensor = match tensor.rank() {
            // Of variance 1 / cols.
            2 => values((1, rows, cols), seed, (12.0 / cols as f32).sqrt())?.squeeze(0)?,
            _ => (values((1, 1, cols), seed, 0.5)?.flatten_all()? + 1.0)?,
        };
    }
    write(dir, config, tensors, format)
}

const fn affine(bits: u8, group: u8, scale: Float) -> Affine {
    Affine { bits, group, scale }
}

/// One layer's matrices differ, and so do layers; some are held in 16 bits.
fn mixed(layer: &str) -> Option<Affine> {
    let first = layer.contains("layers.0.");
    Some(match layer.rsplit('.').next().unwrap_or_default() {
        "embed_tokens" => affine(6, 32, Float::F16),
        "lm_head" => affine(8, 64, Float::BF16),
        "q_proj" | "gate_proj" | "up_proj" => affine(4, 64, Float::BF16),
        "k_proj" => affine(5, 128, Float::F32),
        "v_proj" if first => affine(3, 32, Float::BF16),
        "v_proj" => return None,
        // The same bits in other groups.
        "o_proj" if first => affine(4, 32, Float::BF16),
        "o_proj" => affine(4, 128, Float::F16),
        _ => affine(5, 64, Float::BF16),
    })
}

#[test]
fn affine_goldens_give_the_cpus_logits() -> Any {
    let Some(device) = gpu("affine goldens") else { return Ok(()) };
    let golden_logits = Golden::open("qwen2")?;
    // Biases, and one matrix for embedding and output.
    let theirs = deviation(&golden_logits.logits_bf16("short")?, &golden_logits.logits("short")?)?;
    for bits in [4, 8] {
        let dir = tempfile::tempdir()?;
        let (config, tensors) = golden("qwen2")?;
        // Queries and keys in one launch, values in another; a feed-forward of 160 columns takes groups of 32.
        let other = if bits == 8 { 4 } else { 8 };
        write(dir.path(), config, tensors, |layer| {
            Some(affine(if layer.contains("v_proj") { other } else { bits }, 32, Float::BF16))
        })?;
        as_on_the_cpu(&format!("{bits} bits"), dir.path(), &device, theirs)?;
    }
    Ok(())
}

/// A hybrid model in 4 bits as MLX's converter writes it.
#[test]
fn mlxs_own_file_of_a_hybrid_gives_the_cpus_logits() -> Any {
    let Some(device) = gpu("MLX's file of a hybrid") else { return Ok(()) };
    let golden = Golden::open("qwen3_5_heads")?;
    let theirs = deviation(&golden.logits_bf16("short")?, &golden.logits("short")?)?;
    as_on_the_cpu("MLX's file", &root().join("tests/fixtures/forms/qwen3_5_heads-mlx4"), &device, theirs)
}

/// Against the same file held in bf16 on the GPU, whose step rounds the weights too.
#[test]
fn every_number_of_bits_and_a_mixture_decode_as_a_captured_step() -> Any {
    let Some(device) = gpu("captured affine decode") else { return Ok(()) };
    let one = formats().filter(|a| (a.group, a.scale) == (64, Float::BF16) || a.bits == 4);
    let one = one.map(|a| (format!("{a:?}"), Box::new(move |_: &str| Some(a)) as Box<dyn Fn(&str) -> Option<Affine>>));
    for (name, format) in one.chain([("mixed".to_string(), Box::new(mixed) as Box<_>)]) {
        let dir = tempfile::tempdir()?;
        write_wide(dir.path(), format)?;
        let checkpoint = open(&dir.path().to_string_lossy())?;
        let host =
            load_as(&checkpoint, None, 300, &WeightFormat::new(WeightDtype::As(Storage::F32), 0, None), &Device::Cpu)?;
        let model = load_as(&checkpoint, None, 300, &WeightFormat::for_gpu(WeightDtype::Auto), &device)?;
        let dense = load_as(&checkpoint, None, 300, &WeightFormat::for_gpu(WeightDtype::As(Storage::BF16)), &device)?;
        assert!(model.weights.has_quantised() && !dense.weights.has_quantised());
        // Without a prompt to speak of, so that all keys and values are of captured steps.
        let (ids, tail) = (text(1), text(120));
        let want = read(&host, &ids, &tail, false)?;
        let off = deviation(&read(&model, &ids, &tail, true)?, &want)?;
        let bf16 = deviation(&read(&dense, &ids, &tail, true)?, &want)?;
        println!("{name}: {off:.2e}, in bf16 {bf16:.2e}");
        assert!(off <= 2.0 * bf16, "{name}: {off:.2e}, in bf16 {bf16:.2e}");
    }
    Ok(())
}

/// A prefill rounds activations to 16 bits between products, a captured step does not; both round keys and values.
#[test]
fn a_captured_step_gives_what_a_prefill_gives() -> Any {
    let Some(device) = gpu("captured affine decode beside a prefill") else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    write_wide(dir.path(), mixed)?;
    let checkpoint = open(&dir.path().to_string_lossy())?;
    let model = load_as(&checkpoint, None, 300, &WeightFormat::for_gpu(WeightDtype::Auto), &device)?;
    let dense = load_as(&checkpoint, None, 300, &WeightFormat::for_gpu(WeightDtype::As(Storage::BF16)), &device)?;
    let ids = text(121);
    let prefill = |model: &Model| model.run()?.prefill(&ids, 200, 120, &mut watch(|_| ()));
    let step = |model: &Model| read(model, &ids[..1], &ids[1..], true);
    let off = deviation(&step(&model)?, &prefill(&model)?.to_device(&Device::Cpu)?)?;
    let bf16 = deviation(&step(&dense)?, &prefill(&dense)?.to_device(&Device::Cpu)?)?;
    assert!(off <= 2.0 * bf16, "{off:.2e}, in bf16 {bf16:.2e}");
    Ok(())
}
