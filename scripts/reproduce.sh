#!/usr/bin/env bash
# Redraws every figure: those of results/ from their JSON, and the graph of the documentation.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/reproduce.sh [options]

Draws the figures of every file results/<date>-<device>-<subject>/raw/*.json and *.json.gz of a kind that bfly-plot
draws, and skips other JSON. Then draws the graph of the default partner rule. Figures are SVG and PNG, for light and
dark pages. No measurement is repeated.

The repository contains only the figures that a page shows, in results/*/figures/ and docs/figures/.

  --out DIR       draw into DIR/<date>-<device>-<subject>/, and the graph into DIR/docs/ [target/figures]
  --in-place      replace the figures that exist in results/*/figures/ and docs/figures/, and add no others
  --results DIR   read the results in DIR instead of results/
  --binary FILE   use this bfly-plot instead of building it with cargo
  -h, --help      print this text

Examples:
  scripts/reproduce.sh
  scripts/reproduce.sh --in-place --binary target/release/bfly-plot

Needs Rust (https://rustup.rs) with a C compiler.
TEXT
}
fail() { echo "reproduce.sh: $*" >&2; exit 2; }
say() { printf '%s\n' "$*" >&2; }

results="" out="" in_place="" binary=""
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --in-place) in_place=yes; shift; continue ;;
    --results | --out | --binary) [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value; see --help" ;;
    *) fail "unknown argument '$1'; see --help" ;;
  esac
  case "$1" in
    --results) results=$(cd "$2" 2>/dev/null && pwd) || fail "--results $2: no such directory" ;;
    --out) mkdir -p "$2" || fail "--out $2: cannot be created"; out=$(cd "$2" && pwd) ;;
    --binary) [ -x "$2" ] || fail "--binary $2: no such program"; binary=$(cd "$(dirname "$2")" && pwd)/$(basename "$2") ;;
  esac
  shift 2
done
[ -z "$in_place" ] || [ -z "$out" ] || fail "--in-place and --out exclude each other"
cd "$(dirname "$0")/.."
results=${results:-results}
if [ -n "$in_place" ]; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
fi
out=${out:-target/figures}

if [ -n "$binary" ]; then
  plot() { "$binary" "$@"; }
else
  command -v cargo >/dev/null || fail "cargo is missing; install Rust from https://rustup.rs"
  plot() { cargo run --quiet --release --features plot --bin bfly-plot -- "$@"; }
  say "build bfly-plot"
  cargo build --release --features plot --bin bfly-plot || fail "the build failed; see above"
fi

# Succeeds for a file, plain or gzipped, of a kind that bfly-plot draws. The kind is near the start of the file;
# bfly-plot itself reports truncated files.
is_drawn() {
  local top
  top=$(gzip -cdf -- "$1" 2>/dev/null | head -c 4096) || true # head closes the pipe early
  [[ $top =~ \"kind\"[[:space:]]*:[[:space:]]*\"bfly-(ladder|kernels|smoke|answers|layers|ablation|positions)\" ]]
}
count() { printf '%s\n' "$1" | wc -l | tr -d ' '; }
# Replaces each figure in directory $2 with the one of the same name in $1.
refresh() {
  local figure new=$1 shown=$2 refreshed=0
  [ -d "$shown" ] || return 0
  for figure in "$shown"/*; do
    [ -e "$figure" ] || continue
    [ -e "$new/$(basename "$figure")" ] || fail "$figure: no results file draws this figure; remove it"
    cp -- "$new/$(basename "$figure")" "$figure"
    refreshed=$((refreshed + 1))
  done
  say "$shown: $refreshed figures redrawn"
}

drawn=0 skipped=0
for raw in "$results"/*/raw; do
  [ -d "$raw" ] || continue
  files=()
  for file in "$raw"/*.json "$raw"/*.json.gz; do
    [ -e "$file" ] || continue
    case "$file" in *.gz) [ ! -e "${file%.gz}" ] || fail "$file: ${file%.gz} exists too; remove one of them" ;; esac
    if is_drawn "$file"; then files+=("$file"); else skipped=$((skipped + 1)); fi
  done
  [ ${#files[@]} -gt 0 ] || continue
  run=${raw%/raw}
  figures=$out/$(basename "$run")
  written=$(plot "${files[@]}" --out "$figures") || fail "$raw: not every figure could be drawn; see above"
  if [ -n "$in_place" ]; then
    refresh "$figures" "$run/figures"
  else
    say "$figures: $(count "$written") files from ${#files[@]} of $raw"
  fi
  drawn=$((drawn + ${#files[@]}))
done
written=$(plot graph --out "$out/docs") || fail "the graph could not be drawn; see above"
if [ -n "$in_place" ]; then
  refresh "$out/docs" docs/figures
else
  say "$out/docs: $(count "$written") files from the selector"
fi
say "done: $drawn results files drawn, $skipped files of other kinds skipped"
