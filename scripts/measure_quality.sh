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
#   --jobs N        samples side by side on one GPU                   [1]
#   --tasks LIST    of the ruler stages and bytes alone: with --part, one process per group of tasks, to be joined afterwards
#   --part NAME     added to the names of the files
#   --kept LIST     how the layers were ranked that the ruler stages keep dense: alone, mixed, rounds, rounds-mixed, heads  [alone,mixed]
#   --squad FILE    questions for qa_1, in the form of SQuAD 2.0; with --hotpot FILE, in the form of HotpotQA, for qa_2
#   --out DIR       JSON goes to DIR/raw; files of answers there are taken up where they were cut off
#
# Stages: smoke, layers (swapped alone; writes DIR/plans/NAME), layers-rounds (eliminated round by round: DIR/plans/NAME-rounds),
# layers-mixed, layers-rounds-mixed (judged on other tasks too), layers-heads (by retrieval heads), ruler-LENGTH (such as ruler-4k: every
# method, the question unseen), bytes (every method from 1/2 to 1/64 of a dense cache, the question unseen), ablate-LENGTH,
# cumulative-LENGTH (partner rules as layers are swapped, most harmless first), needle, smoke-plans (text again, with layers kept
# dense), positions (to 128k, beyond the trained length). All by default; several may run side by side once those of layers are done.
# texts/ and words/ must be there (scripts/fetch_texts.py, scripts/fetch_words.py).
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,26s/^# \{0,1\}//p' "$0" >&2; exit 2; }
quality=target/release/bfly-quality-smoke model="" out="" name="" ctx=32k samples=50 jobs=1 tasks="" part="" kept=alone,mixed questions=() flags=() stages=()
while [ $# -gt 0 ]; do
  case "$1" in
    --model) model=$2; shift 2 ;;
    --name) name=$2; shift 2 ;;
    --ctx) ctx=$2; shift 2 ;;
    --quality) quality=$2; shift 2 ;;
    --flags) read -ra flags <<<"$2"; shift 2 ;;
    --samples) samples=$2; shift 2 ;;
    --jobs) jobs=$2; shift 2 ;;
    --tasks) tasks=$2; shift 2 ;;
    --part) part=-$2; shift 2 ;;
    --kept) kept=$2; shift 2 ;;
    --squad|--hotpot) questions+=("$1" "$2"); shift 2 ;;
    --out) out=$2; shift 2 ;;
    -h|--help) usage ;;
    -*) echo "measure_quality.sh: unknown flag $1" >&2; usage ;;
    *) stages+=("$1"); shift ;;
  esac
done
[ -n "$model" ] && [ -n "$out" ] || { echo "measure_quality.sh: --model and --out are needed" >&2; usage; }
[ -x "$quality" ] || { echo "measure_quality.sh: $quality is missing; build it with: cargo build --release" >&2; exit 2; }
[ -n "$name" ] || { name=$(basename "$model"); name=${name%.gguf}; }
raw=$out/raw plans=$out/plans/$name
mkdir -p "$raw"

# Every length that the model was trained for.
lengths=""
for length in 4k 8k 16k 32k; do
  [ "${length%k}" -le "${ctx%k}" ] && lengths=$lengths${lengths:+,}$length
done
middle=8k; [ "${ctx%k}" -ge 8 ] || middle=$ctx
if [ ${#stages[@]} -eq 0 ]; then
  stages=(smoke layers layers-rounds layers-mixed layers-rounds-mixed layers-heads)
  for length in ${lengths//,/ }; do stages+=("ruler-$length"); done
  stages+=(bytes)
  for length in 4k 8k 16k; do [ "${length%k}" -gt "${ctx%k}" ] || stages+=("ablate-$length" "cumulative-$length"); done
  stages+=(needle smoke-plans positions)
fi
published=retrofit:window=64,block=64,window-align=token,sink-tokens=0,shift-unit=1
local=retrofit:partner=local
run() { local what=$1 file=$2; shift 2; "$quality" $what --model "$model" ${flags[@]+"${flags[@]}"} --out "$raw/$name-$file$part.json" "$@"; }
answer() { local file=$1; shift; run ruler "$file" --samples "$samples" --jobs "$jobs" --question-unseen ${tasks:+--tasks "$tasks"} ${questions[@]+"${questions[@]}"} "$@"; }
# Retrofits with so many layers kept dense, those that each way of ranking in --kept found most sensitive; once it was run.
dense() {
  local how dir k
  for how in ${kept//,/ }; do
    dir=$plans-$how dir=${dir%-alone}
    for k in "$@"; do [ ! -f "$dir/dense-$k.json" ] || echo -n ",retrofit:plan=$dir/dense-$k.json"; done
  done
}

for stage in "${stages[@]}"; do
  echo "== $stage" >&2
  case "$stage" in
    smoke) run "" smoke --ctx "1k,$lengths" --documents 12 --variants "stock,retrofit,$published,$local" ;;
    # Layers that matter to needles need not be those that matter to chains and counts.
    layers|layers-*)
      how=(--rank alone) each=8
      case "$stage" in *-rounds*) how=(--rank rounds) ;; *-heads) how=(--rank heads) ;; esac
      case "$stage" in *-mixed) how+=(--tasks niah_multikey_1,vt,cwe,fwe) ;; esac
      # As many questions as of two tasks: these have longer answers, and rounds ask them three times as often.
      case "$stage" in *-rounds-mixed) each=4 ;; esac
      run layers "$stage" --ctx "$middle" --documents 8 --samples "$each" --jobs "$jobs" "${how[@]}" --plans "$plans${stage#layers}"
      ;;
    # A file per length: a run that is cut off can only be taken up by the same build. An eviction is some thirty launches in
    # every layer: KeyDiff's blocks grow with the text.
    ruler-*)
      length=${stage#ruler-}
      answer "$stage" --ctx "$length" \
        --variants "stock,retrofit,$published,$local$(dense 4 8),snapkv:kv=1/4,keydiff:kv=1/4,block=$((${length%k} * 32))"
      ;;
    # Blocks small enough for the smallest shares.
    bytes)
      variants=stock$(dense 1 2 4 8 12)
      for share in 2 4 8 16 32 64; do
        evict=$((${middle%k} * 256 / share))
        evict=$((evict < 64 ? 64 : evict > 256 ? 256 : evict))
        variants=$variants,retrofit:kv=1/$share,block=32,snapkv:kv=1/$share,keydiff:kv=1/$share,block=$evict
        case $share in 4|16|64) variants=$variants,$local,kv=1/$share,block=32 ;; esac
      done
      answer bytes --ctx "$middle" --variants "$variants"
      ;;
    ablate-*)
      length=${stage#ablate-}
      run ablate "$stage" --ctx "$length" --documents 12 --samples 8
      run ablate "ablate-small-blocks-$length" --ctx "$length" --documents 12 --samples 8 --axes partner \
        --variants retrofit:block=16,partner-count=4
      ;;
    # Summaries that many queries read, and layers that still need them: where a rule could show.
    cumulative-*)
      length=${stage#cumulative-}
      for k in 16 12 8 4; do
        [ ! -f "$plans/dense-$k.json" ] || run ablate "$stage-dense-$k" --ctx "$length" --documents 12 --samples 8 --axes partner \
          --variants "retrofit:plan=$plans/dense-$k.json,block=16,partner-count=4"
      done
      ;;
    needle) run needle needle --ctx "$lengths" --samples 5 --jobs "$jobs" --variants "stock,retrofit$(dense 4)" ;;
    smoke-plans) run "" smoke-plans --ctx "1k,$lengths" --documents 12 --variants "stock$(dense 4 8)" ;;
    positions)
      run positions positions --ctx 128k --allow-extrapolation --documents 5 \
        --variants "stock,retrofit,retrofit:pool=pre-rope,retrofit:pool=pre-rope,far-position=clamp"
      ;;
    *) echo "measure_quality.sh: unknown stage $stage" >&2; usage ;;
  esac
done
