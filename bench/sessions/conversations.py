"""Multi-turn conversations like those of real services, drawn from published figures. Pure.

* **Turns**: ShareGPT has 5.5 a conversation on average (FastSwitch, arXiv 2411.18424). Only the
  mean is published; a geometric distribution with that mean is this module's choice.
* **Lengths** of what is said and answered: the quantiles of Azure's 2023 conversation trace,
  log-linear between them. They belong to models of 4k and more tokens of context that serve
  thousands of users; one factor makes them smaller, so that a conversation has a given mean.
* **Starts**: Poisson arrivals, from nothing (`draw_conversations`) or in a steady state
  (`draw_steady`). **Think time** before each further turn: the quantiles of the proxy that
  Mooncake's conversation trace gives (FAST'25), made shorter by a factor.

The same arguments give the same conversations on every machine.
"""

import math
import random
from dataclasses import dataclass

from edgekv.config import check_float, check_int

_NUM_RESIDUALS = 32
_RETURNS_MIN = 0.25
_TURNS_MAX_FACTOR = 4  # no conversation has more turns than this times the mean


@dataclass(frozen=True)
class Quantiles:
    """A distribution known at a few points: (probability, value) pairs, both rising.

    Values between two points are interpolated in their logarithm; the first and the last stretch go
    on to probability 0 and 1.
    """

    points: tuple[tuple[float, float], ...]

    def at(self, probability: float) -> float:
        """The value that this fraction of all draws stays below."""
        assert 0 <= probability <= 1
        index = 1
        while index < len(self.points) - 1 and self.points[index][0] < probability:
            index += 1
        (p0, v0), (p1, v1) = self.points[index - 1], self.points[index]
        share = (probability - p0) / (p1 - p0)
        return math.exp(math.log(v0) + share * (math.log(v1) - math.log(v0)))

    def mean(self, steps: int = 2000) -> float:
        """The mean, by the midpoint rule."""
        return sum(self.at((i + 0.5) / steps) for i in range(steps)) / steps


INPUT_TOKENS = Quantiles(
    ((0.05, 181), (0.25, 396), (0.50, 1020), (0.75, 1189), (0.95, 4083), (0.99, 4142))
)
OUTPUT_TOKENS = Quantiles(
    ((0.05, 41), (0.25, 85), (0.50, 129), (0.75, 395), (0.95, 451), (0.99, 601))
)
THINK_S = Quantiles(((0.05, 30), (0.25, 66), (0.50, 123), (0.75, 264), (0.90, 483), (0.95, 618)))
THINK_S_MEAN = THINK_S.mean()


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question and its answer."""

    # From the end of the answer before to this turn's submission; 0 at the first turn.
    think_ms: float
    input_tokens: int  # new tokens of the prompt, behind all tokens so far
    output_tokens: int  # tokens of the answer

    @property
    def num_tokens(self) -> int:
        """Tokens by which the conversation grows."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True)
class Talk:
    """A conversation: turns, each submitted when the one before is answered and thought over."""

    start_ms: float  # when its first turn is submitted
    turns: tuple[Turn, ...]  # at least one
    num_past_tokens: int = 0  # said before the play begins: a conversation that is open by then

    @property
    def num_tokens(self) -> int:
        """Tokens at the end."""
        return self.num_past_tokens + sum(turn.num_tokens for turn in self.turns)


@dataclass(frozen=True, kw_only=True)
class ConversationShape:
    """What conversations are drawn."""

    num_sessions: int  # how many
    turns_mean: float = 5.5  # mean number of turns
    tokens_mean: int = 2048  # mean tokens of a whole conversation, but for what `tokens_max` cuts
    tokens_max: int = 8192  # conversations end before the turn that would exceed this
    arrivals_per_s: float = 1.0  # mean rate at which conversations start
    think_scale: float = 0.01  # think times are this fraction of the published ones; 0 leaves none
    seed: int = 0  # same seed, same conversations

    def __post_init__(self) -> None:
        check_int("sessions", self.num_sessions, 1, 4096)
        check_float("turns", self.turns_mean, 1.0, 1000.0)
        check_int("session tokens", self.tokens_mean, 16, 1 << 24)
        check_int("context", self.tokens_max, self.tokens_mean, 1 << 24)
        check_float("arrivals per second", self.arrivals_per_s, 1e-3, 1e6)
        check_float("think scale", self.think_scale, 0.0, 1000.0)
        check_int("seed", self.seed, 0, (1 << 63) - 1)

    @property
    def returns_mean(self) -> float:
        """Turns of a conversation behind its first, on average, and never quite none."""
        return max(_RETURNS_MIN, self.turns_mean - 1.0)

    @property
    def length_scale(self) -> float:
        """What published lengths are multiplied with."""
        return self.tokens_mean / (self.turns_mean * (INPUT_TOKENS.mean() + OUTPUT_TOKENS.mean()))


def draw_conversations(shape: ConversationShape) -> list[Talk]:
    """The conversations of a shape, in the order in which they start.

    Each is drawn from a generator of its own, so that one more session changes no other.
    """
    scale = shape.length_scale
    arrivals = random.Random(f"arrivals {shape.seed}")
    conversations, start_ms = [], 0.0
    for index in range(shape.num_sessions):
        start_ms += 1e3 * arrivals.expovariate(shape.arrivals_per_s)
        draw = random.Random(f"conversation {shape.seed} {index}")
        turns = _draw_turns(shape, scale, draw, room=shape.tokens_max)
        conversations.append(Talk(start_ms=start_ms, turns=turns))
    return conversations


def draw_steady(shape: ConversationShape, *, cycle_ms: float, window_ms: float) -> list[Talk]:
    """Conversations of a play that begins in the middle: as many open as will ever be, on average.

    `shape.num_sessions` are open at the start, each with what was said before and somewhere in its
    think time. New ones start until `window_ms`, by a Poisson process of which the number is known,
    as often as old ones end. As numbers of turns are geometric, the rest of an open conversation
    is drawn as a whole one is. `cycle_ms` is the mean time from one turn of a conversation to its
    next; its last one ends it.
    """
    scale = shape.length_scale
    found = []
    for index in range(shape.num_sessions):
        draw = random.Random(f"open {shape.seed} {index}")
        start_ms = cycle_ms * _draw_residual(draw)
        past = _draw_turns(shape, scale, draw, room=shape.tokens_max // 2, whole=False)
        num_past = sum(turn.num_tokens for turn in past)
        turns = _draw_turns(shape, scale, draw, room=shape.tokens_max - num_past)
        found.append(Talk(start_ms=start_ms, turns=turns, num_past_tokens=num_past))
    num_new = round(shape.num_sessions * window_ms / (shape.returns_mean * cycle_ms))
    for index in range(num_new):
        draw = random.Random(f"new {shape.seed} {index}")
        start_ms = window_ms * draw.random()
        turns = _draw_turns(shape, scale, draw, room=shape.tokens_max)
        found.append(Talk(start_ms=start_ms, turns=turns))
    return found


def _draw_residual(draw: random.Random) -> float:
    """What is left of the think time at a moment, in means: long ones are met more often."""
    times = [THINK_S.at(draw.random()) for _ in range(_NUM_RESIDUALS)]
    (met,) = draw.choices(times, weights=times)
    return draw.random() * met / THINK_S_MEAN


def _draw_turns(
    shape: ConversationShape, scale: float, draw: random.Random, *, room: int, whole: bool = True
) -> tuple[Turn, ...]:
    """Turns that fit into `room` tokens; not `whole`: those before the turn that comes next."""
    turns: list[Turn] = []
    for number in range(_draw_num_turns(shape.turns_mean, draw) - (not whole)):
        think_s = shape.think_scale * THINK_S.at(draw.random()) if number else 0.0
        # Two tokens of answer at least: one alone has no time between tokens.
        input_tokens = max(1, round(scale * INPUT_TOKENS.at(draw.random())))
        output_tokens = max(2, round(scale * OUTPUT_TOKENS.at(draw.random())))
        if not turns:  # the first always fits
            input_tokens = min(input_tokens, room - 2)
            output_tokens = min(output_tokens, room - input_tokens)
        turn = Turn(think_ms=1e3 * think_s, input_tokens=input_tokens, output_tokens=output_tokens)
        if turn.num_tokens > room:
            break
        room -= turn.num_tokens
        turns.append(turn)
    return tuple(turns)


def _draw_num_turns(mean: float, draw: random.Random) -> int:
    """Geometric from 1 on, by inversion."""
    if mean <= 1.0:
        return 1
    number = 1 + int(math.log(1.0 - draw.random()) / math.log(1.0 - 1.0 / mean))
    return min(number, math.ceil(_TURNS_MAX_FACTOR * mean))
