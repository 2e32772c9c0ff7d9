"""What `bench quality` reads: pieces of text, passages to repeat, facts to find again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekv.config import check_int
from edgekv.errors import ConfigError
from edgekv.predict.fit.corpus import text_files
from edgekv.tokenizer import Tokenizer

COPY_BACK = 180  # tokens between the repeated passage and the context's end
FIRST = 8
_NEEDLE = "The secret code is {}. Remember the code. "
_QUESTION = "\nWhat was said above: the secret code is"
_SPREAD = 7  # samples are taken from a file this many contexts apart, at most


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """What is measured."""

    context: int = 384  # tokens that are prefilled
    continuation: int = 128  # tokens that are forced through behind them
    samples: int = 16  # pieces of text
    sinks: int = 4  # see `PredictionOptions`
    window: int = 32  # see `PredictionOptions`
    # Files that the pieces come from; () takes sources of the standard library that the default
    # corpus of `edgekv fit` leaves out.
    texts: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        check_int("continuation", self.continuation, FIRST, 1 << 16)
        check_int("context", self.context, COPY_BACK + self.continuation, 1 << 20)
        check_int("samples", self.samples, 1, 1 << 16)
        check_int("sinks", self.sinks, 0, self.context // 2)
        check_int("window", self.window, 1, self.context // 2)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One piece of text and what is forced through behind it."""

    context: list[int]  # tokens that are prefilled
    following: list[int]  # what follows in the text
    repeated: list[int]  # a passage of the context
    # Another context, with a fact in its first tenth and a question about it at its end.
    needle: list[int]
    answer: list[int]  # to the question


def pieces_of(tokenizer: Tokenizer, options: QualityOptions) -> list[Piece]:
    """As many pieces as asked for, or as the files hold.

    Raises:
        ConfigError: The files hold too little text.
    """
    files = text_files(options.texts, held_out=True)
    found = stretches(tokenizer, files, options.context + options.continuation, options.samples)
    return [_piece(tokenizer, options, ids, number) for number, ids in enumerate(found)]


def _piece(tokenizer: Tokenizer, options: QualityOptions, ids: list[int], number: int) -> Piece:
    context = ids[: options.context]
    start = options.context - COPY_BACK - options.continuation
    code = f" {(7919 * (number + 1)) % 9000 + 1000}"
    fact, question, answer = (
        list(tokenizer.encode(text, add_special_tokens=False))
        for text in (_NEEDLE.format(code.strip()), _QUESTION, code)
    )
    at = len(context) // 20
    rest = context[at + len(fact) : len(context) - len(question)]
    return Piece(
        context=context,
        following=ids[options.context :],
        repeated=context[start : start + options.continuation],
        needle=[*context[:at], *fact, *rest, *question],
        answer=answer,
    )


def stretches(
    tokenizer: Tokenizer, files: Sequence[Path], length: int, samples: int
) -> list[list[int]]:
    """Token ids of `samples` stretches of a length, or as many as the files hold, from all of them.

    Raises:
        ConfigError: No file holds one.
    """
    encoded: dict[Path, list[int]] = {}
    found: list[list[int]] = []
    for round_ in range(samples):
        for path in files:
            if path not in encoded:
                encoded[path] = list(tokenizer.encode(path.read_text(errors="replace")))
            ids = encoded[path]
            places = len(ids) // length
            step = max(1, min(_SPREAD, places // max(1, -(-samples // len(files)))))
            start = round_ * step * length
            if start + length <= len(ids):
                found.append(ids[start : start + length])
            if len(found) == samples:
                return found
    if not found:
        raise ConfigError.of("text", ", ".join(map(str, files)), f"longer than {length} tokens")
    return found
