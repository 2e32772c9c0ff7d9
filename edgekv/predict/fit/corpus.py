"""Text to fit on: files, or what every machine has, the running Python's standard library."""

import functools
import itertools
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from edgekv.config import check_float
from edgekv.errors import ConfigError
from edgekv.tokenizer import Tokenizer

STDLIB = "the running Python's standard library"
_SKIPPED = {"site-packages", "__pycache__", "test", "tests", "encodings", "lib2to3"}
_REPEATED = 4  # one sequence in so many says a passage twice: what recall is made of
_BYTES_MIN = 2000
_PASSAGE_BYTES = 16_000
_PASSAGE_BYTES_MIN = 256
HELD_EVERY = 16  # passages, and pieces of a fit: about one of so many is held out
_ROUNDING = 1e-9
_HELD_OUT = ("idlelib", "pydoc_data")  # of the standard library


def text_files(texts: Sequence[Path], *, held_out: bool = False) -> list[Path]:
    """The given files, or sources of the standard library in an order that mixes its packages.

    Of these some are held out, to measure on and never to fit on.

    Raises:
        ConfigError: A file does not exist.
    """
    for path in texts:
        if not path.is_file():
            raise ConfigError.of("text", str(path), "a file")
    if texts:
        return list(texts)
    return list(_stdlib(held_out))


@functools.cache  # it is some thousand files, looked at for every run over the text
def _stdlib(held_out: bool) -> tuple[Path, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED & set(parts) or path.stat().st_size < _BYTES_MIN:
            continue
        if (parts[0] in _HELD_OUT) == held_out:
            found.append(path)
    random.Random(0).shuffle(found)
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text, cut into passages that are shuffled; about one of 16 is held out, to measure by.

    Which ones, their content and place in their file say: beside other files they stay the same, so
    long as all together are of a megabyte or more (of less text, passages are shorter).
    """

    # UTF-8 files; what is not is replaced. () takes the standard library alone.
    texts: tuple[Path, ...] = ()
    # Part of the pieces that come from the standard library, beside `texts`.
    stdlib_share: float = 0.0

    def __post_init__(self) -> None:
        check_float("stdlib-share", self.stdlib_share, 0.0, 1.0)

    @property
    def name(self) -> str:
        """What it is, in words."""
        names = [path.name for path in self.texts]
        if self.stdlib_share or not names:
            names.append(STDLIB)
        return ", ".join(names)

    def key(self) -> str:
        """Names what its pieces depend on, as the files are now."""
        stats = [(path.resolve(), path.stat()) for path in self.texts]
        texts = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return f"{texts} {self.stdlib_share} {sys.version}"

    def pieces(
        self, tokenizer: Tokenizer, length: int, *, held_out: bool = False, repeats: bool = True
    ) -> Iterator[list[int]]:
        """Token ids in pieces of a length, without end: it begins anew when all has been seen.

        They are of passages that are held out or of all others. With `repeats` every fourth one
        ends in a passage that it began with.

        Raises:
            ConfigError: There is less than one piece.
        """
        share = self.stdlib_share if self.texts else 1.0
        prose: Iterator[list[int]] = iter(())
        if self.texts:
            prose = _pieces(text_files(self.texts), tokenizer, length, held_out=held_out)
        code = _pieces(text_files(()), tokenizer, length, held_out=held_out)
        dice = random.Random(0)
        for number in itertools.count():
            of_code = int((number + 1) * share + _ROUNDING) > int(number * share + _ROUNDING)
            ids = next(code if of_code else prose)
            if repeats and number % _REPEATED == _REPEATED - 1:
                ids = _with_repeat(ids, dice)
            yield ids


def _with_repeat(ids: list[int], dice: random.Random) -> list[int]:
    """A piece as long as before; its end says again a passage of the first half, anywhere in it."""
    half = len(ids) // 2
    size = dice.randint(max(1, half // 4), max(1, half))
    start = dice.randint(0, half - size)
    return ids[: len(ids) - size] + ids[start : start + size]


def _pieces(
    files: Sequence[Path], tokenizer: Tokenizer, length: int, *, held_out: bool
) -> Iterator[list[int]]:
    """Pieces without end."""
    passages = _split(_passages(files), held_out=held_out)
    ids: list[int] = []
    for round_ in itertools.count():
        if round_ and sum(one.size for one in passages) < length:
            what = ", ".join(map(str, files))
            raise ConfigError.of("text", what, f"far longer than {length} tokens")
        random.Random(round_).shuffle(passages)
        for passage in passages:
            ids += tokenizer.encode(passage.read().decode(errors="replace"))
            while len(ids) >= length:
                yield ids[:length]
                ids = ids[length:]


class _Passage(NamedTuple):
    """Bytes of a file."""

    path: Path
    at: int
    size: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.at)
            return file.read(self.size)


def _split(passages: list[_Passage], *, held_out: bool) -> list[_Passage]:
    digests = [xxh3_64_intdigest(one.read(), seed=one.at) for one in passages]
    held = {digest for digest in digests if digest % HELD_EVERY == 0}
    if not held and len(digests) > 1:
        held = {min(digests)}
    found = zip(passages, digests, strict=True)
    return [one for one, digest in found if (digest in held) == held_out]


def _passages(files: Sequence[Path]) -> list[_Passage]:
    """All text in passages, so many that some can be held out."""
    sizes = [path.stat().st_size for path in files]
    size = min(_PASSAGE_BYTES, max(_PASSAGE_BYTES_MIN, sum(sizes) // (4 * HELD_EVERY)))
    return [
        _Passage(path, at, min(size, total - at))
        for path, total in zip(files, sizes, strict=True)
        for at in range(0, total, size)
    ]
