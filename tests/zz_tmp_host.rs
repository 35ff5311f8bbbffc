//! Products with quantised blocks on a GPU, and the captured step made of them. Built with `--features cuda`; without a GPU each
//! test says that it was skipped.
#![allow(dead_code, unused_imports)]

mod common;

use bfly::checkpoint::{Held, HoldAs};
use bfly::generate::{Request, Sampler, Sampling, Session};
use bfly::model::Model;
use bfly::nn::{Linear, Weight};
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use common::attention::values;
use common::*;
use std::path::Path;
use std::sync::Arc;
use GgmlDType::*;

/// Every format with a kernel.
const FORMATS: [GgmlDType; 8] = [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K];

fn norm(x: &Tensor) -> Any<f64> {
    Ok(x.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

/// `|got - want| / |want|`.
fn error(got: &Tensor, want: &Tensor) -> Any<f64> {
    let got = got.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let want = want.to_dtype(DType::F64)?;
    Ok(norm(&(got - &want)?)? / norm(&want)?)
}

fn on_device(q: &QTensor, device: &Device) -> candle_core::Result<Linear> {
    let storage = QStorage::from_data(q.data()?, device, q.dtype())?;
    Ok(Linear::new(Weight::Quantised(Arc::new(QTensor::new(storage, q.shape())?)), None))
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

fn text(count: usize) -> Vec<u32> {
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
        "attn_k" => Q4K,
        "attn_v" if first => Q6K,
        // Held in 16 bits beside blocks.
        "attn_v" => F32,
        "attn_output" if first => Q5_0,
        "attn_output" => Q5K,
        "ffn_down" if first => Q4_1,
        _ => Q6K,
    }
}

/// Logits of a short prefill and of `tail` read one by one after it; `captured`: by a captured step.
fn read(model: &Model, ids: &[u32], tail: &[u32], captured: bool) -> Any<(Tensor, Tensor)> {
    let mut session = Session::new(model)?;
    let prefilled = session.prefill(ids, 200, ids.len().min(32), &mut |_| ())?;
    assert_eq!(session.captures(), captured);
    Ok((prefilled.to_device(&Device::Cpu)?, session.read(tail)?.to_device(&Device::Cpu)?))
}


#[test]
fn host_side() -> Any {
    let dir = tempfile::tempdir()?;
    let one = FORMATS.map(|f| (format!("{f:?}"), Box::new(move |_: &str| f) as Box<dyn Fn(&str) -> GgmlDType>));
    let odd = [("ffn_up", Q5K), ("ffn_down", Q3K)].map(|(n, o)| (n.to_string(), Box::new(move |t: &str| if t.contains(n) { o } else { Q4K }) as Box<dyn Fn(&str) -> GgmlDType>));
    for (name, format) in one.into_iter().chain(odd).chain([("mixed".to_string(), Box::new(mixed) as Box<_>)]) {
        let path = dir.path().join(format!("{name}.gguf"));
        write_wide(&path, format)?;
        let checkpoint = open(&path.to_string_lossy())?;
        let host = load_as(&checkpoint, None, 300, &HoldAs::new(Held::As(F32), 0, None), &Device::Cpu)?;
        let native = load_as(&checkpoint, None, 300, &HoldAs::new(Held::Auto, 0, None), &Device::Cpu)?;
        let bf = load_as(&checkpoint, None, 300, &HoldAs::new(Held::As(BF16), 0, None), &Device::Cpu)?;
        let want = read(&host, &text(1), &text(120), false)?.1;
        let std = want.flatten_all()?.var(0)?.sqrt()?.to_scalar::<f32>()?;
        println!("{name}: std {std} native {:.2e} bf16 {:.2e}", deviation(&read(&native, &text(1), &text(120), false)?.1, &want)?, deviation(&read(&bf, &text(1), &text(120), false)?.1, &want)?);
    }
    for format in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0] {
        let path = dir.path().join(format!("g{format:?}.gguf"));
        let other = if format == Q8_0 { Q4_0 } else { Q8_0 };
        write_golden("qwen2", "qwen2", &path, |name| if name.contains("attn_v") { other } else { format })?;
        let checkpoint = open(&path.to_string_lossy())?;
        let host = load_as(&checkpoint, None, 500, &HoldAs::new(Held::Native, 0, None), &Device::Cpu)?;
        let (a, b) = read(&host, &text(430), &text(20), false)?;
        println!("{format:?} {:?} {:?}", a.dims(), b.dims());
    }
    let golden = Golden::open("qwen2")?;
    println!("theirs {}", deviation(&golden.logits_bf16("short")?, &golden.logits("short")?)?);
    Ok(())
}
