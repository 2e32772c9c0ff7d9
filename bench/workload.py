"""What is computed: prompts of real text at exact lengths. Pure."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekv.config import PrefillMode, Sampling, check_int
from edgekv.errors import ConfigError
from edgekv.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgekv.runtime import Reply, ReplyStream, Session

# The beginning of Lewis Carroll, "Alice's Adventures in Wonderland" (1865), in the public domain.
TEXT = Path(__file__).with_name("alice.txt").read_text(encoding="utf-8")

PROMPT_TOKENS_MAX = 1 << 20
SESSIONS_MAX = 256

# Where in the text the next session's prompt begins. Larger than most prompts' first sentences,
# and without a common divisor with any likely length of the text, so that all begin elsewhere.
_STRIDE = 397


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sessions that start together, each with a prompt of its own."""

    lengths: tuple[int, ...]  # prompt tokens of each session
    new_tokens: int  # tokens that every session generates in each of the two phases
    reps: int  # pairs (or runs) that count

    def __post_init__(self) -> None:
        check_int("sessions", len(self.lengths), 1, SESSIONS_MAX)
        for length in self.lengths:
            check_int("prompt tokens", length, 1, PROMPT_TOKENS_MAX)
        check_int("new tokens", self.new_tokens, 2, 1 << 16)
        check_int("reps", self.reps, 1, 1000)

    @property
    def tokens_max(self) -> int:
        """Tokens of the longest session once both phases are over."""
        return max(self.lengths) + 2 * self.new_tokens

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of all prompts, exactly as long as `lengths` says."""
        text = TextIds(tokenizer)
        return [text.prompt(length, i) for i, length in enumerate(self.lengths)]


class TextIds:
    """Real text as token ids, encoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._head = list(tokenizer.prefix_ids)
        self._ids = tokenizer.encode(TEXT, add_special_tokens=False)

    def stretch(self, num_tokens: int, index: int) -> list[int]:
        """Exactly `num_tokens` ids; another `index` begins elsewhere, and the text goes round."""
        start = index * _STRIDE % len(self._ids)
        return list(itertools.islice(itertools.cycle(self._ids), start, start + num_tokens))

    def prompt(self, num_tokens: int, index: int) -> list[int]:
        """Such a stretch behind what the tokenizer puts before a text: mostly BOS or nothing."""
        head = self._head[:num_tokens]
        return [*head, *self.stretch(num_tokens - len(head), index)]


def answer(
    session: "Session",
    token_ids: Sequence[int],
    num_tokens: int,
    *,
    prefill: PrefillMode | None = None,
) -> "Reply":
    """A session's answer to token ids, of exactly so many tokens; waits for it."""
    sampling = Sampling(max_tokens=num_tokens, ignore_eos=True)
    return whole(session.submit_ids(list(token_ids), sampling, prefill=prefill))


def whole(stream: "ReplyStream") -> "Reply":
    """A stream's reply; waits for it."""
    with stream:
        for _ in stream:
            pass
    assert stream.reply is not None
    return stream.reply


def ragged_lengths(low: int, high: int, num_sessions: int) -> tuple[int, ...]:
    """Lengths evenly spaced from `low` to `high`, both included, in a fixed shuffled order.

    One session gets the middle. Shuffled because requests do not arrive sorted.
    """
    check_int("ragged", low, 1, PROMPT_TOKENS_MAX)
    check_int("ragged", high, low, PROMPT_TOKENS_MAX)
    check_int("sessions", num_sessions, 1, SESSIONS_MAX)
    if num_sessions == 1:
        return ((low + high) // 2,)
    span = high - low
    lengths = [low + round(i * span / (num_sessions - 1)) for i in range(num_sessions)]
    random.Random(0).shuffle(lengths)
    return tuple(lengths)


def check_fits(workloads: Sequence[Workload], context_max: int) -> None:
    """Make sure that every session of every workload fits in the model's context.

    Raises:
        ConfigError: One does not.
    """
    for workload in workloads:
        if workload.tokens_max > context_max:
            raise ConfigError(
                f"{max(workload.lengths)} prompt tokens and twice {workload.new_tokens} new ones "
                f"exceed the model's context of {context_max} tokens",
                hint="ask for shorter prompts or fewer new tokens",
            )
