#!/usr/bin/env python3
"""Hugging Face transformers as a peer of bfly: one loaded model that answers timed runs over a pipe.

    peer.py --model DIR [--prefill one-shot|chunked] [--cache dynamic|preallocated] [--random-weights SEED] ...

`bfly-bench ladder --peer "python3 integrations/transformers/peer.py ..."` starts it, so that both engines take turns on the
same device, ids and lengths. JSON lines: requests on stdin, answers on stdout, nothing else on stdout; README.md has
the protocol. Attention is SDPA, decoding is greedy, only the last position's logits are computed.

Exit codes: 0 (asked to quit, or end of input), 2 (the model cannot be loaded), 130 (interrupted).
"""
import argparse
import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import sys
import time
from pathlib import Path

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.I)


class Bad(Exception):
    """A request or an option that cannot be served; the message says why."""


def claim_stdout():
    """The real stdout, for answers alone: from here on whatever a library prints, in C too, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:400] if isinstance(error, Bad) else f"{type(error).__name__}: {lines[0]}"[:400]


def status_of(error: BaseException) -> str:
    """What the answer to a failed request says."""
    memory = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)))
    return f"{'out of memory' if memory else 'failed'}: {one_line(error)}"


def processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def field(request: dict, name: str, kind: type, least: int = 1):
    value = request.get(name)
    if type(value) is not kind or (kind is int and value < least):
        raise Bad(f"`{name}` must be {'a whole number from ' + str(least) if kind is int else 'text'}, not {json.dumps(value)}")
    return value


class Peer:
    """A model on a device, and what is kept from one run to the next."""

    def __init__(self, args):
        # Nothing is to be fetched, whatever the configuration names.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import numpy
        import torch
        import transformers
        transformers.utils.logging.disable_progress_bar()
        self.args, self.numpy, self.torch = args, numpy, torch
        self.cuda = args.device == "cuda"
        if self.cuda and not torch.cuda.is_available():
            raise Bad("--device cuda: torch sees no such device")
        dtype = getattr(torch, DTYPES[args.dtype])
        how = {"dtype": dtype, "attn_implementation": "sdpa"}
        if not (args.model / "config.json").is_file():
            raise Bad(f"--model {args.model}: has no config.json")
        if args.random_weights is None:
            model = transformers.AutoModelForCausalLM.from_pretrained(args.model, local_files_only=True, **how).to(args.device)
        else:
            config = transformers.AutoConfig.from_pretrained(args.model, local_files_only=True)
            torch.manual_seed(args.random_weights)
            with torch.device(args.device):  # made where it will live: seconds, not minutes, for billions of parameters
                model = transformers.AutoModelForCausalLM.from_config(config, **how)
        self.model = model.eval().requires_grad_(False)
        self.slow = self.reference_paths(transformers) if "linear_attention" in getattr(model.config, "layer_types", ()) else []
        self.vocab = model.get_input_embeddings().weight.shape[0]
        self.step = model.get_compiled_call(None) if args.compile else model
        self.static = None  # --compile: the last size and its cache, which the compiled step is bound to
        self.reserved = {}  # bytes the allocator took for a run, by its size
        weights = list(model.parameters())  # a tied matrix is there once
        self.ready = {
            "ready": True, "engine": "transformers", "variant": self.variant(),
            "version": f"{transformers.__version__} torch {torch.__version__}{self.packages()}", "dtype": args.dtype,
            "weights_bytes": sum(p.numel() * p.element_size() for p in weights),
            "device": torch.cuda.get_device_name() if self.cuda else processor(), "parameters": sum(p.numel() for p in weights)}
        if args.random_weights is not None:
            self.ready["random_weights"] = args.random_weights

    def reference_paths(self, transformers) -> list:
        """The parts of recurrent layers that run in plain PyTorch, which is slow, because a package is missing.

        transformers says so when it first calls each: a prompt of three tokens and one more token call all of them.
        """
        found = []

        class Hear(logging.Handler):
            def emit(self, record):
                if match := re.match(r"`(\w+)` is falling back to its reference PyTorch", record.getMessage()):
                    found.append(match[1])

        heard = Hear(level=logging.WARNING)
        transformers.utils.logging.get_logger("transformers").addHandler(heard)
        try:
            with self.torch.inference_mode():
                prompt = self.torch.zeros((1, 3), dtype=self.torch.long, device=self.args.device)
                cache = transformers.DynamicCache(config=self.model.config)
                for ids in (prompt, prompt[:, :1]):
                    self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            transformers.utils.logging.get_logger("transformers").removeHandler(heard)
        return sorted(found)

    def packages(self) -> str:
        """Versions of what computes, recurrent layers' kernels too."""
        found = []
        for name in ("fla-core", "flash-linear-attention", "causal-conv1d"):
            try:
                found.append(f" {name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                pass
        return "".join(found)

    def variant(self) -> str:
        a = self.args
        extra = [" chunked"] * (a.prefill == "chunked") + [f" {a.cache}"] * (a.cache != "dynamic") + [" compiled"] * a.compile
        return "sdpa" + "".join(extra) + (f"; in PyTorch: {', '.join(self.slow)}" if self.slow else "")

    def sync(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def answer(self, request: dict) -> dict:
        try:
            return self.run(request)
        except Exception as error:  # the peer outlives any failed run
            # Formatted here: the error's traceback holds the run's tensors, and goes with this block.
            status = status_of(error)
            self.static = None
        return {"status": status}

    def run(self, request: dict) -> dict:
        begin = time.perf_counter()
        ids, new = self.read_ids(request), field(request, "new_tokens", int)
        if self.args.max_ctx and len(ids) + new > self.args.max_ctx:
            raise Bad(f"{len(ids)} prompt tokens and {new} new ones are more than --max-ctx {self.args.max_ctx}")
        chunk = field(request, "prefill_chunk", int) if self.args.prefill == "chunked" else len(ids)
        prompt_s = time.perf_counter() - begin
        cache = self.new_cache(len(ids) + new)
        before = self.prepare(size := (len(ids), new, chunk))
        # A compiled step runs as generate() runs it; inference mode spares the plain one some bookkeeping.
        with self.torch.no_grad() if self.args.compile else self.torch.inference_mode():
            marks, tokens = self.generate(ids, new, chunk, cache)
        peak = 0
        if self.cuda:
            peak = self.torch.cuda.max_memory_allocated()
            self.reserved[size] = self.torch.cuda.max_memory_reserved() - before
        # Recurrent layers have no keys and values.
        tensors = [t for layer in cache.layers if hasattr(layer, "keys") for t in (layer.keys, layer.values)]
        out = self.numpy.asarray(tokens, dtype="<u4")
        sample = {
            "prefill_s": marks[0], "ttft_s": marks[1], "end_to_end_s": marks[-1],
            "inter_token_s": [b - a for a, b in zip(marks[1:], marks[2:])], "fetched_tokens": 1, "peak_device_bytes": peak,
            "prompt_s": prompt_s, "tokens_sha256": hashlib.sha256(out.tobytes()).hexdigest()}
        return {"sample": sample, "kv_bytes": sum(t.untyped_storage().nbytes() for t in tensors), "tokens": tokens}

    def generate(self, ids, new: int, chunk: int, cache):
        """Seconds from ids on the host to the prompt's last logits, and to each new token on the host; the tokens."""
        self.sync()
        start, marks = time.perf_counter(), []
        prompt = self.torch.from_numpy(ids)[None].to(self.args.device)
        for part in prompt.split(chunk, dim=1):
            logits = self.model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        self.sync()
        marks.append(time.perf_counter() - start)
        tokens = []
        while True:
            token = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token.item())  # waits for the device, as generate() does at every token
            marks.append(time.perf_counter() - start)
            if len(tokens) == new:
                return marks, tokens
            if self.args.compile:
                self.torch.compiler.cudagraph_mark_step_begin()
            logits = self.step(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def read_ids(self, request: dict):
        path, count = field(request, "ids", str), field(request, "prompt_tokens", int)
        try:
            if (held := os.stat(path).st_size // 4) < count:
                raise Bad(f"{path}: holds {held} ids of the {count} wanted")
            ids = self.numpy.fromfile(path, dtype="<u4", count=count).astype("int64")
        except OSError as e:
            raise Bad(f"{path}: cannot be read: {e.strerror}")
        if ids.max() >= self.vocab:  # on a device this would end the process, not the run
            raise Bad(f"{path}: id {ids.max()} is outside the vocabulary of {self.vocab}")
        return ids

    def new_cache(self, positions: int):
        from transformers import DynamicCache, StaticCache
        from transformers.cache_utils import DynamicLayer
        if self.args.compile:
            if self.static is None or self.static[0] != positions:
                # Compiled anew for each size: a graph with a variable length in it would be slower.
                self.torch._dynamo.reset()
                self.static = positions, StaticCache(config=self.model.config, max_cache_len=positions)
            self.static[1].reset()
            return self.static[1]
        cache = DynamicCache(config=self.model.config)
        if self.args.cache == "preallocated":
            kind = preallocated_layer()
            cache.layers = [kind(positions) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def prepare(self, size) -> int:
        """Resets the peak; gives the allocator what a run of this size took before. Returns the bytes reserved before it.

        Between runs all of the device's memory is handed back (`release`), for the other engine's sake. Taking it in one
        piece here keeps the driver's allocation calls out of the timed part, as in a process that has it all to itself.
        """
        if not self.cuda:
            return 0
        before = self.torch.cuda.memory_reserved()
        if self.reserved.get(size):
            try:
                self.torch.empty(self.reserved[size], dtype=self.torch.uint8, device=self.args.device)
            except self.torch.OutOfMemoryError:
                self.torch.cuda.empty_cache()  # in pieces, then, as at the first run
        self.torch.cuda.reset_peak_memory_stats()
        return before

    def release(self) -> None:
        gc.collect()
        if self.cuda:
            self.torch.cuda.empty_cache()


def preallocated_layer():
    from transformers.cache_utils import DynamicLayer

    class Preallocated(DynamicLayer):
        """A dynamic layer in a buffer for all positions: a new token is written in place, the past is not copied."""

        def __init__(self, positions: int):
            super().__init__()
            self.positions = positions

        def lazy_initialization(self, key_states, value_states):
            super().lazy_initialization(key_states, value_states)
            self.buffers = [t.new_empty((*t.shape[:2], self.positions, t.shape[3])) for t in (key_states, value_states)]

        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            begin = self.get_seq_length()
            end = begin + key_states.shape[2]
            for buffer, states in zip(self.buffers, (key_states, value_states)):
                buffer[:, :, begin:end] = states
            self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
            return self.keys, self.values

    return Preallocated


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number from 1 up")
    return int(text)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, metavar="DIR", help="config.json and safetensors")
    p.add_argument("--random-weights", type=int, metavar="SEED", help="config.json alone: the library's own initialisation from a seed")
    p.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights, activations and cache [bf16]")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    p.add_argument("--prefill", choices=("one-shot", "chunked"), default="one-shot",
                   help="the whole prompt at once, or in the request's `prefill_chunk` [one-shot]")
    p.add_argument("--cache", choices=("dynamic", "preallocated"), default="dynamic",
                   help="generate()'s default, which copies the past at each token, or one buffer per layer [dynamic]")
    p.add_argument("--compile", action="store_true", help="torch.compile the decode step, over the library's static cache")
    p.add_argument("--max-ctx", type=positive, metavar="TOKENS", help="refuse runs of more positions than this")
    return p


def serve(peer: Peer, answers) -> None:
    say = lambda answer: print(json.dumps(answer), file=answers, flush=True)
    say(peer.ready)
    for line in sys.stdin:
        try:
            request = json.loads(line)
        except ValueError as e:
            say({"status": f"failed: the request is not JSON: {e}"})
            continue
        if not isinstance(request, dict):
            say({"status": "failed: the request is not a JSON object"})
        elif request.get("quit") is True:
            return
        else:
            answer = peer.answer(request)
            peer.release()  # before the answer: with it, the device is the other engine's
            say(answer)


def main() -> int:
    args = parser().parse_args()
    if args.compile and args.cache != "dynamic":
        parser().error("--compile brings its own cache; leave out --cache")
    answers = claim_stdout()
    try:
        try:
            peer = Peer(args)
        except Exception as error:
            print(json.dumps({"ready": False, "status": status_of(error)}), file=answers, flush=True)
            print(f"peer.py: {one_line(error)}", file=sys.stderr)
            return 2
        serve(peer, answers)
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the parent is gone; nobody is left to tell
        return 0


if __name__ == "__main__":
    sys.exit(main())
