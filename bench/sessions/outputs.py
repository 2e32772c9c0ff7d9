"""Whether two ways of keeping KV gave the same answers, and where not, whether it matters."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgekv.bench.sessions.turns import Played
from edgekv.runtime import Runtime

TIE_LOGITS = 1e-4  # closer than this, two tokens may change places with the shape of a step


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where a session's answers part.

    Attributes:
        prefix: All tokens before, inputs included.
        first: The one run's next token.
        second: The other's.
    """

    prefix: tuple[int, ...]
    first: int
    second: int


def differences(a: Played, b: Played) -> list[Difference]:
    """One for each session whose answers differ; those that ended early are compared as far."""
    found = []
    for session in range(len(a.replies)):
        difference = _difference(
            a.inputs[session],
            [reply.token_ids for reply in a.replies[session]],
            [reply.token_ids for reply in b.replies[session]],
        )
        if difference is not None:
            found.append(difference)
    return found


def _difference(
    inputs: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
) -> Difference | None:
    prefix: list[int] = []
    for input_ids, mine, other in zip(inputs, ours, theirs, strict=False):
        prefix += input_ids
        for first, second in zip(mine, other, strict=True):
            if first != second:
                return Difference(prefix=tuple(prefix), first=first, second=second)
            prefix.append(first)
    return None


def num_ties(runtime: Runtime, found: Sequence[Difference]) -> int:
    """How many differences are between two tokens that the model finds equally likely."""
    return sum(_is_tie(runtime, difference) for difference in found)


def _is_tie(runtime: Runtime, difference: Difference) -> bool:
    logits = runtime.logits(difference.prefix)[-1]
    best = float(logits.max())
    return all(best - float(logits[t]) <= TIE_LOGITS for t in (difference.first, difference.second))
