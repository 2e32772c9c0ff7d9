"""What `bench switch` plays: its options, and conversations at the load that they ask for."""

import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgekv.bench.report import Row, Watch
from edgekv.bench.scratch import NO_STORE, layout_of
from edgekv.bench.sessions.conversations import (
    ConversationShape,
    Talk,
    draw_conversations,
    draw_steady,
)
from edgekv.bench.sessions.load import (
    Capacity,
    TimeBudget,
    fit_size,
    mean_open_bytes,
    measure_capacity,
    num_busy,
)
from edgekv.bench.sessions.trace import RankTrace, TracePolicy
from edgekv.bench.sessions.turns import app_name
from edgekv.config import MIB, RuntimeConfig, SwapMode, SwapOptions, check_float, check_int
from edgekv.device import profile
from edgekv.errors import ConfigError
from edgekv.runtime import Runtime

MODES: dict[str, SwapMode] = {
    "recompute": "off",
    "naive": "async",  # but for `TWINS`
    "groups": "async",
    "async": "async",
    "reuse": "reuse",
}
CLOSE_S = 1.0  # what a row takes behind its play
_CONTEXT_PER_SESSION = 4  # the model's context, in mean conversations
_LARGEST_SHARE = 1.25  # of the largest session, the pool has at least
_NUM_ABSOLUTE = 64  # sessions, where arrivals per second are given
_NUM_LONG = 64  # sessions that are open in a long run, at most
_TURNS_LONG = 6  # that each of them has at least
_THINK_SCALE = 0.01  # where arrivals per second are given
# Of KV, in a pool in which nothing is ever moved: half of it would be written behind.
_WHOLE = 2.2
_MEMORY_SHARE = 0.75  # of the machine's, that KV may take
_CAPACITY_SHARE = 0.09  # of the minutes, to measure capacity
_CAPACITY_S = 45.0  # without a limit
_PROBE_TOKENS = 512
_PROBE_NUM_OPEN = 8
_PROBE_SHARE = 0.3  # of the time to measure capacity, before the size is known
_NEW_CYCLES = 40.0  # conversations at hand while capacity is measured


@dataclass(frozen=True, kw_only=True)
class SwitchOptions:
    """What is run."""

    policies: tuple[str, ...]  # keys of `MODES`, in the order in which they run
    # Parts of the machine's capacity; one set of rows each.
    utilisations: tuple[float, ...] = (0.6,)
    minutes: float = 8.0  # for the whole run, from when the model is there
    # So many turns a row, however long they take, instead of `minutes`.
    row_turns: int | None = None
    arrivals_per_s: float | None = None  # conversations that start per second; instead of all these
    reps: int = 1  # repetitions
    # Conversations that are open at a time, or with `arrivals_per_s` all of them. None fits them to
    # the time.
    sessions: int | None = None
    turns_mean: float = 5.5  # mean number of turns of a conversation
    # Mean tokens of a conversation; None is a quarter of the model's context, or less where the
    # time is short.
    session_tokens: int | None = None
    # Think times, as a fraction of the published ones; None fits them to the load.
    think_scale: float | None = None
    # Pool, as a fraction of the KV of all sessions: of those that are open, on average, or with
    # `arrivals_per_s` of all at their ends.
    pool_fraction: float = 0.25
    trace: str = "random"  # kind of the trace of ranks, one of `TRACE_KINDS`
    update_frequency: float = 0.04  # of the trace, per engine step
    seed: int = 0  # of the first repetition

    def __post_init__(self) -> None:
        for utilisation in self.utilisations:
            check_float("utilisation", utilisation, 0.01, 10.0)
        check_float("minutes", self.minutes, 0.05, 10_000.0)
        if self.row_turns is not None:
            check_int("row turns", self.row_turns, 1, 1 << 20)
        check_int("reps", self.reps, 1, 100)
        check_float("pool fraction", self.pool_fraction, 1e-4, 100.0)
        sessions = 1 if self.sessions is None else self.sessions
        tokens = 1 << 10 if self.session_tokens is None else self.session_tokens
        self.shape(sessions, tokens, tokens_max=1 << 24)
        self.trace_policy(1)

    @property
    def limited(self) -> bool:
        """Whether `minutes` count."""
        return self.row_turns is None and self.arrivals_per_s is None

    def shape(self, num_sessions: int, tokens_mean: int, *, tokens_max: int) -> ConversationShape:
        """The conversations that are drawn, but for their pace."""
        return ConversationShape(
            num_sessions=num_sessions,
            turns_mean=self.turns_mean,
            tokens_mean=tokens_mean,
            tokens_max=tokens_max,
            arrivals_per_s=1.0 if self.arrivals_per_s is None else self.arrivals_per_s,
            think_scale=_THINK_SCALE if self.think_scale is None else self.think_scale,
            seed=self.seed,
        )

    def trace_policy(self, num_sessions: int) -> TracePolicy:
        """Scheduling by the trace from its start, of sessions in the order of their apps."""
        trace = RankTrace(self.trace, num_sessions, self.update_frequency, self.seed)
        return TracePolicy(trace, {app_name(i): i for i in range(num_sessions)})


@dataclass(frozen=True, kw_only=True)
class Script:
    """What all policies play once."""

    conversations: Sequence[Talk]  # one session each
    pool_bytes: int  # memory, but for the policy that has it all
    whole_bytes: int  # memory of that one
    token_bytes: int  # KV of one token
    disk_bytes: int  # twice what all sessions hold: no policy is slowed down by a full disk
    for_ms: float | None  # when it ends; None is with the last turn
    facts: Row  # of its rows

    @property
    def num_turns(self) -> int:
        """Turns that are expected: all, or as many as the load brings in its time."""
        if self.for_ms is None:
            return sum(len(c.turns) for c in self.conversations)
        turns_per_s: float = self.facts["utilisation"] * self.facts["capacity_turns_per_s"]
        return max(1, round(1e-3 * self.for_ms * turns_per_s))


@dataclass(kw_only=True)
class ScriptWriter:
    """Measures the capacity where it is needed, and draws what is played."""

    path: pathlib.Path
    options: SwitchOptions
    budget: TimeBudget
    num_rows: int
    watch: Watch
    open_s: float = 0.0  # what opening a runtime takes

    def __post_init__(self) -> None:
        self.layout = layout_of(self.path)
        # A token less than the context: KV from before the play is computed for one of answer.
        self.tokens_max = self.layout.context_max - 2
        mean = self.layout.context_max // _CONTEXT_PER_SESSION
        self.tokens_mean = self.options.session_tokens or mean

    def write(self) -> list[Script]:
        """All scripts, repetition by repetition.

        Raises:
            ConfigError: The sessions do not fit into memory, or into the model's context.
        """
        options = self.options
        if options.arrivals_per_s is not None:
            return [self._absolute(rep) for rep in range(options.reps)]
        capacity, shape = self._calibrate()
        return [
            self._steady(capacity, shape, utilisation, rep)
            for rep in range(options.reps)
            for utilisation in options.utilisations
        ]

    def _absolute(self, rep: int) -> Script:
        """Arrivals at the rate that was given, played to their ends."""
        options = self.options
        num_sessions = options.sessions or _NUM_ABSOLUTE
        tokens_max = self.layout.context_max - 1
        shape = options.shape(num_sessions, self.tokens_mean, tokens_max=tokens_max)
        conversations = draw_conversations(replace(shape, seed=options.seed + rep))
        pool_bytes = options.pool_fraction * sum(self._sizes(conversations))
        facts = {"arrivals_per_s": options.arrivals_per_s}
        return self._script(shape, conversations, pool_bytes, None, facts)

    def _steady(
        self, capacity: Capacity, shape: ConversationShape, utilisation: float, rep: int
    ) -> Script:
        """Conversations at a utilisation of the capacity."""
        options = self.options
        turn_ms, cycle_ms = capacity.turn_ms(shape), capacity.cycle_ms(shape, utilisation)
        if options.row_turns is not None:
            for_ms = options.row_turns * turn_ms / utilisation
        else:
            recall_s = shape.num_sessions * shape.tokens_mean / capacity.recall_per_s
            for_ms = 1e3 * max(1.0, self._row_s - recall_s)
        think_scale = options.think_scale
        if think_scale is None:
            think_scale = capacity.think_scale(shape, utilisation)
        drawn = replace(shape, think_scale=think_scale, seed=options.seed + rep)
        conversations = draw_steady(drawn, cycle_ms=cycle_ms, window_ms=for_ms)
        open_bytes = mean_open_bytes(self.layout, conversations, cycle_ms, for_ms)
        _check_memory(open_bytes, shape.num_sessions)
        facts = {
            "utilisation": utilisation,
            "capacity_turns_per_s": 1e3 / turn_ms,
            "num_busy": capacity.num_busy,
            "window_s": 1e-3 * for_ms,
        }
        pool_bytes = options.pool_fraction * open_bytes
        return self._script(drawn, conversations, pool_bytes, for_ms, facts)

    @property
    def _row_s(self) -> float:
        """What is left for a row's play, recalling included."""
        row_s = self.budget.row_s(self.num_rows)
        assert row_s is not None
        return row_s - 1.3 * self.open_s - CLOSE_S

    def _calibrate(self) -> tuple[Capacity, ConversationShape]:
        """Measure capacity, first on short conversations if their size is to fit the time."""
        options = self.options
        num_open, tokens = options.sessions, min(self.tokens_mean, self.tokens_max)
        if options.row_turns is not None:
            most = max(4, min(_NUM_LONG, options.row_turns // _TURNS_LONG))
            shape = self._shape(most if num_open is None else num_open, tokens)
            return self._measure(shape, _CAPACITY_S), shape
        seconds = 60.0 * _CAPACITY_SHARE * options.minutes
        if num_open is None or options.session_tokens is None:
            probe = self._shape(num_open or _PROBE_NUM_OPEN, min(tokens, _PROBE_TOKENS))
            capacity = self._measure(probe, _PROBE_SHARE * seconds)
            seconds -= _PROBE_SHARE * seconds
            num_open, tokens = fit_size(
                capacity,
                row_s=max(1.0, self._row_s - seconds / self.num_rows),
                utilisation=min(options.utilisations),
                turns_mean=options.turns_mean,
                tokens_mean=tokens,
                num_open=num_open,
            )
            tokens = options.session_tokens or tokens
        shape = self._shape(num_open, tokens)
        return self._measure(shape, seconds), shape

    def _shape(self, num_open: int, tokens: int) -> ConversationShape:
        return self.options.shape(num_open, tokens, tokens_max=self.tokens_max)

    def _measure(self, shape: ConversationShape, seconds: float) -> Capacity:
        self.watch("capacity", 0, 1)
        started_s = time.monotonic()
        conversations = draw_steady(shape, cycle_ms=1.0, window_ms=_NEW_CYCLES)
        busy = num_busy(shape.num_sessions, self.options.pool_fraction)
        config = RuntimeConfig(
            pool_bytes=_in_memory(_WHOLE * busy * max(self._sizes(conversations))),
            num_sessions_max=len(conversations),
            swap=SwapOptions(mode="off"),
            store=NO_STORE,
        )
        policy = self.options.trace_policy(len(conversations))
        with Runtime.open(str(self.path), config=config, policy=policy) as runtime:
            self.open_s = time.monotonic() - started_s
            return measure_capacity(runtime, conversations, busy, seconds - self.open_s)

    def _script(
        self,
        shape: ConversationShape,
        conversations: Sequence[Talk],
        pool_bytes: float,
        for_ms: float | None,
        facts: Row,
    ) -> Script:
        sizes = self._sizes(conversations)
        unknown = ("arrivals_per_s", "utilisation", "capacity_turns_per_s", "num_busy", "window_s")
        return Script(
            conversations=conversations,
            # The largest session must fit beside staging, or its answers would be cut.
            pool_bytes=int(max(pool_bytes, _LARGEST_SHARE * max(sizes))),
            whole_bytes=_in_memory(_WHOLE * sum(sizes)),
            token_bytes=self.layout.token_bytes,
            disk_bytes=2 * sum(sizes) + 64 * MIB,
            for_ms=for_ms,
            facts={
                "sessions": shape.num_sessions,
                "tokens_mean": shape.tokens_mean,
                "think_scale": shape.think_scale,
                **dict.fromkeys(unknown),
                **facts,
            },
        )

    def _sizes(self, conversations: Sequence[Talk]) -> list[int]:
        layout = self.layout
        return [layout.capacity_bytes(layout.capacity_for(c.num_tokens)) for c in conversations]


def _in_memory(num_bytes: float) -> int:
    """At most what the machine has; a budget for more than is used does not take it."""
    return int(max(1 << 20, min(num_bytes, _MEMORY_SHARE * profile().memory_bytes)))


def _check_memory(open_bytes: int, num_sessions: int) -> None:
    limit_bytes = _MEMORY_SHARE * profile().memory_bytes
    if 1.5 * open_bytes > limit_bytes:
        raise ConfigError(
            f"the KV of {num_sessions} open sessions takes {open_bytes / 2**30:.1f} GiB on "
            f"average, too much for the {limit_bytes / 2**30:.1f} GiB that resident may have",
            hint="ask for fewer --sessions or --session-tokens",
        )
