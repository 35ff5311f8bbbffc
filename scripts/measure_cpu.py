#!/usr/bin/env python3
"""Measure bfly-retrofit on this CPU and compare every figure with its limit.

    end_to_end    seconds for a long prompt and 32 tokens, retrofit / stock, f32
    flat_prefill  prefill tokens/s of the longest prompt / of 2k tokens, retrofit, f32
    flat_decode   decode tokens/s at the depth of the longest prompt / at depth 512, retrofit, f32 and q8_0
    gemm_share    GFLOP/s of a stock f32 prefill of 1k tokens / a plain matrix product's, run just before and after
    peer          prefill and decode tokens/s / llama.cpp's on the same file and ids (needs --peer-python)
    kv            KV bytes / dense KV bytes at 8k, 64k, 256k and 1M; the same bytes for any number of prompt tokens
    peak          peak memory less weights and KV, the maximum over all bfly runs above (derived, without runs of its own)
    kl            KL(f32 || weight type) over the last 256 positions of a 2k prompt, and top-1 agreement, for other weight types

Every run is a separate process and writes raw/<name>-<variant>-<repeat>.json: the report of bfly-retrofit, with the
fields of this script under "run". A run whose file exists is skipped, so an interrupted call can be repeated, and
--only adds to earlier results. Variants are interleaved within a repeat, in reverse order in every other repeat; ratios
are computed within a repeat. The number of cores that other processes keep busy is measured for one second before each
run, and during the run. OUT/report.md and OUT/summary.json are written at the end from all raw files in OUT.

"8k" is the longest prompt that fits with 32 new tokens, or all of --text where that is shorter; text is never repeated.
Exit codes: 0 (also where a limit is missed), 1 (a run failed; the others are reported), 2 (invalid input).
"""
import argparse
import hashlib
import json
import math
import operator
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from array import array
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent.parent
NAMES = ["end_to_end", "flat_prefill", "flat_decode", "gemm_share", "peer", "kv", "peak", "kl"]
WEIGHT_TYPES = ["q8_0", "q4_0", "bf16", "native"]
KV_LIMITS = {"8k": 0.083, "64k": 0.0115, "256k": 0.0036, "1M": None}
CTX, NEW, BUSY, MIB = 8192, 32, 0.2, 1 << 20
FIXTURE, TEXT = ROOT / "tests/fixtures/real/smollm2-135m.json", ROOT / "tests/data/jargon-excerpt.txt"


class Failure(Exception):
    """An error whose message is for the user."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def near(path):
    """Return the path for child processes: relative to the repository for paths inside it."""
    path = Path(os.path.abspath(path))
    return path.relative_to(ROOT) if ROOT in path.parents else path


def show(path):
    """Return the path for reports: relative to the repository, or the file name alone for paths outside it."""
    path = near(path)
    return path.name if path.is_absolute() else str(path)


def shown(arg):
    head, eq, tail = arg.partition("=") if arg.startswith("--") else ("", "", arg)
    return head + eq + (show(tail) if "/" in tail else tail)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(MIB), b""):
            digest.update(piece)
    return digest.hexdigest()


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise Failure(f"{show(path)}: cannot be read: {e}")


def write(path, value):
    """Write a file atomically."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(value if isinstance(value, str) else json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def busy_seconds():
    """Return the busy seconds of all cores and the CPU seconds of finished child processes; None outside Linux."""
    try:
        ticks = [int(t) for t in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    times = os.times()
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), times.children_user + times.children_system


def others(before, after, wall):
    """Return the mean number of cores that other processes kept busy."""
    return max(0.0, (after[0] - before[0] - after[1] + before[1]) / wall) if before and after else None


def tensor(path, name):
    """Return a tensor's offset in a safetensors file, and its shape."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        info = json.loads(file.read(size))[name]
    return 8 + size + info["data_offsets"][0], info["shape"]


def divergence(reference, other):
    """Return, per position of two files of logits, KL(reference || other) in nats and whether the best token agrees."""
    (at, (rows, vocab)), (other_at, other_shape) = tensor(reference, "logits"), tensor(other, "logits")
    if other_shape != [rows, vocab]:
        raise Failure("kl: two files of logits differ in shape")
    result = {"kl": [], "top1": []}
    with open(reference, "rb") as a, open(other, "rb") as b:
        a.seek(at), b.seek(other_at)
        for _ in range(rows):
            x, y = array("f", a.read(4 * vocab)), array("f", b.read(4 * vocab))
            x_max, y_max = max(x), max(y)
            weights = [math.exp(v - x_max) for v in x]
            total = sum(weights)
            mean = sum(map(operator.mul, weights, map(operator.sub, x, y))) / total
            log_y = y_max + math.log(sum(math.exp(v - y_max) for v in y))
            result["kl"].append(mean - x_max - math.log(total) + log_y)
            result["top1"].append(x.index(x_max) == y.index(y_max))
    return result


class Bench:
    """Makes the runs whose files are missing."""

    def __init__(self, args):
        self.args, self.out, self.raw, self.made = args, Path(args.out), Path(args.out) / "raw", 0
        for path, what in ((args.model, "--model"), (args.bfly, "--bfly"), *([(args.text, "--text")] if args.text else [])):
            if not Path(path).is_file():
                raise Failure(f"{what} {show(path)}: no such file")
        try:
            self.raw.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise Failure(f"--out: cannot be created: {e.strerror}")
        self.binary = sha256(args.bfly)
        text = args.text or (None if args.quick else TEXT)
        base = {"model": Path(args.model).name, "model_sha256": sha256(args.model), "threads": args.threads, "quick": args.quick,
                "text": show(text) if text else show(FIXTURE), "text_sha256": sha256(text or FIXTURE)}
        kept = self.raw / "settings.json"
        if kept.exists():
            self.settings = read_json(kept)
            for key, value in base.items():
                if self.settings.get(key) != value:
                    raise Failure(f"--out {show(self.out)} has runs with {key} {self.settings.get(key)}, not {value}; choose another --out")
            self.all_ids = read_json(self.raw / f"ids-{self.settings['longest']}.json")
        else:
            cap = 512 if args.quick else CTX - NEW
            self.all_ids = (self.tokenise(text, cap) if text else read_json(FIXTURE)["prompt_ids"])[:cap]
            if len(self.all_ids) < (192 if args.quick else 2048):
                raise Failure(f"--text {show(text)}: has only {len(self.all_ids)} tokens")
            self.settings = {**base, "longest": len(self.all_ids), "longest_asked": cap}
            self.ids(len(self.all_ids))
            write(kept, self.settings)
        self.n8 = self.settings["longest"]
        self.n_depth = min(self.n8, CTX - 64)
        self.short, self.k1, self.k2 = (64, 96, 128) if args.quick else (512, 1024, 2048)

    def tokenise(self, text, cap):
        """Tokenise a text with the model's tokenizer; bfly writes the ids to its file of logits."""
        say(f"tokenising {show(text)}")
        cut, logits = self.raw / ".text.txt", self.raw / ".text.safetensors"
        try:
            cut.write_text(Path(text).read_text(encoding="utf-8")[:8 * cap], encoding="utf-8")
            self.child([near(self.args.bfly), "--model", near(self.args.model), "--prompt-file", near(cut), "--ctx", "256k", "-n", "0",
                        "--threads", str(self.args.threads), "--logits-out", near(logits), "--quiet"], "tokenising")
            at, (n,) = tensor(logits, "token_ids")
            data = logits.read_bytes()[at:at + 4 * n]
            return [int.from_bytes(data[i:i + 4], "little") for i in range(0, len(data), 4)]
        except UnicodeDecodeError as e:
            raise Failure(f"--text {show(text)}: is not UTF-8: {e}")
        finally:
            for path in (cut, logits):
                path.unlink(missing_ok=True)

    def ids(self, n):
        """Return a file with the first n ids."""
        path = self.raw / f"ids-{n}.json"
        if not path.exists():
            write(path, json.dumps(self.all_ids[:n]) + "\n")
        return path

    def child(self, command, what, env=None):
        try:
            done = subprocess.run([str(c) for c in command], cwd=ROOT, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
        except OSError as e:
            raise Failure(f"{what}: {show(command[0])} cannot be run: {e.strerror}")
        if done.returncode != 0:
            tail = " / ".join(done.stderr.strip().splitlines()[-3:]).replace(f"{ROOT}/", "")
            raise Failure(f"{what} failed with code {done.returncode}: {tail}")
        return done.stdout

    def one(self, name, variant, repeat, command, env=None, again=False, after=None):
        """Make a run, unless its file exists; in `command`, paths are Path, and JSON stands for the report's path."""
        final = self.raw / f"{name}-{variant}-{repeat}.json"
        if final.exists() and not again:
            return
        what = f"{name} {variant} {repeat}"
        before = busy_seconds()
        time.sleep(1)
        idle = others(before, busy_seconds(), 1.0)
        partial = self.raw / ".run.json"
        partial.unlink(missing_ok=True)
        before, begin = busy_seconds(), time.perf_counter()
        stdout = self.child([near(partial) if c == "JSON" else near(c) if isinstance(c, Path) else c for c in command], what, env)
        wall = time.perf_counter() - begin
        during = others(before, busy_seconds(), wall)
        report = read_json(partial) if "JSON" in command else json.loads(stdout.strip().splitlines()[-1])
        partial.unlink(missing_ok=True)
        if isinstance(report.get("model"), dict) and "path" in report["model"]:
            report["model"]["path"] = show(self.args.model)
        line = [final if c == "JSON" else c for c in command]
        line = [*(f"{k}={v}" for k, v in (env or {}).items()), *(show(c) if isinstance(c, Path) else c for c in line)]
        report["run"] = {"name": name, "variant": variant, "repeat": repeat, "command": shlex.join(line), "wall_s": wall,
                         "others_before": idle, "others_during": during, "binary_sha256": self.binary if command[0] == self.args.bfly else None,
                         **(after() if after else {})}
        write(final, report)
        self.made += 1
        rates = [f"{report[k]:.1f} {t} tok/s" for k, t in (("prefill_tok_s", "prefill"), ("decode_tok_s", "decode")) if k in report]
        say(f"{what}: {', '.join([f'{wall:.1f} s', *rates])}; others kept {idle or 0:.2f}, then {during or 0:.2f} cores busy")

    def bfly(self, n, *flags, ctx="8k", new=NEW):
        return [self.args.bfly, "--model", self.args.model, "--token-ids", self.ids(n), "--ctx", ctx, "-n", str(new), "--ignore-eos",
                "--threads", str(self.args.threads), "--quiet", "--json", "JSON", *flags]

    def turns(self, name, variants):
        """Run variants one after the other, in reverse order in every other repeat."""
        for repeat in range(self.args.repeats):
            for variant, command in list(variants.items())[::1 if repeat % 2 == 0 else -1]:
                self.one(name, variant, repeat, command)

    def end_to_end(self):
        f32 = ("--dtype", "f32")
        self.turns("end_to_end", {"retrofit": self.bfly(self.n8, *f32), "stock": self.bfly(self.n8, *f32, "--stock")})

    def flat_prefill(self):
        self.turns("flat_prefill", {at: self.bfly(n, "--dtype", "f32") for at, n in (("2k", self.k2), ("8k", self.n8))})

    def flat_decode(self):
        self.turns("flat_decode", {f"{dtype}_{at}": self.bfly(n, "--dtype", dtype, new=64)
                                   for dtype in ("f32", "q8_0") for at, n in (("512", self.short), ("8k", self.n_depth))})

    def gemm_share(self):
        target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))

        def built():
            found = [p for p in (ROOT / target / "release/deps").glob("ceiling-*") if not p.suffix and os.access(p, os.X_OK)]
            return max(found, key=lambda p: p.stat().st_mtime, default=None)

        if not built() and not self.args.quick:
            say("building the ceiling bench")
            self.child(["cargo", "bench", "--bench", "ceiling", "--no-run"], "building the ceiling bench")
        if not built():
            raise Failure("the ceiling bench is not built; run cargo bench --bench ceiling")
        env = {"RAYON_NUM_THREADS": str(self.args.threads)}
        for repeat in range(self.args.repeats):
            # The ceiling varies over time, so all three are measured again where one is missing.
            again = not all((self.raw / f"gemm_share-{v}-{repeat}.json").exists() for v in ("before", "stock", "after"))
            self.one("gemm_share", "before", repeat, [built()], env, again)
            self.one("gemm_share", "stock", repeat, self.bfly(self.k1, "--dtype", "f32", "--stock"), None, again)
            self.one("gemm_share", "after", repeat, [built()], env, again)

    def peer(self):
        python = self.args.peer_python
        if not python:
            raise Failure("skipped: --peer-python was not given")
        llama = [python, ROOT / "integrations/llama-cpp/peer.py", "--gguf", self.args.model, "--token-ids", self.ids(self.n8), "--ctx", "8k",
                 "-n", str(NEW), "--threads", str(self.args.threads), "--quiet", "--json", "JSON"]
        self.turns("peer", {"llama_cpp": llama, **{d: self.bfly(self.n8, "--dtype", d) for d in ("f32", "q8_0")}})

    def kv(self):
        for ctx in KV_LIMITS:
            self.one("kv", f"ctx_{ctx}", 0, self.bfly(32, "--dtype", "f32", ctx=ctx, new=1))
        for at, n in (("1k", self.k1), ("8k", self.n8)):
            self.one("kv", f"fed_{at}", 0, self.bfly(n, "--dtype", "f32", new=1))

    def kl(self):
        if all((self.raw / f"kl-{d}-0.json").exists() for d in ["f32", *WEIGHT_TYPES]):
            return
        k, files = min(256, self.k2 // 2), {d: self.raw / f".kl-{d}.safetensors" for d in ["f32", *WEIGHT_TYPES]}
        try:
            for d, file in files.items():
                command = self.bfly(self.k2, "--dtype", d, "--logits-last", str(k), "--logits-out", file, new=0)
                self.one("kl", d, 0, command, None, d == "f32", None if d == "f32" else lambda f=file: divergence(files["f32"], f))
                if d != "f32":
                    file.unlink(missing_ok=True)
        finally:
            for file in files.values():
                file.unlink(missing_ok=True)


def work(spec, tokens):
    """Floating-point operations of a prefill: in matrices (the head for one position only), in causal attention."""
    h, matrices, attention = spec["hidden"], 0, 0
    for layer in spec["layers"]:
        q, kv = layer["heads"] * layer["head_dim"], layer["kv_heads"] * layer["head_dim"]
        matrices += h * (2 * q + 2 * kv + 3 * layer["intermediate"])
        attention += 4 * q * tokens * tokens / 2
    return 2 * matrices * tokens + 2 * spec["vocab"] * h, attention


def extra(r):
    """Return the peak memory without weights and KV, in MiB."""
    peak = r.get("peak_memory_bytes")
    return None if peak is None else (peak - r["weights_bytes"] - r["kv"]["total_bytes"]) / MIB


def is_bfly(r):
    return "kv" in r and "engine" not in r


def pairs(variants, f, *names):
    """Return `f` of the named variants' reports for each repeat that has all of them."""
    common = set.intersection(*(set(variants.get(n, {})) for n in names))
    return [f(*(variants[n][i] for n in names)) for i in sorted(common)]


def ratio(key):
    return lambda a, b: a[key] / b[key]


def figures(runs, lengths):
    """Compute all figures from the raw files."""
    made = []

    def add(group, what, dtype, values, limit=None, unit="", value=statistics.median):
        if not values:
            return
        mid = value(values)
        met = None if limit is None else mid <= limit[1] if limit[0] == "<=" else mid >= limit[1]
        made.append({"group": group, "what": what, "dtype": dtype, "limit": limit, "unit": unit, "value": mid, "min": min(values),
                     "max": max(values), "met": met, "statistic": "mean" if value is statistics.mean else "median", "samples": values})

    get = lambda name: runs.get(name, {})
    n8, k1, k2, short, depth = lengths
    seconds = lambda r: r["prefill_s"] + r["decode_s"]
    add("end_to_end", f"prompt of {n8} and {NEW} tokens: seconds, retrofit / stock", "f32",
        pairs(get("end_to_end"), lambda a, b: seconds(a) / seconds(b), "retrofit", "stock"), ["<=", 0.6])
    add("flat_prefill", f"prefill tokens/s, {n8} / {k2} tokens", "f32", pairs(get("flat_prefill"), ratio("prefill_tok_s"), "8k", "2k"), [">=", 0.9])
    for d in ("f32", "q8_0"):
        add("flat_decode", f"decode tokens/s, depth {depth} / {short}", d,
            pairs(get("flat_decode"), ratio("decode_tok_s"), f"{d}_8k", f"{d}_512"), [">=", 0.9])
    gemm = get("gemm_share")
    ceiling = lambda a, b: (a["gemm_gflop_s_median"] + b["gemm_gflop_s_median"]) / 2
    rate = lambda r, with_attention: sum(work(r["spec"], r["prompt_tokens"])[:1 + with_attention]) / r["prefill_s"] / 1e9
    three = ("stock", "before", "after")
    add("gemm_share", f"stock prefill of {k1} tokens, matrices only / ceiling", "f32", pairs(gemm, lambda r, a, b: rate(r, 0) / ceiling(a, b), *three), [">=", 0.6])
    add("gemm_share", "the same, attention counted too", "f32", pairs(gemm, lambda r, a, b: rate(r, 1) / ceiling(a, b), *three))
    add("gemm_share", "matrices only", "f32", pairs(gemm, lambda r: rate(r, 0), "stock"), unit="GFLOP/s")
    add("gemm_share", "attention's operations, counted over the same seconds", "f32", pairs(gemm, lambda r: rate(r, 1) - rate(r, 0), "stock"), unit="GFLOP/s")
    add("gemm_share", "ceiling: plain f32 matrix product, mean of before and after", "f32", pairs(gemm, ceiling, "before", "after"), unit="GFLOP/s")
    add("gemm_share", "ceiling: one pass over memory, all cores", "f32",
        pairs(gemm, lambda a, b: (a["read_gb_s_median"] + b["read_gb_s_median"]) / 2, "before", "after"), unit="GB/s")
    peer = get("peer")
    for d in ("f32", "q8_0"):
        for key, what, limit in (("prefill_tok_s", f"prefill tokens/s, {n8} tokens", 2), ("decode_tok_s", f"decode tokens/s at depth {n8}", 3)):
            theirs = next((r["dtype"] for r in peer.get("llama_cpp", {}).values()), "")
            add("peer", f"{what}, bfly / llama.cpp", f"{d} / {theirs}", pairs(peer, ratio(key), d, "llama_cpp"), [">=", limit])
    for ctx, limit in KV_LIMITS.items():
        for r in get("kv").get(f"ctx_{ctx}", {}).values():
            swapped = f"{len(r['plan']['layers'])} of {r['plan']['model_layers']} layers swapped"
            add("kv", f"KV / dense KV at ctx {ctx}, {r['kv']['total_bytes'] / MIB:.1f} MiB, {swapped}", "KV f32", [r["kv"]["ratio"]], limit and ["<=", limit])
    fed = [r for v in runs.values() for rs in v.values() for r in rs.values() if is_bfly(r) and r["plan"] and r["ctx"] == CTX]
    if {k1, n8} <= {r["prompt_tokens"] for r in fed}:
        sizes = {r["kv"]["total_bytes"] for r in fed}
        told = ", ".join(f"{n:,}" for n in sorted({r["prompt_tokens"] for r in fed}))
        add("kv", f"distinct KV sizes at ctx 8k over {len(fed)} retrofit runs fed {told} tokens", "KV f32", [len(sizes)], ["<=", 1])
    rest = [(extra(r), n, v, r) for n, vs in runs.items() if n != "kl" for v, rs in vs.items() for r in rs.values() if is_bfly(r)]
    rest = [x for x in rest if x[0] is not None]
    for stock in (None, False, True):
        part = [x for x in rest if stock is None or (x[3]["plan"] is None) == stock]
        if part:
            _, n, v, r = max(part, key=lambda x: x[0])
            who = {None: "all bfly runs but kl", False: "retrofit", True: "stock"}[stock]
            add("peak", f"peak less weights and KV, largest of {who}: {n} {v}", r["dtype"], [x[0] for x in part],
                ["<=", 400] if stock is None else None, "MiB", max)
    for d in WEIGHT_TYPES:
        for r in get("kl").get(d, {}).values():
            n, held = len(r["run"]["kl"]), dtype_of(r)
            add("kl", f"KL(f32 || held), nats, mean of {n} positions", held, r["run"]["kl"], value=statistics.mean)
            add("kl", f"share of {n} positions with f32's best token", held, [sum(r["run"]["top1"]) / n])
    return made


def dtype_of(r):
    held = "+".join(r.get("held") or [])
    return r["dtype"] + (f" (held as {held})" if held and held != r["dtype"] else "")


def machine():
    def first(path, pattern):
        try:
            found = re.search(pattern, Path(path).read_text(), re.M)
        except OSError:
            found = None
        return found[1] if found else None

    flags, kib = (first("/proc/cpuinfo", r"^flags\s*:\s*(.+)$") or "").split(), first("/proc/meminfo", r"^MemTotal:\s+(\d+) kB")
    return {"cpu": first("/proc/cpuinfo", r"^model name\s*:\s*(.+)$") or platform.machine(), "cores": os.cpu_count(),
            "vectors": [f for f in ("avx2", "fma", "avx512f", "avx512_vnni", "amx_tile") if f in flags],
            "memory_bytes": int(kib) * 1024 if kib else None, "kernel": f"{platform.system()} {platform.release()} {platform.machine()}"}


def num(x):
    return "-" if x is None else f"{x:,.1f}" if abs(x) >= 20 else f"{x:.3g}" if abs(x) < 0.1 else f"{x:.3f}"


def spread(values, value=statistics.median):
    return "-" if not values else num(values[0]) if len(values) == 1 else f"{num(value(values))} [{num(min(values))}–{num(max(values))}]"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"


def write_report(bench, runs, failed, took):
    made = figures(runs, (bench.n8, bench.k1, bench.k2, bench.short, bench.n_depth))
    rows = [(n, v, i, r) for n in NAMES for v, rs in runs.get(n, {}).items() for i, r in sorted(rs.items())]
    git = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    sha, builds = git.stdout.strip() or "unknown", sorted({r["git_sha"] for *_, r in rows if is_bfly(r)})
    command = shlex.join(["scripts/measure_cpu.py", *map(shown, sys.argv[1:])])
    host, s, wall = machine(), bench.settings, sum(r["run"]["wall_s"] for *_, r in rows)
    notes = [str(f) for f in failed]
    if s["quick"]:
        notes.append("--quick: the prompts are too short for a measurement; this only checks the script")
    if s["longest"] < s["longest_asked"]:
        notes.append(f"\"8k\" is {s['longest']:,} tokens, all of {s['text']}; {s['longest_asked']:,} would fit")
    if len({r["run"]["binary_sha256"] for *_, r in rows if is_bfly(r)}) > 1:
        notes.append("the runs are of more than one build of bfly-retrofit")
    if builds and builds != [sha]:
        notes.append(f"bfly-retrofit was built from {', '.join(builds)}; the checkout is at {sha}")
    loud = [f"{n} {v} {i}" for n, v, i, r in rows if max(r["run"]["others_before"] or 0, r["run"]["others_during"] or 0) > BUSY]
    if loud:
        notes.append(f"other processes kept more than {BUSY} cores busy before or during {len(loud)} of {len(rows)} runs: {', '.join(loud)}")
    if any(r["run"]["others_before"] is None for *_, r in rows):
        notes.append("the load of other processes is unknown on this system")
    notes += ["bfly's KV cache is f32 in every run; llama.cpp's is f16. Medians are over repeats; ratios are taken within a repeat",
              "decode tokens/s count the tokens after the first; loading is not timed"]
    last = {}
    for n, v, i, r in rows:
        last.setdefault((n, v), []).append(r)
    limit = lambda f: "-" if not f["limit"] else f"{'≤' if f['limit'][0] == '<=' else '≥'} {f['limit'][1]}"
    of = lambda rs, key: [r[key] for r in rs if r.get(key)]
    vectors, memory = ", ".join(host["vectors"]) or "no known vector extensions", num((host["memory_bytes"] or 0) / (1 << 30))
    text = f"""# {s['model']} on a CPU

{host['cpu']}, {host['cores']} cores ({vectors}), {memory} GiB, {host['kernel']}; {s['threads']} threads.
bfly-retrofit built from {', '.join(builds) or 'unknown'}; checkout {sha}.
Model SHA-256 {s['model_sha256']}.
{len(rows)} runs, {wall / 60:.1f} minutes together; {bench.made} of them by this call, which took {took / 60:.1f} minutes:

    {command}

## Figures

{table(["figure", "", "dtype", "limit", "measured: median [min–max]", "met"],
       [[f["group"], f["what"], f["dtype"], limit(f), (spread(f["samples"], lambda _: f["value"]) + " " + f["unit"]).strip(),
         {True: "yes", False: "NO", None: "-"}[f["met"]]] for f in made])}
{"".join(f"* {n}.{chr(10)}" for n in notes)}
## Medians by variant

{table(["measurement", "variant", "dtype", "prompt", "new", "ctx", "runs", "prefill tok/s", "decode tok/s", "prefill + decode s", "peak MiB", "KV MiB"],
       [[n, v, dtype_of(r[0]), r[0]["prompt_tokens"], r[0]["generated_tokens"], r[0]["ctx"], len(r), spread(of(r, "prefill_tok_s")),
         spread(of(r, "decode_tok_s")), spread([x["prefill_s"] + x["decode_s"] for x in r]), spread([p / MIB for p in of(r, "peak_memory_bytes")]),
         num(r[0]["kv"]["total_bytes"] / MIB)] for (n, v), r in last.items() if "kv" in r[0]])}
## Every run

{table(["run", "prefill tok/s", "decode tok/s", "matrix product GFLOP/s", "peak less weights and KV, MiB", "others before, cores", "others during, cores", "wall s"],
       [[f"{n}-{v}-{i}", num(r.get("prefill_tok_s")), num(r.get("decode_tok_s") or None), num(r.get("gemm_gflop_s_median")),
         num(extra(r) if is_bfly(r) else None), num(r["run"]["others_before"]), num(r["run"]["others_during"]), num(r["run"]["wall_s"])] for n, v, i, r in rows])}
## Commands

One of each; the reports, with every decode step, and the prompts' ids are in `raw/`.

{"".join(f"    {r[0]['run']['command']}{chr(10)}" for r in last.values())}"""
    write(bench.out / "report.md", text)
    slim = ("dtype", "held", "prompt_tokens", "generated_tokens", "ctx", "prefill_s", "decode_s", "prefill_tok_s", "decode_tok_s",
            "peak_memory_bytes", "weights_bytes", "kv", "gemm_gflop_s", "gemm_gflop_s_median", "read_gb_s", "read_gb_s_median")
    write(bench.out / "summary.json", {
        "schema_version": 1, "machine": host, "git_sha": sha, "built_from": builds, "command": command, "settings": s, "notes": notes,
        "wall_s": wall, "figures": made,
        "runs": [{"file": f"raw/{n}-{v}-{i}.json", **{k: r[k] for k in slim if k in r},
                  **{k: r["run"][k] for k in ("wall_s", "others_before", "others_during")}} for n, v, i, r in rows]})
    for f in made:
        say(f"{'' if f['met'] is None else 'met   ' if f['met'] else 'MISSED'}".ljust(8) + f"{f['group']}: {f['what']} [{f['dtype']}] "
            f"{num(f['value'])} {f['unit']} (limit {limit(f)})")


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
               "  measure_cpu.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf --out results/2030-01-31-cpu-first\n"
               "  measure_cpu.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf --out results/2030-01-31-cpu-first \\\n"
               "      --only peer --peer-python .venv/bin/python --repeats 5\n"
               "  measure_cpu.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf --out try --quick --repeats 1")
    p.add_argument("--model", required=True, type=Path, help="a GGUF file")
    p.add_argument("--out", required=True, type=Path, help="folder of report.md, summary.json and raw/; created if missing")
    p.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each timed variant [3]; kv and kl run once")
    p.add_argument("--only", default=",".join(NAMES), metavar="NAME,...", help="measurements to run [all]; the report covers all raw files")
    p.add_argument("--threads", type=int, default=2, metavar="N", help="threads of every run [2]")
    p.add_argument("--text", type=Path, help=f"text of the prompts [{show(TEXT)}]")
    p.add_argument("--quick", action="store_true", help="use prompts of at most 512 tokens, to check this script only")
    p.add_argument("--bfly", type=Path, help="bfly-retrofit to measure [target/release/bfly-retrofit]")
    p.add_argument("--peer-python", metavar="PYTHON",
                   help="Python interpreter with integrations/llama-cpp/requirements.txt installed; without it peer is skipped")
    args = p.parse_args()
    begin, failed = time.perf_counter(), []
    try:
        only = [n for n in args.only.split(",") if n]
        bad = [n for n in only if n not in NAMES]
        if bad or args.repeats < 1 or args.threads < 1:
            raise Failure(f"--only {bad[0]}: not one of {', '.join(NAMES)}" if bad else "--repeats and --threads must be at least 1")
        args.bfly = args.bfly or ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release/bfly-retrofit"
        args.peer_python = args.peer_python and Path(shutil.which(args.peer_python) or args.peer_python)
        bench = Bench(args)
    except Failure as e:
        say(f"measure_cpu.py: {e}")
        return 2
    try:
        for name in NAMES:
            if name in only and name != "peak":
                try:
                    getattr(bench, name)()
                except Failure as e:
                    failed.append(f"{name}: {e}")
                    say(f"measure_cpu.py: {failed[-1]}")
        runs = {}
        for path in sorted(bench.raw.glob("[a-z]*-*-*.json")):
            name, variant, repeat = path.stem.rsplit("-", 2)
            runs.setdefault(name, {}).setdefault(variant, {})[int(repeat)] = read_json(path)
        write_report(bench, runs, failed, time.perf_counter() - begin)
    except KeyboardInterrupt:
        return 130
    say(f"wrote {show(bench.out / 'report.md')} and summary.json")
    return 1 if any("skipped" not in f for f in failed) else 0


if __name__ == "__main__":
    sys.exit(main())
