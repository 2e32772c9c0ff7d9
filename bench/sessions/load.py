"""Load that is the same on any machine: capacity is measured, conversations come at a part of it.

**Capacity** is what this machine could do if switching between sessions cost nothing: the turns a
second that it answers with everything in memory while as many users as the small pool holds
sessions are busy, each with one conversation after the other and never a pause. More users would
share more steps, but no policy could serve them together. Counted are rows (tokens computed, those
of prompts and answers) between two moments of that play, and not turns: turns are few, of very
different length, and cut at both ends. A turn is then as long as its mean number of tokens takes.
On a machine that is busy with other things capacity is an average over some tens of seconds, and
what a row really had is reported beside it: `utilisation_measured`, service to elapsed time.

**Load** is drawn in units of such a turn. So many conversations are open all the time
(`num_open`); each comes back for its next turn once in a *cycle*, and new ones begin as often as
others end. The cycle is as long as all these turns take at capacity, divided by the utilisation;
what the answer leaves of it is think time. The play is in its steady state from the first moment
(`draw_steady`): KV of what was said before is computed before the clock starts. Conversations begin
whether or not a policy keeps up.

**Time** is shared equally among the rows of a run. Sizes are chosen so that a row has enough turns,
every row ends when its share is over, and what it has not answered by then counts as it is.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from edgekv.bench.sessions.conversations import THINK_S_MEAN, ConversationShape, Talk
from edgekv.bench.sessions.turns import Play
from edgekv.kv.layout import KVLayout
from edgekv.runtime import Runtime

_RAMP = 0.15  # of a measurement of capacity, until all users are somewhere in a turn
_NUM_OPEN = (16, 12, 8)  # tried in this order
_TOKENS_MIN = 192
_TOKENS_SHRINK = 0.8
_TURNS_PER_SESSION = 4.0  # that a row should have
_RECALL_MAX = 0.3  # of a row's time
_PAUSE_MIN = 0.1  # of a cycle
_MOMENTS = 16


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What was measured."""

    rows_per_s: float  # of busy users, in the mix of their conversations
    recall_per_s: float  # tokens of prompts alone, one session after the other
    num_busy: int  # users

    def turn_ms(self, shape: ConversationShape) -> float:
        """What a mean turn takes of the machine."""
        return 1e3 * shape.tokens_mean / shape.turns_mean / self.rows_per_s

    def cycle_ms(self, shape: ConversationShape, utilisation: float) -> float:
        """From one turn of an open conversation to its next, at a part of this capacity."""
        # An open conversation will have so many turns for each time that it comes back.
        turns_per_return = 1.0 + 1.0 / shape.returns_mean
        return shape.num_sessions * turns_per_return * self.turn_ms(shape) / utilisation

    def think_scale(self, shape: ConversationShape, utilisation: float) -> float:
        """Think times that the answers leave of a cycle, to the published ones."""
        cycle_ms = self.cycle_ms(shape, utilisation)
        answer_ms = min(self.num_busy, shape.num_sessions) * self.turn_ms(shape)
        return 1e-3 * max(_PAUSE_MIN * cycle_ms, cycle_ms - answer_ms) / THINK_S_MEAN


def num_busy(num_open: int, pool_fraction: float) -> int:
    """Users whose sessions the small pool holds together."""
    return max(2, min(num_open, round(pool_fraction * num_open)))


def measure_capacity(
    runtime: Runtime, conversations: Sequence[Talk], num_busy: int, seconds: float
) -> Capacity:
    """Play conversations without a pause for about so long; see the module.

    The runtime's pool holds them all, nobody else is on it, and they are more than can be played.
    """
    started_s = time.monotonic()
    play = Play(runtime, conversations)
    num_recalled = play.recall(num_busy)
    recall_s = time.monotonic() - started_s
    moments: list[tuple[float, int]] = []
    play.run(
        num_busy=num_busy,
        for_ms=1e3 * max(1.0, seconds - recall_s),
        tick=lambda at_ms: moments.append((at_ms, runtime.counters().num_rows)),
    )
    last_ms, last_rows = moments[-1]
    start_ms = moments[0][0] + _RAMP * (last_ms - moments[0][0])
    first_ms, first_rows = next(moment for moment in moments if moment[0] >= start_ms)
    if first_rows == last_rows:  # all in one step
        first_ms, first_rows = moments[0]
    return Capacity(
        rows_per_s=1e3 * max(1, last_rows - first_rows) / max(1.0, last_ms - first_ms),
        recall_per_s=max(1, num_recalled) / max(1e-3, recall_s),
        num_busy=num_busy,
    )


def fit_size(
    capacity: Capacity,
    *,
    row_s: float,
    utilisation: float,
    turns_mean: float,
    tokens_mean: int,
    num_open: int | None = None,
) -> tuple[int, int]:
    """How many conversations are open, and their mean tokens, so that a row has enough turns.

    The largest of both that fit into `row_s`, recalling included, or the smallest that are tried;
    `tokens_mean` is as long as they may be, and `utilisation` the least that is played.
    """
    choices = _NUM_OPEN if num_open is None else (num_open,)
    tokens: float = tokens_mean
    smallest = min(tokens_mean, _TOKENS_MIN)
    while True:
        for number in choices:
            recall_s = number * tokens / capacity.recall_per_s
            turn_s = tokens / turns_mean / capacity.rows_per_s
            num_turns = utilisation * (row_s - recall_s) / turn_s
            if recall_s <= _RECALL_MAX * row_s and num_turns >= _TURNS_PER_SESSION * number:
                return number, int(tokens)
        if tokens <= smallest:
            return choices[-1], smallest
        tokens = max(smallest, _TOKENS_SHRINK * tokens)


def mean_open_bytes(
    layout: KVLayout, conversations: Sequence[Talk], cycle_ms: float, window_ms: float
) -> int:
    """KV of the conversations that are open, on average over a play in which nobody is late."""
    moments = [window_ms * (number + 0.5) / _MOMENTS for number in range(_MOMENTS)]
    found = [_open_tokens(c, cycle_ms, at_ms) for c in conversations for at_ms in moments]
    return sum(layout.capacity_bytes(layout.capacity_for(n)) for n in found if n) // _MOMENTS


def _open_tokens(conversation: Talk, cycle_ms: float, at_ms: float) -> int:
    """Of a conversation by then; 0 if it has not begun, or is over."""
    num_done = max(0, int((at_ms - conversation.start_ms) // cycle_ms) + 1)
    if num_done > len(conversation.turns):
        return 0
    said = sum(turn.num_tokens for turn in conversation.turns[:num_done])
    return conversation.num_past_tokens + said


class TimeBudget:
    """What is left of the time that a run may take; None is without end."""

    def __init__(self, seconds: float | None) -> None:
        self._end_s = None if seconds is None else time.monotonic() + seconds

    def row_s(self, num_rows_left: int) -> float | None:
        """What each of the rows that are left may take."""
        if self._end_s is None:
            return None
        return max(0.0, self._end_s - time.monotonic()) / num_rows_left
