// Compiles kernels/*.cu to PTX with nvcc and lists them as Rust constants. Part of the package's build script.
//
// The architecture is CUDA_COMPUTE_CAP, or that of the GPU at hand. Without a GPU or a toolkit: README, "Building for CUDA".

use cudaforge::KernelBuilder;
use std::path::{Path, PathBuf};

/// Sources compiled once per head dim: the driver translates a module's PTX when it is first loaded, and all of one takes
/// seconds.
const BY_DIM: &[(&str, &[u32])] = &[
    ("attention_decode", &[64, 128, 256]),
    ("attention_hopper", &[64, 96, 128, 256]),
    ("attention_hopper_pieces", &[64, 96, 128, 256]),
    ("attention_prefill", &[64, 96, 128, 256]),
    ("recall_fetch", &[64, 128, 256]),
];
/// The same per format of weights: a model uses a few of them.
const BY_FORMAT: &[(&str, &[&str])] = &[
    ("quantised", &["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]),
    // Bits of a value.
    ("affine", &["2", "3", "4", "5", "6", "8"]),
];

/// The sources that are compiled whole, those that are neither in [`BY_DIM`] nor in [`BY_FORMAT`], and the headers.
fn sources(folder: &Path) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let in_parts = |name: &str| BY_DIM.iter().any(|(n, _)| *n == name) || BY_FORMAT.iter().any(|(n, _)| *n == name);
    let (mut whole, mut headers) = (vec![], vec![]);
    for entry in std::fs::read_dir(folder).expect("kernels/ is readable") {
        let path = entry.expect("kernels/ is readable").path();
        let name = stem(&path);
        match path.extension().and_then(|e| e.to_str()) {
            Some("cu") if !in_parts(&name) => whole.push(path),
            Some("cuh") => headers.push(path),
            _ => (),
        }
    }
    whole.sort();
    headers.sort();
    (whole, headers)
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

pub fn compile() {
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let here = Path::new(&std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR")).join("kernels");
    println!("cargo:rerun-if-changed={}", here.display()); // A new file too.
    let (mut files, mut watched) = sources(&here);
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
    let stems: Vec<String> = files.iter().map(|file| stem(file)).collect();
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
    // `Kernel::load` finds a module by the name of its file, so that no Rust source lists the files again.
    let arms: String = stems.iter().map(|stem| format!("\"{stem}\" => {},\n", stem.to_uppercase())).collect();
    let table = format!(
        "/// PTX by the name of its source or part.\n\
         pub fn module(name: &str) -> Option<&'static str> {{\nSome(match name {{\n{arms}_ => return None,\n}})\n}}\n"
    );
    let mut list = std::fs::read_to_string(out.join("kernels.rs")).expect("OUT_DIR is readable");
    list.push_str(&table);
    std::fs::write(out.join("kernels.rs"), list).expect("OUT_DIR is writable");
}
