#!/usr/bin/env python3
"""Run a command on one GPU: on_gpu.py COMMAND [ARGUMENT...]

Sets CUDA_VISIBLE_DEVICES to the GPU with the fewest commands started by this script, among those that the variable
lists, or all GPUs. The caller limits the number of parallel commands. Without a GPU the command runs unchanged.
Standard library only.

Each command holds a lock on a slot, one of the files GPU.0, GPU.1, ... in a folder of the user, until its process
exits.

Example: on_gpu.py target/release/bfly-quality-smoke --model MODEL.gguf --out smoke.json
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
    """Return a GPU with the fewest slots taken; the lock is kept by this process and the command that replaces it."""
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
    raise AssertionError("unreachable: the slots of a GPU are unlimited")


def main() -> int:
    command = sys.argv[1:]
    if not command or command[0] in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        return 2
    names = gpus()
    if names:
        # In two Slurm jobs on one host, GPU 0 may be two different devices.
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
