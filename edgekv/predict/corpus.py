"""Text to fit on: files, or what every machine has, the running Python's standard library."""

import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgekv.errors import ConfigError
from edgekv.tokenizer import Tokenizer

STDLIB = "the running Python's standard library"
_SKIPPED = {"site-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "lib2to3"}
_REPEATED = 4  # one sequence in so many says a passage twice: what recall is made of
_BYTES_MIN = 2000


def corpus_files(texts: Sequence[Path]) -> list[Path]:
    """The given files, or the standard library's sources in an order that mixes its packages.

    Raises:
        ConfigError: A file does not exist.
    """
    for path in texts:
        if not path.is_file():
            raise ConfigError.of("text", str(path), "a file")
    if texts:
        return list(texts)
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED & set(path.relative_to(root).parts) and path.stat().st_size >= _BYTES_MIN
    ]
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


def _stretches(
    files: Sequence[Path], tokenizer: Tokenizer, length: int
) -> Iterator[list[int]]:
    while True:
        found = False
        for path in files:
            ids = list(tokenizer.encode(path.read_text(errors="replace")))
            # From one large file not all at once: variety first.
            for start in range(0, min(len(ids), 16 * length) - length + 1, length):
                found = True
                yield ids[start : start + length]
        if not found:
            raise ConfigError.of(
                "text", ", ".join(map(str, files)), f"longer than {length} tokens"
            )
