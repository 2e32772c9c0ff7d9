"""The English that the shipped KV predictors were fitted and trained on, out of Debian packages.

    python -m edgekv.bench.prediction.fit_corpus FOLDER

downloads them with apt-get (Debian or Ubuntu; nothing is installed) and writes text files: what is
fitted on into FOLDER, what is held out, to measure on, into FOLDER/held-out.
"""

import argparse
import gzip
import html
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "r-cran-janeaustenr",
    "debian-handbook",
    "debian-policy",
    "developers-reference",
    "git-doc",
    "python3.11-doc",
    "fortunes",
    "fortunes-min",
    "perl-doc",
    "postgresql-doc-15",
    "sqlite3-doc",
    "apache2-doc",
    "debian-reference-en",
    "anarchism",
    "golang-1.19-src",
    "libreoffice-help-en-us",
    "linux-doc-6.1",
    "nodejs-doc",
    "rust-doc",
    "vim-doc",
)
HELD_OUT = ("sense-and-sensibility", "handbook-apt")
_PAGE_CHARS_MIN = 20_000  # of the handbook: shorter pages are mostly navigation
_MANUAL_CHARS_MAX = 3_000_000  # large manuals must not outweigh all else
_STRINGS, _STRING = 16, 9  # types in R's serialisation
_MANUALS = {
    "postgresql": "doc/postgresql-doc-15/html/*.html",
    "sqlite": "doc/sqlite3/*.html",
    "apache": "doc/apache2-doc/manual/en/**/*.html",
    "debian-reference": "debian-reference/*.en.html",
    "libreoffice": "libreoffice/help/en-US/text/**/*.html",
    "rust": "doc/rust-doc/html/[ber]*/**/*.html",
    "vim": "doc/vim/html/*.html",
}
_PLAIN = {  # or as they are
    "anarchism": "doc/anarchism/markdown/*",
    "go-code": "go-1.19/src/**/[a-z]*.go",
    "linux": "doc/linux-doc-6.1/html/_sources/**/*.txt",
    "nodejs": "doc/nodejs/api/*.md*",
}
_GUIDES = ("tutorial", "howto", "faq", "whatsnew")  # of Python; its reference is measured on


def texts(root: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every file, from packages that were unpacked below a folder."""
    share = root / "usr/share"
    yield from _novels(root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    for page in sorted((share / "doc/debian-handbook/html/en-US").glob("*.html")):
        text = _plain(page.read_text())
        if len(text) > _PAGE_CHARS_MIN:
            yield f"handbook-{page.stem.removeprefix('sect.')}", text
    with gzip.open(share / "doc/debian-policy/policy.txt.gz", "rt") as file:
        yield "debian-policy", file.read()
    yield "developers-reference", _joined(share / "developers-reference/_sources", "*")
    git = share / "doc/git-doc"
    yield "git-doc", "".join(_joined(git / part, "*.txt") for part in ("", "howto", "technical"))
    sources = share / "doc/python3.11/html/_sources"
    yield "python-guides", "".join(_joined(sources / part, "*") for part in _GUIDES)
    yield "fortunes", _joined(root / "usr/share/games/fortunes", "*")
    yield "perl", _joined(share / "perl", "*/pod/perl[a-z]*.pod")[:_MANUAL_CHARS_MAX]
    for name, pages in _MANUALS.items():
        yield name, _plain(_joined(share, pages))[:_MANUAL_CHARS_MAX]
    for name, pages in _PLAIN.items():
        yield name, _joined(share, pages)[:_MANUAL_CHARS_MAX]


def _joined(folder: Path, pattern: str) -> str:
    files = sorted(p for p in folder.glob(pattern) if p.is_file() and not p.is_symlink())
    kept = [path for path in files if path.suffix not in (".dat", ".u8")]
    return "".join(_read(path) for path in kept)


def _read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode(errors="replace")


def _plain(page: str) -> str:
    page = re.sub(r"(?s)<(script|style|head|nav)\b.*?</\1>", "", page)
    page = re.sub(r"<(p|h\d|li|div|pre)[^>]*>", "\n", page)
    return re.sub(r"\n\s*\n+", "\n\n", html.unescape(re.sub(r"<[^>]+>", "", page)))


def _novels(database: Path) -> Iterator[tuple[str, str]]:
    """R's lazy-load database: zlib streams behind their lengths, each a vector of strings."""
    data = database.read_bytes()
    while data:
        stream = zlib.decompressobj()
        lines = _strings(stream.decompress(data[4:]))
        data = stream.unused_data
        yield re.sub(r"\W+", "-", lines[0].lower()), "\n".join(lines)


def _strings(data: bytes) -> list[str]:
    """Of R's serialisation format, version 3, big-endian."""
    (encoding,) = struct.unpack_from(">I", data, 14)
    at = 18 + encoding
    kind, count = struct.unpack_from(">II", data, at)
    assert data[:2] == b"X\n"
    assert kind & 0xFF == _STRINGS
    at, found = at + 8, []
    for _ in range(count):
        kind, size = struct.unpack_from(">II", data, at)
        assert kind & 0xFF == _STRING
        found.append(data[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return found


def main(folder: Path) -> None:
    """Download, unpack, write."""
    (folder / "held-out").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        # apt's own user need not be able to write there
        options = ["-o", "APT::Sandbox::User=root"]
        subprocess.run(["apt-get", *options, "-qq", "download", *PACKAGES], cwd=place, check=True)
        for package in sorted(Path(place).glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, f"{place}/root"], check=True)
        for name, text in texts(Path(place) / "root"):
            where = folder / "held-out" if name in HELD_OUT else folder
            (where / f"{name}.txt").write_text(text, encoding="utf-8")
            sys.stdout.write(f"{where / name}.txt\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="Where to write; made if it does not exist.")
    main(parser.parse_args().folder)
