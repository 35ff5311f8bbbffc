#!/usr/bin/env python3
"""Check all *.md files in git: links, figures, the size of results/, line lengths.

  - Every relative link and image is a file or folder in git, and its #anchor is a heading there.
  - Every figure in results/ and docs/figures/ is shown or linked by a page; scripts/reproduce.sh draws the others.
  - results/ has at most 15 MB without checkpoints, and JSON files over 200 kB are gzipped.
  - A line of prose has at most 120 characters, not counting tables, code, HTML and link targets.

Prints each fault as FILE:LINE: MESSAGE, and exits with 1 if there is any. Standard library only.
"""
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Set, Tuple

ROOT = Path(__file__).resolve().parent.parent
LONGEST_LINE = 120
LARGEST_RESULTS = 15_000_000
LARGEST_PLAIN_JSON = 200_000
FIGURE = re.compile(r"^(results|docs/figures)/.*\.(svg|png)$")
# [text](target "title"), ![alt](target), and the attributes of <img>, <source> and <a>.
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|\b(?:src|srcset|href)=\"([^\"\s]+)[^\"]*\"")
INLINE_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
FENCE = re.compile(r"^\s*(```+|~~~+)")


class Line(NamedTuple):
    number: int
    text: str
    prose: bool  # not code, not a table, not HTML


def lines_of(text: str) -> Iterator[Line]:
    """Yield the lines outside fenced and indented code."""
    fence, before, code, in_list = "", "", False, False
    for number, line in enumerate(text.split("\n"), 1):
        opens = FENCE.match(line)
        if fence:
            if opens and opens[1].startswith(fence) and line.strip() == opens[1]:
                fence = ""
            continue
        if opens:
            fence = opens[1]
            continue
        if re.match(r"^\s*([-*+]|\d+[.)])\s", line):
            in_list = True
        elif line and not line.startswith(" "):
            in_list = False
        # Four spaces after an empty line start code, but within a list they continue its item.
        code = line.startswith("    ") and not in_list and (code or not before.strip())
        before = line
        if not code:
            yield Line(number, line, not line.lstrip().startswith(("|", "<")))


def links_of(line: str) -> Iterator[str]:
    for match in LINK.finditer(INLINE_CODE.sub("", line)):
        yield match[1] or match[2]


def anchors_of(text: str) -> Set[str]:
    """Return the anchors that GitHub generates for headings."""
    found: Dict[str, int] = {}
    anchors = set()
    for line in lines_of(text):
        if not re.match(r"^#{1,6} ", line.text):
            continue
        title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", line.text.lstrip("#").strip())
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        times = found.get(slug, 0)
        found[slug] = times + 1
        anchors.add(f"{slug}-{times}" if times else slug)
    return anchors


def check_page(page: str, texts: Dict[str, str], tracked: Set[str]) -> Tuple[List[str], Set[str]]:
    """Return the faults of a page, and the files that it links."""
    faults, linked = [], set()
    for line in lines_of(texts[page]):
        here = f"{page}:{line.number}"
        for target in links_of(line.text):
            if re.match(r"^[a-z][a-z0-9+.-]*:", target):
                continue
            path, _, anchor = target.partition("#")
            file = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
            linked.add(file)
            if file not in tracked:
                faults.append(f"{here}: {target} is not in git")
            elif anchor and file in texts and anchor not in anchors_of(texts[file]):
                faults.append(f"{here}: {target}: {file} has no heading with this anchor")
        seen = re.sub(r"https?://[^\s)>]+", "", re.sub(r"\]\([^)]*\)", "]", line.text))
        if line.prose and len(seen) > LONGEST_LINE:
            faults.append(f"{here}: {len(seen)} characters of prose, more than {LONGEST_LINE}")
    return faults, linked


def check_results(files: List[str], linked: Set[str]) -> List[str]:
    unseen = [file for file in files if FIGURE.match(file) and file not in linked]
    faults = [f"{file}: no page shows or links this figure" for file in unseen]
    # The checkpoint that a page describes is shipped beside its report; it is no measurement.
    measured = [file for file in files if file.startswith("results/") and not file.endswith(".safetensors")]
    sizes = {file: (ROOT / file).stat().st_size for file in measured}
    faults += [
        f"{file}: {size:,} bytes of JSON, more than {LARGEST_PLAIN_JSON:,}; compress it with gzip -9 -n"
        for file, size in sizes.items()
        if file.endswith(".json") and size > LARGEST_PLAIN_JSON
    ]
    if sum(sizes.values()) > LARGEST_RESULTS:
        faults.append(f"results/: {sum(sizes.values()):,} bytes, more than {LARGEST_RESULTS:,}")
    return faults


def main() -> int:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        print(f"check_links.py: git ls-files: {listed.stderr.strip()}", file=sys.stderr)
        return 2
    files = [file for file in listed.stdout.split("\0") if file and (ROOT / file).is_file()]
    folders = {str(folder) for file in files for folder in Path(file).parents}
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in files if file.endswith(".md")}
    faults: List[str] = []
    linked: Set[str] = set()
    for page in texts:
        found, targets = check_page(page, texts, {*files, *folders})
        faults += found
        linked |= targets
    faults += check_results(files, linked)
    print("\n".join(faults) if faults else f"{len(texts)} pages, {len(linked)} linked files: no faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
