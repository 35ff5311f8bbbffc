#!/usr/bin/env bash
# Makes the published GPU measurements, one after another.
#
#   scripts/measure_gpu.sh --model DIR --out results/2026-01-01-h100-ladders [STAGE...]
#
#   --model DIR    Qwen2.5-Coder-0.5B-Instruct, bf16, tied, as integrations/transformers/convert_gguf.py writes it
#   --bench FILE   bfly-bench built with --features cuda [target/release/bfly-bench]
#   --peer  CMD    Python interpreter with transformers [python3]
#   --out DIR      directory of the results, which go to DIR/raw; interrupted ladders there are resumed
#
# Stages (default: all): kernels; ladder (stock, retrofit and transformers from 4k to 256k, retrofit to 1M); chunked (the
# peer with chunked prefill, for memory); shapes (Qwen3-4B and Qwen2.5-7B with random weights, to 256k); budget (largest
# contexts in 10 and 24 GiB).
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
bench=target/release/bfly-bench model="" out="" python=python3 stages=()
while [ $# -gt 0 ]; do
  case "$1" in
    --bench) bench=$2; shift 2 ;;
    --model) model=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --peer) python=$2; shift 2 ;;
    -h|--help) usage ;;
    -*) echo "measure_gpu.sh: unknown flag $1" >&2; usage ;;
    *) stages+=("$1"); shift ;;
  esac
done
[ -n "$out" ] || { echo "measure_gpu.sh: --out is missing" >&2; usage; }
[ -x "$bench" ] || { echo "measure_gpu.sh: $bench is missing; build it with: cargo build --release --features cuda" >&2; exit 2; }
[ ${#stages[@]} -gt 0 ] || stages=(kernels ladder chunked shapes budget)
raw=$out/raw
mkdir -p "$raw"
shapes=tests/fixtures/shapes
peer="$python integrations/transformers/peer.py --model"
need_model() { [ -n "$model" ] || { echo "measure_gpu.sh: stage $1 needs --model" >&2; exit 2; }; }

for stage in "${stages[@]}"; do
  echo "== $stage" >&2
  case "$stage" in
    kernels) "$bench" kernel --out "$raw/kernels.json" ;;
    ladder)
      need_model ladder
      file=$raw/qwen2.5-coder-0.5b.json
      "$bench" ladder --model "$model" --dtype bf16 --ctx 4k,32k,64k,128k,256k --variants stock,retrofit --peer "$peer $model" --out "$file"
      "$bench" ladder --model "$model" --dtype bf16 --ctx 512k,1M --variants retrofit --out "$file"
      ;;
    chunked)
      need_model chunked
      "$bench" ladder --model "$model" --dtype bf16 --ctx 64k,256k --variants stock,retrofit --repeats 2 \
        --peer "$peer $model --prefill chunked --cache preallocated" --out "$raw/qwen2.5-coder-0.5b-chunked.json"
      ;;
    shapes)
      for shape in qwen3-4b qwen2.5-7b; do
        "$bench" ladder --model "$shapes/$shape" --random-weights 1 --dtype bf16 --ctx 4k,32k,64k,128k,256k \
          --variants stock,retrofit --repeats 3 --out "$raw/shape-$shape.json"
      done
      ;;
    budget)
      for shape in qwen3-4b qwen2.5-7b; do
        for dtype in bf16 q4_0; do
          "$bench" fit --model "$shapes/$shape" --random-weights 1 --dtype "$dtype" --memory-budget 10G,24G \
            --variants stock,retrofit --most 1M --read 64k --decode 8 --out "$raw/budget-$shape-$dtype.json"
        done
      done
      ;;
    *) echo "measure_gpu.sh: unknown stage $stage" >&2; usage ;;
  esac
done
