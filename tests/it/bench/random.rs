//! Weights drawn from a seed, and runs that do not fit.

use super::*;

/// A directory that holds a golden configuration and nothing else.
fn bare(change: impl FnOnce(&mut Value)) -> Any<tempfile::TempDir> {
    let dir = variant("qwen2", change)?;
    std::fs::remove_file(dir.path().join("model.safetensors"))?;
    Ok(dir)
}

#[test]
fn random_weights_need_a_configuration_alone_and_results_say_so() -> Any {
    let (dir, mut place) = (bare(|_| ())?, Place::new()?);
    let flags =
        ["--ctx", "128", "--repeats", "1", "--variants", "stock,retrofit:block=16,window=16", "--random-weights"];
    let tokens = |l: &Ladder| -> Vec<String> { l.runs.iter().map(|r| r.samples[0].tokens_sha256.clone()).collect() };
    let mut seen = vec![];
    for (model, seed, dtype) in [
        (dir.path().to_path_buf(), "7", "auto"),
        (dir.path().join("config.json"), "7", "f32"),
        (dir.path().to_path_buf(), "8", "f32"),
        (dir.path().to_path_buf(), "7", "q8_0"),
        (dir.path().to_path_buf(), "7", "q4_0"),
    ] {
        place.model = model.to_string_lossy().into_owned();
        let ladder = place.run_ladder(&[&flags[..], &[seed, "--dtype", dtype]].concat())?;
        let h = &ladder.header;
        assert_eq!((h.random_weights, h.model.is_none()), (Some(seed.parse()?), true));
        assert_eq!(h.dtype, if dtype == "auto" { "f32" } else { dtype });
        // 384 x 64 tied, 4 layers of q, k, v, o, gate, up, down, three biases and two norms, and the last norm.
        let layer = 2 * 64 * 64 + 2 * 16 * 64 + 3 * 160 * 64 + 96 + 128;
        assert_eq!(h.parameters, 384 * 64 + 4 * layer + 64);
        let bytes = h.held.values().sum::<u64>() as f64;
        let per_weight =
            [("q8_0", 34.0 / 32.0), ("q4_0", 18.0 / 32.0)].iter().find(|(d, _)| *d == dtype).map_or(4.0, |x| x.1);
        assert_eq!(bytes, per_weight * (h.parameters - 4 * (96 + 128) - 64) as f64);
        seen.push(tokens(&ladder));
        std::fs::remove_file(place.out())?;
    }
    assert_eq!(seen[0], seen[1], "the same seed is the same model");
    assert!(seen[0] != seen[2] && seen[0] != seen[4], "another seed or type is another");
    let out = place.ladder(&[&flags[..], &["7"]].concat()).output()?;
    assert!(String::from_utf8(out.stdout)?.contains("random weights from seed 7: speed and memory only"));
    Ok(())
}

#[test]
fn drawn_matrices_are_close_to_normal_norms_are_one_and_shapes_share_what_is_quantised() -> Any {
    let dir = bare(|c| (c["dtype"], c["tie_word_embeddings"]) = ("bfloat16".into(), false.into()))?;
    let model = dir.path().to_string_lossy().into_owned();
    let checkpoint = Checkpoint::random(&model, 3)?;
    let device = Device::Cpu;
    let values = |tensor: &TensorSpec, storage: Storage| -> Any<Vec<f32>> {
        let hold = WeightFormat::new(WeightDtype::As(storage), 0, None);
        let ids = candle_core::Tensor::arange(0u32, 64, &device)?;
        let rows = checkpoint.matrix(tensor, &hold, &device)?.rows(&ids, candle_core::DType::F32)?;
        Ok(rows.flatten_all()?.to_vec1()?)
    };
    let layers = &checkpoint.schema.layers;
    let attention = |i: usize| layers[i].attention().ok_or("no attention");
    let (q, o) = (&attention(0)?.q.weight, &attention(1)?.out.weight);
    let x = values(q, Storage::F32)?;
    let spread = (x.iter().map(|v| f64::from(v * v)).sum::<f64>() / x.len() as f64).sqrt();
    assert!((spread / 0.02 - 1.0).abs() < 0.05, "a deviation of {spread}");
    assert!(x.iter().all(|v| half::bf16::from_f32(*v).to_f32() == *v), "stored in the configuration's type");
    assert_ne!(x, values(o, Storage::F32)?, "matrices differ");
    assert_eq!(x, values(q, Storage::F32)?, "and stay");
    let hold = WeightFormat::new(WeightDtype::As(Storage::F32), 0, None);
    let other = match Checkpoint::random(&model, 4)?.matrix(q, &hold, &device)? {
        bfly::nn::Weight::Dense(w) => w.flatten_all()?.to_vec1::<f32>()?,
        quantised => panic!("{quantised:?}"),
    };
    assert_ne!(x, other, "another seed draws another matrix");
    let off = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let eight = values(q, Storage::Ggml(Ggml::Q8_0))?;
    assert!(off(&x, &eight) < 0.08 / 127.0, "off by {}", off(&x, &eight));
    assert_eq!(eight, values(o, Storage::Ggml(Ggml::Q8_0))?, "quantised once per shape");
    let one = checkpoint.vector(&layers[2].before_mlp, &device)?.to_vec1::<f32>()?;
    let bias = attention(2)?.k.bias.as_ref().ok_or("qwen2 has biases")?;
    let bias = checkpoint.vector(bias, &device)?.to_vec1::<f32>()?;
    assert!(one.iter().all(|v| *v == 1.0) && bias.iter().all(|v| *v == 0.0));
    let absent = TensorSpec { name: "model.layers.9.input_layernorm.weight".into(), ..layers[0].before_mixer.clone() };
    let missing = checkpoint.vector(&absent, &device).unwrap_err().to_string();
    assert!(missing.contains("`model.layers.9.input_layernorm.weight` is missing"), "{missing}");
    let text = checkpoint.tokenizer().err().ok_or("has text")?.to_string();
    assert!(text.contains("random weights come without a tokenizer"), "{text}");
    Ok(())
}

#[test]
fn runs_that_do_not_fit_are_recorded() -> Any {
    // Half a megabyte of keys and values per position: 2 TiB at 4M.
    let dir = bare(|c| {
        for (key, value) in [("num_attention_heads", 64), ("num_key_value_heads", 64), ("head_dim", 256)] {
            c[key] = value.into();
        }
    })?;
    let place = Place { model: dir.path().to_string_lossy().into_owned(), ..Place::new()? };
    let flags = ["--ctx", "64,4M,5M", "--repeats", "1", "--variants", "stock", "--random-weights", "1"];
    let out = place.ladder(&flags).output()?;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let ladder: Ladder = read(&place.out(), LADDER)?;
    assert_eq!(run(&ladder, "stock", 64).status, "ok");
    let failed = run(&ladder, "stock", 4 << 20);
    assert!(
        failed.status.starts_with("out of memory: --ctx: a cache for 4194304 tokens takes 2048.0 GiB"),
        "{}",
        failed.status
    );
    assert!(failed.samples.is_empty() && failed.summary.is_none());
    assert_eq!(run(&ladder, "stock", 5 << 20).status, "skipped: did not fit at 4M");
    // Recorded is done.
    place.ladder(&flags).assert().success().stderr(predicates::str::contains("is complete"));
    Ok(())
}
