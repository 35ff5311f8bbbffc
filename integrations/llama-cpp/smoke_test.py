#!/usr/bin/env python3
"""A check of peer.py on a real model, in well under a minute.

    smoke_test.py [model.gguf] [--bfly target/release/bfly-retrofit]

Without a path it takes models/SmolLM2-135M-Instruct.Q4_1.gguf of this repository (scripts/fetch_models.py smollm2-135m).
With --bfly it also runs the comparison. Exit codes: 0 passed, 1 failed, 77 skipped (package or model is missing).
"""
import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = HERE.parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "A butterfly network joins every input to every output in a number of stages that grows with the logarithm of its size. " * 12
PROMPT, NEW, CTX = 200, 8, 512
KEYS = {"schema_version", "git_sha", "engine", "model", "spec", "plan", "ctx", "device", "dtype", "threads", "prompt_tokens",
        "generated_tokens", "prefill_s", "ttft_s", "decode_s", "prefill_tok_s", "decode_tok_s", "decode_steps_s", "peak_memory_bytes",
        "weights_bytes", "kv", "text", "token_ids"}
POOLS = {"local_bytes", "summary_bytes", "sink_bytes", "total_bytes", "used_bytes", "dense_bytes", "ratio"}


def peer(*args, code: int = 0) -> subprocess.CompletedProcess:
    """Runs peer.py and insists on its exit code, and on a message rather than a traceback."""
    done = subprocess.run([sys.executable, str(HERE / "peer.py"), *map(str, args)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, f"{args}: exit code {done.returncode}, not {code}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def check_run(gguf: Path, folder: Path) -> Path:
    """A run from text, the same from its ids, and what their reports say."""
    text, ids, a, b = (folder / name for name in ("prompt.txt", "ids.json", "a.json", "b.json"))
    text.write_text(TEXT, encoding="utf-8")
    run = ("--gguf", gguf, "--ctx", CTX, "-n", NEW, "--quiet")
    peer(*run, "--prompt-file", text, "--prompt-tokens", PROMPT, "--dump-ids", ids, "--json", a)
    peer(*run, "--token-ids", ids, "--json", b)
    first, second = (json.loads(p.read_text(encoding="utf-8")) for p in (a, b))
    assert first["token_ids"] == second["token_ids"], "the same ids gave other tokens"

    r, kv, spec = second, second["kv"], second["spec"]
    assert KEYS <= r.keys() and POOLS <= kv.keys(), f"missing: {KEYS - r.keys()} {POOLS - kv.keys()}"
    assert r["schema_version"] == 1 and r["device"] == "cpu" and r["plan"] is None
    assert (r["prompt_tokens"], r["generated_tokens"], len(r["token_ids"])) == (PROMPT, NEW, NEW)
    assert all(0 <= i < spec["vocab"] for i in r["token_ids"])
    assert 0 < r["prefill_s"] <= r["ttft_s"] and len(r["decode_steps_s"]) == NEW - 1
    assert abs(r["decode_tok_s"] * r["decode_s"] - (NEW - 1)) < 1e-6 and abs(r["prefill_tok_s"] * r["prefill_s"] - PROMPT) < 1e-6
    if not spec["sliding_window"]:
        row = 2 * 2 * spec["layers"] * spec["kv_heads"] * spec["head_dim"]  # K and V, f16
        assert kv["total_bytes"] == row * r["details"]["n_ctx"], "KV bytes are not those of an f16 cache for every position"
        assert kv["used_bytes"] == row * (PROMPT + NEW - 1)
    if r["peak_memory_bytes"] is not None:
        assert r["peak_memory_bytes"] > kv["total_bytes"]
    # Their clock and ours must tell the same story.
    own = r["details"]["own_counters"]
    assert own["prompt_eval_tokens"] == PROMPT and own["eval_tokens"] == NEW - 1
    assert own["prompt_eval_ms"] <= 1000 * r["prefill_s"] * 1.02 + 1
    return ids


def check_errors(gguf: Path, ids: Path, folder: Path) -> None:
    bad = folder / "bad.json"
    bad.write_text("[1, -2]")
    far = folder / "far.json"
    far.write_text("[2000000000]")
    model = ("--gguf", gguf)
    cases = (
        ((*model, "--token-ids", bad), "array of token ids"),
        ((*model, "--token-ids", far), "outside the vocabulary"),
        (("--gguf", folder / "none.gguf", "--token-ids", ids), "no such file"),
        (("--gguf", ids, "--token-ids", ids), "cannot load"),
        ((*model, "--token-ids", ids, "--ctx", 100), "--ctx"),
        ((*model, "--token-ids", ids, "--ctx", "0"), "--ctx"),
    )
    for flags, word in cases:
        out = folder / "never.json"
        done = peer(*flags, "--json", out, "--quiet", code=2)
        assert word in done.stderr, f"{flags}: {done.stderr}"
        assert not out.exists(), f"{flags}: left a report behind"


def check_comparison(gguf: Path, ids: Path, bfly: Path, folder: Path) -> None:
    out = folder / "both.json"
    run = ("--gguf", gguf, "--token-ids", ids, "--ctx", CTX, "-n", NEW, "--repeats", 2, "--json", out, "--quiet")
    done = peer(*run, "--bfly", bfly, "--bfly-args=--stock", "--bfly-args=--window 128")
    both = json.loads(out.read_text(encoding="utf-8"))
    order = [s["label"] for s in both["samples"]]
    assert order == ["llama.cpp", "bfly --stock", "bfly --window 128"] + ["bfly --window 128", "bfly --stock", "llama.cpp"], order
    assert all(label in done.stdout for label in order) and "/ llama.cpp" in done.stdout
    first = {label: next(s["report"]["token_ids"] for s in both["samples"] if s["label"] == label) for label in order}
    assert first["llama.cpp"][0] == first["bfly --stock"][0], f"the engines differ at the first token: {first}"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("gguf", type=Path, nargs="?", default=MODEL)
    p.add_argument("--bfly", type=Path)
    args = p.parse_args()
    if importlib.util.find_spec("llama_cpp") is None:
        print(f"skipped: llama-cpp-python is not installed; pip install -r {HERE / 'requirements.txt'}")
        return 77
    if not args.gguf.is_file():
        print(f"skipped: {args.gguf} does not exist; scripts/fetch_models.py smollm2-135m fetches the default model")
        return 77
    with tempfile.TemporaryDirectory(prefix="peer-smoke-") as name:
        folder = Path(name)
        try:
            ids = check_run(args.gguf, folder)
            check_errors(args.gguf, ids, folder)
            if args.bfly:
                check_comparison(args.gguf, ids, args.bfly, folder)
        except (AssertionError, subprocess.TimeoutExpired) as e:
            print(f"failed: {e}")
            return 1
    print("passed" if args.bfly else "passed (without --bfly the comparison was not run)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
