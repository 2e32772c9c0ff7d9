"""What the shipped predictors were fitted on, out of packages' files."""

import gzip
import struct
import zlib

from edgekv.bench.prediction.fit_corpus import texts


def entry(lines):
    """As R keeps a vector of strings in a lazy-load database."""
    data = b"X\n" + struct.pack(">IIII", 3, 0x40201, 0x30500, 5) + b"UTF-8"
    data += struct.pack(">II", 0x10, len(lines))
    for line in lines:
        raw = line.encode()
        data += struct.pack(">II", 0x40009, len(raw)) + raw
    return struct.pack(">I", len(data)) + zlib.compress(data)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_files_of_packages(tmp_path):
    share = tmp_path / "usr/share"
    novels = entry(["A NOVEL", "", "by é"]) + entry(["ANOTHER ONE", "line"])
    write(tmp_path / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", novels)
    page = "<head>no</head><h1>Title</h1><p>a &amp; b</p>" + "<p>much more of it</p>" * 2000
    write(share / "doc/debian-handbook/html/en-US/sect.apt.html", page)
    write(share / "doc/debian-handbook/html/en-US/short.html", "<p>short</p>")
    write(share / "doc/debian-policy/policy.txt.gz", gzip.compress(b"policy"))
    write(share / "developers-reference/_sources/a.rst.txt", "reference")
    write(share / "doc/git-doc/git.txt", "git")
    write(share / "doc/git-doc/howto/how.txt", " how")
    write(share / "doc/python3.11/html/_sources/tutorial/a.rst.txt", "tutorial")
    write(share / "doc/python3.11/html/_sources/reference/b.rst.txt", "reference")
    write(tmp_path / "usr/share/games/fortunes/art", "fortune")
    write(tmp_path / "usr/share/games/fortunes/art.dat", b"\0\1")
    write(share / "perl/5.36.0/pod/perlfaq.pod", "pod")
    write(share / "perl/5.36.0/pod/perl5360delta.pod", "changes")
    write(share / "doc/postgresql-doc-15/html/a.html", "<head>no</head><p>a &lt; b</p>")
    write(share / "doc/sqlite3/a.html", "sqlite")
    write(share / "doc/apache2-doc/manual/en/mod/a.html", "<p>english" + "n" * 4_000_000)
    write(share / "doc/apache2-doc/manual/fr/mod/a.html", "french")
    write(share / "debian-reference/ch01.en.html", "reference")
    write(share / "debian-reference/ch01.fr.html", "french")
    page = '<header>a</header><nav class="n">no</nav><p>help'
    write(share / "libreoffice/help/en-US/text/shared/a.html", page)
    write(share / "doc/rust-doc/html/book/a.html", "book")
    write(share / "doc/rust-doc/html/src/a.html", "source")
    write(share / "doc/vim/html/a.html", "vim")
    write(share / "doc/anarchism/markdown/a.md.gz", gzip.compress(b"anarchism"))
    write(share / "go-1.19/src/fmt/a.go", "package fmt")
    write(share / "doc/linux-doc-6.1/html/_sources/PCI/a.rst.txt", "linux")
    write(share / "doc/nodejs/api/a.md.gz", gzip.compress(b"node"))
    write(share / "doc/nodejs/api/a.json.gz", gzip.compress(b"{}"))
    found = dict(texts(tmp_path))
    handbook = found.pop("handbook-apt")
    assert handbook.startswith("\nTitle\na & b\nmuch more")
    assert found == {
        "a-novel": "A NOVEL\n\nby é",
        "another-one": "ANOTHER ONE\nline",
        "debian-policy": "policy",
        "developers-reference": "reference",
        "git-doc": "git how",
        "python-guides": "tutorial",
        "fortunes": "fortune",
        "perl": "pod",
        "postgresql": "\na < b",
        "sqlite": "sqlite",
        "apache": "\nenglish" + "n" * (3_000_000 - 8),
        "debian-reference": "reference",
        "libreoffice": "a\nhelp",
        "rust": "book",
        "vim": "vim",
        "anarchism": "anarchism",
        "go-code": "package fmt",
        "linux": "linux",
        "nodejs": "node",
    }
