#!/usr/bin/env bash
# Trains the native character model: corpus, training, evaluation, sample and figures, in one command.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/train_char.sh [options] [-- flags of `bfly-char train`]

Fetches a corpus, trains a model, evaluates it on held-out text and on copy recall, continues a prompt and draws figures.
Without options a micro model (2.0M parameters) trains for half a minute on two cores and has not learned to write.

  --out DIR         folder of the run (default: run-PRESET)
  --preset NAME     micro, tiny, small or full (default: micro)
  --corpus DIR      texts to train on (default: corpus-SIZE, fetched by scripts/fetch_corpus.py)
  --size N          characters of the fetched corpus, such as 218M (default: 1M; 218M for the other presets)
  --window N        characters of a window (default: 512; 16k for the other presets)
  --batch N         windows of a step (default: 4; 8 for the other presets)
  --steps N         optimiser steps (default: 40; 1500 for the other presets)
  -h, --help        print this text

Examples:
  scripts/train_char.sh
  scripts/train_char.sh --preset tiny --steps 4000 -- --mix recall:0.1 --save-every 500      # on a GPU
  BFLY_FEATURES=cuda scripts/train_char.sh --preset small --window 64k --batch 4

BFLY_FEATURES gives cargo's features (README, "Building for CUDA"); BFLY_PROFILE=dev takes an unoptimised build. A run that
exists is gone on with. Needs Rust (https://rustup.rs) with a C compiler, and Python 3.9 or later with pip.
TEXT
}
fail() { echo "train_char.sh: $*" >&2; exit 2; }
say() { printf '\n== %s\n' "$*" >&2; }

preset=micro out="" corpus="" size="" window="" batch="" steps=""
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    --out | --preset | --corpus | --size | --window | --batch | --steps)
      [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value; see --help"
      declare "${1#--}=$2"
      shift 2 ;;
    *) fail "unknown argument '$1'; see --help" ;;
  esac
done
small=1
[ "$preset" = micro ] || small=""
size=${size:-${small:+1M}} size=${size:-218M}
window=${window:-${small:+512}} window=${window:-16k}
batch=${batch:-${small:+4}} batch=${batch:-8}
steps=${steps:-${small:+40}} steps=${steps:-1500}

# Paths on the command line are relative to the caller's directory, all others to the repository.
here=$PWD
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }
[ -z "$corpus" ] || corpus=$(absolute "$corpus")
out=$(absolute "${out:-run-$preset}")
cd "$(dirname "$0")/.."
command -v cargo >/dev/null || fail "cargo is missing; install Rust from https://rustup.rs"
command -v python3 >/dev/null || fail "python3 is missing (Debian: apt-get install python3 python3-pip)"
if [ -z "$corpus" ]; then
  corpus=$PWD/corpus-$size
  say "corpus of $size characters"
  [ -e "$corpus/manifest.json" ] || python3 scripts/fetch_corpus.py --size "$size" --out "$corpus" >/dev/null
fi

say "build"
profile=${BFLY_PROFILE:-release}
cargo build --quiet --profile "$profile" ${BFLY_FEATURES:+--features "$BFLY_FEATURES"} --bin bfly-char --bin bfly-plot
folder=$profile
[ "$profile" != dev ] || folder=debug
bin=${CARGO_TARGET_DIR:-target}/$folder

resume=()
compgen -G "$out/step-*" >/dev/null && resume=(--resume)
say "train $preset, $steps steps of $batch windows of $window characters"
"$bin/bfly-char" train "$corpus" --out "$out" --preset "$preset" --window "$window" --batch "$batch" --micro-batch "$batch" \
  --steps "$steps" --warmup $((steps / 20 + 1)) --eval-every $((steps / 2)) ${resume[@]+"${resume[@]}"} "$@"

say "evaluate"
windows=32
[ -z "$small" ] || windows=8
"$bin/bfly-char" eval --model "$out" "$corpus" --held-out --window "$window" --windows $windows --json "$out/eval.json" |
  tee "$out/eval.txt"
"$bin/bfly-char" recall --model "$out" --window "$window" --windows $windows --texts "$corpus" --json "$out/recall.json" |
  tee "$out/recall.txt"
say "a sample"
"$bin/bfly-char" generate --model "$out" --prompt 'The ' -n 120 --temperature 0.8 --seed 1 --stats | tee "$out/sample.txt"
say "figures"
"$bin/bfly-plot" "$out/log.jsonl" --out "$out/figures"
"$bin/bfly-plot" "$out/eval.json" --out "$out/figures"
"$bin/bfly-plot" "$out/recall.json" --out "$out/figures"
