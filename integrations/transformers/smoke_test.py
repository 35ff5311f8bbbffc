#!/usr/bin/env python3
"""A check of peer.py and convert_gguf.py on tiny checkpoints, on the CPU, in about a minute.

    smoke_test.py [--model DIR] [--device cuda] [--compile] [--only runs|random|converter]

The peer's tokens must be those of transformers' own generate(), in every mode. The default model is a golden case of this
repository whose attention is sharp: its greedy tokens all differ, so a wrong position or a lost key shows.
--compile checks the compiled decode step too (a minute more). Exit codes: 0 passed, 1 failed, 77 skipped (a package is missing).
"""
import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
MODEL = REPOSITORY / "tests" / "fixtures" / "goldens" / "llama3_rope"
PROMPT, NEW, CHUNK = 300, 12, 64  # the chunk does not divide the prompt
JSON_TYPES = {"f64": float, "Vec<f64>": list, "usize": int, "u64": int, "String": str}


def sample_fields() -> dict:
    """The fields of struct TimedRun, from its source: what the peer's samples are read into."""
    source = (REPOSITORY / "src" / "eval" / "report" / "ladder.rs").read_text(encoding="utf-8")
    body = re.search(r"pub struct TimedRun \{(.*?)\n\}", source, re.S)[1]
    return {name: JSON_TYPES[kind] for name, kind in re.findall(r"pub (\w+): ([\w<>]+),", body)}


class Peer:
    """peer.py as a child, one line to a request."""

    def __init__(self, *args):
        command = [sys.executable, str(HERE / "peer.py"), *map(str, args)]
        self.log = tempfile.TemporaryFile("w+")
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.ready = self.read()

    def read(self) -> dict:
        line = self.child.stdout.readline()
        assert line, f"the peer ended without an answer:\n{self.said()}"
        try:
            return json.loads(line)
        except ValueError:
            raise AssertionError(f"not a line of JSON on stdout: {line!r}") from None

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def send(self, line: str) -> dict:
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()
        return self.read()

    def ask(self, ids: Path, prompt: int = PROMPT, new: int = NEW, chunk: int = CHUNK) -> dict:
        return self.send(json.dumps({"ids": str(ids), "prompt_tokens": prompt, "new_tokens": new, "prefill_chunk": chunk}))

    def end(self, ask: bool = True, code: int = 0) -> None:
        if ask:
            self.child.stdin.write('{"quit": true}\n')
        self.child.stdin.close()  # quit or not, the end of input ends it
        rest = self.child.stdout.read()
        got = self.child.wait(timeout=60)
        assert (got, rest) == (code, ""), f"exit code {got}, left on stdout: {rest!r}\n{self.said()}"
        assert "Traceback" not in self.said(), self.said()


def check_sample(answer: dict, want: list, fields: dict) -> None:
    assert "sample" in answer, answer
    assert answer["tokens"] == want, f"tokens {answer['tokens']}, not generate()'s {want}"
    s = answer["sample"]
    assert s.keys() == fields.keys(), f"missing {fields.keys() - s.keys()}, unknown to struct Sample {s.keys() - fields.keys()}"
    wrong = [name for name, kind in fields.items() if type(s[name]) is not kind]
    assert not wrong, f"of another type than in struct Sample: {wrong}"
    assert s["fetched_tokens"] == 1 and len(s["inter_token_s"]) == len(want) - 1 and all(t > 0 for t in s["inter_token_s"])
    assert 0 < s["prefill_s"] <= s["ttft_s"] and abs(s["ttft_s"] + sum(s["inter_token_s"]) - s["end_to_end_s"]) < 1e-9
    assert s["tokens_sha256"] == hashlib.sha256(struct.pack(f"<{len(want)}I", *want)).hexdigest()


def check_runs(args, ids: Path, want: list) -> None:
    """Every mode: generate()'s tokens, twice, and the bytes of a cache for so many positions."""
    fields = sample_fields()
    config = json.loads((args.model / "config.json").read_text())
    row = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]  # K and V, f32
    modes = [("sdpa", PROMPT + NEW - 1, ()),
             ("sdpa chunked", PROMPT + NEW - 1, ("--prefill", "chunked")),
             ("sdpa chunked preallocated", PROMPT + NEW, ("--prefill", "chunked", "--cache", "preallocated"))]
    modes += [("sdpa compiled", PROMPT + NEW, ("--compile",))] * args.compile
    for variant, positions, flags in modes:
        peer = Peer("--model", args.model, "--dtype", "f32", "--device", args.device, "--max-ctx", 10**14, *flags)
        ready = peer.ready
        assert ready["ready"] is True and (ready["engine"], ready["variant"], ready["dtype"]) == ("transformers", variant, "f32"), ready
        assert ready["weights_bytes"] == 4 * ready["parameters"] > 0 and ready["device"] and "random_weights" not in ready, ready
        assert re.fullmatch(r"5\.\S+ torch 2\.\S+", ready["version"]), ready
        for _ in range(2):
            answer = peer.ask(ids)
            check_sample(answer, want, fields)
            assert answer["kv_bytes"] == row * positions, f"{variant}: kv_bytes {answer['kv_bytes']}, not {row * positions}"
            assert (answer["sample"]["peak_device_bytes"] > ready["weights_bytes"]) == (args.device == "cuda")
        if "preallocated" in variant:
            # A cache that no machine holds: refused by the allocator itself.
            status = peer.ask(ids, new=10**13).get("status", "")
            assert status.startswith("out of memory: ") and "\n" not in status, status
            check_sample(peer.ask(ids), want, fields)
        if variant == "sdpa":
            check_errors(peer, ids)
            check_sample(peer.ask(ids), want, fields)
        check_sample(peer.ask(ids, new=1), want[:1], fields)
        peer.end(ask=variant != "sdpa chunked")


def check_errors(peer: Peer, ids: Path) -> None:
    far = ids.with_name("far.bin")
    far.write_bytes(struct.pack("<2I", 1, 1 << 31))
    answers = (
        (peer.ask(ids.with_name("none.bin")), "No such file"),
        (peer.ask(ids, prompt=PROMPT + 1), "holds 300 ids of the 301 wanted"),
        (peer.ask(far, prompt=2), "outside the vocabulary"),
        (peer.ask(ids, new=0), "`new_tokens` must be"),
        (peer.ask(ids, new=10**15), "--max-ctx"),
        (peer.send('{"prompt_tokens": 1}'), "`new_tokens`|`ids`"),
        (peer.send("{"), "not JSON"),
        (peer.send("[]"), "not a JSON object"),
    )
    for answer, word in answers:
        assert answer.keys() == {"status"} and answer["status"].startswith("failed: ") and re.search(word, answer["status"]), (word, answer)


def check_random(args, ids: Path, folder: Path) -> None:
    """A seed gives the same model again; without config.json there is none."""
    bare = folder / "bare"
    bare.mkdir()
    shutil.copy(args.model / "config.json", bare)
    tokens = []
    for seed in (1, 1, 2):
        peer = Peer("--model", bare, "--random-weights", seed, "--device", args.device)
        assert peer.ready["random_weights"] == seed and peer.ready["weights_bytes"] == 2 * peer.ready["parameters"], peer.ready
        tokens.append(peer.ask(ids)["tokens"])
        peer.end()
    assert tokens[0] == tokens[1] != tokens[2], tokens
    for model, word in ((bare, "safetensors"), (folder / "none", "no config.json")):
        peer = Peer("--model", model, "--device", args.device)
        assert peer.ready["ready"] is False and word in peer.ready["status"], peer.ready
        peer.end(ask=False, code=2)


def write_gguf(path: Path, model: Path, output_scale: float) -> None:
    """The golden case `qwen2` as a GGUF file whose token matrix is there twice, in two types."""
    import gguf
    from safetensors.torch import load_file
    config, weights = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
    w = gguf.GGUFWriter(path, "qwen2")
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list(["a", "ab", "b"] + [f"t{i}" for i in range(3, config["vocab_size"])])
    w.add_token_types([1] * config["vocab_size"])
    w.add_token_merges(["a b"])
    w.add_bos_token_id(config["vocab_size"] - 1)
    w.add_eos_token_id(config["vocab_size"] - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for name, tensor in weights.items():
        base, suffix = name.rsplit(".", 1)
        w.add_tensor(f"{names.get_name(base)}.{suffix}", tensor.float().numpy())
    kind = gguf.GGMLQuantizationType.Q8_0
    embed = weights["model.embed_tokens.weight"].float().numpy()
    w.add_tensor("output.weight", gguf.quantize(embed * output_scale, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def check_converter(folder: Path) -> None:
    import gguf
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    golden = REPOSITORY / "tests" / "fixtures" / "goldens" / "qwen2"
    source, other = folder / "twice.gguf", folder / "other.gguf"
    write_gguf(source, golden, 1.0)
    write_gguf(other, golden, -1.0)

    def convert(*flags, code: int = 0) -> str:
        command = [sys.executable, str(HERE / "convert_gguf.py"), *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        fine = done.returncode == code and done.stdout == "" and "Traceback" not in done.stderr
        assert fine, f"{flags}: exit code {done.returncode}\n{done.stderr}"
        return done.stderr

    convert(source, folder / "tied", "--tie-embeddings")
    convert(source, folder / "apart")
    block = next(t for t in gguf.GGUFReader(source).tensors if t.name == "output.weight")
    matrix = torch.from_numpy(gguf.dequantize(block.data, block.tensor_type)).bfloat16()
    want = {name: t.bfloat16() for name, t in load_file(golden / "model.safetensors").items()}
    for name, output in (("tied", "model.embed_tokens.weight"), ("apart", "lm_head.weight")):
        held = load_file(folder / name / "model.safetensors")
        assert held.keys() == want.keys() | {output}, held.keys() ^ want.keys()
        for key, tensor in held.items():
            assert torch.equal(tensor, matrix if key == output else want[key]), f"{name}: {key} is not what the file holds"
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        assert model.config.tie_word_embeddings == (name == "tied") and model.dtype == torch.bfloat16
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied")
        about = json.loads((folder / name / "conversion.json").read_text())
        assert about["tied"] == (name == "tied") and about["output"] == "Q8_0" and 0 < about["apart"]["relative_distance"] < 0.01, about
        assert AutoTokenizer.from_pretrained(folder / name)("abb")["input_ids"] == [1, 2]
    cases = (((other, folder / "never", "--tie-embeddings"), "two matrices"), ((source, folder / "tied"), "exists already"),
             ((folder / "none.gguf", folder / "never"), "no such file"), ((HERE / "README.md", folder / "never"), "README.md"))
    for flags, word in cases:
        said = convert(*flags, code=2)
        assert word in said, said
    left = [p.name for p in folder.iterdir() if "never" in p.name or "partial" in p.name]
    assert not left, f"left behind: {left}"


def reference(model: Path, folder: Path, device: str):
    """The prompt as a file of ids, and what generate() makes of it."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    golden = load_file(model / "golden.safetensors")
    path = folder / "ids.bin"
    path.write_bytes(struct.pack(f"<{PROMPT}I", *golden["short"][:PROMPT].tolist()))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
    prompt = golden["short"][None, :PROMPT].long().to(device)
    made = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
                           pad_token_id=0)[0, PROMPT:].tolist()
    recorded = golden["short_logits"][-1].argmax().item()
    assert made[0] == recorded, f"generate() begins with {made[0]}, the golden's logits say {recorded}"
    return path, made


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=MODEL, help="a folder of tests/fixtures/goldens")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--only", choices=("runs", "random", "converter"), help="one part")
    args = p.parse_args()
    missing = [name for name in ("torch", "transformers", "safetensors", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"skipped: {', '.join(missing)} not installed; pip install -r {HERE / 'requirements.txt'}")
        return 77
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    with tempfile.TemporaryDirectory(prefix="peer-smoke-") as name:
        folder = Path(name)
        try:
            if args.only != "converter":
                ids, want = reference(args.model, folder, args.device)
            if args.only in (None, "runs"):
                check_runs(args, ids, want)
            if args.only in (None, "random"):
                check_random(args, ids, folder)
            if args.only in (None, "converter"):
                check_converter(folder)
        except (AssertionError, subprocess.TimeoutExpired) as e:
            at = traceback.extract_tb(e.__traceback__)[-1]
            print(f"failed: line {at.lineno}: {e or at.line}")
            return 1
    print("passed" if args.compile else "passed (the compiled step was not run: --compile)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
