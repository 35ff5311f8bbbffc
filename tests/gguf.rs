//! A GGUF file gives the logits of the safetensors it was made from: names, metadata, interleaved heads.

mod common;

use common::*;

#[test]
fn a_gguf_copy_of_a_golden_gives_its_logits() -> Any {
    for (name, arch) in [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("llama_linear", "llama")] {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("model.gguf");
        gguf::write(name, arch, &path, |_, _| ())?;
        let golden = Golden::open(name)?;
        let model = load(&open(&path.to_string_lossy())?, None, 300)?;
        let off = deviation(&last_logits(&model, &golden.ids("short")?, 300, 64)?, &golden.logits("short")?)?;
        assert!(off < 1e-4, "{name}: {off:.2e} standard deviations off");
    }
    Ok(())
}
