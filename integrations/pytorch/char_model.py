#!/usr/bin/env python3
"""The native character model in PyTorch: the same weights and batches, to compare with and to time against.

    python3 integrations/pytorch/char_model.py compare RUN RECORD      losses of a run that was made with --record
    python3 integrations/pytorch/char_model.py time --preset small --window 64k --sequences 1 --kind pair

`compare` trains from the weights in RECORD on the batches in RECORD with PyTorch's AdamW and compares the losses with
RUN/log.jsonl; it fails where a loss differs by more than --bound (1%). `time` prints characters per second of whole training
steps; --kind pair is this model with scaled_dot_product_attention over pairs of chunks, dense the same sizes with causal
attention over the whole window, both compiled and in bf16 with f32 master weights.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

PRESETS = {"full": (12, 128, 9), "small": (6, 128, 9), "tiny": (2, 128, 9), "micro": (1, 16, 6)}  # heads, chunk, stages


def config_of(preset):
    heads, chunk, stages = PRESETS[preset]
    d = 64 * heads
    return {"hidden_size": d, "num_attention_heads": heads, "head_dim": 64, "chunk": chunk, "local_layers": [4, 4],
            "intermediate_size": -(-8 * d // 96) * 32, "stages": list(range(stages)) * 5,
            "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "partner_form": "raw", "pairing": "causal_shift"}


def distances(config):
    local = [[1] * n for n in config["local_layers"]]
    return local[0] + [2**s for s in config["stages"]] + local[1]


def table(positions, dim, theta, device):
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotated(x, cos, sin):
    """x [.., T, D]; cos, sin [T, D / 2]."""
    low, high = x.float().chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)


class Layer(torch.nn.Module):
    def __init__(self, config, distance):
        super().__init__()
        d, width, wide = config["hidden_size"], config["num_attention_heads"] * config["head_dim"], config["intermediate_size"]
        self.config, self.distance = config, distance
        linear = lambda i, o: torch.nn.Linear(i, o, bias=False)
        self.input_layernorm = torch.nn.RMSNorm(d, config["rms_norm_eps"])
        self.qkv, self.o_proj = linear(d, 3 * width), linear(width, d)
        self.post_attention_layernorm = torch.nn.RMSNorm(d, config["rms_norm_eps"])
        self.gate_up, self.down_proj = linear(d, 2 * wide), linear(wide, d)

    def before(self, x, cos, sin):
        """Queries, keys for the chunk itself, keys for its readers, values."""
        h, dim = self.config["num_attention_heads"], self.config["head_dim"]
        qkv = self.qkv(F.rms_norm(x, x.shape[-1:], self.input_layernorm.weight.to(x.dtype), self.config["rms_norm_eps"]))
        if self.distance is None:
            q, k, v = (y.transpose(1, 2) for y in qkv.unflatten(-1, (3, h, dim)).unbind(2))
            return rotated(q, cos, sin), rotated(k, cos, sin), None, v
        b = self.config["chunk"]
        # [S, C, H, B, D]. Queries and the chunk's own keys one chunk on: only differences of positions count.
        q, k, v = (y.transpose(2, 3) for y in qkv.unflatten(1, (-1, b)).unflatten(-1, (3, h, dim)).unbind(3))
        return rotated(q, cos[b:], sin[b:]), rotated(k, cos[b:], sin[b:]), rotated(k, cos[:b], sin[:b]), v.contiguous()

    def attend(self, q, own, far, v):
        if self.distance is None:
            return F.scaled_dot_product_attention(q, own, v, is_causal=True).transpose(1, 2).flatten(2)
        flat = lambda x: x.flatten(0, 1)
        first, chunks, b = min(self.distance, q.shape[1]), q.shape[1], q.shape[3]
        out = [F.scaled_dot_product_attention(flat(q[:, :first]), flat(own[:, :first]), flat(v[:, :first]), is_causal=True)]
        out[0] = out[0].unflatten(0, (-1, first))
        if chunks > first:
            keys, values = torch.cat([far[:, :-first], own[:, first:]], 3), torch.cat([v[:, :-first], v[:, first:]], 3)
            bias = causal_lower_right(b, 2 * b)
            both = F.scaled_dot_product_attention(flat(q[:, first:]), flat(keys), flat(values), attn_mask=bias)
            out.append(both.unflatten(0, (-1, chunks - first)))
        return torch.cat(out, 1).transpose(2, 3).flatten(3).flatten(1, 2)

    def after(self, x, attended):
        x = x + self.o_proj(attended)
        weight = self.post_attention_layernorm.weight.to(x.dtype)
        gate, up = self.gate_up(F.rms_norm(x, x.shape[-1:], weight, self.config["rms_norm_eps"])).chunk(2, -1)
        return x + self.down_proj(F.silu(gate) * up)

    def forward(self, x, cos, sin):
        return self.after(x, self.attend(*self.before(x, cos, sin)))


class CharModel(torch.nn.Module):
    def __init__(self, config, kind="pair", rematerialise=False, device="cpu", window=None):
        super().__init__()
        form = (config["partner_form"], config["pairing"])
        if kind == "pair" and form != ("raw", "causal_shift"):
            raise ValueError(f"partner_form and pairing are {form}: only raw and causal_shift are here")
        self.config, self.rematerialise = config, rematerialise
        self.embed_tokens = torch.nn.Embedding(256, config["hidden_size"])
        dense = kind == "dense"
        self.layers = torch.nn.ModuleList(Layer(config, None if dense else d) for d in distances(config))
        self.norm = torch.nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.to(device)
        self.cos, self.sin = table(window if dense else 2 * config["chunk"], config["head_dim"], config["rope_theta"], device)

    def compile_layers(self):
        """One graph for all layers: what differs between them, the partner's distance, stays outside."""
        for name in ("before", "after"):
            compiled = torch.compile(getattr(Layer, name), dynamic=False)
            for layer in self.layers:
                setattr(layer, name, compiled.__get__(layer))

    def forward(self, symbols, dtype=torch.float32):
        x = self.embed_tokens(symbols).to(dtype)
        for layer in self.layers:
            if self.rematerialise:
                x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False)
            else:
                x = layer(x, self.cos, self.sin)
        x = F.rms_norm(x, x.shape[-1:], self.norm.weight.to(dtype), self.config["rms_norm_eps"])
        return F.linear(x, self.embed_tokens.weight.to(dtype))

    def load(self, path):
        from safetensors.torch import load_file
        tensors, state = load_file(path), {}
        for name, value in tensors.items():
            state[name.removeprefix("model.")] = value
        for i in range(len(self.layers)):
            at = f"layers.{i}."
            state[at + "qkv.weight"] = torch.cat([state.pop(f"{at}self_attn.{p}_proj.weight") for p in "qkv"])
            state[at + "o_proj.weight"] = state.pop(at + "self_attn.o_proj.weight")
            state[at + "gate_up.weight"] = torch.cat([state.pop(f"{at}mlp.{p}_proj.weight") for p in ("gate", "up")])
            state[at + "down_proj.weight"] = state.pop(at + "mlp.down_proj.weight")
        self.load_state_dict(state)


def optimiser_of(model, rate):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=next(model.parameters()).is_cuda)


def step_of(model, optimiser, symbols, targets, half):
    """One optimiser step over the mean loss of sequences computed at once."""
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        logits = model(symbols, torch.bfloat16 if half else torch.float32)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss.detach()


def compare(args):
    from safetensors.torch import load_file
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    log = [json.loads(line) for line in (args.run / "log.jsonl").open()]
    batches = load_file(args.record / "batches.safetensors")
    symbols, targets = batches["symbols"], batches["targets"]
    config = json.loads((args.record / "config.json").read_text())
    if config.get("mlp", "dense") != "dense":
        sys.exit(f"{args.record / 'config.json'}: mlp: {config['mlp']!r} is not implemented here")
    model = CharModel(config, args.kind, device=device, window=symbols.shape[2])
    model.load(args.record / "weights.safetensors")
    if args.compile:
        model.compile_layers()
    written = args.out.open("w") if args.out else None
    optimiser = optimiser_of(model, 1.0)
    worst = 0.0
    steps = min(len(log), symbols.shape[0], args.steps or symbols.shape[0])
    for step, line in enumerate(log[:steps]):
        for group in optimiser.param_groups:
            group["lr"] = line["learning_rate"]
        batch = (symbols[step].long().to(device), targets[step].long().to(device))
        bits = step_of(model, optimiser, *batch, device == "cuda").item() / math.log(2)
        off = bits / line["bits_per_character"] - 1
        worst = max(worst, abs(off))
        if written:
            print(json.dumps({"step": step + 1, "bits_per_character": bits}), file=written, flush=True)
        if step % 20 == 0 or step + 1 == steps:
            print(f"step {step + 1}: PyTorch {bits:.4f}, bfly {line['bits_per_character']:.4f} bits a character ({100 * off:+.3f}%)", flush=True)
    print(f"{steps} steps, largest difference {100 * worst:.3f}%")
    return worst > args.bound


def timed(args):
    torch.manual_seed(0)
    torch._dynamo.config.cache_size_limit = 64
    config = config_of(args.preset)
    window = int(args.window.removesuffix("k")) * (1024 if args.window.endswith("k") else 1)
    model = CharModel(config, args.kind, args.rematerialise, "cuda", window)
    model.compile_layers()
    optimiser = optimiser_of(model, 1e-4)
    batch = [torch.randint(0, 256, (args.sequences, window), device="cuda") for _ in range(2)]
    seconds = []
    for i in range(args.warmup + args.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step_of(model, optimiser, *batch, True)
        torch.cuda.synchronize()
        if i >= args.warmup:
            seconds.append(time.perf_counter() - start)
    seconds.sort()
    result = {"kind": args.kind, "preset": args.preset, "window": window, "sequences": args.sequences,
              "rematerialise": args.rematerialise, "seconds": seconds, "loss": loss.item(),
              "characters_per_second": args.sequences * window / seconds[len(seconds) // 2],
              "peak_bytes": torch.cuda.max_memory_allocated(), "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(result), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("compare")
    c.add_argument("run", type=Path)
    c.add_argument("record", type=Path)
    c.add_argument("--bound", type=float, default=0.01)
    c.add_argument("--steps", type=int, help="compare the first STEPS steps alone")
    c.add_argument("--kind", choices=["pair", "dense"], default="pair", help="dense: causal attention over the window")
    c.add_argument("--device", choices=["cuda", "cpu"], help="f32 on a CPU, bf16 on a GPU, as bfly-char; default: a GPU if any")
    c.add_argument("--compile", action="store_true")
    c.add_argument("--out", type=Path, help="losses by step, JSON lines")
    t = commands.add_parser("time")
    t.add_argument("--preset", choices=PRESETS, default="small")
    t.add_argument("--window", default="64k")
    t.add_argument("--sequences", type=int, default=1)
    t.add_argument("--kind", choices=["pair", "dense"], default="pair")
    t.add_argument("--rematerialise", action="store_true")
    t.add_argument("--warmup", type=int, default=3)
    t.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    return {"compare": compare, "time": timed}[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
