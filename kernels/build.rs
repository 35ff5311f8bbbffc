// Compiles kernels/*.cu to PTX with nvcc and lists them as Rust constants. Part of the package's build script.
//
// The architecture is CUDA_COMPUTE_CAP, or that of the GPU at hand. Without a GPU or a toolkit: README, "Building for CUDA".

use cudaforge::KernelBuilder;
use std::path::{Path, PathBuf};

/// Sources compiled whole.
const WHOLE: &[&str] = &["attention_any", "decode", "pointwise", "select", "summaries"];
/// Sources compiled once per head dim: the driver translates a module's PTX when it is first loaded, and all of one takes
/// seconds.
const BY_DIM: &[(&str, &[u32])] = &[
    ("attention_decode", &[64, 128, 256]),
    ("attention_hopper", &[64, 96, 128, 256]),
    ("attention_hopper_pieces", &[64, 96, 128, 256]),
    ("attention_prefill", &[64, 96, 128, 256]),
];
/// The same per format of weights: a model uses a few of them.
const BY_FORMAT: &[(&str, &[&str])] =
    &[("quantised", &["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])];
const HEADERS: &[&str] = &["common.cuh", "attention.cuh", "blocks.cuh", "decode.cuh", "matvec.cuh", "wgmma.cuh"];

pub fn compile() {
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let here = Path::new(&std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR")).join("kernels");
    let mut files: Vec<PathBuf> = WHOLE.iter().map(|name| here.join(format!("{name}.cu"))).collect();
    let mut watched: Vec<PathBuf> = HEADERS.iter().map(|name| here.join(name)).collect();
    let generated = out.join("parts");
    std::fs::create_dir_all(&generated).expect("OUT_DIR is writable");
    let dims = BY_DIM.iter().map(|(name, dims)| (name, "ONLY_DIM", dims.iter().map(u32::to_string).collect()));
    let formats =
        BY_FORMAT.iter().map(|(name, all)| (name, "ONLY_FORMAT", all.iter().map(|f| f.to_string()).collect()));
    for (name, only, parts) in dims.chain(formats) {
        let (source, parts): (PathBuf, Vec<String>) = (here.join(format!("{name}.cu")), parts);
        for part in parts {
            let file = generated.join(format!("{name}_{part}.cu"));
            let text = format!("#define {only} {part}\n#include \"{}\"\n", source.display());
            std::fs::write(&file, text).expect("OUT_DIR is writable");
            files.push(file);
        }
        watched.push(source);
    }
    let built = KernelBuilder::new()
        .source_files(files)
        .watch(watched)
        .out_dir(&out)
        // Warpgroup instructions exist on compute capability 9.0 alone; the module is loaded nowhere else.
        .with_compute_override_arch("attention_hopper*", "90a")
        .arg("-std=c++17")
        .arg("-O3")
        .build_ptx()
        .unwrap_or_else(|e| panic!("compiling kernels/*.cu: {e}"));
    built.write(out.join("kernels.rs")).expect("OUT_DIR is writable");
}
