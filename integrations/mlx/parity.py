#!/usr/bin/env python3
"""Compare bfly with MLX on a CPU: affine quantisation, and the logits of a checkpoint.

    python parity.py formats OUT.safetensors            # every bits and group: packed, scales, biases, and MLX's values
    python parity.py logits DIR OUT.safetensors         # logits of mlx-lm for a text of token ids
    python parity.py compare DIR --bfly PATH            # the same by bfly-retrofit, and the largest difference

Needs `pip install mlx-lm "mlx[cpu]"`.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

TOKENS = 80


def formats(out: Path) -> None:
    mx.random.seed(1)
    tensors = {}
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            for name, dtype in (("bf16", mx.bfloat16), ("f16", mx.float16), ("f32", mx.float32)):
                if name != "bf16" and (bits, group) not in ((4, 64), (3, 32)):
                    continue
                matrix = mx.random.normal((3, 256)).astype(dtype)
                packed, scales, biases = mx.quantize(matrix, group_size=group, bits=bits)
                key = f"b{bits}_g{group}_{name}"
                tensors |= {f"{key}.weight": packed, f"{key}.scales": scales, f"{key}.biases": biases}
                wide = (scales.astype(mx.float32), biases.astype(mx.float32))
                tensors[f"{key}.values"] = mx.dequantize(packed, *wide, group_size=group, bits=bits)
    mx.save_safetensors(str(out), tensors)


def ids_of(folder: Path) -> list:
    config = json.loads((folder / "config.json").read_text())
    vocabulary = config.get("text_config", config)["vocab_size"]
    return [(i * i * 7 + 3 * i + 1) % vocabulary for i in range(TOKENS)]


def logits_of(folder: Path) -> mx.array:
    from mlx_lm import utils

    model, _ = utils.load_model(folder)
    return model(mx.array([ids_of(folder)]))[0].astype(mx.float32)


def compare(folder: Path, bfly: str, limit: float) -> int:
    with tempfile.TemporaryDirectory() as place:
        ids, out = Path(place) / "ids.json", Path(place) / "logits.safetensors"
        ids.write_text(json.dumps(ids_of(folder)))
        flags = ["--stock", "--device", "cpu", "-n", "1", "-q", "--ctx", "256", "--token-ids", str(ids)]
        subprocess.run([bfly, "--model", str(folder), *flags, "--logits-out", str(out), "--logits-last", str(TOKENS)], check=True)
        ours = mx.load(str(out))["logits"]
    theirs = logits_of(folder)
    off = (mx.abs(ours - theirs).max() / mx.sqrt(mx.var(theirs))).item()
    print(f"{TOKENS} positions: largest difference {off:.1e} standard deviations of the logits")
    return int(not off <= limit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("formats").add_argument("out", type=Path)
    logits = commands.add_parser("logits")
    logits.add_argument("model", type=Path)
    logits.add_argument("out", type=Path)
    both = commands.add_parser("compare")
    both.add_argument("model", type=Path)
    both.add_argument("--bfly", default="bfly-retrofit")
    both.add_argument("--limit", type=float, default=1e-3)
    args = parser.parse_args()
    if args.command == "formats":
        formats(args.out)
    elif args.command == "logits":
        mx.save_safetensors(str(args.out), {"ids": mx.array(ids_of(args.model)), "logits": logits_of(args.model)})
    else:
        return compare(args.model, args.bfly, args.limit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
