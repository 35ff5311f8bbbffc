#!/usr/bin/env python3
"""Convert a golden case of Qwen3.5 with the converters of llama.cpp and MLX, for tests/fixtures/forms.

    python scripts/convert_forms.py gguf tests/fixtures/goldens/qwen3_5_heads tests/fixtures/forms/qwen3_5_heads.gguf \\
        --llama-cpp DIR
    python scripts/convert_forms.py mlx tests/fixtures/goldens/qwen3_5_heads tests/fixtures/forms/qwen3_5_heads-mlx

A golden has no tokenizer, so the converters' own loaders and writers are called without one; the GGUF file gets tokens
that no test reads. The folder DIR is llama.cpp's sources, with conversion/ and gguf-py/; needs torch and transformers.
For MLX, `pip install mlx-lm "mlx[cpu]"`.
"""
import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path


def gguf(source: Path, out: Path, llama_cpp: Path) -> None:
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    import gguf as writer
    from conversion import get_model_class

    def vocabulary(self) -> None:
        count = self.hparams["vocab_size"]
        self.gguf_writer.add_tokenizer_model("gpt2")
        self.gguf_writer.add_tokenizer_pre("qwen2")
        self.gguf_writer.add_token_list([f"t{i}".encode() for i in range(count)])
        self.gguf_writer.add_token_types([1] * count)
        self.gguf_writer.add_token_merges(["t 0"])

    architecture = json.loads((source / "config.json").read_text())["architectures"][0]
    model = get_model_class(architecture)
    model.set_vocab, model.no_mtp = vocabulary, True
    model(source, writer.LlamaFileType.ALL_F32, out).write()


def mlx(source: Path, out: Path, bits: int, group: int) -> None:
    from mlx_lm import utils

    text = json.loads((source / "config.json").read_text())
    text.pop("architectures", None)
    nested = {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(nested))
        shutil.copy(source / "model.safetensors", folder)
        model, config = utils.load_model(Path(folder))
    if bits:
        model, config = utils.quantize_model(model, config, group, bits)
    out.mkdir(parents=True, exist_ok=True)
    utils.save_model(out, model)
    utils.save_config(config, config_path=out / "config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=["gguf", "mlx"])
    parser.add_argument("source", type=Path, help="folder of the golden case")
    parser.add_argument("out", type=Path, help="GGUF file, or folder of MLX's form")
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's sources")
    parser.add_argument("--bits", type=int, default=0, help="quantise to so many bits (MLX)")
    parser.add_argument("--group", type=int, default=64, help="columns of a scale (MLX)")
    args = parser.parse_args()
    if args.form == "gguf":
        if not args.llama_cpp:
            parser.error("gguf needs --llama-cpp")
        gguf(args.source, args.out, args.llama_cpp)
    else:
        mlx(args.source, args.out, args.bits, args.group)


if __name__ == "__main__":
    main()
