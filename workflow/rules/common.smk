# Shared by the rules: the configuration, file names, and the variants and flags of each stage.
import shlex
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

validate(config, "../config.schema.yaml")


def listed(value):
    """Return a list setting, which --config may give as a,b."""
    return [one for one in value.split(",") if one] if isinstance(value, str) else value


def kilo(length):
    return int(length.removesuffix("k"))


QUALITY = config["quality"]
OUT = config["out"].rstrip("/")
NAME = config["name"] or Path(config["model"]).name.removesuffix(".gguf")
PART = f"-{config['part']}" if config["part"] else ""
LENGTHS = [length for length in ("4k", "8k", "16k", "32k") if kilo(length) <= kilo(config["ctx"])] or [config["ctx"]]
MIDDLE = "8k" if kilo(config["ctx"]) >= 8 else config["ctx"]
TASKS = listed(config["tasks"]) or [
    *"niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3".split(),
    *"niah_multivalue niah_multiquery vt cwe fwe".split(),
    *(["qa_1"] if config["squad"] else []),
    *(["qa_2"] if config["hotpot"] else []),
]

# Flags of the layer rankings, by suffix of the stage. The layers that needles need may differ from those that chains
# and counts need, so -mixed includes tasks of these kinds. With rounds, which take three times as many scores, -mixed
# uses half as many samples.
MIXED = "--tasks niah_multikey_1,vt,cwe,fwe"
RANKINGS = {
    "": "--samples 8 --rank alone",
    "-rounds": "--samples 8 --rank rounds",
    "-mixed": f"--samples 8 --rank alone {MIXED}",
    "-rounds-mixed": f"--samples 4 --rank rounds {MIXED}",
    "-heads": "--samples 8 --rank heads",
}
KEPT = ["" if ranking == "alone" else f"-{ranking}" for ranking in listed(config["kept"]) if ranking != "none"]
for suffix in KEPT:
    if suffix not in RANKINGS:
        raise WorkflowError(f"kept: unknown ranking {suffix[1:]}; known: alone, rounds, mixed, rounds-mixed, heads, none")
# Plan dense-K keeps the K most sensitive layers dense; `layers` writes it for K below the model's number of layers.
WRITTEN = [k for k in (1, 2, 4, 8, 12, 16) if not config["layers"] or k < config["layers"]]
CUMULATIVE = [k for k in (16, 12, 8, 4) if k in WRITTEN]

PUBLISHED = "retrofit:window=64,block=64,window-align=token,sink-tokens=0,shift-unit=1"
LOCAL = "retrofit:partner=local"


def raw(file):
    return f"{OUT}/raw/{NAME}-{file}{PART}.json"


def log_of(file):
    return f"{OUT}/logs/{NAME}-{file}{PART}.log"


def plans(*counts, rankings=KEPT):
    return [f"{OUT}/plans/{NAME}{suffix}/dense-{k}.json" for suffix in rankings for k in counts if k in WRITTEN]


def dense(*counts):
    return [f"retrofit:plan={plan}" for plan in plans(*counts)]


def variants(*parts):
    return "--variants " + ",".join(parts)


def measure(more=""):
    """Return the shell command of a rule with the parameters `what` and `args`.

    bfly-quality-smoke saves its file repeatedly, and resumes answers and layer studies that exist at --out. Snakemake
    deletes the outputs of a job before it starts and after it fails, so the incomplete file is in work/, which
    Snakemake does not track, and raw/ gets a hard link to it once it is complete. Each save replaces the file by a
    rename, so a later run that adds to the file in work/ does not change the one in raw/.
    """
    return (
        "mkdir -p {OUT}/work && python3 workflow/scripts/on_gpu.py {QUALITY} {params.what} {params.model}"
        " --out {params.work} {params.args}" + more + " >{log} 2>&1 && ln -f {params.work} {output[0]}"
    )


# Not a parameter of the rules, since the number of parallel samples does not change results and must not cause reruns.
JOBS = " --jobs {config[jobs]}"


def model(wildcards):
    return shlex.join(["--model", config["model"], *shlex.split(config["flags"])])


def work(wildcards, output):
    return f"{OUT}/work/{Path(output[0]).name}"


def task_ctx(stage):
    return MIDDLE if stage == "bytes" else stage.removeprefix("ruler-")


def task_plans(stage):
    return (1, 2, 4, 8, 12) if stage == "bytes" else (4, 8)


def task_variants(stage):
    """Return every method at one setting, or for `bytes` at budgets from 1/2 to 1/64 of a dense cache."""
    length, kept = kilo(task_ctx(stage)), dense(*task_plans(stage))
    if stage != "bytes":
        # An eviction takes about thirty kernel launches per layer, so KeyDiff's blocks grow with the text.
        return ["stock", "retrofit", PUBLISHED, LOCAL, *kept, "snapkv:kv=1/4", f"keydiff:kv=1/4,block={length * 32}"]
    methods = ["stock", *kept]
    for share in (2, 4, 8, 16, 32, 64):
        # Blocks must be small enough for the smallest shares.
        evicted = min(max(length * 256 // share, 64), 256)
        methods += [f"retrofit:kv=1/{share},block=32", f"snapkv:kv=1/{share}", f"keydiff:kv=1/{share},block={evicted}"]
        methods += [f"{LOCAL},kv=1/{share},block=32"] if share in (4, 16, 64) else []
    return methods


def task_args(stage, task):
    files = [f"--{key} {shlex.quote(config[key])}" for key in ("squad", "hotpot") if config[key]]
    asked = ["--question-unseen", "--tasks", task, *files, "--ctx", task_ctx(stage)]
    return " ".join(["--samples", str(config["samples"]), *asked, variants(*task_variants(stage))])


def stages():
    """Return the output files of each stage, in the order in which stages are listed."""
    ablated = [length for length in ("4k", "8k", "16k") if kilo(length) <= kilo(config["ctx"])]
    return {
        "smoke": [raw("smoke")],
        **{f"layers{suffix}": [raw(f"layers{suffix}")] for suffix in RANKINGS},
        **{f"ruler-{length}": [raw(f"ruler-{length}")] for length in LENGTHS},
        "bytes": [raw("bytes")],
        **{f"ablate-{n}": [raw(f"ablate-{n}"), raw(f"ablate-small-blocks-{n}")] for n in ablated},
        **{f"cumulative-{n}": [raw(f"cumulative-{n}-dense-{k}") for k in CUMULATIVE] for n in ablated},
        "needle": [raw("needle")],
        "smoke-plans": [raw("smoke-plans")],
        "positions": [raw("positions")],
    }
