#!/usr/bin/env bash
# Draws every figure again: those of results/ from their JSON, and the graph of the documentation.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/reproduce.sh [options]

For each results/<date>-<device>-<subject>/raw/*.json of a kind that bfly-plot knows, draws its figures into
results/<date>-<device>-<subject>/figures/; other JSON there is left alone. Then draws the default partner rule's graph into
docs/figures/. Figures are SVG and PNG, for light and dark pages.

  --results DIR   look there instead of in results/
  --docs DIR      draw the graph there instead of into docs/figures/
  --binary FILE   a bfly-plot that is already built; else it is built with cargo
  -h, --help      this text

Needs Rust (https://rustup.rs) with a C compiler, and nothing else: no measurement is repeated.
TEXT
}
fail() { echo "reproduce.sh: $*" >&2; exit 2; }
say() { printf '%s\n' "$*" >&2; }

results="" docs="" binary=""
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --results | --docs | --binary) [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value; see --help" ;;
    *) fail "unknown argument '$1'; see --help" ;;
  esac
  case "$1" in
    --results) results=$(cd "$2" 2>/dev/null && pwd) || fail "--results $2: no such directory" ;;
    --docs) mkdir -p "$2" || fail "--docs $2: cannot be created"; docs=$(cd "$2" && pwd) ;;
    --binary) [ -x "$2" ] || fail "--binary $2: no such program"; binary=$(cd "$(dirname "$2")" && pwd)/$(basename "$2") ;;
  esac
  shift 2
done
cd "$(dirname "$0")/.."
results=${results:-results}
docs=${docs:-docs/figures}

if [ -n "$binary" ]; then
  plot() { "$binary" "$@"; }
else
  command -v cargo >/dev/null || fail "cargo is missing; install Rust from https://rustup.rs"
  plot() { cargo run --quiet --release --features plot --bin bfly-plot -- "$@"; }
  say "build bfly-plot"
  cargo build --release --features plot --bin bfly-plot || fail "the build failed; see above"
fi

drawn=0 skipped=0
for raw in "$results"/*/raw; do
  [ -d "$raw" ] || continue
  files=()
  for file in "$raw"/*.json; do
    [ -e "$file" ] || continue
    # The kind stands near the top of a file; a half-written one is left to bfly-plot, which says so.
    if head -c 4096 "$file" | grep -qE '"kind"[[:space:]]*:[[:space:]]*"bfly-(ladder|kernels|smoke|answers|layers|ablation|positions)"'; then
      files+=("$file")
    else
      skipped=$((skipped + 1))
    fi
  done
  [ ${#files[@]} -gt 0 ] || continue
  figures=${raw%/raw}/figures
  written=$(plot "${files[@]}" --out "$figures") || fail "$raw: not every figure could be drawn; see above"
  say "$figures: $(printf '%s\n' "$written" | wc -l | tr -d ' ') files from ${#files[@]} of $raw"
  drawn=$((drawn + ${#files[@]}))
done
written=$(plot graph --out "$docs") || fail "the graph could not be drawn; see above"
say "$docs: $(printf '%s\n' "$written" | wc -l | tr -d ' ') files from the selector"
say "done: $drawn result files drawn, $skipped of other kinds left alone"
