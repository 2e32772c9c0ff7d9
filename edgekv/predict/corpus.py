"""Text to fit on: files, or what every machine has, the running Python's standard library."""

import itertools
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgekv.errors import ConfigError
from edgekv.tokenizer import Tokenizer

STDLIB = "the running Python's standard library"
_SKIPPED = {"site-packages", "__pycache__", "test", "tests", "encodings", "lib2to3"}
_REPEATED = 4  # one sequence in so many says a passage twice: what recall is made of
_BYTES_MIN = 2000
_PASSAGE_BYTES = 16_000
_ROUNDING = 1e-9
_HELD_OUT = ("idlelib", "pydoc_data")  # of the standard library: to measure on, never to fit on


def corpus_files(texts: Sequence[Path]) -> list[Path]:
    """The given files, or the standard library's sources in an order that mixes its packages.

    Raises:
        ConfigError: A file does not exist.
    """
    return _checked(texts) or _stdlib(held_out=False)


def held_out_files(texts: Sequence[Path]) -> list[Path]:
    """The given files, or those of the standard library that `corpus_files` leaves out.

    Raises:
        ConfigError: A file does not exist.
    """
    return _checked(texts) or _stdlib(held_out=True)


def _checked(texts: Sequence[Path]) -> list[Path]:
    for path in texts:
        if not path.is_file():
            raise ConfigError.of("text", str(path), "a file")
    return list(texts)


def _stdlib(*, held_out: bool) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED & set(parts) or path.stat().st_size < _BYTES_MIN:
            continue
        if (parts[0] in _HELD_OUT) == held_out:
            found.append(path)
    random.Random(0).shuffle(found)
    return found


def sequences(
    texts: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    length: int,
    stdlib_share: float = 0.0,
) -> Iterator[list[int]]:
    """Token ids of text, in pieces of a length; it begins anew when all has been seen.

    Files are cut into passages that are shuffled. Every fourth piece ends in a passage that
    it began with.

    Args:
        texts: UTF-8 files; what is not is replaced. () takes the standard library alone.
        tokenizer: Of the base model.
        num_tokens: At least as many in all.
        length: Of a piece.
        stdlib_share: Part of the pieces that come from the standard library, beside `texts`.

    Raises:
        ConfigError: The files hold less than one piece.
    """
    share = stdlib_share if texts else 1.0
    prose = _pieces(corpus_files(texts), tokenizer, length) if texts else iter(())
    code = _pieces(corpus_files(()), tokenizer, length)
    dice = random.Random(0)
    for number in range(-(-num_tokens // length)):
        of_code = int((number + 1) * share + _ROUNDING) > int(number * share + _ROUNDING)
        ids = next(code if of_code else prose)
        if number % _REPEATED == _REPEATED - 1:
            ids = _with_repeat(ids, dice)
        yield ids


def _with_repeat(ids: list[int], dice: random.Random) -> list[int]:
    """As long as before; the end says again a passage of the first half, anywhere in it."""
    half = len(ids) // 2
    size = dice.randint(max(1, half // 4), max(1, half))
    start = dice.randint(0, half - size)
    return ids[: len(ids) - size] + ids[start : start + size]


def _pieces(files: Sequence[Path], tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    """Pieces without end."""
    ids: list[int] = []
    for round_ in itertools.count():
        passages = [place for path in files for place in _passages(path)]
        random.Random(round_).shuffle(passages)
        for path, at in passages:
            ids += tokenizer.encode(_read(path, at))
            while len(ids) >= length:
                yield ids[:length]
                ids = ids[length:]
        if round_ == 0 and sum(path.stat().st_size for path in files) < length:
            raise ConfigError.of("text", ", ".join(map(str, files)), f"longer than {length} tokens")


def _passages(path: Path) -> list[tuple[Path, int]]:
    """Where passages of a file begin."""
    return [(path, at) for at in range(0, path.stat().st_size, _PASSAGE_BYTES)]


def _read(path: Path, at: int) -> str:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(_PASSAGE_BYTES).decode(errors="replace")
