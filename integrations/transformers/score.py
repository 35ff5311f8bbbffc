#!/usr/bin/env python3
"""Puts samples of tasks to transformers, greedily, and scores the answers as bfly does: a check of the dense scores.

    bfly-quality-smoke ruler --model MODEL --ctx 4k --tasks niah_single_2 --samples 50 --variants stock --out ours.json --export niah.jsonl
    score.py --model DIR|GGUF --samples niah.jsonl [--compare ours.json] [--out theirs.json]

`--samples` is a file of `bfly-quality-smoke ruler --export` (or of RULER's own making, with --task). Prompts go in as they are, without
a chat template. An answer ends at the model's end-of-text tokens or where its room ends. Scores are RULER's: the share of the
expected outputs that occur in the answer, whatever their case (for qa: whether any does); for recall_count, whether its first number is
the expected one. Samples of several turns (recall_turns) are refused: their prompts depend on the answers.

--compare holds the answers against those of the variant `stock` in a file of bfly's: same prompts (by hash of the token ids), the
share of equal answers, both scores.

A table goes to stdout, JSON to --out. Exit codes: 0, 2 (bad input).
"""
import argparse
import hashlib
import json
import os
import re
import struct
import sys
import time
from pathlib import Path

ROOMS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
TURN_ENDS = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>"]


class Bad(Exception):
    """An error whose message is for the user."""


def read_samples(path: Path, task: str):
    samples = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise Bad(f"--samples {path}: {e}")
    for number, line in enumerate(lines, 1):
        try:
            sample = json.loads(line)
            sample.setdefault("task", task)
            if not sample["task"]:
                raise Bad(f"{path}: line {number} names no task; give --task")
            sample.setdefault("max_new_tokens", ROOMS.get(sample["task"].split("_")[0], 128))
            sample["prompt"] = sample["input"] + sample.get("answer_prefix", "")
            if not sample["outputs"]:
                raise Bad(f"{path}: line {number} expects no output")
            if sample.get("follow_ups"):
                raise Bad(f"{path}: line {number} has several turns, which this script does not read; leave out {sample['task']}")
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise Bad(f"{path}: line {number} is not a sample: {e!r}")
        samples.append(sample)
    if not samples:
        raise Bad(f"{path}: no samples")
    return samples


NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def first_number(answer: str):
    """The first number of an answer: words of digits, or where there are none the words of NUMBERS."""
    words = re.findall(r"[^\W_]+", answer.lower())
    digits = next((word for word in words if re.fullmatch("[0-9]+", word)), None)
    return str(int(digits)) if digits else next((str(NUMBERS.index(word)) for word in words if word in NUMBERS), None)


def score(task: str, answer: str, outputs) -> float:
    if task == "recall_count":
        return float(first_number(answer) in outputs)
    found = sum(o.lower() in answer.lower() for o in outputs)
    return float(found > 0) if task.startswith("qa") else found / len(outputs)


def load(args):
    import torch
    import transformers
    transformers.utils.logging.disable_progress_bar()
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[args.dtype]
    how = {"dtype": dtype, "attn_implementation": "sdpa"}
    if args.model.is_file():
        place = {"pretrained_model_name_or_path": args.model.parent, "gguf_file": args.model.name}
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        place = {"pretrained_model_name_or_path": args.model, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, **how).eval().to(args.device)
    if args.tokenizer:
        place = {"pretrained_model_name_or_path": args.tokenizer.parent, "gguf_file": args.tokenizer.name} \
            if args.tokenizer.is_file() else {"pretrained_model_name_or_path": args.tokenizer, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    known = tokenizer.get_vocab()
    stop = sorted({tokenizer.eos_token_id, *(known[t] for t in TURN_ENDS if t in known)} - {None})
    return model, tokenizer, stop


def answer_all(args, samples) -> list:
    try:
        import torch
    except ImportError as e:
        raise Bad(f"{e}; install with: pip install -r {Path(__file__).with_name('requirements.txt')}")
    model, tokenizer, stop = load(args)
    answers, begin = [], time.monotonic()
    for i, sample in enumerate(samples):
        ids = tokenizer(sample["prompt"], return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(ids.to(args.device), do_sample=False, max_new_tokens=sample["max_new_tokens"],
                                 eos_token_id=stop, pad_token_id=stop[0])
        new = out[0, ids.shape[1]:].tolist()
        if new and new[-1] in stop:
            new.pop()
        text = tokenizer.decode(new, skip_special_tokens=True)
        digest = hashlib.sha256(b"".join(struct.pack("<I", t) for t in ids[0].tolist())).hexdigest()
        answers.append({"task": sample["task"], "index": sample["index"], "sha256": digest, "prompt_tokens": ids.shape[1],
                        "answer": text, "tokens": len(new), "score": score(sample["task"], text, sample["outputs"])})
        passed = time.monotonic() - begin
        print(f"\r{i + 1}/{len(samples)} samples  {passed / (i + 1):.2f} s each  {passed / (i + 1) * (len(samples) - i - 1):.0f} s left ",
              end="", file=sys.stderr)
    print(file=sys.stderr)
    return answers


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def compare(path: Path, answers: list) -> list:
    try:
        ours = json.loads(path.read_text())
        cells = [c for c in ours["cells"] if c["variant"] == "stock"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise Bad(f"--compare {path}: {e!r}; a file of bfly-quality-smoke ruler --out is wanted")
    rows = []
    for cell in cells:
        pairs = [(a, t) for a in cell["answers"] for t in answers if a["sha256"] == t["sha256"] and t["task"] == cell["task"]]
        if pairs:
            rows.append({"task": cell["task"], "length": cell["length"], "samples": len(pairs), "of": len(cell["answers"]),
                         "equal_answers": mean(a["answer"] == t["answer"] for a, t in pairs),
                         "equal_scores": mean(a["score"] == t["score"] for a, t in pairs),
                         "bfly": mean(a["score"] for a, _ in pairs), "transformers": mean(t["score"] for _, t in pairs)})
    if not rows:
        raise Bad(f"--compare {path}: no prompt of it is among these samples")
    return rows


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, metavar="GGUF|DIR")
    p.add_argument("--tokenizer", type=Path, metavar="GGUF|DIR", help="where the model's directory has none")
    p.add_argument("--samples", type=Path, required=True, metavar="FILE.jsonl")
    p.add_argument("--task", default="", help="of samples that name none")
    p.add_argument("--dtype", default="bf16", choices=["bf16", "f16", "f32"])
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--compare", type=Path, metavar="FILE.json")
    p.add_argument("--out", type=Path, metavar="FILE.json")
    args = p.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        samples = read_samples(args.samples, args.task)
        for path in filter(None, [args.model, args.tokenizer, args.compare]):
            if not path.exists():
                raise Bad(f"{path}: no such file or directory")
        answers = answer_all(args, samples)
        import torch
        import transformers
        device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        report = {"model": args.model.name, "dtype": args.dtype, "device": device,
                  "versions": {"transformers": transformers.__version__, "torch": torch.__version__}}
        for task in dict.fromkeys(a["task"] for a in answers):
            own = [a["score"] for a in answers if a["task"] == task]
            print(f"{task:20s} {100 * mean(own):5.1f}%  {len(own)} samples")
        if args.compare:
            report["comparison"] = compare(args.compare, answers)
            for r in report["comparison"]:
                print(f"{r['task']:20s} {r['length']:6d}  bfly {100 * r['bfly']:5.1f}%  transformers {100 * r['transformers']:5.1f}%  "
                      f"equal answers {100 * r['equal_answers']:.0f}%, scores {100 * r['equal_scores']:.0f}%  ({r['samples']} of {r['of']} prompts)")
        if args.out:
            partial = args.out.with_name(f".{args.out.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps(report | {"answers": answers}, indent=1) + "\n")
            partial.replace(args.out)
        return 0
    except Bad as e:
        print(f"score.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
