#!/usr/bin/env python3
"""Run a GGUF model through llama.cpp and report it in the form of `bfly-retrofit --json`; or run both and compare.

One run. Greedy, on the CPU, exactly -n tokens (end-of-text tokens do not stop it):

    peer.py --gguf model.gguf --token-ids ids.json --ctx 8k -n 32 --json run.json

The comparison. Both engines read the same ids, one run at a time, each in a process of its own, taking turns:

    peer.py --gguf model.gguf --token-ids ids.json --ctx 8k -n 32 --repeats 3 --json out.json \\
        --bfly target/release/bfly-retrofit --bfly-args=--stock --bfly-args="--window 512"

Times are wall-clock around the calls that evaluate: prefill is the whole prompt in chunks of --n-batch until the last
position's logits can be read; a decode step is one token in, its logits out, and the argmax. Loading is not counted.

The table goes to stdout, progress to stderr, every sample to --json. Exit codes: 0, 1 (a run failed), 2 (bad input).
"""
import argparse
import ctypes
import hashlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

SCHEMA_VERSION = 1
BFLY_VERSIONS = (1, 2)  # schema versions of bfly's report whose fields below mean the same
BYTES_PER = {"f32": 4, "f16": 2, "bf16": 2}
# What the comparison reads from a report. Both engines must write it.
NEEDED = ("prompt_tokens", "generated_tokens", "prefill_s", "ttft_s", "decode_s", "prefill_tok_s", "decode_tok_s",
          "peak_memory_bytes", "weights_bytes", "threads", "kv", "token_ids")


class Failure(Exception):
    """An error whose message is for the user: bad input, or a run that failed (code 1)."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def size(text: str) -> int:
    """8192, 8k (k = 1024) or 1M, as bfly-retrofit reads them."""
    match = re.fullmatch(r"(\d+)([kKmM]?)", text.strip())
    n = int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2].lower()] if match else 0
    if not 0 < n <= 1 << 30:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of tokens such as 8192, 256k or 1M")
    return n


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number from 1 up")
    return int(text)


def peak_memory() -> Optional[int]:
    """VmHWM of this process: the most memory it ever had resident, mapped weights that were touched included."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.M)
    return int(found[1]) * 1024 if found else None


def write_json(path: Path, value) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise Failure(f"--json {path}: cannot be written: {e.strerror}")


def read_ids(path: Path) -> List[int]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise Failure(f"--token-ids {path}: cannot be read: {e}")
    except ValueError as e:
        raise Failure(f"--token-ids {path}: is not a JSON array of token ids: {e}")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
        raise Failure(f"--token-ids {path}: is not a non-empty JSON array of token ids")
    return ids


class KvPool(NamedTuple):
    """A KV cache that some of the layers share, as llama.cpp's log names it."""

    mib: float
    cells: int
    layers: int
    k: str
    v: str


KV_LINE = re.compile(r"size =\s*([\d.]+) MiB \(\s*(\d+) cells,\s*(\d+) layers.*K \((\w+)\):.*V \((\w+)\):")


class Llama:
    """A model and a context of llama.cpp, through the package's low-level bindings."""

    def __init__(self, args):
        try:
            import llama_cpp
            import numpy
        except ImportError as e:
            raise Failure(f"{e}; install with: pip install -r {Path(__file__).with_name('requirements.txt')}")
        lib = self.lib = llama_cpp
        self.numpy, self.log = numpy, []
        # Kept on self: llama.cpp goes on calling it.
        self.callback = lib.llama_log_callback(lambda _, text, __: self.log.append(text.decode("utf-8", "replace")))
        lib.llama_log_set(self.callback, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.baseline = peak_memory()
        begin = time.perf_counter()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(os.fsencode(args.gguf), params)
        if not self.model:
            raise Failure(f"--gguf {args.gguf}: llama.cpp cannot load it: {self.last_error()}")
        self.load_s = time.perf_counter() - begin
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.n_vocab = lib.llama_vocab_n_tokens(self.vocab)

    def last_error(self) -> str:
        lines = [line.strip() for line in "".join(self.log).splitlines() if line.strip(" .\n")]
        return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no message")

    def meta(self, key: str) -> Optional[str]:
        buffer = ctypes.create_string_buffer(1 << 12)
        n = self.lib.llama_model_meta_val_str(self.model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if n >= 0 else None

    def spec(self) -> dict:
        lib, m = self.lib, self.model
        arch, heads = self.meta("general.architecture"), lib.llama_model_n_head(m)
        key = self.meta(f"{arch}.attention.key_length")
        return {"architecture": arch, "layers": lib.llama_model_n_layer(m), "hidden": lib.llama_model_n_embd(m), "heads": heads,
                "kv_heads": lib.llama_model_n_head_kv(m), "head_dim": int(key) if key else lib.llama_model_n_embd(m) // heads,
                "vocab": self.n_vocab, "max_positions": lib.llama_model_n_ctx_train(m), "sliding_window": lib.llama_model_n_swa(m) or None}

    def dtype(self) -> str:
        """The file's quantisation: q4_1, q4_k_m."""
        name = (self.lib.llama_ftype_name(self.lib.llama_model_ftype(self.model)) or b"unknown").decode()
        short = re.sub(r"^\(guessed\)\s*|^all\s+", "", name.strip()).lower()
        return re.sub(r"\s*-\s*(small|medium|large)$", lambda m: f"_{m[1][0]}", short)

    def tokenize(self, text: str) -> List[int]:
        """Special tokens named in the text count as such, and the model's own are added, as transformers does."""
        raw = text.encode("utf-8")
        out = (self.lib.llama_token * (len(raw) + 16))()
        n = self.lib.llama_tokenize(self.vocab, raw, len(raw), out, len(out), True, True)
        if n <= 0:
            raise Failure("--prompt-file: the prompt is empty")
        return list(out[:n])

    def detokenize(self, ids: List[int]) -> str:
        tokens = (self.lib.llama_token * len(ids))(*ids)
        room = 64 + 32 * len(ids)
        while True:
            out = ctypes.create_string_buffer(room)
            n = self.lib.llama_detokenize(self.vocab, tokens, len(ids), out, room, False, False)
            if n >= 0:
                return out.raw[:n].decode("utf-8", "replace")
            room = -n

    def open(self, args) -> None:
        lib, p = self.lib, self.lib.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = args.ctx, args.n_batch, min(args.n_ubatch, args.n_batch), 1
        p.n_threads = p.n_threads_batch = args.threads
        p.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if args.flash_attn else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # K and V stay at the default f16. A sliding layer keeps its window only, as llama.cpp's own programs have it.
        p.offload_kqv = p.op_offload = p.swa_full = False
        p.no_perf = False
        self.ctx = lib.llama_init_from_model(self.model, p)
        if not self.ctx:
            raise Failure(f"llama.cpp cannot make a context of {args.ctx} tokens: {self.last_error()}", 1)
        self.batch = lib.llama_batch_init(args.n_batch, 0, 1)
        for i in range(args.n_batch):
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0

    def eval(self, ids: List[int], start: int, want_last: bool) -> None:
        """One call of llama_decode, waited for; only the last position's logits are made, and only where wanted."""
        b, n = self.batch, len(ids)
        b.n_tokens = n
        ctypes.memmove(b.token, (ctypes.c_int32 * n)(*ids), 4 * n)
        ctypes.memmove(b.pos, (ctypes.c_int32 * n)(*range(start, start + n)), 4 * n)
        ctypes.memset(b.logits, 0, n)
        b.logits[n - 1] = want_last
        code = self.lib.llama_decode(self.ctx, b)
        if code != 0:
            raise Failure(f"llama_decode failed with code {code} at position {start}: {self.last_error()}", 1)
        self.lib.llama_synchronize(self.ctx)

    def argmax(self) -> int:
        logits = self.lib.llama_get_logits_ith(self.ctx, -1)
        row = self.numpy.ctypeslib.as_array(logits, shape=(self.n_vocab,))
        best = int(row.argmax())
        if not self.numpy.isfinite(row[best]):
            raise Failure("llama.cpp's logits are not finite", 1)
        return best

    def warm_up(self) -> None:
        """One token, forgotten again, so that mapped weights are in memory before the clock starts; llama-bench does so too."""
        self.eval([0], 0, True)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.ctx), True)
        self.lib.llama_perf_context_reset(self.ctx)

    def kv(self, spec: dict, positions: int) -> dict:
        """Bytes from the cells that llama.cpp says it allocated, checked against the MiB that it reports."""
        found = KV_LINE.findall("".join(self.log))
        pools = [KvPool(float(mib), int(cells), int(layers), k, v) for mib, cells, layers, k, v in found]
        total = used = 0
        for pool in pools:
            width = spec["kv_heads"] * spec["head_dim"] * pool.layers
            row = width * (BYTES_PER.get(pool.k, 0) + BYTES_PER.get(pool.v, 0))
            if abs(row * pool.cells / (1 << 20) - pool.mib) > 0.01:
                row = round(pool.mib * (1 << 20) / pool.cells)
            total += row * pool.cells
            used += row * min(positions, pool.cells)
        if not total:
            raise Failure("llama.cpp's log names no KV cache; this script reads that of llama-cpp-python as pinned", 1)
        kv = {"local_bytes": total, "summary_bytes": 0, "sink_bytes": 0, "total_bytes": total, "used_bytes": used,
              "dense_bytes": total, "ratio": 1.0}
        return {"kv": kv, "kv_dtype": sorted({t for p in pools for t in (p.k, p.v)}), "kv_cells": [p.cells for p in pools]}


def run_llama(args) -> dict:
    """One run: the report."""
    text = None
    if args.prompt_file:
        try:
            text = sys.stdin.read() if args.prompt_file == "-" else Path(args.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise Failure(f"--prompt-file {args.prompt_file}: cannot be read: {e}")
    ids = read_ids(args.token_ids) if args.token_ids else []
    if not args.gguf.is_file():
        raise Failure(f"--gguf {args.gguf}: no such file")
    say(args.quiet, f"loading {args.gguf.name}")
    llama = Llama(args)
    ids = ids if text is None else llama.tokenize(text)
    if args.prompt_tokens:
        if args.prompt_tokens > len(ids):
            raise Failure(f"--prompt-tokens {args.prompt_tokens}: the prompt has {len(ids)}")
        ids = ids[:args.prompt_tokens]
    if args.dump_ids:
        write_json(args.dump_ids, ids)
    if args.only_ids:
        return {}
    bad = next((i for i in ids if i >= llama.n_vocab), None)
    if bad is not None:
        raise Failure(f"--token-ids: {bad} is outside the vocabulary of {llama.n_vocab}")
    if len(ids) + args.max_new_tokens > args.ctx:
        raise Failure(f"--ctx {args.ctx}: does not hold the prompt's {len(ids)} tokens and {args.max_new_tokens} new ones")
    llama.open(args)
    if args.warm_up:
        llama.warm_up()

    say(args.quiet, f"prefill of {len(ids)} tokens")
    begin = time.perf_counter()
    for at in range(0, len(ids), args.n_batch):
        piece = ids[at:at + args.n_batch]
        llama.eval(piece, at, at + len(piece) == len(ids))
        if not args.quiet and sys.stderr.isatty():
            print(f"\r{at + len(piece)}/{len(ids)}", end="\n" if at + len(piece) == len(ids) else "", file=sys.stderr, flush=True)
    prefill_s = time.perf_counter() - begin
    out = [llama.argmax()]
    ttft_s = time.perf_counter() - begin
    say(args.quiet, f"decode of {args.max_new_tokens} tokens")
    steps = []
    while len(out) < args.max_new_tokens:
        begin = time.perf_counter()
        llama.eval(out[-1:], len(ids) + len(out) - 1, True)
        out.append(llama.argmax())
        steps.append(time.perf_counter() - begin)

    lib, spec, perf = llama.lib, llama.spec(), llama.lib.llama_perf_context(llama.ctx)
    kv = llama.kv(spec, len(ids) + len(out) - 1)
    version, decode_s = lib.llama_version().decode(), sum(steps)
    return {
        "schema_version": SCHEMA_VERSION,
        "git_sha": None,
        "engine": f"llama.cpp {version} (llama-cpp-python {lib.__version__})",
        "model": {"source": "file", "path": str(args.gguf)},
        "spec": spec,
        "plan": None,
        "ctx": args.ctx,
        "device": "cpu",
        "dtype": llama.dtype(),
        "threads": args.threads,
        "prefill_chunk": args.n_batch,
        "prompt_tokens": len(ids),
        "generated_tokens": len(out),
        "prefill_s": prefill_s,
        "ttft_s": ttft_s,
        "decode_s": decode_s,
        "prefill_tok_s": len(ids) / prefill_s,
        "decode_tok_s": len(steps) / decode_s if steps else 0.0,
        "decode_steps_s": steps,
        "peak_memory_bytes": peak_memory(),
        "weights_bytes": lib.llama_model_size(llama.model),
        "kv": kv["kv"],
        "text": llama.detokenize(out),
        "token_ids": out,
        # What only this engine has: kept apart from the common keys.
        "details": {
            "kv_dtype": kv["kv_dtype"], "kv_cells": kv["kv_cells"],
            "n_ctx": lib.llama_n_ctx(llama.ctx), "n_batch": args.n_batch, "n_ubatch": min(args.n_ubatch, args.n_batch),
            "flash_attn": args.flash_attn, "warm_up": args.warm_up, "load_s": llama.load_s,
            "baseline_memory_bytes": llama.baseline,
            "own_counters": {"prompt_eval_ms": perf.t_p_eval_ms, "prompt_eval_tokens": perf.n_p_eval, "eval_ms": perf.t_eval_ms,
                             "eval_tokens": perf.n_eval},
            "system_info": lib.llama_print_system_info().decode().strip(),
        },
    }


class Contender(NamedTuple):
    """One engine with one set of flags."""

    label: str
    engine: str
    command: List[str]


def cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def cpu_seconds() -> Optional[Tuple[float, float]]:
    """Seconds that all cores together have been busy, and those of them that went to finished children of this process."""
    try:
        ticks = [int(t) for t in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _, _, irq, softirq, steal = ticks
    times = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), times.children_user + times.children_system


def run_once(contender: Contender, args, out: Path) -> dict:
    """Runs a contender in a process of its own and reads its report."""
    out.unlink(missing_ok=True)
    before, begin = cpu_seconds(), time.perf_counter()
    try:
        done = subprocess.run(contender.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              errors="replace")
    except OSError as e:
        raise Failure(f"{contender.command[0]}: cannot be run: {e.strerror}")
    wall, after = time.perf_counter() - begin, cpu_seconds()
    others = max(0.0, (after[0] - before[0] - after[1] + before[1]) / wall) if before and after else None
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise Failure(f"{contender.label} failed with code {done.returncode}:\n{tail}", 1)
    try:
        report = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise Failure(f"{contender.label}: its report cannot be read: {e}", 1)
    missing = [key for key in NEEDED if key not in report]
    version = report.get("schema_version")
    if version not in BFLY_VERSIONS:
        known = " or ".join(map(str, BFLY_VERSIONS))
        raise Failure(f"{contender.label}: its report is of version {version}; this script reads version {known}", 1)
    if missing:
        raise Failure(f"{contender.label}: its report lacks {', '.join(missing)}", 1)
    if isinstance(report.get("model"), dict) and "path" in report["model"]:
        report["model"]["path"] = args.gguf.name
    return {"label": contender.label, "engine": contender.engine, "cores_busy_with_others": others, "report": report}


def contenders(args, ids: Path, out: Path) -> List[Contender]:
    common = ["--token-ids", str(ids), "--ctx", str(args.ctx), "-n", str(args.max_new_tokens), "--threads", str(args.threads),
              "--json", str(out), "--quiet"]
    flags = ["--n-batch", str(args.n_batch), "--n-ubatch", str(args.n_ubatch),
             "--flash-attn" if args.flash_attn else "--no-flash-attn", "--warm-up" if args.warm_up else "--no-warm-up"]
    made = [Contender("llama.cpp", "llama.cpp", [sys.executable, __file__, "--gguf", str(args.gguf), *common, *flags])]
    for extra in args.bfly_args or [""]:
        label = f"bfly {extra}".strip()
        if any(c.label == label for c in made):
            raise Failure(f"--bfly-args: `{extra}` is given twice")
        made.append(Contender(label, "bfly", [str(args.bfly), "--model", str(args.gguf), *common, *shlex.split(extra)]))
    return made


FIGURES = {"prefill_tok_s": "prefill tok/s", "decode_tok_s": "decode tok/s", "ttft_s": "first token s", "peak_memory_bytes": "peak MiB",
           "kv_bytes": "KV MiB", "weights_bytes": "weights MiB"}


def figure(report: dict, name: str) -> Optional[float]:
    return report["kv"]["total_bytes"] if name == "kv_bytes" else report[name]


def summarise(samples: List[dict]) -> Dict[str, dict]:
    """Median, least and most of each figure per contender, and the ratio of its median to llama.cpp's."""
    table: Dict[str, dict] = {}
    for label in dict.fromkeys(s["label"] for s in samples):
        row = table[label] = {}
        for name in FIGURES:
            values = [figure(s["report"], name) for s in samples if s["label"] == label]
            if all(v is not None for v in values):
                row[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
                base = table["llama.cpp"].get(name, {}).get("median")
                row[name]["ratio"] = row[name]["median"] / base if base else None
    return table


def number(name: str):
    """How a figure is written: bytes in MiB."""
    unit = 1 << 20 if name.endswith("_bytes") else 1
    return lambda value: f"{value / unit:.1f}"


def render(table: Dict[str, dict]) -> str:
    """Medians, the spread below, the ratios to llama.cpp below that."""
    rows = [["", *FIGURES.values()]]
    for label, row in table.items():
        def cells(show, row=row):
            return [show(row[name], number(name)) if name in row else "-" for name in FIGURES]

        rows.append([label, *cells(lambda v, text: text(v["median"]))])
        rows.append(["  least..most", *cells(lambda v, text: f"{text(v['min'])}..{text(v['max'])}")])
        if label != "llama.cpp":
            rows.append(["  / llama.cpp", *cells(lambda v, _: "-" if v["ratio"] is None else f"{v['ratio']:.3g}x")])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip() for row in rows)


def compare(args) -> dict:
    """Runs every contender --repeats times, taking turns, and prints the table."""
    say(args.quiet, f"hashing {args.gguf.name}")
    if not args.gguf.is_file():
        raise Failure(f"--gguf {args.gguf}: no such file")
    digest = sha256_of(args.gguf)
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        ids, out = Path(folder) / "ids.json", Path(folder) / "report.json"
        fix_ids(args, ids)
        prompt = read_ids(ids)
        field, samples = contenders(args, ids, out), []
        for repeat in range(args.repeats):
            # Every other round in reverse, so that no engine always runs second on a warm machine.
            for contender in field if repeat % 2 == 0 else field[::-1]:
                say(args.quiet, f"[{len(samples) + 1}/{args.repeats * len(field)}] {contender.label}")
                sample = run_once(contender, args, out)
                sample["repeat"] = repeat
                samples.append(sample)
                r = sample["report"]
                say(args.quiet, f"    prefill {r['prefill_tok_s']:.1f} tok/s, decode {r['decode_tok_s']:.1f} tok/s")
                if r["prompt_tokens"] != len(prompt):
                    raise Failure(f"{contender.label} read {r['prompt_tokens']} tokens, not the {len(prompt)} it was given", 1)
    table = summarise(samples)
    notes = remarks(args, samples)
    print(f"{args.gguf.name}: prompt {len(prompt)} tokens, {args.max_new_tokens} new from depth {len(prompt)}, ctx {args.ctx}, "
          f"{args.threads} threads, median of {args.repeats}\n")
    print(render(table))
    print("".join(f"\n* {note}" for note in notes))
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "peer",
        "model": {"file": args.gguf.name, "bytes": args.gguf.stat().st_size, "sha256": digest},
        "host": {"cpu": cpu_model(), "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
        "settings": {"ctx": args.ctx, "max_new_tokens": args.max_new_tokens, "threads": args.threads, "repeats": args.repeats,
                     "flash_attn": args.flash_attn, "n_batch": args.n_batch, "n_ubatch": args.n_ubatch, "warm_up": args.warm_up,
                     "bfly_args": args.bfly_args or [""]},
        "prompt_ids_sha256": hashlib.sha256(json.dumps(prompt).encode()).hexdigest(),
        "summary": table,
        "notes": notes,
        "samples": samples,
    }


def fix_ids(args, ids: Path) -> None:
    """Writes the ids that every run will read; text is made into ids by llama.cpp, once."""
    if args.token_ids:
        prompt = read_ids(args.token_ids)
        if args.prompt_tokens and args.prompt_tokens > len(prompt):
            raise Failure(f"--prompt-tokens {args.prompt_tokens}: the prompt has {len(prompt)}")
        write_json(ids, prompt[:args.prompt_tokens])
        return
    cut = ["--prompt-tokens", str(args.prompt_tokens)] if args.prompt_tokens else []
    command = [sys.executable, __file__, "--gguf", str(args.gguf), "--prompt-file", args.prompt_file, "--ctx", str(args.ctx), "-n",
               str(args.max_new_tokens), "--only-ids", "--dump-ids", str(ids), "--quiet", *cut]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise Failure(re.sub(r"^peer\.py: ", "", done.stderr.strip()), done.returncode)


def remarks(args, samples: List[dict]) -> List[str]:
    """What a reader of the table must know."""
    first: Dict[str, dict] = {}
    for s in samples:
        first.setdefault(s["label"], s["report"])
    base = first["llama.cpp"]
    kinds = "/".join(base["details"]["kv_dtype"])
    notes = [f"KV: llama.cpp {kinds}, bytes it allocated; a bfly cache counts its own bytes in its own type (f32 on a CPU)"]
    for label, r in first.items():
        if r.get("held"):
            notes.append(f"{label}: weights held as " + ", ".join(f"{t} {b / (1 << 20):.0f} MiB" for t, b in sorted(r["held"].items())))
        if r["threads"] != args.threads:
            notes.append(f"{label}: ran on {r['threads']} threads, not {args.threads}")
        if r["generated_tokens"] != args.max_new_tokens:
            notes.append(f"{label}: stopped after {r['generated_tokens']} of {args.max_new_tokens} new tokens; decode is of those")
        if label != "llama.cpp":
            same = next((i for i, (a, b) in enumerate(zip(base["token_ids"], r["token_ids"])) if a != b),
                        min(len(base["token_ids"]), len(r["token_ids"])))
            notes.append(f"{label}: the first {same} of its {r['generated_tokens']} new tokens are llama.cpp's")
    others = max(s["cores_busy_with_others"] or 0.0 for s in samples)
    if others > 0.1:
        notes.append(f"other work kept up to {others:.2f} cores busy during a run: a fair comparison needs an idle machine")
    changed = {s["label"] for s in samples if s["report"]["token_ids"] != first[s["label"]]["token_ids"]}
    notes += [f"{label}: not every repeat gave the same tokens" for label in sorted(changed)]
    return notes


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gguf", type=Path, required=True, metavar="FILE", help="the model, for every engine")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--token-ids", type=Path, metavar="FILE", help="a JSON array of token ids")
    source.add_argument("--prompt-file", metavar="FILE|-", help="UTF-8 text; llama.cpp makes the ids")
    p.add_argument("--prompt-tokens", type=size, metavar="N", help="use only the first N tokens of the prompt")
    p.add_argument("--ctx", type=size, default=8192, metavar="TOKENS", help="context to provision: 8192, 8k [8k]")
    p.add_argument("-n", "--max-new-tokens", type=positive, default=32, metavar="N", help="exactly so many new tokens [32]")
    p.add_argument("--threads", type=positive, default=os.cpu_count() or 1, metavar="N", help="threads [all cores]")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the report, or the comparison with every sample")
    p.add_argument("--dump-ids", type=Path, metavar="FILE", help="write the prompt's ids (not in a comparison)")
    p.add_argument("--quiet", action="store_true", help="no progress")
    llama = p.add_argument_group("llama.cpp")
    llama.add_argument("--flash-attn", action=argparse.BooleanOptionalAction, default=True, help="flash attention")
    llama.add_argument("--n-batch", type=positive, default=2048, metavar="N", help="tokens to a call of llama_decode [2048]")
    llama.add_argument("--n-ubatch", type=positive, default=512, metavar="N", help="tokens computed at once [512]")
    llama.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=True, help="evaluate one token first, untimed")
    peer = p.add_argument_group("comparison")
    peer.add_argument("--bfly", type=Path, metavar="FILE", help="a bfly-retrofit binary: run both and compare")
    peer.add_argument("--bfly-args", action="append", metavar="FLAGS",
                      help="more flags for bfly in one string, written --bfly-args=\"...\"; again for another contender")
    peer.add_argument("--repeats", type=positive, default=3, metavar="N", help="runs of each [3]")
    p.add_argument("--only-ids", action="store_true", help=argparse.SUPPRESS)
    return p


def main() -> int:
    args = parser().parse_args()
    try:
        if args.bfly_args and not args.bfly:
            raise Failure("--bfly-args needs --bfly")
        if args.bfly and args.dump_ids:
            raise Failure("--dump-ids does not go with --bfly")
        if args.json and not args.json.absolute().parent.is_dir():
            raise Failure(f"--json {args.json}: its folder does not exist")
        result = compare(args) if args.bfly else run_llama(args)
        if args.only_ids:
            return 0
        if args.json:
            write_json(args.json, result)
        if not args.bfly:
            print(result["text"])
            kv, peak = result["kv"]["total_bytes"] / (1 << 20), (result["peak_memory_bytes"] or 0) / (1 << 20)
            say(args.quiet, f"prefill {result['prefill_tok_s']:.1f} tok/s, decode {result['decode_tok_s']:.1f} tok/s, "
                            f"KV {kv:.1f} MiB, peak {peak:.1f} MiB")
        return 0
    except Failure as e:
        print(f"peer.py: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
