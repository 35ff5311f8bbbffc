#!/usr/bin/env bash
# Trains the same character model with a dense MLP, a dense one of the factored one's parameter count, and a factored one.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/compare_mlp.sh --bin FILE --corpus DIR --out DIR [--steps N] [--seeds N] [--lr LIST]

Trains on one CPU thread: first all models for the same steps, then narrow and factored for as many steps as take the
dense model's time of a thread in user mode. Writes DIR/FORM-lrRATE-seedN[-time]/log.jsonl and runs.jsonl, a line a run.

  --bin FILE     a release build of bfly-char
  --corpus DIR   texts, such as of scripts/fetch_corpus.py --size 4M
  --out DIR      folder of the runs; runs that are there are kept
  --steps N      steps of 4 windows of 512 characters (default: 600)
  --seeds N      seeds 0 to N - 1 (default: 2)
  --lr LIST      largest learning rates, by commas (default: 2e-3)
TEXT
}
fail() { echo "compare_mlp.sh: $*" >&2; exit 2; }

bin="" corpus="" out="" steps=600 seeds=2 lr=2e-3
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --bin | --corpus | --out | --steps | --seeds | --lr)
      [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value; see --help"
      declare "${1#--}=$2"
      shift 2 ;;
    *) fail "unknown argument '$1'; see --help" ;;
  esac
done
[ -x "$bin" ] || fail "--bin: '$bin' is not a program"
[ -d "$corpus" ] || fail "--corpus: '$corpus' is not a folder"
[ -n "$out" ] || fail "--out is missing; see --help"
mkdir -p "$out"
export RAYON_NUM_THREADS=1
TIMEFORMAT=%U

# 2 * 3 butterflies on 64 elements and one on 256: 8,704 weights, where a width of 45 has 8,640.
declare -A flags=([dense]="" [narrow]="--mlp-width 45" [factored]="--mlp factored")

# run FORM RATE SEED STEPS SUFFIX
run() {
  local name=$1-lr$2-seed$3$5 dir
  dir=$out/$name
  [ ! -e "$dir/seconds" ] || return 0
  rm -rf "$dir"
  # shellcheck disable=SC2086
  { time "$bin" train "$corpus" --out "$dir" --preset micro --stages 0,1,2,3,4,5 --window 512 --batch 4 --micro-batch 4 \
    --steps "$4" --warmup $(($4 / 20 + 1)) --eval-every $(($4 / 6)) --save-every "$4" --lr "$2" --seed "$3" --device cpu \
    --quiet ${flags[$1]} 2>"$dir.err"; } 2>"$out/.seconds" || fail "$name: $(cat "$dir.err")"
  rm -f "$dir.err"
  mv "$out/.seconds" "$dir/seconds"
  python3 - "$dir" "$1" "$2" "$3" "$4" "$5" <<'PYTHON' >>"$out/runs.jsonl"
import json, pathlib, sys
directory, form, rate, seed, steps, suffix = sys.argv[1:]
run = pathlib.Path(directory)
log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
print(json.dumps({
    "form": form, "lr": float(rate), "seed": int(seed), "steps": int(steps), "equal": "time" if suffix else "characters",
    "user_seconds": float((run / "seconds").read_text()), "held_out_bits": log[-1]["held_out_bits_per_character"],
    "training_bits_of_the_last_tenth": sum(l["bits_per_character"] for l in log[-(len(log) // 10):]) / (len(log) // 10),
}))
PYTHON
  tail -1 "$out/runs.jsonl"
}

for rate in ${lr//,/ }; do
  for ((seed = 0; seed < seeds; seed++)); do
    for form in dense narrow factored; do run $form "$rate" $seed "$steps" ""; done
  done
done
for rate in ${lr//,/ }; do
  for ((seed = 0; seed < seeds; seed++)); do
    for form in narrow factored; do
      own=$(cat "$out/$form-lr$rate-seed$seed/seconds") dense=$(cat "$out/dense-lr$rate-seed$seed/seconds")
      run $form "$rate" $seed "$(python3 -c "print(round($steps * $dense / $own))")" -time
    done
  done
done
