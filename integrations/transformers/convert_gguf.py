#!/usr/bin/env python3
"""A GGUF checkpoint as a Hugging Face directory in bf16, so that two engines can read identical weights.

    convert_gguf.py GGUF OUTDIR [--tie-embeddings]

transformers' own GGUF support unpacks the blocks. OUTDIR gets model.safetensors, config.json, generation_config.json, the
tokenizer's files, and conversion.json: what was read, and how far apart the two token matrices are.

Some files hold the token matrix twice, once as `token_embd.weight` and once as `output.weight`, quantised differently, though
the original ties them. --tie-embeddings then keeps `output.weight` for both, and refuses where the two are not one matrix.

Messages go to stderr. Exit codes: 0, 2 (bad input). OUTDIR must not exist; it appears whole or not at all.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# Relative distance up to which two matrices count as one that was quantised twice. Even 2-bit types stay below it, and
# two different matrices are about 1.4 apart.
SAME = 0.5


class Bad(Exception):
    """An error whose message is for the user."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def compare(a, b, rows: int = 8192) -> dict:
    """How far matrix `a` is from `b`, in f32 and a part at a time: they are the largest of the model."""
    square = norm = largest = cosine = 0.0
    least = 1.0
    for x, y in zip(a.split(rows), b.split(rows)):
        x, y = x.float(), y.float()
        square += (x - y).square().sum().item()
        norm += y.square().sum().item()
        largest = max(largest, (x - y).abs().max().item())
        alike = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp_min(1e-20)
        cosine += alike.sum().item()
        least = min(least, alike.min().item())
    return {"relative_distance": math.sqrt(square / norm), "largest_difference": largest, "mean_row_cosine": cosine / len(a),
            "least_row_cosine": least}


def write_tokenizer(gguf: Path, reader, out: Path) -> str:
    """The repository's reference tokenizer where it knows the file's kind; else what transformers makes of it."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        from dump_tokens import from_gguf
        tokenizer, source = from_gguf(str(gguf)), "scripts/dump_tokens.py"
    except (ImportError, SystemExit) as e:
        from transformers import AutoTokenizer
        say(f"convert_gguf.py: tokenizer by transformers' own conversion, which may split text otherwise than the original ({e})")
        tokenizer, source = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), "transformers"
    field = reader.fields.get("tokenizer.chat_template")
    if field is not None:
        tokenizer.chat_template = field.contents()
    tokenizer.save_pretrained(out)
    return source


def convert(gguf_path: Path, out: Path, tie: bool) -> dict:
    try:
        import gguf
        import torch
        import transformers
    except ImportError as e:
        raise Bad(f"{e}; install with: pip install -r {Path(__file__).with_name('requirements.txt')}")
    # Configuration, weights and tokenizer each open the file; parsing its vocabulary is most of the time that takes.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    place = {"pretrained_model_name_or_path": gguf_path.parent, "gguf_file": gguf_path.name}
    reader = gguf.GGUFReader(str(gguf_path))
    config = transformers.AutoConfig.from_pretrained(**place)
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    about = {"gguf": gguf_path.name, "bytes": gguf_path.stat().st_size, "sha256": sha256_of(gguf_path),
             "transformers": transformers.__version__, "gguf_package": version("gguf"), "dtype": "bf16",
             "token_embd": types.get("token_embd.weight"), "output": types.get("output.weight"), "apart": None}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **place, config=config, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True))
    embed, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if "output.weight" in types:
        apart = about["apart"] = compare(embed.data, output.data)
        say(f"convert_gguf.py: token_embd.weight ({about['token_embd']}) and output.weight ({about['output']}) are stored apart: "
            f"relative distance {apart['relative_distance']:.4f}, mean row cosine {apart['mean_row_cosine']:.5f}")
        if tie:
            if not apart["relative_distance"] < SAME:
                raise Bad(f"{gguf_path}: --tie-embeddings: token_embd.weight and output.weight are two matrices, not one")
            embed.data = output.data
            model.config.tie_word_embeddings = True
            model.tie_weights(recompute_mapping=True)
    elif tie:
        say(f"convert_gguf.py: {gguf_path.name} has no output.weight: tied already")
    about["tied"] = model.config.tie_word_embeddings
    model.save_pretrained(out)
    about["tokenizer"] = write_tokenizer(gguf_path, reader, out)
    (out / "conversion.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return about


def version(package: str) -> str:
    from importlib.metadata import version as of
    return of(package)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("gguf", type=Path, metavar="GGUF")
    p.add_argument("out", type=Path, metavar="OUTDIR")
    p.add_argument("--tie-embeddings", action="store_true", help="one token matrix, output.weight's, for input and output")
    args = p.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the file
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
    partial = args.out.with_name(f".{args.out.name}.{os.getpid()}.partial")
    try:
        if not args.gguf.is_file():
            raise Bad(f"{args.gguf}: no such file")
        if args.out.exists():
            raise Bad(f"{args.out}: exists already")
        args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        convert(args.gguf, partial, args.tie_embeddings)
        partial.replace(args.out)
        say(f"convert_gguf.py: wrote {args.out}")
        return 0
    except Bad as e:
        say(f"convert_gguf.py: {e}")
        return 2
    except Exception as e:  # whatever a damaged or unknown file makes of the parsers
        say(f"convert_gguf.py: {args.gguf}: cannot be converted: {type(e).__name__}: {e}")
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
