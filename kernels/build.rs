// Compiles kernels/*.cu to PTX with nvcc and lists them as Rust constants. Part of the package's build script.
//
// The architecture is CUDA_COMPUTE_CAP, or that of the GPU at hand. Without a GPU or a toolkit: README, "Building for CUDA".

use cudaforge::KernelBuilder;
use std::path::Path;

pub fn compile() {
    let sources = ["attention_any", "attention_hopper", "attention_prefill", "pointwise", "summaries"];
    let files: Vec<String> = sources.iter().map(|name| format!("kernels/{name}.cu")).collect();
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let built = KernelBuilder::new()
        .source_files(files)
        .watch(["kernels/common.cuh", "kernels/attention.cuh", "kernels/wgmma.cuh"])
        // Warpgroup instructions exist on compute capability 9.0 alone; the module is loaded nowhere else.
        .with_compute_override_arch("attention_hopper*", "90a")
        .out_dir(&out)
        .arg("-std=c++17")
        .arg("-O3")
        .build_ptx()
        .unwrap_or_else(|e| panic!("compiling kernels/*.cu: {e}"));
    built.write(Path::new(&out).join("kernels.rs")).expect("OUT_DIR is writable");
}
