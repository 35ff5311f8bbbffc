#!/usr/bin/env python3
"""Runs a command on one GPU: on_gpu.py COMMAND [ARGUMENT...]

CUDA_VISIBLE_DEVICES names the GPU that runs the fewest commands begun this way, of those that it named before, or of
all. The caller limits how many run at once. Without a GPU the command runs as it is. Standard library only.

A command holds a lock on its place, the file GPU.0, GPU.1 and so on in a folder of this user, until it ends, however it
ends.
"""
import fcntl
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List
from urllib.parse import quote


def gpus() -> List[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(n) for n, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def take(names: List[str], places: Path) -> str:
    """A GPU with the fewest places taken; the lock stays with this process and what it becomes."""
    places.mkdir(mode=0o700, exist_ok=True)
    for level in itertools.count():
        for gpu in names:
            place = os.open(places / f"{quote(gpu, safe='')}.{level}", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(place)
                continue
            os.set_inheritable(place, True)
            return gpu
    raise AssertionError("levels have no end")


def main() -> int:
    command = sys.argv[1:]
    if not command or command[0] in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        return 2
    names = gpus()
    if names:
        # Two jobs of a Slurm cluster on one host may both call different GPUs 0.
        job = os.environ.get("SLURM_JOB_ID", "")
        gpu = take(names, Path(tempfile.gettempdir()) / f"bfly-gpus-{os.getuid()}{'-' + job if job else ''}")
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        print(f"on_gpu.py: GPU {gpu}", file=sys.stderr, flush=True)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"on_gpu.py: {command[0]}: {error.strerror}; build it with: cargo build --release", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
