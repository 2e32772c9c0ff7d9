"""What the scheduler reads and what it decides: values, nothing else."""

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from edgekv.config import Priority
from edgekv.ids import RequestId, SessionId
from edgekv.kv.layout import KVLayout, PoolSnapshot
from edgekv.sched.cost import StepShape

Place = tuple[float, ...]  # of an app's requests of a class among those of others, lowest first
PlaceOf = Callable[[str, Priority], Place]
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class RequestState:
    """One request as the scheduler sees it."""

    request_id: RequestId
    priority: Priority
    arrival_ms: float  # when it was submitted
    admitted: bool  # whether it may compute (its session has KV buffers for it)
    held_capacity: int  # tokens that its session's buffers hold now
    num_tokens: int  # tokens of prompt and answer so far, one still being sampled included
    num_computed: int  # how many of them have KV, or will when the running step ends
    num_prompt: int  # tokens that must be computed before the first can be sampled
    reserve_tokens: int  # tokens to make room for beyond `num_tokens` when admitted
    app: str = ""
    session_id: SessionId | None = None
    num_stored: int = 0  # leading tokens whose KV can be restored, from disk or from staging
    # Admitted and owner of its buffers, which a restore still fills: it cannot compute and is
    # nobody's victim.
    arriving: bool = False
    # Not admitted, and its KV on the way to disk, or back from there for a request that is gone: it
    # cannot be admitted at this moment, and nothing can be taken from it.
    leaving: bool = False
    # Since when it waits to be admitted: its arrival or its last preemption.
    queued_ms: float | None = None
    served_ms: float | None = None  # when its last step ended; None before the first
    resident_ms: float = 0.0  # service that it got since it was admitted last
    service_ms: float = 0.0  # service that it got in all
    # Its urgency by the trace of a bench, lowest first; None anywhere else.
    rank: float | None = None
    row_share: float = 1.0  # what its rows cost, relative to one that runs through all layers once
    rows_max: int = 1 << 30  # most rows of it in one step
    # Tokens `[start, end)` whose rows cost `cheap_share` where they are not there yet.
    cheap: tuple[int, int] = (0, 0)
    cheap_share: float = 1.0  # what such a row costs, relative to another
    cheap_room: float = 1.0  # of the room for rows in a step, what it takes of another's
    num_extra: int = 0  # rows that come before those of its tokens, and are as cheap ones
    num_forced: int = 0  # last tokens that nobody had to sample; they are computed in one step

    @property
    def num_remaining(self) -> int:
        """Tokens that need KV before the next can be sampled."""
        return self.num_tokens - self.num_computed

    @property
    def num_rows_left(self) -> int:
        """Rows before the next token can be sampled, those that are no token's included."""
        return self.num_extra + self.num_remaining

    @property
    def computes(self) -> bool:
        """Whether it has rows to compute, and buffers for them."""
        has_buffers = self.admitted and not self.arriving
        return has_buffers and self.num_remaining > 0 and self.num_tokens <= self.held_capacity

    @property
    def decoding(self) -> bool:
        """Whether only the token sampled last is left to compute, and those forced behind it."""
        in_answer = self.admitted and self.num_tokens > self.num_prompt
        return in_answer and 1 <= self.num_remaining <= 1 + self.num_forced

    def room(self, num_rows: int) -> float:
        """What its next rows take of the room for rows in a step."""
        segment = self.segment(num_rows)
        return num_rows - (1.0 - self.cheap_room) * (segment.num_extra + segment.num_cheap)

    def rows_in(self, room: float) -> int:
        """How many of its next rows fit."""
        rows = range(1, self.num_rows_left + 1)
        return bisect.bisect_right(rows, room + _ROUNDING, key=self.room)

    def segment(self, num_rows: int) -> "SegmentPlan":
        """Its next rows as a segment, extra ones first."""
        num_extra = min(self.num_extra, num_rows)
        start, end = self.num_computed, self.num_computed + num_rows - num_extra
        first = min(end, max(start, self.cheap[0]))
        last = max(first, min(end, self.cheap[1]))
        return SegmentPlan(
            request_id=self.request_id,
            start=start,
            end=end,
            samples=end == self.num_tokens,
            row_share=self.row_share,
            cheap=(first, last),
            cheap_share=self.cheap_share,
            num_extra=num_extra,
        )


@dataclass(frozen=True, kw_only=True)
class RepairState:
    """A session some of whose KV is not exact, and can be computed again."""

    session_id: SessionId
    app: str
    start: int  # first token whose KV is not exact
    end: int  # end of those that can be repaired now
    share: float  # what such a token costs, relative to one that runs through all layers
    eager: bool = False  # goes before prefill, not after

    def plan(self, num_rows: int) -> "RepairPlan":
        """Its next tokens."""
        end = self.start + num_rows
        return RepairPlan(session_id=self.session_id, start=self.start, end=end, share=self.share)


@dataclass(frozen=True, kw_only=True)
class IdleSession:
    """A session that holds KV and has no request."""

    session_id: SessionId
    capacity: int
    last_used_ms: float
    app: str = ""


@dataclass(frozen=True, kw_only=True)
class ParkedRequest:
    """A request too far back in its line for this plan, whose session holds KV all the same."""

    request_id: RequestId
    capacity: int
    app: str = ""


@dataclass(frozen=True, kw_only=True)
class AppState:
    """What an app is owed and what it got; see `fairness.Accounts`."""

    weight: float = 1.0  # its share of the service, relative to the others of its class
    priority: Priority = "interactive"
    virtual_ms: float = 0.0  # service by weight
    # Since when it has unfinished requests and no service; infinite before the first.
    unserved_since_ms: float = float("inf")


NO_APP = AppState()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything a plan depends on; `apps` and `pins` are their owner's, as they are right now."""

    # That have rows to compute: all that have memory, and of those that wait the first in line.
    requests: tuple[RequestState, ...]
    idle: tuple[IdleSession, ...]
    pool: PoolSnapshot
    layout: KVLayout
    apps: Mapping[str, AppState] = field(default_factory=dict)  # who asked, or has terms of its own
    # By app: while it owns no more KV than so many bytes, no other app can evict any of it.
    pins: Mapping[str, int] = field(default_factory=dict)
    parked: tuple[ParkedRequest, ...] = ()  # least urgent first
    attended_ms: float = float("-inf")  # when interactive work was last asked for, or served
    aged_turn_ms: float = float("-inf")  # when those kept waiting too long last had a quantum
    # What a token of KV costs that was taken away: reading it, or, without a store, computing it
    # again.
    restore_ms_per_token: float = 0.0
    # What sessions should own at most while the system is short of memory.
    soft_budget_bytes: int | None = None
    num_steps: int = 0
    leaving_bytes: int = 0  # of the pool's used bytes, those of sessions that are about to leave
    repairs: tuple[RepairState, ...] = ()  # sessions in memory with KV that is not exact

    def app(self, name: str) -> AppState:
        """An app by name; one without an account counts as one that was never served."""
        return self.apps.get(name, NO_APP)

    @cached_property
    def restoring(self) -> bool:
        """Whether some request's KV is being read back."""
        return any(r.arriving for r in self.requests)

    @cached_property
    def weight_max(self) -> float:
        """Largest weight of the apps that have requests."""
        names = {r.app for r in self.requests}
        return max((self.app(name).weight for name in names), default=NO_APP.weight)


@dataclass(frozen=True, kw_only=True)
class SegmentPlan:
    """Rows `[start, end)` of a request's tokens in one step.

    Attributes:
        samples: The last row's logits give the next token.
        row_share, cheap, cheap_share: See `RequestState`; `cheap` is among its tokens.
        num_extra: Rows that are no token's, and come first; there may be no others.
    """

    request_id: RequestId
    start: int
    end: int
    samples: bool
    row_share: float = 1.0
    cheap: tuple[int, int] = (0, 0)
    cheap_share: float = 1.0
    num_extra: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the segment's tokens, extra ones not counted."""
        return self.end - self.start

    @property
    def num_cheap(self) -> int:
        """Rows of the segment that cost less."""
        return self.cheap[1] - self.cheap[0]

    def added_to(self, shape: StepShape) -> StepShape:
        """A step's shape with this segment."""
        if self.num_extra:
            shape = shape.plus(self.num_extra, self.start, self.cheap_share)
        num_dear = self.num_rows - self.num_cheap
        if num_dear:
            shape = shape.plus(num_dear, self.end - num_dear, self.row_share)
        if self.num_cheap:
            shape = shape.plus(self.num_cheap, self.cheap[0], self.cheap_share)
        return shape


@dataclass(frozen=True, kw_only=True)
class RepairPlan:
    """Tokens `[start, end)` of a session whose KV is made exact in one step."""

    session_id: SessionId
    start: int
    end: int
    share: float

    @property
    def num_rows(self) -> int:
        """Tokens."""
        return self.end - self.start

    def added_to(self, shape: StepShape) -> StepShape:
        """A step's shape with this repair."""
        return shape.plus(self.num_rows, self.start, self.share)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What happens to KV buffers before the step, in this order."""

    # Idle sessions that lose their buffers: swapped out where there is a store, else forgotten.
    drop: tuple[SessionId, ...] = ()
    preempt: tuple[RequestId, ...] = ()  # requests that lose theirs in the same way, and wait again
    # (request, capacity) of requests that run out of room.
    grow: tuple[tuple[RequestId, int], ...] = ()
    # (request, capacity) of requests that may compute from now on.
    admit: tuple[tuple[RequestId, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.drop or self.preempt or self.grow or self.admit)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step: what happens to memory first, then which rows are computed."""

    memory: MemoryPlan = field(default_factory=MemoryPlan)
    segments: tuple[SegmentPlan, ...] = ()
    repairs: tuple[RepairPlan, ...] = ()

    @property
    def computes(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.segments or self.repairs)
