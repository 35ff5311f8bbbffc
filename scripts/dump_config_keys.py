#!/usr/bin/env python3
"""Record the keys and defaults of transformers' configuration classes.

This script writes tests/fixtures/config_keys. A file there is named after its version of transformers and has the
fields

    classes      by class: its model_type, every key that it saves, and the default of every argument
    generation   generation settings, which older versions saved in config.json too

tests/it/unread.rs compares the tables in src/family with these files: a class that gains a key fails the test.

Needs transformers, without torch. Record one version 4 and one version 5, since there are checkpoints of both:

    pip install transformers==4.57.6 && python scripts/dump_config_keys.py
"""
import dataclasses
import inspect
import json
from pathlib import Path

import transformers
from transformers import GenerationConfig, PretrainedConfig

CLASSES = ["LlamaConfig", "Qwen2Config", "Qwen3Config", "Gemma3TextConfig", "Gemma3Config", "Qwen3_5TextConfig", "Qwen3_5Config"]
OUT = Path(__file__).parent.parent / "tests/fixtures/config_keys"


def defaults(cls) -> dict:
    """Return the default of every key, from a dataclass's fields (version 5) or a constructor's arguments (version 4)."""
    if dataclasses.is_dataclass(cls):
        fields = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
        theta = cls.default_theta
        theta = theta if isinstance(theta, dict) else {"global": theta}
        bases = {"rope_theta": theta["global"], "rope_local_base_freq": theta.get("local")}
        return fields | ({k: v for k, v in bases.items() if v is not None} if "rope_parameters" in fields else {})
    arguments = inspect.signature(cls.__init__).parameters.values()
    return {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}


def generation() -> list:
    if hasattr(GenerationConfig, "_get_default_generation_params"):
        return sorted(GenerationConfig._get_default_generation_params())
    return sorted(PretrainedConfig._get_global_generation_defaults())


def main() -> None:
    classes = {}
    for name in filter(lambda name: hasattr(transformers, name), CLASSES):
        cls = getattr(transformers, name)
        plain = {k: v for k, v in defaults(cls).items() if v is None or isinstance(v, (bool, int, float, str))}
        keys = sorted(cls().to_dict())
        classes[name] = {"model_type": cls.model_type, "keys": keys, "defaults": dict(sorted(plain.items()))}
    OUT.mkdir(parents=True, exist_ok=True)
    out = {"transformers": transformers.__version__, "classes": classes, "generation": generation()}
    (OUT / f"{transformers.__version__}.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
