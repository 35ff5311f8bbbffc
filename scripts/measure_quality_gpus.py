#!/usr/bin/env python3
"""Spread the measurements of scripts/measure_quality.sh over several GPUs.

A stage is one process, but for ruler-LENGTH and bytes, which are one per task: their files of answers are joined once all of
them are whole. Stages are begun in the order in which they are named, as GPUs are free. A stage that keeps layers dense waits for
the stages that rank them, where these are named too; STAGE@KEPT says which rankings (--kept of measure_quality.sh), so that what
needs none can go first and be taken up later. The same command goes on where it was cut off: answers and studies of layers are taken
up, from joined files too; of other stages only those that were cut off need be named again.

Standard library only.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

HERE = Path(__file__).resolve().parent
TASKS = [
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe",
]  # fmt: skip
# What the plans of --kept come from.
RANKED_BY = {
    "alone": "layers", "mixed": "layers-mixed", "rounds": "layers-rounds", "rounds-mixed": "layers-rounds-mixed",
    "heads": "layers-heads",
}  # fmt: skip
EXAMPLES = """examples:
  # Everything at 8k on four GPUs, two processes each; what needs no plans goes first
  measure_quality_gpus.py --gpus 0,1,2,3 layers-rounds ruler-8k@none ruler-8k@rounds -- \\
      --model MODEL.gguf --flags '--dtype bf16 --tie-embeddings' --jobs 4 --out results/today

  # As much as fits into half an hour; the same command goes on later
  measure_quality_gpus.py --gpus 0 --seconds 1800 ruler-4k ruler-32k -- --model MODEL.gguf --out results/today
"""


class Job(NamedTuple):
    """One process."""

    name: str
    command: List[str]
    file: str  # Two jobs of one file never run side by side.
    needs: List[str]  # Files of the stages that rank layers for it.


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def part_of(raw: Path, name: str, stage: str, task: str) -> Path:
    return raw / f"{name}-{stage}-{task}.json"


def split_by_task(raw: Path, name: str, stage: str) -> None:
    """Cuts a joined file into the parts that are not there, so that each can be gone on with."""
    whole = raw / f"{name}-{stage}.json"
    answers = json.loads(whole.read_text()) if whole.exists() else {"cells": []}
    for task in TASKS:
        part, cells = part_of(raw, name, stage, task), [c for c in answers["cells"] if c["task"] == task]
        if cells and not part.exists():
            new = part.with_suffix(".new")
            new.write_text(json.dumps({**answers, "cells": cells}, separators=(",", ":")) + "\n")
            new.rename(part)


def jobs_of(stages: List[str], rest: List[str], kept_by_default: str, raw: Path, name: str) -> List[Job]:
    jobs = []
    for wanted in stages:
        stage, _, kept = wanted.partition("@")
        base = ["bash", str(HERE / "measure_quality.sh"), *rest, *(["--kept", kept] if kept else [])]
        ranked = [] if stage.startswith("layers") else (kept or kept_by_default).split(",")
        needs = [f"{name}-{RANKED_BY[k]}.json" for k in ranked if k in RANKED_BY]
        if stage.startswith("ruler-") or stage == "bytes":
            split_by_task(raw, name, stage)
            for task in TASKS:
                part = part_of(raw, name, stage, task)
                jobs.append(Job(f"{wanted} {task}", [*base, "--tasks", task, "--part", task, stage], part.name, needs))
        else:
            jobs.append(Job(wanted, [*base, stage], f"{name}-{stage}.json", needs))
    return jobs


def run(jobs: List[Job], slots: List[Optional[str]], logs: Path, until: float) -> Tuple[int, int]:
    """Runs them; how many failed, and how many were cut off or not begun."""
    waiting: List[Job] = list(jobs)
    running: Dict[int, Tuple[Job, subprocess.Popen, float]] = {}
    failed: List[Job] = []

    def ready(job: Job) -> bool:
        undone = waiting + [j for j, _, _ in running.values()]
        before = jobs[: jobs.index(job)]
        return not any(j.file in job.needs or (j.file == job.file and j in before) for j in undone)

    def log_of(job: Job) -> Path:
        return logs / f"{job.name.replace(' ', '-')}.log"

    try:
        while (waiting or running) and time.time() < until:
            for slot, (job, process, begun) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                if process.returncode != 0:
                    failed.append(job)
                end = "FAILED, see " + str(log_of(job)) if job in failed else "done"
                say(f"{job.name}: {end} ({time.time() - begun:.0f} s; {len(waiting) + len(running)} left)")
            for job in [j for j in waiting if any(f.file in j.needs for f in failed)]:
                waiting.remove(job)
                failed.append(job)
                say(f"{job.name}: FAILED, for want of its plans")
            for slot, gpu in enumerate(slots):
                job = next((j for j in waiting if ready(j)), None) if slot not in running else None
                if job is None:
                    continue
                waiting.remove(job)
                env = dict(os.environ) if gpu is None else dict(os.environ, CUDA_VISIBLE_DEVICES=gpu)
                with open(log_of(job), "w") as log:
                    process = subprocess.Popen(job.command, stdout=log, stderr=log, env=env, start_new_session=True)
                running[slot] = (job, process, time.time())
                say(f"{job.name}: begun" + (f" on GPU {gpu}" if gpu is not None else ""))
            time.sleep(0.2)
    finally:
        for job, process, _ in running.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            say(f"{job.name}: cut off")
    return len(failed), len(waiting) + len(running)


def join(stages: List[str], quality: str, raw: Path, name: str) -> None:
    for stage in dict.fromkeys(s.partition("@")[0] for s in stages):
        parts = [part_of(raw, name, stage, task) for task in TASKS]
        if all(p.exists() for p in parts):
            whole = raw / f"{name}-{stage}.json"
            subprocess.run([quality, "join", *map(str, parts), "--out", str(whole)], check=True)
            say(f"{whole}: joined from {len(parts)} parts")


def gpus_here() -> List[str]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i, line in enumerate(listed.splitlines()) if line.startswith("GPU")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="+", metavar="STAGE[@KEPT]", help="stages of measure_quality.sh, the most important first")
    parser.add_argument("--gpus", help="such as 0,1 [all]; without a GPU, --each processes on the CPU")
    parser.add_argument("--each", type=int, default=2, metavar="N", help="processes on each GPU [2]")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="S", help="stop after so long")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    args, rest = parser.parse_args(given[:cut]), given[cut + 1 :]
    options = argparse.ArgumentParser(add_help=False, prog="measure_quality_gpus.py ... --")
    for flag in ("--model", "--out"):
        options.add_argument(flag, required=True)
    options.add_argument("--name")
    options.add_argument("--kept", default="alone,mixed")
    options.add_argument("--quality", default="target/release/bfly-quality-smoke")
    known, _ = options.parse_known_args(rest)
    if args.each < 1:
        parser.error("--each must be at least 1")
    gpus: List[Optional[str]] = list(args.gpus.split(",") if args.gpus else gpus_here()) or [None]
    # As measure_quality.sh does: its paths are those of the repository's root.
    os.chdir(HERE.parent)
    name = known.name or Path(known.model).name.removesuffix(".gguf")
    raw, logs = Path(known.out) / "raw", Path(known.out) / "logs"
    raw.mkdir(parents=True, exist_ok=True)
    logs.mkdir(exist_ok=True)
    jobs = jobs_of(args.stages, rest, known.kept, raw, name)
    failed, left = run(jobs, [gpu for _ in range(args.each) for gpu in gpus], logs, time.time() + args.seconds)
    if failed or left:
        say(f"{failed} failed, {left} cut off or not begun of {len(jobs)}; the same command goes on")
        return 1
    join(args.stages, known.quality, raw, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
