//! Calibration of exact recall at uniform and at natural positions.

use crate::common::*;
use bfly::method::Method;
use bfly::nn::Rope;
use bfly::recall::{calibrate, joined, Calibration, HeadMoments, HeadRows, KeyCodeChoice, Positions};
use bfly::retrofit::{RetrofitPlan, Settings};
use bfly::run::Run;
use candle_core::Tensor;

const SINKS: usize = 3;

fn made(model: &Model, documents: &[Vec<u32>], positions: Positions) -> Any<Calibration> {
    Ok(calibrate(&model.weights, documents, SINKS, positions, &|_, _, _| ())?)
}

/// The golden with angles of 0 at every position.
fn without_rotation(name: &str) -> Any<Model> {
    let dir = variant(name, |config| {
        let theta = config["rope_parameters"]["rope_theta"].clone();
        config["rope_parameters"] = serde_json::json!({"rope_type": "linear", "factor": 1e300, "rope_theta": theta});
    })?;
    Ok(load(&open(&dir.path().to_string_lossy())?, None, 600)?)
}

#[test]
fn natural_moments_are_those_of_keys_and_queries_rotated_at_their_own_positions() -> Any {
    let model = load_golden("llama", None, 900)?;
    let spec = model.spec();
    let documents = &calibration_documents(spec.vocab)[..3];
    let got = made(&model, documents, Positions::Natural)?;
    for (layer, a) in spec.full_attention() {
        let rope = Rope::new(&spec.ropes[a.rope]);
        let (frequencies, amplitude) = rope.frequencies();
        let (dim, half) = (a.head_dim, frequencies.len());
        // Rotated keys and queries of each KV head, by position.
        let (mut keys, mut queries) = (vec![vec![]; a.kv_heads], vec![vec![]; a.kv_heads]);
        for document in documents {
            let mut rows: Vec<(Tensor, Tensor)> = vec![];
            Run::new(&model.weights, Method::Stock, document.len())?.forward_observed(document, &[], &mut |seen| {
                if seen.layer == layer {
                    let table = &seen.chunk.tables[seen.projections.rope];
                    rows.extend(seen.projections.project(seen.x, table, true)?.plain);
                }
                Ok(())
            })?;
            let (q, k) = (rows[0].0.to_vec3::<f32>()?, rows[0].1.to_vec3::<f32>()?);
            let rotated = |x: &[f32], position: usize| -> Vec<f64> {
                let mut y: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                for (i, frequency) in frequencies.iter().enumerate() {
                    let (sin, cos) = (f64::from(*frequency) * position as f64).sin_cos();
                    let (one, two, by) = (f64::from(x[i]), f64::from(x[i + half]), f64::from(amplitude));
                    (y[i], y[i + half]) = (by * (one * cos - two * sin), by * (two * cos + one * sin));
                }
                y
            };
            for t in SINKS..document.len() {
                for g in 0..a.kv_heads {
                    keys[g].push(rotated(&k[t][g], t));
                    let group = a.heads / a.kv_heads;
                    queries[g].extend(q[t][g * group..(g + 1) * group].iter().map(|q| rotated(q, t)));
                }
            }
        }
        let found = got.layers[layer].as_ref().ok_or("a layer is missing")?;
        for (g, head) in found.heads.iter().enumerate() {
            let mean = |rows: &[Vec<f64>], f: &dyn Fn(&[f64]) -> f64| -> f32 {
                (rows.iter().map(|row| f(row)).sum::<f64>() / rows.len() as f64) as f32
            };
            let square = |rows: &[Vec<f64>]| (0..dim).map(|c| mean(rows, &|x| x[c] * x[c])).collect();
            let cross = |rows: &[Vec<f64>]| (0..half).map(|i| mean(rows, &|x| x[i] * x[i + half])).collect();
            let want = HeadMoments {
                key_mean: (0..dim).map(|c| mean(&keys[g], &|x| x[c])).collect(),
                key_square: square(&keys[g]),
                key_cross: cross(&keys[g]),
                query_square: square(&queries[g]),
                query_cross: cross(&queries[g]),
            };
            let all = |h: &HeadMoments| {
                [&h.key_mean, &h.key_square, &h.key_cross, &h.query_square, &h.query_cross].map(Clone::clone).concat()
            };
            for (got, want) in all(head).iter().zip(all(&want)) {
                assert!((got - want).abs() < 1e-3 * (1.0 + want.abs()), "layer {layer}, head {g}: {got}, not {want}");
            }
            // Statistics in a run are these moments, whatever its context.
            let zeros = vec![0.0; half];
            let used = head.rotated((&zeros, 1.0), 3..100_000, 50_000..100_000);
            assert_eq!(used.mean, head.key_mean);
        }
    }
    assert_ne!(got.layers[1].as_ref().map(|l| &l.heads), {
        let uniform = made(&model, documents, Positions::Uniform)?;
        uniform.layers[1].as_ref().map(|l| l.heads.clone()).as_ref()
    });
    Ok(())
}

#[test]
fn without_rotation_both_positions_give_the_same_codes() -> Any {
    let model = without_rotation("llama")?;
    let spec = model.spec();
    let documents = calibration_documents(spec.vocab);
    let uniform = made(&model, &documents, Positions::Uniform)?;
    let natural = made(&model, &documents, Positions::Natural)?;
    let dim = spec.attention().next().ok_or("no attention")?.1.head_dim;
    let keys: Vec<f32> = (0..64 * dim).map(|i| ((i * 7919 + 13) % 9973) as f32 / 2493.25 - 2.0).collect();
    for (i, a) in spec.full_attention() {
        let rope = Rope::new(&spec.ropes[a.rope]);
        assert!(rope.frequencies().0.iter().all(|f| *f == 0.0));
        let heads = |c: &Calibration| c.layers[i].as_ref().map(|l| l.heads.clone());
        assert_eq!(heads(&uniform), heads(&natural));
        for choice in KeyCodeChoice::all().filter(|c| c.check_natural().is_ok()) {
            for ctx in [600, 1 << 20] {
                let decoded = |c: &Calibration| -> Any<Vec<f32>> {
                    let tables = c.tables(i, &choice, &rope, ctx)?;
                    let mut all = vec![];
                    for head in &tables.keys {
                        let mut codes = vec![0; 64 * head.bytes()];
                        head.encode(&keys, &mut codes);
                        let mut rows = vec![0.0; 64 * head.lift(&keys[..dim]).len()];
                        head.decode(&HeadRows { codes: &codes, exact: &[&keys[..], &keys].concat() }, 0..64, &mut rows);
                        all.extend(rows);
                    }
                    Ok(all)
                };
                assert_eq!(decoded(&uniform)?, decoded(&natural)?, "{} at {ctx}", choice.name());
            }
        }
    }
    Ok(())
}

#[test]
fn a_file_says_its_positions_and_one_that_does_not_is_uniform() -> Any {
    let model = load_golden("qwen2", None, 600)?;
    let documents = calibration_documents(model.spec().vocab);
    let natural = made(&model, &documents, Positions::Natural)?.to_bytes()?;
    let uniform = made(&model, &documents, Positions::Uniform)?.to_bytes()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(4096)]).into_owned();
    assert!(text(&natural).contains(r#"\"version\":2"#) && text(&natural).contains(r#"\"positions\":\"natural\""#));
    assert!(text(&uniform).contains(r#"\"version\":1"#) && !text(&uniform).contains("positions"));
    let read = Calibration::from_bytes(&natural, model.spec())?;
    assert_eq!(read.positions, Positions::Natural);
    assert!(read.to_bytes()? == natural);
    assert_eq!(Calibration::from_bytes(&uniform, model.spec())?.positions, Positions::Uniform);

    // At every context; but a code that needs moments before rotation is refused by its name.
    model.weights.calibrate(read);
    let run = |key_code: &str, ctx: usize| -> bfly::Result<Run> {
        let settings = Settings { block: 16, window: 32, sink_tokens: SINKS, recall: 20, ..Settings::default() };
        let settings = Settings { key_code: key_code.into(), ..settings };
        Run::new(&model.weights, &RetrofitPlan::new(model.spec(), None, settings)?, ctx)
    };
    for key_code in ["pair:1bit", "scalar2", "page", "exact"] {
        let mut run = run(key_code, 600)?;
        run.forward(&documents[0][..200], &[])?;
        run.read(&documents[0][200..210])?;
    }
    run("pair:2bit", 100_000)?;
    let e = run("qpq:2bit", 600).err().ok_or("qpq on rotated moments")?.to_string();
    assert!(e.contains("--key-code: `qpq:2bit` is fitted to moments before rotation"), "{e}");
    Ok(())
}

#[test]
fn documents_are_joined_into_texts_of_the_trained_length() {
    let documents = [vec![1, 2, 3], vec![4], vec![5, 6, 7]];
    assert_eq!(joined(&documents, 4), [vec![1, 2, 3, 4], vec![5, 6, 7]]);
    assert_eq!(joined(&documents, 100), [vec![1, 2, 3, 4, 5, 6, 7]]);
}
