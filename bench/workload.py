"""What is computed: prompts of real text at exact lengths. Pure."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from edgekv.bench.text import TEXT
from edgekv.config import check_int
from edgekv.errors import ConfigError
from edgekv.tokenizer import Tokenizer

PROMPT_TOKENS_MAX = 1 << 20
SESSIONS_MAX = 256
NEW_TOKENS_MAX = 1 << 16
REPS_MAX = 1000

# Where in the text the next session's prompt begins. Larger than most prompts' first sentences,
# and without a common divisor with any likely length of the text, so that all begin elsewhere.
_STRIDE = 397


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sessions that start together, each with a prompt of its own.

    Attributes:
        lengths: Prompt tokens of each session.
        new_tokens: Tokens that every session generates in each of the two phases.
        reps: Pairs (or runs) that count.
    """

    lengths: tuple[int, ...]
    new_tokens: int
    reps: int

    def __post_init__(self) -> None:
        check_int("sessions", len(self.lengths), 1, SESSIONS_MAX)
        for length in self.lengths:
            check_int("prompt tokens", length, 1, PROMPT_TOKENS_MAX)
        check_int("new tokens", self.new_tokens, 2, NEW_TOKENS_MAX)
        check_int("reps", self.reps, 1, REPS_MAX)

    @property
    def num_sessions(self) -> int:
        """Sessions that start together."""
        return len(self.lengths)

    @property
    def tokens_max(self) -> int:
        """Tokens of the longest session once both phases are over."""
        return max(self.lengths) + 2 * self.new_tokens

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of all prompts, exactly as long as `lengths` says."""
        return [make_prompt(tokenizer, length, i) for i, length in enumerate(self.lengths)]


def make_prompt(tokenizer: Tokenizer, num_tokens: int, index: int) -> list[int]:
    """Real text as exactly `num_tokens` ids; another `index` is another part of the text.

    Behind what the tokenizer puts before a text (mostly BOS or nothing), the text goes round: where
    it ends it begins again.
    """
    head = list(tokenizer.prefix_ids)[:num_tokens]
    return [*head, *TextIds(tokenizer).stretch(num_tokens - len(head), index)]


class TextIds:
    """Real text as token ids, encoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._ids = tokenizer.encode(TEXT, add_special_tokens=False)

    def stretch(self, num_tokens: int, index: int) -> list[int]:
        """Exactly `num_tokens` ids; another `index` begins elsewhere, and the text goes round."""
        start = index * _STRIDE % len(self._ids)
        return list(itertools.islice(itertools.cycle(self._ids), start, start + num_tokens))


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
