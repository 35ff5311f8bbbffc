#!/usr/bin/env bash
# Runs the GPU tests on a machine with a GPU and without Rust.
#
#   scripts/gpu_tests.sh pack [DIR]            build the GPU test binaries and copy them to DIR [target/gpu-tests]
#   scripts/gpu_tests.sh run [DIR] [REPORT]    run them and write a Markdown report [target/gpu-tests/report.md]
#   scripts/gpu_tests.sh run --sanitize [DIR]  run the kernels' own tests under compute-sanitizer (memcheck)
#
# Packing needs Rust and nvcc (README, "Building for CUDA"). Running needs the checkout, DIR and a driver, with cuBLAS
# and cuRAND of the toolkit's major version on LD_LIBRARY_PATH. Tests that find no GPU count as skipped, never as passed.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }

pack() {
  local dir=${1:-target/gpu-tests}
  mkdir -p "$dir"
  git describe --always --dirty --abbrev=12 --exclude '*' >"$dir/commit"
  cargo test --release --features cuda --test cuda --test cuda_quantised --no-run --message-format=json |
    python3 -c 'import json,sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable") and m["target"]["kind"] == ["test"]: print(m["target"]["name"], m["executable"])' |
    while read -r name path; do strip -o "$dir/$name" "$path"; echo "packed $dir/$name"; done
}

run() {
  local sanitize=""
  [ "${1:-}" = --sanitize ] && { sanitize=1; shift; }
  local dir=${1:-target/gpu-tests} report=${2:-target/gpu-tests/report.md} failed=0
  command -v nvidia-smi >/dev/null || echo "gpu_tests.sh: nvidia-smi is missing; tests that find no GPU count as skipped" >&2
  local log; log=$(mktemp)
  {
    echo "# GPU tests"
    echo
    echo "- device: $(nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | grep . || echo none)"
    echo "- commit: $(cat "$dir/commit" 2>/dev/null || echo unknown)"
    echo "- date: $(date -u +%F)"
    echo
    echo "| test | result |"
    echo "|---|---|"
  } >"$report"
  for binary in "$dir"/*; do
    [ -x "$binary" ] && [ -f "$binary" ] || continue
    local command=("$binary" --test-threads=1 --nocapture)
    # All tests under compute-sanitizer would take hours, so only the kernels' own tests run.
    [ -n "$sanitize" ] && command=(compute-sanitizer --error-exitcode 9 "$binary" --test-threads=1 --nocapture
      small_operators block_means attention_of_one products_of captured_decode highest_scores)
    CARGO_MANIFEST_DIR=$root "${command[@]}" >"$log" 2>&1 || failed=1
    cat "$log"
    python3 - "$log" >>"$report" <<'P'
import re, sys
lines = open(sys.argv[1]).read().splitlines()
name, skipped = None, None
for line in lines:
    started = re.match(r"test (\S+) \.\.\. ?(.*)", line)
    if started:
        name, skipped = started[1], None
        line = started[2]
    if "SKIPPED" in line:
        skipped = line.split("SKIPPED", 1)[1].strip()
    ended = re.search(r"\b(ok|FAILED)$", line)
    if name and ended:
        print(f"| {name} | {'skipped: ' + skipped if skipped and ended[1] == 'ok' else 'passed' if ended[1] == 'ok' else 'FAILED'} |")
        name = None
if name:
    print(f"| {name} | FAILED: the process exited |")
P
  done
  rm -f "$log"
  local passed skipped wrong
  passed=$(grep -c '| passed |$' "$report" || true)
  skipped=$(grep -c '| skipped' "$report" || true)
  wrong=$(grep -c '| FAILED' "$report" || true)
  printf '\nrun %s, passed %s, skipped %s, failed %s\n' $((passed + skipped + wrong)) "$passed" "$skipped" "$wrong" | tee -a "$report"
  return "$failed"
}

case "${1:-}" in
  pack) shift; pack "$@" ;;
  run) shift; run "$@" ;;
  *) usage ;;
esac
