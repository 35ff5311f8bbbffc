#!/usr/bin/env python3
"""Check and time the attention kernels on a GPU without building bfly: nvcc, PyTorch and the driver are enough.

    python3 kernels/check.py                  random ragged shapes against f64, then timings beside PyTorch's SDPA
    python3 kernels/check.py --skip-checks    timings alone

For work on a kernel (docs/adding-a-kernel.md): compiles kernels/*.cu for the GPU at hand and calls the entry points as
src/ops/attention/cuda.rs does. Timings are medians of event pairs over random inputs, after a warm-up.
"""
import argparse
import ctypes as C
import math
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
EXTRA_TILE = 128
PIECE = 16
QUERIES = 128
# As in SHAPES of src/ops/attention/cuda.rs: dim -> (keys per tile, threads, row in shared memory).
SHAPES = {64: (64, 128, 64), 96: (64, 128, 128), 128: (64, 128, 128), 256: (32, 256, 256)}


# As in HOPPER there: dim -> (keys per tile, stages, row in shared memory).
HOPPER = {64: (128, 2, 64), 96: (128, 2, 128), 128: (96, 2, 128), 256: (64, 2, 256)}


class Extra(C.Structure):
    _fields_ = [("k", C.c_uint64), ("v", C.c_uint64), ("bias", C.c_float), ("from_", C.c_int), ("until", C.c_int),
                ("far_query", C.c_int)]


class Piece(C.Structure):
    _fields_ = [("k", C.c_uint64), ("v", C.c_uint64), ("bias", C.c_float), ("from_", C.c_int), ("until", C.c_int),
                ("rows", C.c_int)]


class Params(C.Structure):
    _fields_ = ([(n, C.c_uint64) for n in ("q q_far k v past_k past_v out extras extra_offsets far_offsets "
                                           "pieces piece_offsets lse").split()]
                + [(n, C.c_int64) for n in "q_row q_head k_row k_head v_row v_head past_row past_head".split()]
                + [(n, C.c_int) for n in ("tokens start heads kv_heads dim capacity window_kind window_size "
                                          "window_count").split()] + [("scale", C.c_float)])


class Driver:
    """The few calls of the CUDA driver that a launch takes."""

    def __init__(self):
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        self.lib = C.CDLL("libcuda.so.1")
        self.functions = {}

    def call(self, name, *args):
        code = getattr(self.lib, name)(*args)
        if code:
            text = C.c_char_p()
            self.lib.cuGetErrorName(code, C.byref(text))
            sys.exit(f"check.py: {name}: {text.value.decode()}")

    def load(self, source):
        major, minor = torch.cuda.get_device_capability()
        arch = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
        out = Path(tempfile.gettempdir()) / (Path(source).stem + ".cubin")
        subprocess.run(["nvcc", "-cubin", "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", out, source],
                       check=True)
        module = C.c_void_p()
        self.call("cuModuleLoad", C.byref(module), str(out).encode())
        return module

    def function(self, module, name, shared=0):
        f = C.c_void_p()
        self.call("cuModuleGetFunction", C.byref(f), module, name.encode())
        if shared > 48 << 10:
            self.call("cuFuncSetAttribute", f, 8, shared)
        return f

    def launch(self, f, grid, threads, shared, *args):
        pointers = (C.c_void_p * len(args))(*[C.cast(C.pointer(a), C.c_void_p) for a in args])
        stream = C.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.call("cuLaunchKernel", f, *grid, threads, 1, 1, shared, stream, pointers, None)


def left_edge(window, p):
    kind, size, count = window
    if kind == 0:
        return 0
    if kind == 1:
        return max(0, p + 1 - size)
    return max(0, (p // size - count) * size)


class Case:
    """Random inputs of one shape. `extras` is a list of (row, bias, from, until, far_query), `runs` of (row, count, bias, from,
    until)."""

    with_lse = True  # Off for timings: a model's prefill does not ask for it.

    def __init__(self, t, start, h, g, d, window, capacity, rows=0, extras=(), far=False, dtype=torch.bfloat16, pad=0, runs=()):
        self.t, self.start, self.h, self.g, self.d, self.window, self.capacity = t, start, h, g, d, window, max(1, capacity)
        self.dtype, self.single, self.runs = dtype, list(extras), list(runs)
        self.extras = self.single + [(r + i, bias, a, b, False) for r, n, bias, a, b in self.runs for i in range(n)]
        make = lambda n, heads: torch.randn(n, heads, d + pad, device="cuda", dtype=dtype)[:, :, :d]
        dense = lambda n, heads: torch.randn(n, heads, d, device="cuda", dtype=dtype)
        self.q, self.k, self.v = make(t, h), make(t, g), make(t, g)
        self.q_far = make(t, h) if far else None
        self.past_k, self.past_v = dense(self.capacity, g), dense(self.capacity, g)
        self.rows_k, self.rows_v = dense(max(1, rows), g), dense(max(1, rows), g)
        self.scale = 1 / math.sqrt(d)
        self.out = torch.full((t, h, d), float("nan"), device="cuda", dtype=dtype)
        self.lse = torch.full((t, h), float("nan"), device="cuda")
        self.prepare(True)

    def prepare(self, pieces):
        """With `pieces`, runs have a list of their own; else their rows are among the extras."""
        bytes_per_row = self.g * self.d * self.k.element_size()
        lists, near, far, parts, ends = [], [0], [], [], [0]
        for tile in range(self.start // EXTRA_TILE, (self.start + self.t - 1) // EXTRA_TILE + 1):
            first, end = tile * EXTRA_TILE, (tile + 1) * EXTRA_TILE
            if pieces:
                for row, count, bias, a, b in self.runs:
                    if a < end and b > first:
                        parts += [(row + i, bias, a, b, min(PIECE, count - i)) for i in range(0, count, PIECE)]
            ends.append(len(parts))
            seen = [e for e in (self.single if pieces else self.extras) if e[2] < end and e[3] > first]
            seen.sort(key=lambda e: e[4])
            far.append(len(lists) + sum(1 for e in seen if not e[4]))
            lists += seen
            near.append(len(lists))
        array = (Extra * max(1, len(lists)))()
        for i, (row, bias, first, end, far_query) in enumerate(lists):
            at = row * bytes_per_row
            array[i] = Extra(self.rows_k.data_ptr() + at, self.rows_v.data_ptr() + at, bias, first, end, int(far_query))
        upload = lambda x: torch.frombuffer(bytearray(x), dtype=torch.uint8).cuda()
        ints = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")
        runs = (Piece * max(1, len(parts)))()
        for i, (row, bias, first, end, count) in enumerate(parts):
            at = row * bytes_per_row
            runs[i] = Piece(self.rows_k.data_ptr() + at, self.rows_v.data_ptr() + at, bias, first, end, count)
        self.held = (upload(array), ints(near), ints(far), upload(runs), ints(ends))
        kind, size, count = self.window
        some, self.pieces = bool(lists), bool(parts)
        self.params = Params(
            self.q.data_ptr(), self.q_far.data_ptr() if self.q_far is not None else 0, self.k.data_ptr(), self.v.data_ptr(),
            self.past_k.data_ptr(), self.past_v.data_ptr(), self.out.data_ptr(), self.held[0].data_ptr() if some else 0,
            self.held[1].data_ptr() if some else 0, self.held[2].data_ptr() if some else 0,
            self.held[3].data_ptr() if parts else 0, self.held[4].data_ptr() if parts else 0,
            self.lse.data_ptr() if Case.with_lse else 0,
            *self.q.stride()[:2], *self.k.stride()[:2], *self.v.stride()[:2], *self.past_k.stride()[:2],
            self.t, self.start, self.h, self.g, self.d, self.capacity, kind, size, count, self.scale)

    def reference(self):
        """The definition in f64: output and log-sum-exp."""
        lse = torch.empty(self.t, self.h, device="cuda", dtype=torch.float64)
        out = torch.empty(self.t, self.h, self.d, device="cuda", dtype=torch.float64)
        up = lambda x: x.double()
        for i in range(self.t):
            p = self.start + i
            left = left_edge(self.window, p)
            old = [x % self.capacity for x in range(left, self.start)]
            own = list(range(max(left, self.start) - self.start, i + 1))
            seen = [(r, b) for r, b, first, end, f in self.extras if first <= p < end and not f]
            far = [(r, b) for r, b, first, end, f in self.extras if first <= p < end and f]
            pick = lambda a, b, c: torch.cat([a[old], b[own], c[[r for r, _ in seen + far]]])
            k, v = up(pick(self.past_k, self.k, self.rows_k)), up(pick(self.past_v, self.v, self.rows_v))
            group = self.h // self.g
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            s = torch.einsum("hd,nhd->hn", up(self.q[i]), k) * self.scale
            if far:
                s[:, -len(far):] = torch.einsum("hd,nhd->hn", up(self.q_far[i]), k[-len(far):]) * self.scale
            if seen + far:
                s[:, -len(seen + far):] += torch.tensor([b for _, b in seen + far], device="cuda", dtype=torch.float64)
            lse[i] = s.logsumexp(-1)
            out[i] = torch.einsum("hn,nhd->hd", s.softmax(-1), v)
        return out, lse


class Attention:
    def __init__(self, driver):
        self.driver = driver
        self.prefill, self.any = driver.load(HERE / "attention_prefill.cu"), driver.load(HERE / "attention_any.cu")
        hopper = torch.cuda.get_device_capability() == (9, 0)
        self.hopper = driver.load(HERE / "attention_hopper.cu") if hopper else None
        self.hopper_pieces = driver.load(HERE / "attention_hopper_pieces.cu") if hopper else None
        self.cache = {}

    def get(self, module, name, shared=0):
        if name not in self.cache:
            self.cache[name] = self.driver.function(module, name, shared)
        return self.cache[name]

    def run(self, case, form="best"):
        suffix = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[case.dtype]
        if case.runs and (form != "best" or case.q_far is not None or case.d % 8 or not self.hopper):
            case.prepare(False)
        if form == "any" or case.dtype == torch.float32 or case.d % 8:
            f = self.get(self.any, f"attention_any_{suffix}")
            self.driver.launch(f, ((case.t + 3) // 4, case.h, 1), 128, 0, case.params)
            return case.out
        dim = next(x for x in SHAPES if case.d <= x)
        tiles = (case.start + case.t - 1) // QUERIES - case.start // QUERIES + 1
        if form == "best" and self.hopper and case.q_far is None:
            keys, stages, row = HOPPER[dim]
            shared = (QUERIES + 2 * stages * keys + 32) * row * 2 + (4 * stages + 2) * 8 + 1024
            if case.runs and not case.pieces:
                case.prepare(True)
            module, form = (self.hopper_pieces, "hopper_pieces") if case.pieces else (self.hopper, "hopper")
            f = self.get(module, f"attention_{form}_{suffix}_{dim}", shared)
            self.driver.launch(f, (case.h, tiles, 1), 384, shared, case.params)
            return case.out
        keys, threads, row = SHAPES[dim]
        shared = (QUERIES + 2 * keys) * row * 2
        f = self.get(self.prefill, f"attention_prefill_{suffix}_{dim}", shared)
        self.driver.launch(f, (tiles, case.h, 1), threads, shared, case.params)
        return case.out


def median_ms(f, repeats=20):
    for _ in range(3):
        f()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        f()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    return sorted(times)[len(times) // 2]


def random_case(rng):
    d = rng.choice([8, 16, 64, 64, 80, 96, 128, 128, 256])
    g, group, t, start = rng.randint(1, 3), rng.randint(1, 8), rng.randint(1, 300), rng.choice([0, 0, rng.randint(1, 700), 128, 384])
    window = rng.choice([(0, 0, 0), (1, rng.randint(1, 200), 0), (2, rng.choice([16, 33, 64, 128]), rng.randint(0, 4))])
    reach = start - left_edge(window, start)
    rows, runs = rng.choice([0, 1, 5, 40]), rng.choice([0, 0, 1, 6])
    far = rng.random() < 0.4
    extras = []
    for r in range(rows):
        first = start + rng.randint(-50, t)
        extras.append((r, rng.uniform(-2, 2), first, first + rng.randint(1, 200), far and rng.random() < 0.5))
    dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16])
    listed = []
    for r in range(runs):
        first = start + rng.randint(-50, t)
        listed.append((rows + r * 9, rng.randint(2, 150), rng.choice([0.0, 1.5]), first, first + rng.randint(1, 300)))
    held = rows + (runs * 9 + 150 if runs else 0)
    return Case(t, start, g * group, g, d, window, reach + rng.randint(0, 7), held, extras, far, dtype, rng.choice([0, 0, 8]), listed)


def check(attention, count):
    rng = random.Random(7)
    torch.manual_seed(7)
    worst = 0.0
    for i in range(count):
        case = random_case(rng)
        want, lse = case.reference()
        size = want.norm()
        for form in ("best", "portable", "any"):
            case.out.fill_(float("nan"))
            case.lse.fill_(float("nan"))
            got = attention.run(case, form).double()
            error = float((got - want).norm() / size)
            # What rounding the definition's result once costs, and the weights' rounding on top.
            limit = 4 * float((want.to(case.dtype).double() - want).norm() / size) + 1e-3
            worst = max(worst, error / limit)
            # Logits are exact products of 16-bit numbers, summed in f32.
            apart = float((case.lse.double() - lse).abs().max())
            if not apart <= 2e-3:
                sys.exit(f"check.py: case {i} {form}: log-sum-exp off by {apart:.2e}")
            if not error <= limit:
                sys.exit(f"check.py: case {i} {form}: {error:.2e} > {limit:.2e}: t={case.t} start={case.start} h={case.h} "
                         f"g={case.g} d={case.d} window={case.window} extras={len(case.extras)} {case.dtype}")
    print(f"{count} random shapes agree with f64 (worst {worst:.2f} of the limit)")


def dense_flop(t, start, h, d):
    return 4 * h * d * (t * start + t * (t + 1) / 2)


def timings(attention):
    import torch.nn.functional as F
    Case.with_lse = False
    print(f"{torch.cuda.get_device_name()}")
    portable = median_ms(lambda c=Case(16384, 0, 16, 16, 128, (0, 0, 0), 1): attention.run(c, "portable"))
    print(f"portable D=128 H=16 T=16384: {dense_flop(16384, 0, 16, 128) / portable / 1e9:.1f} TFLOP/s")
    for d, h, g, t in [(128, 16, 16, 16384), (128, 32, 8, 16384), (64, 32, 32, 16384), (64, 14, 2, 16384), (96, 16, 16, 16384), (256, 8, 8, 16384)]:
        case = Case(t, 0, h, g, d, (0, 0, 0), 1)
        ms = median_ms(lambda: attention.run(case))
        q, k, v = [x.transpose(0, 1)[None] for x in (case.q, case.k, case.v)]
        sdpa = median_ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=h != g))
        flop = dense_flop(t, 0, h, d)
        print(f"dense  D={d:3} H={h} G={g} T={t}: {ms:8.3f} ms {flop / ms / 1e9:6.1f} TFLOP/s   sdpa {flop / sdpa / 1e9:6.1f}")
    for d, h, g in [(128, 32, 8), (64, 14, 2)]:
        t, w = 32768, 2048
        case = Case(t, 0, h, g, d, (1, w, 0), 1)
        ms = median_ms(lambda: attention.run(case))
        flop = 4 * h * d * (w * (w + 1) / 2 + (t - w) * w)
        print(f"window {w} D={d} H={h} T={t}: {ms:8.3f} ms {flop / ms / 1e9:6.1f} useful TFLOP/s")
    t, start, b = 4096, 65536, 128
    extras = [(r, 0.0, start, start + t, False) for r in range(4)]
    extras += [(4 + i, 0.0, start + i * b, start + (i + 1) * b, False) for i in range(t // b)]
    case = Case(t, start, 14, 2, 64, (2, b, 4), 640, 4 + t // b, extras)
    ms = median_ms(lambda: attention.run(case))
    flop = 4 * 14 * 64 * t * (512 + 64 + 5)
    print(f"butterfly chunk D=64 H=14 T={t}: {ms:8.3f} ms {flop / ms / 1e9:6.1f} useful TFLOP/s")
    runs = [(n * b, b, 0.0, start + i * b, start + (i + 1) * b) for i in range(t // b) for n in range(16)]
    case = Case(t, start, 32, 8, 128, (2, b, 4), 640, 16 * b, runs=runs)
    ms = median_ms(lambda: attention.run(case))
    flop = 4 * 32 * 128 * t * (512 + 64 + 16 * b)
    print(f"16 raw blocks D=128 H=32 T={t}: {ms:8.3f} ms {flop / ms / 1e9:6.1f} useful TFLOP/s")
    case = Case(t, start, 14, 2, 64, (0, 0, 0), start)
    ms = median_ms(lambda: attention.run(case))
    print(f"dense chunk at {start} D=64 H=14 T={t}: {ms:8.3f} ms {dense_flop(t, start, 14, 64) / ms / 1e9:6.1f} TFLOP/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--cases", type=int, default=60)
    args = parser.parse_args()
    attention = Attention(Driver())
    if not args.skip_checks:
        check(attention, args.cases)
    timings(attention)


if __name__ == "__main__":
    main()
