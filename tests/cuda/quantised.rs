//! Products with quantised blocks on a GPU, and the captured step made of them.

use crate::common::attention::values;
use crate::common::*;
use bfly::checkpoint::{WeightDtype, WeightFormat};
use bfly::generate::{watch, Phase, Request, Sampler, Sampling};
use bfly::nn::{Blocks, Linear, Weight};
use bfly::storage::Storage;
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use std::path::Path;
use GgmlDType::*;

/// Every format with a kernel.
const FORMATS: [GgmlDType; 10] = [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K];

fn norm(x: &Tensor) -> Any<f64> {
    Ok(x.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

/// `|got - want| / |want|`.
pub fn error(got: &Tensor, want: &Tensor) -> Any<f64> {
    let got = got.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let want = want.to_dtype(DType::F64)?;
    Ok(norm(&(got - &want)?)? / norm(&want)?)
}

fn on_device(q: &QTensor, device: &Device) -> Any<Linear> {
    let storage = Storage::from_candle(q.dtype()).ok_or("a format of weights")?;
    let blocks = Blocks::new(storage, q.shape().dims2()?, q.data()?.into_owned(), device)?;
    Ok(Linear::new(Weight::Blocks(blocks), None))
}

/// Checks the products of one row with `layer`, whose values `wide` holds in f64.
pub fn check_one_row(what: &str, layer: &Linear, wide: &Tensor, device: &Device) -> Any {
    let (rows, cols) = wide.dims2()?;
    let x = values((1, 1, cols + 1), 11 + cols as u64, 2.0)?.squeeze(0)?;
    // From the first element, and from the second: a view that is not aligned.
    for from in [0, 1] {
        let there = x.to_device(device)?.narrow(1, from, cols)?;
        let want = x.narrow(1, from, cols)?.to_dtype(DType::F64)?.matmul(&wide.t()?)?;
        let got = layer.forward(&there)?;
        assert_eq!((got.dtype(), got.dims()), (DType::F32, &[1, rows][..]));
        let off = error(&got, &want)?;
        // Rounding the vector to 8 bits would show as 5e-3.
        assert!(off < 1e-5, "{what}, {rows} x {cols} from {from}: {off:.2e}");
        let half = there.to_dtype(DType::BF16)?;
        let want = half.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.matmul(&wide.t()?)?;
        let rounding = error(&want.to_dtype(DType::BF16)?, &want)?;
        let got = layer.forward(&half)?;
        assert_eq!(got.dtype(), DType::BF16);
        let off = error(&got, &want)?;
        assert!(off <= 1.5 * rounding + 1e-5, "{what} bf16, {rows} x {cols}: {off:.2e}, {rounding:.2e}");
    }
    Ok(())
}

/// Checks the products of `tokens` rows with `layer`, whose values `wide` holds in f32.
pub fn check_many_rows(what: &str, tokens: usize, layer: &Linear, wide: &Tensor, device: &Device) -> Any {
    let (rows, cols) = wide.dims2()?;
    let x = values((1, tokens, cols + 1), 11 + cols as u64, 2.0)?.squeeze(0)?;
    for from in [0, 1] {
        let there = x.to_device(device)?.narrow(1, from, cols)?;
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let x = there.to_dtype(dtype)?.contiguous()?;
            let (w, exact) = (wide.to_dtype(dtype)?, x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?);
            let want = exact.matmul(&w.to_dtype(DType::F64)?.t()?)?;
            // What cuBLAS makes of the same weights held dense: it may add parts of a sum up in 16 bits.
            let dense = error(&x.matmul(&w.to_device(device)?.t()?)?, &want)?;
            let got = layer.forward(&there.to_dtype(dtype)?)?;
            assert_eq!((got.dtype(), got.dims()), (dtype, &[tokens, rows][..]));
            let off = error(&got, &want)?;
            let shape = format!("{what} {dtype:?}, {tokens} by {rows} x {cols} from {from}");
            assert!(off <= 1.1 * dense + 1e-5, "{shape}: {off:.2e}, dense {dense:.2e}");
        }
    }
    Ok(())
}

/// Rows that begin at odd and even multiples of two bytes, fewer units than lanes and many times as many, and more rows than
/// warps take one by one.
#[test]
fn products_of_one_row_are_those_of_the_dequantised_matrix() -> Any {
    let Some(device) = gpu("quantised products") else { return Ok(()) };
    for format in FORMATS {
        let shapes =
            [(1, 32), (7, 96), (33, 576), (70, 896), (3, 256), (130, 1024), (9, 4864), (5, 18_944), (8200, 256)];
        for (rows, cols) in shapes.into_iter().filter(|(_, cols)| cols % format.block_size() == 0) {
            let w = values((1, rows, cols), 7 + rows as u64, 2.0)?.squeeze(0)?;
            let q = QTensor::quantize(&w, format)?;
            let wide = q.dequantize(&Device::Cpu)?.to_dtype(DType::F64)?;
            check_one_row(&format!("{format:?}"), &on_device(&q, &device)?, &wide, &device)?;
        }
    }
    Ok(())
}

/// Whole and part units to a warp, and a matrix that is dequantised in parts.
#[test]
fn products_of_many_rows_are_those_of_the_dequantised_matrix() -> Any {
    let Some(device) = gpu("quantised products of many rows") else { return Ok(()) };
    for format in FORMATS {
        let shapes = [(2, 7, 96), (130, 70, 896), (5, 130, 1024), (33, 9, 4864), (3, 2000, 18_944)];
        for (tokens, rows, cols) in shapes.into_iter().filter(|(.., cols)| cols % format.block_size() == 0) {
            let w = values((1, rows, cols), 7 + rows as u64, 2.0)?.squeeze(0)?;
            let q = QTensor::quantize(&w, format)?;
            let (layer, wide) = (on_device(&q, &device)?, q.dequantize(&Device::Cpu)?);
            check_many_rows(&format!("{format:?}"), tokens, &layer, &wide, &device)?;
        }
    }
    Ok(())
}

/// Writes golden `name` with every matrix in the format that `format` gives its GGUF name.
fn write_golden(name: &str, arch: &str, path: &Path, format: impl Fn(&str) -> GgmlDType) -> Any {
    gguf::write(name, arch, path, |tensors, _| {
        for (name, tensor) in tensors.iter_mut().filter(|(_, t)| t.shape().rank() == 2) {
            let blocks = tensor.dequantize(&Device::Cpu).and_then(|t| QTensor::quantize(&t, format(name)));
            *tensor = blocks.expect("rows hold whole blocks");
        }
    })
}

/// A model of golden `qwen3`'s make whose rows are wide enough for every format, with random weights.
fn write_wide(path: &Path, format: impl Fn(&str) -> GgmlDType) -> Any {
    let (hidden, intermediate, dim) = (256, 512, 32);
    gguf::write("qwen3", "qwen3", path, |tensors, meta| {
        for (key, value) in [
            ("embedding_length", hidden),
            ("feed_forward_length", intermediate),
            ("attention.key_length", dim),
            ("attention.value_length", dim),
        ] {
            meta.insert(format!("qwen3.{key}"), Value::U32(value as u32));
        }
        for (i, (name, tensor)) in tensors.iter_mut().enumerate() {
            let (rows, cols) = match name.rsplit('.').nth(1).unwrap_or_default() {
                "token_embd" | "output" => (384, hidden),
                "attn_q" => (8 * dim, hidden),
                "attn_k" | "attn_v" => (4 * dim, hidden),
                "attn_output" => (hidden, 8 * dim),
                "ffn_gate" | "ffn_up" => (intermediate, hidden),
                "ffn_down" => (hidden, intermediate),
                "attn_q_norm" | "attn_k_norm" => (1, dim),
                _ => (1, hidden),
            };
            let made = match tensor.shape().rank() {
                // Of variance 1 / cols.
                2 => values((1, rows, cols), 3 + i as u64, (12.0 / cols as f32).sqrt())
                    .and_then(|w| QTensor::quantize(&w.squeeze(0)?, format(name))),
                _ => values((1, 1, cols), 3 + i as u64, 0.5)
                    .and_then(|w| QTensor::quantize(&(w.flatten_all()? + 1.0)?, F32)),
            };
            *tensor = made.expect("rows hold whole blocks");
        }
    })
}

pub fn text(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 4 + (i * i * 31 + i * 7) % 370).collect()
}

/// As llama.cpp mixes them: one layer's matrices differ, and so do layers.
fn mixed(name: &str) -> GgmlDType {
    let first = name.starts_with("blk.0.");
    match name.rsplit('.').nth(1).unwrap_or_default() {
        "token_embd" => Q8_0,
        "output" => Q6K,
        "attn_q" | "ffn_gate" | "ffn_up" => Q4K,
        "attn_k" if first => Q5_1,
        "attn_k" => Q2K,
        "attn_v" if first => Q6K,
        // Held in 16 bits beside blocks.
        "attn_v" => F32,
        "attn_output" if first => Q3K,
        "attn_output" => Q5K,
        "ffn_down" if first => Q4_1,
        _ => Q6K,
    }
}

/// Logits of `tail` read one by one after `ids`; `captured`: by a captured step.
pub fn read(model: &Model, ids: &[u32], tail: &[u32], captured: bool) -> Any<Tensor> {
    let mut session = model.run()?;
    session.prefill(ids, 200, 1, &mut watch(|_| ()))?;
    assert_eq!(session.captures(), captured);
    Ok(session.read(tail)?.to_device(&Device::Cpu)?)
}

/// Prefill and decode of a model held as stored against the CPU's in f32; `theirs` is what transformers' bf16 run is off.
pub fn as_on_the_cpu(name: &str, path: &Path, device: &Device, theirs: f32) -> Any {
    let checkpoint = open(&path.to_string_lossy())?;
    let host = load_as(&checkpoint, None, 500, &WeightFormat::new(WeightDtype::Native, 0, None), &Device::Cpu)?;
    let model = load_as(&checkpoint, None, 500, &WeightFormat::for_gpu(WeightDtype::Auto), device)?;
    // Vectors of a hybrid are wider on a CPU.
    let as_stored = model.weights.has_quantised() && model.weights.bytes() <= host.weights.bytes();
    assert!(as_stored, "{name}: matrices are held as stored");
    let ids: Vec<u32> = text(430).into_iter().map(|id| id % checkpoint.spec.vocab as u32).collect();
    let prefill = |model: &Model| model.run()?.prefill(&ids, 200, 32, &mut watch(|_| ()));
    let off = deviation(&prefill(&model)?, &prefill(&host)?)?;
    // All but the first token through decode: a prefill's error would stay in the cache.
    let next = deviation(&read(&model, &ids[..1], &ids[1..300], true)?, &read(&host, &ids[..1], &ids[1..300], false)?)?;
    println!("{name}: prefill {off:.2e}, decode {next:.2e}, transformers' bf16 run {theirs:.2e}");
    assert!(off <= 2.0 * theirs, "{name}: prefill {off:.2e}, limit {:.2e}", 2.0 * theirs);
    assert!(next <= 2.0 * theirs, "{name}: decode {next:.2e}, limit {:.2e}", 2.0 * theirs);
    Ok(())
}

#[test]
fn quantised_goldens_give_the_cpus_logits() -> Any {
    let Some(device) = gpu("quantised goldens") else { return Ok(()) };
    let (dir, golden) = (tempfile::tempdir()?, Golden::open("qwen2")?);
    // Biases, one matrix for embedding and output, and a text that tells a wrong weight at once.
    let theirs = deviation(&golden.logits_bf16("short")?, &golden.logits("short")?)?;
    for format in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0] {
        let path = dir.path().join(format!("{format:?}.gguf"));
        // Queries and keys in one launch, values in another.
        let other = if format == Q8_0 { Q4_0 } else { Q8_0 };
        write_golden("qwen2", "qwen2", &path, |name| if name.contains("attn_v") { other } else { format })?;
        as_on_the_cpu(&format!("{format:?}"), &path, &device, theirs)?;
    }
    Ok(())
}

/// Against the same file held in bf16 on the GPU, whose step rounds the weights too.
#[test]
fn every_format_and_a_mixture_decode_as_a_captured_step() -> Any {
    let Some(device) = gpu("captured quantised decode") else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let one = FORMATS.map(|f| (format!("{f:?}"), Box::new(move |_: &str| f) as Box<dyn Fn(&str) -> GgmlDType>));
    for (name, format) in one.into_iter().chain([("mixed".to_string(), Box::new(mixed) as Box<_>)]) {
        let path = dir.path().join(format!("{name}.gguf"));
        write_wide(&path, format)?;
        let checkpoint = open(&path.to_string_lossy())?;
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

#[test]
fn captured_decode_of_a_mixture_takes_the_likeliest_token() -> Any {
    let Some(device) = gpu("captured greedy decode") else { return Ok(()) };
    let (dir, prompt) = (tempfile::tempdir()?, text(40));
    let path = dir.path().join("mixed.gguf");
    write_wide(&path, mixed)?;
    let model =
        load_as(&open(&path.to_string_lossy())?, None, 100, &WeightFormat::for_gpu(WeightDtype::Auto), &device)?;
    let request =
        Request { prompt: &prompt, max_new_tokens: 30, chunk: 128, stop: &[], logits_last: 1, phase: Phase::Prefill };
    let mut greedy = Sampler::new(Sampling::GREEDY)?;
    let made = model.run()?.generate(&request, &mut greedy, &mut watch(|_| ()), &mut watch(|_| ()))?;
    assert!(made.timing.fetched > 1, "tokens of a captured step are fetched together");
    let mut session = model.run()?;
    let first = session.prefill(&prompt, 128, 1, &mut watch(|_| ()))?.argmax(1)?.to_vec1::<u32>()?;
    let next = session.read(&made.tokens[..29])?.argmax(1)?.to_vec1::<u32>()?;
    assert_eq!(made.tokens, [first, next].concat());
    Ok(())
}

#[test]
fn gate_and_up_in_two_formats_decode_step_by_step() -> Any {
    let Some(device) = gpu("uncaptured quantised decode") else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("mixed.gguf");
    write_wide(&path, |tensor| if tensor.contains("ffn_up") { Q5K } else { Q4K })?;
    let checkpoint = open(&path.to_string_lossy())?;
    let model = load_as(&checkpoint, None, 100, &WeightFormat::for_gpu(WeightDtype::Auto), &device)?;
    let logits = read(&model, &text(10), &text(5), false)?;
    let largest = logits.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(largest.is_finite() && largest > 0.0, "{largest}");
    Ok(())
}
