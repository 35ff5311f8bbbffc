#!/usr/bin/env python3
"""flash-linear-attention's Gated DeltaNet kernels (fla-core) at the shapes of delta.cu: JSON lines with every sample, ms.

    pip install fla-core && python3 kernels/repro/delta_fla.py > fla.jsonl
"""
import importlib.metadata
import json

import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

DIM, SAMPLES = 128, 10


def timed(f):
    samples = []
    for i in range(-3, SAMPLES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        f()
        end.record()
        torch.cuda.synchronize()
        if i >= 0:
            samples.append(begin.elapsed_time(end))
    return samples


def call(kernel, states: int, tokens: int, heads: int):
    normal = lambda *shape: torch.randn(states, tokens, heads, *shape, device="cuda", dtype=torch.bfloat16)
    q, k, v, beta, a = normal(DIM), normal(DIM), normal(DIM), normal().sigmoid(), normal()
    g = -16 * torch.rand(heads, device="cuda") * torch.nn.functional.softplus(a.float())
    state = torch.zeros(states, heads, DIM, DIM, device="cuda")
    return timed(lambda: kernel(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True))


def main():
    torch.manual_seed(0)
    versions = {"fla_core": importlib.metadata.version("fla-core"), "torch": torch.__version__, "device": torch.cuda.get_device_name()}
    print(json.dumps(versions), flush=True)
    with torch.no_grad():
        for heads in (16, 32, 48):
            for tokens in (2048, 8192, 65536):
                ms = call(chunk_gated_delta_rule, 1, tokens, heads)
                print(json.dumps({"kind": "chunk", "heads": heads, "tokens": tokens, "ms": ms}), flush=True)
            for states in (1, 64):
                ms = call(fused_recurrent_gated_delta_rule, states, 1, heads)
                print(json.dumps({"kind": "step", "heads": heads, "states": states, "ms": ms}), flush=True)


if __name__ == "__main__":
    main()
