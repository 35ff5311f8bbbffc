#!/usr/bin/env bash
# The published quality measurements of one model, one after another.
#
#   scripts/measure_quality.sh --model FILE.gguf --out results/2026-01-01-h100-quality [--ctx 32k] [STAGE...]
#
#   --model FILE    a checkpoint with a tokenizer
#   --name NAME     of the files in DIR/raw                          [the model's file name]
#   --ctx TOKENS    what the model was trained for: the longest text  [32k]
#   --quality FILE  bfly-quality-smoke                                [target/release/bfly-quality-smoke]
#   --flags FLAGS   for every command, such as '--dtype bf16 --tie-embeddings'
#   --samples N     samples per cell                                  [50]
#   --out DIR       JSON goes to DIR/raw; files of answers there are taken up where they were cut off
#
# Stages: smoke, layers (writes DIR/plans), ablate, ruler, unseen (methods that evict, and what they are held against, with the question
# unseen), needle, positions (to 128k, beyond the trained length). All by default. texts/ and words/ must be there
# (scripts/fetch_texts.py, scripts/fetch_words.py).
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,18s/^# \{0,1\}//p' "$0" >&2; exit 2; }
quality=target/release/bfly-quality-smoke model="" out="" name="" ctx=32k samples=50 flags=() stages=()
while [ $# -gt 0 ]; do
  case "$1" in
    --model) model=$2; shift 2 ;;
    --name) name=$2; shift 2 ;;
    --ctx) ctx=$2; shift 2 ;;
    --quality) quality=$2; shift 2 ;;
    --flags) read -ra flags <<<"$2"; shift 2 ;;
    --samples) samples=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    -h|--help) usage ;;
    -*) echo "measure_quality.sh: unknown flag $1" >&2; usage ;;
    *) stages+=("$1"); shift ;;
  esac
done
[ -n "$model" ] && [ -n "$out" ] || { echo "measure_quality.sh: --model and --out are needed" >&2; usage; }
[ -x "$quality" ] || { echo "measure_quality.sh: $quality is missing; build it with: cargo build --release" >&2; exit 2; }
[ ${#stages[@]} -gt 0 ] || stages=(smoke layers ablate ruler unseen needle positions)
[ -n "$name" ] || { name=$(basename "$model"); name=${name%.gguf}; }
raw=$out/raw plans=$out/plans/$name
mkdir -p "$raw"

# Every length that the model was trained for.
lengths=""
for length in 4k 8k 16k 32k; do
  [ "${length%k}" -le "${ctx%k}" ] && lengths=$lengths${lengths:+,}$length
done
middle=8k; [ "${ctx%k}" -ge 8 ] || middle=$ctx
published=retrofit:window=64,block=64,window-align=token,sink-tokens=0,shift-unit=1
local=retrofit:partner=local
# The four layers that `layers` found most sensitive, kept dense; once it was run.
best=""; [ ! -f "$plans/dense-4.json" ] || best=retrofit:plan=$plans/dense-4.json
run() { local what=$1 file=$2; shift 2; "$quality" $what --model "$model" ${flags[@]+"${flags[@]}"} --out "$raw/$name-$file.json" "$@"; }

for stage in "${stages[@]}"; do
  echo "== $stage" >&2
  case "$stage" in
    smoke) run "" smoke --ctx "1k,$lengths" --documents 12 --variants "stock,retrofit,$published,$local" ;;
    layers)
      run layers layers --ctx "$middle" --documents 8 --samples 8 --plans "$plans"
      best=retrofit:plan=$plans/dense-4.json
      ;;
    ablate)
      for length in 4k 8k 16k; do
        [ "${length%k}" -le "${ctx%k}" ] || continue
        run ablate "ablate-$length" --ctx "$length" --documents 12 --samples 8
        run ablate "ablate-small-blocks-$length" --ctx "$length" --documents 12 --samples 8 --axes partner \
          --variants retrofit:block=16,partner-count=4
      done
      ;;
    # A file per length: a run that is cut off can only be taken up by the same build.
    ruler)
      for length in ${lengths//,/ }; do
        run ruler "ruler-$length" --ctx "$length" --samples "$samples" --variants "stock,retrofit,$published,$local${best:+,$best}"
      done
      ;;
    unseen)
      for length in ${lengths//,/ }; do
        run ruler "unseen-$length" --ctx "$length" --samples "$samples" --question-unseen \
          --variants "snapkv:budget=644,keydiff:budget=512,block=128,snapkv:budget=2048,keydiff:budget=1536,block=512"
      done
      ;;
    needle) run needle needle --ctx "$lengths" --samples 5 --variants "stock,retrofit${best:+,$best}" ;;
    positions)
      run positions positions --ctx 128k --allow-extrapolation --documents 5 \
        --variants "stock,retrofit,retrofit:pool=pre-rope,retrofit:pool=pre-rope,far-position=clamp"
      ;;
    *) echo "measure_quality.sh: unknown stage $stage" >&2; usage ;;
  esac
done
