#!/usr/bin/env python3
"""Write a golden case: a small model, token ids, and the logits that transformers computes for them.

This script writes tests/fixtures/goldens. A case is a folder with

    config.json         the model's configuration, byte for byte as given, so that old and new spellings are covered
    model.safetensors   f32 weights, randomly initialised from a seed
    golden.safetensors  short, long                            i32 token ids
                        short_logits, long_logits              f32 logits of the last --short-last, --long-last positions
                        short_logits_bf16, long_logits_bf16    the same from transformers' bf16 run (--bf16)

The initialisation makes attention sharp (the standard deviation of its logits is 3), so that an error in positions,
masks or head order changes the model's logits by far more than any tolerance; --sensitivity prints by how much.

Needs torch, transformers and safetensors.
"""
import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

SHARPNESS = 3.0  # standard deviation of the attention logits
WEIGHT_STD, NORM_STD, BIAS_STD, EMBED_STD = 0.08, 0.1, 0.1, 0.5


def initialise(model, seed: int) -> None:
    """Fill every parameter from a seeded normal distribution; norms keep their default (0 or 1) as the mean.

    With a normalised input of width h, a query times a key over sqrt(D) has the standard deviation std^2 * h; where
    queries and keys are normalised per head, it is the product of the gains of their norms.
    """
    rng = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    normed = any(name.endswith("q_norm.weight") for name, _ in model.named_parameters())
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=rng)
        head_norm = name.endswith(("q_norm.weight", "k_norm.weight"))
        if head_norm:
            scale = getattr(config, "query_pre_attn_scalar", None) or config.head_dim
            gain = math.sqrt(SHARPNESS * math.sqrt(scale / config.head_dim))
            p.data = p.data - 1 + gain + noise * NORM_STD
        elif "norm" in name:
            p.data = p.data + noise * NORM_STD
        elif name.endswith(".bias"):
            p.data = noise * BIAS_STD
        elif "embed_tokens" in name:
            p.data = noise * EMBED_STD
        elif not normed and name.endswith(("q_proj.weight", "k_proj.weight")):
            p.data = noise * math.sqrt(SHARPNESS / config.hidden_size)
        else:
            p.data = noise * WEIGHT_STD


def create(config_file: Path, out: Path, seed: int) -> None:
    """Write config.json and model.safetensors of a randomly initialised model."""
    out.mkdir(parents=True, exist_ok=True)
    if config_file.resolve() != (out / "config.json").resolve():
        shutil.copyfile(config_file, out / "config.json")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out), dtype=torch.float32)
    initialise(model, seed)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}  # a tied head appears once
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def logits(folder: Path, ids: dict, keep: dict, dtype: torch.dtype, config=None) -> dict:
    """Compute the logits of the last positions of each text.

    The model is loaded with the dtype, not cast to it, since a cast would round the RoPE tables.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, config=config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        return {name: model(ids[name][None].long(), logits_to_keep=keep[name], use_cache=False).logits[0] for name in ids}


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference, in standard deviations of the reference `b`."""
    return ((a.double() - b.double()).abs().max() / b.double().std()).item()


def perturbed(folder: Path):
    """Yield configurations with one wrong value each, as a faulty reader of config.json would give."""
    rope = AutoConfig.from_pretrained(folder).rope_parameters
    nested = "rope_theta" not in rope  # Gemma 3: one set per kind of layer
    for key in ("rope_type", "attention_factor", "factor", "rope_theta"):
        config = AutoConfig.from_pretrained(folder)
        for p in config.rope_parameters.values() if nested else [config.rope_parameters]:
            kind = p["rope_type"]
            if key == "rope_type":
                p["rope_type"] = "default"
            elif key == "attention_factor" and kind == "yarn":
                p["attention_factor"] = 1.0
            elif key == "factor" and kind != "default":
                p["factor"] *= 1.05
            elif key == "rope_theta":
                p["rope_theta"] *= 1.05
        label = {"rope_type": "rope scaling dropped", "attention_factor": "attention factor 1"}.get(key, f"{key} + 5 %")
        if config.rope_parameters != rope:
            yield label, config


def report_sensitivity(folder: Path, ids: dict, keep: dict, reference: dict) -> None:
    """Print the error of rounding and of wrong settings, between which the tolerances must lie."""
    def line(label, got):
        print(f"  {label:24}" + "".join(f"  {name} {off(got[name], reference[name]):.1e}" for name in ids), file=sys.stderr)

    print("largest logit difference, in standard deviations of the logits:", file=sys.stderr)
    line("f64 instead of f32", logits(folder, ids, keep, torch.float64))
    for label, config in perturbed(folder):
        line(label, logits(folder, ids, keep, torch.float32, config))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write a golden case with transformers.", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
               "  dump_golden.py --config CASE/config.json --out CASE --bf16 --sensitivity\n"
               "  dump_golden.py --model CASE --bf16        # keep golden.safetensors and add the bf16 logits\n"
               "  dump_golden.py --model DIR --out CASE     # logits of an existing checkpoint")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, help="config.json of a model to initialise randomly")
    source.add_argument("--model", type=Path, help="folder of an existing checkpoint (config.json, model.safetensors)")
    parser.add_argument("--out", type=Path, help="folder of the case (default: that of --model)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and token ids (default: 0)")
    parser.add_argument("--short", type=int, default=300, help="tokens of the short text (default: 300)")
    parser.add_argument("--short-last", type=int, default=64, help="last positions of the short text to save logits of (default: 64)")
    parser.add_argument("--long", type=int, default=9001,
                        help="tokens of the long text (default: 9001, beyond 8k and not a multiple of any block)")
    parser.add_argument("--long-last", type=int, default=8, help="last positions of the long text to save logits of (default: 8)")
    parser.add_argument("--bf16", action="store_true", help="add the logits of a bf16 run")
    parser.add_argument("--sensitivity", action="store_true", help="print by how much wrong settings change the logits")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    args = parser.parse_args()
    if args.config and not args.out:
        parser.error("--config needs --out")
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    out = args.out or args.model
    folder, golden_file = args.model or out, out / "golden.safetensors"
    golden, made = {}, {"seed": str(args.seed), "torch": torch.__version__, "transformers": transformers.__version__}
    if args.config:
        create(args.config, out, args.seed)
    elif golden_file.exists():
        golden = load_file(golden_file)
        with safe_open(golden_file, "pt") as file:
            made = file.metadata() or {}
    out.mkdir(parents=True, exist_ok=True)

    vocab = AutoConfig.from_pretrained(folder).vocab_size
    rng = torch.Generator().manual_seed(args.seed + 1)
    ids = {name: golden[name] if name in golden else torch.randint(vocab, (n,), generator=rng, dtype=torch.int32)
           for name, n in (("short", args.short), ("long", args.long))}
    keep = {name: len(golden.get(f"{name}_logits", [])) or n for name, n in (("short", args.short_last), ("long", args.long_last))}
    fresh = logits(folder, ids, keep, torch.float32)
    for name in ids:
        known = golden.setdefault(f"{name}_logits", fresh[name])
        if off(fresh[name], known) > 1e-4:
            print(f"dump_golden.py: {golden_file}: {name}_logits are not those of this model", file=sys.stderr)
            return 2
    golden.update(ids)
    if args.bf16:
        for name, value in logits(folder, ids, keep, torch.bfloat16).items():
            golden[f"{name}_logits_bf16"] = value.to(torch.bfloat16)
    save_file({name: t.contiguous() for name, t in golden.items()}, golden_file, metadata=made or None)
    report = {name: f"{off(golden[name + '_logits_bf16'], fresh[name]):.1e}" for name in ids if args.bf16}
    print(f"{golden_file}: " + json.dumps({"bf16 - f32, in standard deviations": report} if report else {"keys": sorted(golden)}), file=sys.stderr)
    if args.sensitivity:
        report_sensitivity(folder, ids, keep, fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
