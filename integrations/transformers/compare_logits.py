#!/usr/bin/env python3
"""How far logits of bfly are from those of transformers in f32, on the same weights and ids.

    compare_logits.py --model GGUF|DIR [--device cuda|cpu] [--out FILE.json] NAME=FILE.safetensors ...

Each FILE is what `bfly-retrofit --logits-out FILE --logits-last K` wrote: `token_ids` and the last K positions' `logits`; all files
must hold the same ids. transformers reads the same ids in f32 and in bf16 (SDPA, one shot). Distances are the largest over all K rows
(`deviation`, as in the crate's tests) and the root mean square, in standard deviations of the f32 logits; `kl` is the mean KL
divergence from f32 in nats, `top1` the share of rows with the same likeliest token. The bf16 row says what transformers' own rounding costs: a 16-bit path of
another engine is judged by it.

A table goes to stdout, JSON to --out. Exit codes: 0, 2 (bad input).
"""
import argparse
import json
import os
import sys
from pathlib import Path


class Bad(Exception):
    """An error whose message is for the user."""


def read(text: str):
    """A NAME=FILE argument: name, ids, logits."""
    from safetensors.torch import load_file
    name, _, file = text.partition("=")
    if not file:
        raise Bad(f"`{text}` is not NAME=FILE")
    try:
        tensors = load_file(file)
        return name, tensors["token_ids"].long().flatten(), tensors["logits"].float()
    except (OSError, KeyError) as e:
        raise Bad(f"{file}: {e} (written with --logits-out?)")
    except Exception as e:  # safetensors' own error types differ by version
        raise Bad(f"{file}: {e}")


def reference(args, dtype, ids, last: int):
    """transformers' logits of the last positions, f32 on the host."""
    import torch
    import transformers
    transformers.utils.logging.disable_progress_bar()
    how = {"dtype": dtype, "attn_implementation": "sdpa"}
    if args.model.is_file():
        place = {"pretrained_model_name_or_path": args.model.parent, "gguf_file": args.model.name}
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        place = {"pretrained_model_name_or_path": args.model, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, **how).eval().to(args.device)
    with torch.inference_mode():
        return model(ids[None].to(args.device), use_cache=False, logits_to_keep=last).logits[0].float().cpu()


def distances(logits, want) -> dict:
    off, std = logits - want, want.std().item()
    p, q = want.log_softmax(-1), logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    top1 = (logits.argmax(-1) == want.argmax(-1)).float().mean().item()
    rms = off.square().mean().sqrt().item() / std
    return {"deviation": off.abs().max().item() / std, "rms": rms, "kl": kl, "top1": top1}


def compare(args) -> dict:
    try:
        import torch
        import transformers
    except ImportError as e:
        raise Bad(f"{e}; install with: pip install -r {Path(__file__).with_name('requirements.txt')}")
    files = [read(text) for text in args.files]
    ids, last = files[0][1], len(files[0][2])
    for name, other, logits in files:
        if not torch.equal(other, ids) or logits.shape != files[0][2].shape:
            raise Bad(f"{name}: other ids or positions than {files[0][0]}")
    # f32 products in f32, not in tf32.
    torch.backends.cuda.matmul.allow_tf32 = False
    want = reference(args, torch.float32, ids, last)
    rows = {"transformers bf16": distances(reference(args, torch.bfloat16, ids, last), want)}
    rows |= {name: distances(logits, want) for name, _, logits in files}
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    return {"model": args.model.name, "positions": len(ids), "rows": last, "device": device, "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "against transformers f32": rows}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, metavar="GGUF|DIR")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--out", type=Path, metavar="FILE.json")
    p.add_argument("files", nargs="+", metavar="NAME=FILE")
    args = p.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        if not args.model.exists():
            raise Bad(f"--model {args.model}: no such file or directory")
        report = compare(args)
        print(f"{report['positions']} positions, last {report['rows']} compared with transformers' f32")
        for name, d in report["against transformers f32"].items():
            print(f"{name:24s} largest {d['deviation']:.2e}   rms {d['rms']:.2e} standard deviations   "
                  f"KL {d['kl']:.2e}   top-1 {d['top1']:.4f}")
        if args.out:
            partial = args.out.with_name(f".{args.out.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps(report, indent=2) + "\n")
            partial.replace(args.out)
        return 0
    except Bad as e:
        print(f"compare_logits.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
