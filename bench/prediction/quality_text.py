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
    """What is measured.

    Attributes:
        context: Tokens that are prefilled.
        continuation: Tokens that are forced through behind them.
        samples: Pieces of text.
        sinks: See `PredictionOptions`.
        window: See `PredictionOptions`.
        texts: Files that the pieces come from; () takes sources of the standard library that the
            default corpus of `edgekv fit` leaves out.
    """

    context: int = 384
    continuation: int = 128
    samples: int = 16
    sinks: int = 4
    window: int = 32
    texts: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        check_int("continuation", self.continuation, FIRST, 1 << 16)
        check_int("context", self.context, COPY_BACK + self.continuation, 1 << 20)
        check_int("samples", self.samples, 1, 1 << 16)
        check_int("sinks", self.sinks, 0, self.context // 2)
        check_int("window", self.window, 1, self.context // 2)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One piece of text and what is forced through behind it.

    Attributes:
        context: Tokens that are prefilled.
        following: What follows in the text.
        repeated: A passage of the context.
        needle: Another context, with a fact near its start and a question about it at its end.
        answer: To the question.
    """

    context: list[int]
    following: list[int]
    repeated: list[int]
    needle: list[int]
    answer: list[int]


def samples_of(tokenizer: Tokenizer, options: QualityOptions) -> list[Sample]:
    """As many samples as asked for, or as the files hold.

    Raises:
        ConfigError: The files hold too little text.
    """
    start = options.context - COPY_BACK - options.continuation
    found = []
    for number, piece in enumerate(_pieces(tokenizer, options)):
        context = piece[: options.context]
        needle, answer = _needle(tokenizer, context, number)
        found.append(
            Sample(
                context=context,
                following=piece[options.context :],
                repeated=context[start : start + options.continuation],
                needle=needle,
                answer=answer,
            )
        )
    return found


def _needle(
    tokenizer: Tokenizer, context: Sequence[int], number: int
) -> tuple[list[int], list[int]]:
    """The context with a fact in its first tenth and a question at its end; the answer."""
    code = f" {(7919 * (number + 1)) % 9000 + 1000}"
    fact = tokenizer.encode(_NEEDLE.format(code.strip()), add_special_tokens=False)
    question = tokenizer.encode(_QUESTION, add_special_tokens=False)
    answer = tokenizer.encode(code, add_special_tokens=False)
    at = len(context) // 20
    filled = [*context[:at], *fact, *context[at + len(fact) : len(context) - len(question)]]
    return [*filled, *question], list(answer)


def _pieces(tokenizer: Tokenizer, options: QualityOptions) -> list[list[int]]:
    """Of `context + continuation` tokens each, from as many files as there are."""
    files = text_files(options.texts, held_out=True)
    length = options.context + options.continuation
    encoded: dict[Path, list[int]] = {}
    pieces: list[list[int]] = []
    for round_ in range(options.samples):
        for path in files:
            if path not in encoded:
                encoded[path] = list(tokenizer.encode(path.read_text(errors="replace")))
            ids = encoded[path]
            places = len(ids) // length
            step = max(1, min(_SPREAD, places // max(1, -(-options.samples // len(files)))))
            start = round_ * step * length
            if start + length <= len(ids):
                pieces.append(ids[start : start + length])
            if len(pieces) == options.samples:
                return pieces
    if not pieces:
        raise ConfigError.of("text", ", ".join(map(str, files)), f"longer than {length} tokens")
    return pieces
