//! Damaged inputs: every mutation of a header, configuration, tokenizer, template or plan is read, or refused by an error that names
//! the file. Nothing panics.
//!
//! `BFLY_MUTATIONS=10000000 cargo test --release --test it mutations` runs so many; a failure names the seed that repeats it.

use crate::common::*;
use bfly::checkpoint::{ChatTemplate, Detokenizer, TextTokenizer};
use bfly::cli::Patch;
use bfly::generate::render_chat;
use bfly::layout::Layout;
use bfly::retrofit::{RetrofitPlan, Settings};
use bfly::spec::{Config, ModelSpec};
use rayon::prelude::*;
use serde_json::{json, Value};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;

/// Mutations where the variable does not say.
const FEW: u64 = 12_000;

/// Mutations that once failed: a sum that overflows, a tensor error without its file, a namespace that contains itself.
const ONCE: &[u64] = &[95_667, 72_430, 774_126, 3_906_011];

/// Configurations that are mutated, golden cases all: a fixed list, since a seed draws from it by index.
const CONFIGS: &[&str] =
    &["qwen2", "qwen3", "llama", "gemma3", "qwen2_yarn", "llama3_rope", "llama_linear", "qwen3_d128", "gemma3_bias"];

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// Numbers at which sizes overflow, and some that are merely odd.
const NUMBERS: &[&str] = &[
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "255",
    "65536",
    "16777216",
    "2147483647",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "99999999999999999999",
    "0.5",
    "1e308",
    "-1e-300",
    "1e400",
    "null",
    "true",
    "\"x\"",
    "[]",
    "{}",
];
/// What damages text of JSON and of Jinja.
const TOKENS: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    "\"",
    ",",
    ":",
    "\\",
    "\\u0000",
    "\\ud800",
    "\u{0}",
    "é",
    "😀",
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "'",
    "(",
    ")",
    "|",
    ".",
    "null",
    "true",
    "-",
    "{% generation %}",
    "{% endif %}",
    "{% for %}",
    "loop",
    "__class__",
    "messages[99999999]",
    "\n",
];

/// `bytes` with up to three injuries within the first `head` bytes.
fn injure(rng: &mut Rng, bytes: &[u8], head: usize) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..=rng.below(3) {
        let at = rng.below(out.len().min(head));
        match rng.below(8) {
            0 if !out.is_empty() => out[at] ^= 1 << rng.below(8),
            1 if !out.is_empty() => out[at] = rng.next() as u8,
            2 => out.truncate(at),
            3 => drop(out.splice(at..at, rng.of(TOKENS).bytes())),
            4 => {
                let end = (at + 1 + rng.below(40)).min(out.len());
                out.drain(at..end);
            }
            5 => {
                let end = (at + 1 + rng.below(40)).min(out.len());
                let copy = out[at..end].to_vec();
                drop(out.splice(at..at, copy));
            }
            6 => {
                // Eight bytes, as counts and lengths of binary headers are.
                let numbers = [0, 1, u64::MAX, u64::MAX / 2, 1 << 32, 1 << 40, 255];
                let end = (at + 8).min(out.len());
                let value = rng.of(&numbers).to_le_bytes();
                out[at..end].copy_from_slice(&value[..end - at]);
            }
            _ => {
                // The next number, wherever it is.
                let Some(from) = out[at..].iter().position(u8::is_ascii_digit).map(|i| at + i) else { continue };
                let end = out[from..].iter().position(|b| !b.is_ascii_digit()).map_or(out.len(), |i| from + i);
                drop(out.splice(from..end, rng.of(NUMBERS).bytes()));
            }
        }
    }
    out
}

/// JSON with up to three values deleted, renamed, doubled or replaced.
fn change(rng: &mut Rng, value: &Value) -> Value {
    let mut out = value.clone();
    (0..=rng.below(3)).for_each(|_| change_one(rng, &mut out));
    out
}

fn change_one(rng: &mut Rng, value: &mut Value) {
    let deeper = rng.below(4) > 0;
    match value {
        Value::Object(map) if !map.is_empty() => {
            let key = map.keys().nth(rng.below(map.len())).cloned().unwrap_or_default();
            match (deeper, rng.below(3)) {
                (true, _) => change_one(rng, &mut map[&key]),
                (_, 0) => drop(map.remove(&key)),
                (_, 1) => {
                    let old = map.remove(&key).unwrap_or_default();
                    map.insert(key + "x", old);
                }
                _ => drop(map.insert(key, replacement(rng))),
            }
        }
        Value::Array(list) if !list.is_empty() => {
            let i = rng.below(list.len());
            match (deeper, rng.below(3)) {
                (true, _) => change_one(rng, &mut list[i]),
                (_, 0) => drop(list.remove(i)),
                (_, 1) => list.push(list[i].clone()),
                _ => list[i] = replacement(rng),
            }
        }
        leaf => *leaf = replacement(rng),
    }
}

fn replacement(rng: &mut Rng) -> Value {
    let text = *rng.of::<&str>(NUMBERS);
    serde_json::from_str(text).unwrap_or(json!("1e400"))
}

/// A text file, injured as bytes or as JSON.
fn damaged(rng: &mut Rng, text: &[u8]) -> Vec<u8> {
    match serde_json::from_slice::<Value>(text) {
        Ok(value) if rng.below(2) == 0 => change(rng, &value).to_string().into_bytes(),
        _ => injure(rng, text, text.len()),
    }
}

/// Inputs that are whole, read once.
struct Whole {
    gguf: Vec<Vec<u8>>,
    safetensors: Vec<u8>,
    /// Configurations, each with the directory whose weights they describe.
    configs: Vec<(Vec<u8>, std::path::PathBuf)>,
    tokenizers: Vec<Vec<u8>>,
    beside: Vec<(&'static str, Vec<u8>)>,
    templates: Vec<String>,
    plan: Vec<u8>,
    patch: Vec<u8>,
    spec: ModelSpec,
}

impl Whole {
    fn open() -> Any<Self> {
        let dir = fault("model");
        let spec = open(&dir.to_string_lossy())?.spec;
        let plan = RetrofitPlan::new(&spec, None, Settings { block: 16, window: 32, ..Settings::default() })?;
        let templates = fixture("chat.json")?;
        let templates = templates["cases"].as_array().ok_or("no cases")?;
        let token = json!({"content": "<|im_start|>", "lstrip": false, "normalized": false, "special": true});
        Ok(Self {
            gguf: ["gguf-llama3-bos", "gguf-no-pre-tokenizer"]
                .iter()
                .map(|case| std::fs::read(fault(case).join("model.gguf")))
                .collect::<Result<_, _>>()?,
            safetensors: std::fs::read(dir.join("model.safetensors"))?,
            configs: CONFIGS
                .iter()
                .map(|g| golden_dir(g))
                .chain([dir.clone()])
                .map(|d| Ok((std::fs::read(d.join("config.json"))?, d)))
                .collect::<Any<_>>()?,
            tokenizers: ["added-tokens-decoder", "stream-byte-pieces", "tokenizer-padding", "tokenizer-truncation"]
                .iter()
                .map(|case| std::fs::read(fault(case).join("tokenizer.json")))
                .collect::<Result<_, _>>()?,
            beside: [
                ("tokenizer_config.json", json!({"eos_token": "</s>", "bos_token": token, "chat_template": [{"name": "default", "template": "x"}], "added_tokens_decoder": {"256": token, "257": token}})),
                ("tokenizer_config.json", json!({"eos_token": null, "chat_template": "{{ bos_token }}", "extra_special_tokens": {"a_token": "b"}})),
                ("special_tokens_map.json", json!({"eos_token": token, "additional_special_tokens": ["<a>", token]})),
                ("added_tokens.json", json!({"<|im_start|>": 257, "<|im_end|>": 258})),
                ("generation_config.json", json!({"eos_token_id": [1, 2], "bos_token_id": 0})),
            ]
            .into_iter()
            .map(|(name, value)| (name, value.to_string().into_bytes()))
            .collect(),
            templates: templates.iter().filter_map(|c| Some(c["template"].as_str()?.to_string())).collect(),
            patch: json!({"schema_version": 1, "base": {"source": "file", "path": "x", "sha256": "0"}, "ctx": 1024, "plan": plan})
                .to_string()
                .into_bytes(),
            plan: serde_json::to_vec(&plan)?,
            spec,
        })
    }

    /// Reads one damaged input in `dir`. An error is its text and one of the names that it must say.
    fn read(&self, seed: u64, dir: &Path) -> Result<(), (String, String)> {
        let rng = &mut Rng(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let put =
            |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).map_err(|e| (e.to_string(), "?".into()));
        let place = dir.to_string_lossy().into_owned();
        let named = |name: &str| {
            let name = name.to_string();
            move |e: bfly::Error| (e.to_string(), name.clone())
        };
        match rng.below(7) {
            0 => {
                let whole = rng.of(&self.gguf);
                // The header: what is after it are weights.
                put("model.gguf", &injure(rng, whole, 5000))?;
                let path = dir.join("model.gguf").to_string_lossy().into_owned();
                let checkpoint = open(&path).map_err(named("model.gguf"))?;
                if let Ok(text) = checkpoint.tokenizer().map_err(named("model.gguf")) {
                    use_text(&text).map_err(named("model.gguf"))?;
                }
                run(&checkpoint).map_err(named(&path))
            }
            1 => {
                put("config.json", &self.configs.last().ok_or(("no configuration".to_string(), "?".to_string()))?.0)?;
                put("model.safetensors", &injure(rng, &self.safetensors, 1800))?;
                run(&open(&place).map_err(named(&place))?).map_err(named(&place))
            }
            2 => {
                let (config, weights) = rng.of(&self.configs);
                put("config.json", &damaged(rng, config))?;
                let copied = std::fs::copy(weights.join("model.safetensors"), dir.join("model.safetensors"));
                copied.map_err(|e| (e.to_string(), "?".to_string()))?;
                run(&open(&place).map_err(named(&place))?).map_err(named(&place))
            }
            3 => {
                let whole = rng.of(&self.tokenizers);
                put("tokenizer.json", &damaged(rng, whole))?;
                let text = text_of(dir).map_err(named("tokenizer.json"))?;
                use_text(&text).map_err(named("tokenizer.json"))
            }
            4 => {
                let tokenizer: &Vec<u8> = rng.of(&self.tokenizers);
                put("tokenizer.json", tokenizer)?;
                let (name, whole) = rng.of(&self.beside);
                put(name, &damaged(rng, whole))?;
                let text = text_of(dir).map_err(named(&place))?;
                use_text(&text).map_err(named(&place))
            }
            5 => {
                let whole = rng.of(&self.templates);
                let source = String::from_utf8_lossy(&injure(rng, whole.as_bytes(), whole.len())).into_owned();
                let tokens = vec![("bos_token".into(), "<s>".into())];
                let template = ChatTemplate { source, origin: "chat_template.jinja".into(), tokens };
                render_chat(&template, Some("Be brief."), "Hi").map(drop).map_err(named("chat_template.jinja"))
            }
            _ if rng.below(2) == 0 => {
                put("bfly.json", &damaged(rng, &self.patch))?;
                let patch = Patch::open(&place).map_err(named("bfly.json"))?;
                let (plan, ctx) = patch.map(|p| (p.plan, p.ctx)).ok_or(("no patch".to_string(), "?".to_string()))?;
                self.lay_out(&plan, ctx)
                    .map_err(|e| (e.within(dir.join("bfly.json").display()).to_string(), "bfly.json".into()))
            }
            _ => {
                put("plan.json", &damaged(rng, &self.plan))?;
                let plan = RetrofitPlan::load(&dir.join("plan.json")).map_err(named("plan.json"))?;
                self.lay_out(&plan, 4096).map_err(|e| (e.within("plan.json").to_string(), "plan.json".into()))
            }
        }
    }

    fn lay_out(&self, plan: &RetrofitPlan, ctx: usize) -> bfly::Result<()> {
        plan.check(&self.spec)?;
        let layout = Layout::new(&self.spec, plan, ctx.min(1 << 16))?;
        layout.reach();
        layout.bytes(candle_core::DType::F32);
        Ok(())
    }
}

/// Two tokens of the vocabulary through the model.
fn run(checkpoint: &bfly::checkpoint::Checkpoint) -> bfly::Result<()> {
    let last = checkpoint.spec.vocab as u32 - 1;
    load(checkpoint, None, 16)?.run()?.forward(&[last.min(1), last.min(2)], &[1]).map(drop)
}

fn text_of(dir: &Path) -> bfly::Result<TextTokenizer> {
    TextTokenizer::from_dir(dir, &Config::new(dir.join("config.json").display().to_string(), json!({}))?)
}

/// Hard text to ids and back, by the whole and by pieces.
fn use_text(text: &TextTokenizer) -> bfly::Result<()> {
    let ids = text.encode("<|im_start|> Hello,\n  wörld 123 😀<|im_end|>", true)?;
    let mut stream = Detokenizer::new(text);
    let mut pieces: String = ids.iter().map(|id| stream.push(*id)).collect();
    pieces += &stream.finish()?;
    assert_eq!(pieces, text.decode(&ids)?, "pieces are the text");
    if let Ok(template) = text.chat_template() {
        render_chat(template, None, "Hi")?;
    }
    Ok(())
}

#[test]
fn every_mutation_is_read_or_refused_by_an_error_that_names_the_file() -> Any {
    let count = std::env::var("BFLY_MUTATIONS").ok().map(|n| n.parse()).transpose()?.unwrap_or(FEW);
    let first: u64 = std::env::var("BFLY_MUTATION_SEED").ok().map(|n| n.parse()).transpose()?.unwrap_or(0);
    let whole = Whole::open()?;
    let one = |dir: &mut tempfile::TempDir, seed: u64| -> Option<String> {
        let _ =
            std::fs::read_dir(dir.path()).map(|all| all.flatten().for_each(|e| drop(std::fs::remove_file(e.path()))));
        match catch_unwind(AssertUnwindSafe(|| whole.read(seed, dir.path()))) {
            Err(_) => Some(format!("seed {seed} panics")),
            Ok(Err((message, name))) if !message.contains(&name) => {
                Some(format!("seed {seed} does not name {name}: {message}"))
            }
            Ok(Ok(())) => None,
            Ok(Err(_)) => None,
        }
    };
    let seeds = (first..first + count).into_par_iter().chain(ONCE.par_iter().copied());
    let faults: Vec<String> =
        seeds.map_init(|| tempfile::tempdir().expect("a temporary directory"), one).flatten().collect();
    assert!(faults.is_empty(), "{} of {count} inputs:\n{}", faults.len(), faults[..faults.len().min(40)].join("\n"));
    Ok(())
}
