#!/usr/bin/env python3
"""Check the workflow without a model or a GPU: check.py [--snakemake FILE] [--quality FILE]

A dry run plans every stage. Each planned command is then run by bfly-quality-smoke with a model that does not exist;
the missing model must be the only error, which shows that all flags are valid. Standard library only.
"""
import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Optional

ROOT = Path(__file__).resolve().parent.parent
COMMAND = re.compile(r"^Shell command: .*?(?:on_gpu\.py )?(QUALITY .*?) >\S+ 2>&1", re.MULTILINE)


def planned(snakemake: str, out: str) -> List[List[str]]:
    command = [snakemake, "--workflow-profile", "local", "--dry-run", "--config"]
    command += [f"model={out}/no-model.gguf", f"out={out}", "quality=QUALITY"]
    command += ["kept=alone,mixed,rounds,rounds-mixed,heads"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"check.py: the dry run failed:\n{run.stdout}{run.stderr}")
    found = [shlex.split(command)[1:] for command in COMMAND.findall(run.stdout)]
    jobs = re.search(r"^total +(\d+)$", run.stdout, re.MULTILINE)
    # One of the jobs is the target itself.
    if not jobs or len(found) != int(jobs[1]) - 1:
        sys.exit(f"check.py: the dry run shows {len(found)} commands for {jobs[1] if jobs else 'no'} jobs:\n{run.stdout}")
    return found


def fault(quality: str, command: List[str]) -> Optional[str]:
    run = subprocess.run([quality, *command], cwd=ROOT, capture_output=True, text=True)
    missing = "no-model" if command[0] != "join" else "niah_single_1.json"
    if run.returncode == 2 and missing in run.stderr and "Usage:" not in run.stderr:
        return None
    return f"{shlex.join([quality, *command])}\n  exited with {run.returncode}: {run.stderr.strip()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snakemake", default="snakemake", help="Snakemake of the version in requirements.txt [%(default)s]")
    parser.add_argument("--quality", default="target/debug/bfly-quality-smoke", help="bfly-quality-smoke to check with [%(default)s]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(os.cpu_count()) as pool:
        for folder in ("raw", "work"):
            os.mkdir(f"{out}/{folder}")
        commands = planned(args.snakemake, out)
        faults = [f for f in pool.map(lambda c: fault(args.quality, c), commands) if f]
    print("\n".join(faults) if faults else f"{len(commands)} commands, all flags valid")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
