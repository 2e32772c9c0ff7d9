"""Text to fit on: files, or what every machine has, the running Python's standard library."""

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
    files: Sequence[Path], tokenizer: Tokenizer, *, num_tokens: int, length: int
) -> Iterator[list[int]]:
    """Token ids of the files, in pieces of a length; files begin anew when all have been seen.

    Every fourth piece says the first half of itself twice.

    Args:
        files: UTF-8 text; what is not is replaced.
        tokenizer: Of the base model.
        num_tokens: At least as many in all.
        length: Of a piece.

    Raises:
        ConfigError: The files hold less than one piece.
    """
    made = 0
    for ids in _stretches(files, tokenizer, length):
        number = made // length
        if number % _REPEATED == _REPEATED - 1:
            half = length // 2
            ids = ids[:half] + ids[: length - half]
        yield ids
        made += length
        if made >= num_tokens:
            return


def _stretches(files: Sequence[Path], tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    while True:
        found = False
        for path in files:
            ids = list(tokenizer.encode(path.read_text(errors="replace")))
            # From one large file not all at once: variety first.
            for start in range(0, min(len(ids), 16 * length) - length + 1, length):
                found = True
                yield ids[start : start + length]
        if not found:
            raise ConfigError.of("text", ", ".join(map(str, files)), f"longer than {length} tokens")
