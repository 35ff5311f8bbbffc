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
from typing import Dict, List, NamedTuple, Optional

SCHEMA_VERSION = 1
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


# ---- llama.cpp ---------------------------------------------------------------------------------------------------------


class KvPool(NamedTuple):
    """One `size = ...` line of llama.cpp's log: a cache for some of the layers."""

    mib: float
    cells: int
    layers: int
    k: str
    v: str

    LINE = re.compile(r"size =\s*([\d.]+) MiB \(\s*(\d+) cells,\s*(\d+) layers.*K \((\w+)\):.*V \((\w+)\):")


class Llama:
    """A model and a context of llama.cpp, through the package's low-level bindings."""

    def __init__(self, args):
        try:
            import llama_cpp
            import numpy
        except ImportError as e:
            raise Failure(f"{e}; install with: pip install -r {Path(__file__).with_name('requirements.txt')}")
        self.lib, self.numpy, self.log = lib, self.numpy, self.log = llama_cpp, numpy, []
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

    def eval(self, ids: List[int], start: int, want_last: bool) -> None:
        """One call of llama_decode, waited for."""
        b = self.batch
        b.n_tokens = len(ids)
        for i, token in enumerate(ids):
            b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = token, start + i, 1, 0, 0
        b.logits[len(ids) - 1] = want_last
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
        pools = [KvPool(float(m[1]), int(m[2]), int(m[3]), m[4], m[5]) for m in KvPool.LINE.finditer("".join(self.log))] \
            if False else [KvPool(float(a), int(b), int(c), d, e) for a, b, c, d, e in KV_LINE.findall("".join(self.log))]
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
