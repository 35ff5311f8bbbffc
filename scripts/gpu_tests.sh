#!/usr/bin/env bash
# GPU tests on a machine that has a GPU but no Rust.
#
#   scripts/gpu_tests.sh pack [DIR]            build the GPU tests here and put the binary into DIR
#   scripts/gpu_tests.sh run [DIR] [REPORT]    run it there; the report is Markdown
#   scripts/gpu_tests.sh run --sanitize [DIR]  under compute-sanitizer (memcheck), a few tests each
#
# DIR is target/gpu-tests. Packing needs Rust and nvcc (README, "Building for CUDA"); running needs the checkout, DIR and a driver,
# with cuBLAS and cuRAND of the toolkit's major version on LD_LIBRARY_PATH. A test without a GPU counts as skipped, never as passed.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }

pack() {
  local dir=${1:-target/gpu-tests}
  mkdir -p "$dir"
  git describe --always --dirty --abbrev=12 --exclude '*' >"$dir/commit"
  cargo test --release --features cuda --test cuda --no-run --message-format=json |
    python3 -c 'import json,sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable") and m["target"]["kind"] == ["test"]: print(m["executable"])' |
    while read -r path; do strip -o "$dir/cuda" "$path"; echo "packed $dir/cuda"; done
}

run() {
  local sanitize=""
  [ "${1:-}" = --sanitize ] && { sanitize=1; shift; }
  local dir=${1:-target/gpu-tests} report=${2:-target/gpu-tests/report.md} failed=0
  command -v nvidia-smi >/dev/null || echo "gpu_tests.sh: no nvidia-smi here; tests without a GPU are counted as skipped" >&2
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
  local command=("$dir/cuda" --test-threads=1 --nocapture)
  # Everything under the checker takes hours: the kernels' own tests are enough.
  [ -n "$sanitize" ] && command=(compute-sanitizer --error-exitcode 9 "$dir/cuda" --test-threads=1 --nocapture
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
