#!/usr/bin/env python3
"""Record transformers' output for a real GGUF checkpoint in f32: greedy ids, margins and logits.

This script writes tests/fixtures/real. transformers dequantises the GGUF weights to f32, so a fixture does not have the
rounding error of quantised matrix products; top2_margin is the error that each greedy id tolerates.

    prompt_ids        the first --prompt tokens of the passage
    prompt_nll        mean negative log-likelihood of prompt tokens 1.. given those before (nats)
    greedy_ids        the continuation by argmax
    top2_margin       best minus second-best logit at each step
    last_logits       logits of the last prompt position: mean, std, the ten largest and 64 evenly spaced ones
    cache_error       largest difference between one pass over the text and the cached steps, in standard deviations

Needs torch, transformers and gguf; scripts/fetch_models.py fetches the models.
"""
import argparse
import gzip
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from dump_tokens import from_gguf
from fetch_models import MODELS, sha256_of


def passage(path: Path, start: str):
    """Return the text from the first occurrence of `start`, and its offset in characters."""
    text = gzip.open(path, "rt", encoding="utf-8").read() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    at = text.find(start)
    if at < 0:
        raise SystemExit(f"dump_greedy.py: {path} does not contain {start!r}")
    return text[at:], at


@torch.no_grad()
def greedy(model, prompt: list, steps: int) -> dict:
    """Prefill, then decode greedily with the cache; then recompute the same positions in one pass, as a check."""
    out = model(torch.tensor([prompt]), use_cache=True)
    logits, cache, rows, ids = out.logits[0, -1], out.past_key_values, [], []
    nll = torch.nn.functional.cross_entropy(out.logits[0, :-1], torch.tensor(prompt[1:])).item()
    for step in range(steps):
        rows.append(logits)
        ids.append(int(logits.argmax()))
        if step + 1 < steps:
            out = model(torch.tensor([[ids[-1]]]), past_key_values=cache, use_cache=True)
            logits, cache = out.logits[0, -1], out.past_key_values
    rows = torch.stack(rows)
    again = model(torch.tensor([prompt + ids[:-1]]), use_cache=False, logits_to_keep=steps).logits[0]
    best = rows.topk(2).values
    return {"prompt_nll": nll, "greedy_ids": ids, "top2_margin": (best[:, 0] - best[:, 1]).tolist(), "last_logits": statistics(rows[0]),
            "cache_error": ((again - rows).abs().max() / rows.std()).item()}


def statistics(row: torch.Tensor) -> dict:
    top = row.topk(10)
    sample = torch.arange(64) * (len(row) // 64)
    return {"mean": row.mean().item(), "std": row.std().item(), "top_ids": top.indices.tolist(), "top_values": top.values.tolist(),
            "sample_ids": sample.tolist(), "sample_values": row[sample].tolist()}


def rounded(value):
    """Round floats to seven significant digits, the precision of f32."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Record greedy ids and logits of real checkpoints.", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  dump_greedy.py smollm2-135m --text jargon.txt.gz --start 'This document is a collection of slang'\n"
               "  dump_greedy.py gemma3-270m qwen2.5-coder-0.5b --text book.txt --start 'It was' --threads 2")
    parser.add_argument("names", nargs="+", choices=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text, plain or .gz")
    parser.add_argument("--text-name", help="name of the text in the fixture (default: the file's name)")
    parser.add_argument("--start", required=True, help="the passage starts at the first occurrence of this string")
    parser.add_argument("--prompt", type=int, default=512, help="prompt length in tokens (default: 512)")
    parser.add_argument("--steps", type=int, default=32, help="greedy new tokens (default: 32)")
    parser.add_argument("--dir", type=Path, default=Path("models"), help="folder of the models (default: models)")
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures/real"), help="folder of the fixtures (default: tests/fixtures/real)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    text, offset = passage(args.text, args.start)
    for name in args.names:
        known = MODELS[name]
        file = args.dir / known.file
        prompt = from_gguf(file)(text[: 20 * args.prompt], add_special_tokens=True)["input_ids"][: args.prompt]
        model = AutoModelForCausalLM.from_pretrained(args.dir, gguf_file=known.file, dtype=torch.float32).eval()
        record = {
            "model": known.title, "gguf": known.file, "gguf_sha256": sha256_of(file), "transformers": transformers.__version__,
            "torch": torch.__version__, "dtype": "float32", "text": args.text_name or args.text.name,
            "text_start": args.start, "text_offset_chars": offset, "prompt_ids": prompt,
            **greedy(model, prompt, args.steps),
        }
        config = model.config
        print(f"{name}: {config.model_type}, rope {config.rope_parameters}, layers {getattr(config, 'layer_types', None)}, "
              f"tied {config.tie_word_embeddings}", file=sys.stderr)
        path = args.out / f"{name}.json"
        body = ",\n".join(f"  {json.dumps(k)}: {json.dumps(rounded(v))}" for k, v in record.items())
        path.write_text(f"{{\n{body}\n}}\n")
        print(f"{path}: nll {record['prompt_nll']:.3f}, smallest margin {min(record['top2_margin']):.4f}, cache error "
              f"{record['cache_error']:.1e}: {from_gguf(file).decode(record['greedy_ids'])!r}", file=sys.stderr)
        del model
    return 0


if __name__ == "__main__":
    sys.exit(main())
