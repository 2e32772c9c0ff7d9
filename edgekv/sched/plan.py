"""What the scheduler reads and what it decides: values, nothing else."""

from dataclasses import dataclass, field

from edgekv.config import Priority
from edgekv.ids import RequestId, SessionId
from edgekv.kv.layout import KVLayout, PoolSnapshot


@dataclass(frozen=True, kw_only=True)
class RequestState:
    """One request as the scheduler sees it.

    Attributes:
        request_id: Its id.
        priority: Its app's class.
        arrival_ms: When it was submitted.
        admitted: Whether it may compute (its session has KV buffers for it).
        held_capacity: Tokens that its session's buffers hold now.
        num_tokens: Tokens of prompt and answer so far, one still being sampled included.
        num_computed: How many of them have KV, or will when the running step ends.
        num_prompt: Tokens that must be computed before the first can be sampled.
        reserve_tokens: Tokens to make room for beyond `num_tokens` when admitted.
    """

    request_id: RequestId
    priority: Priority
    arrival_ms: float
    admitted: bool
    held_capacity: int
    num_tokens: int
    num_computed: int
    num_prompt: int
    reserve_tokens: int

    @property
    def num_remaining(self) -> int:
        """Rows to compute before the next token can be sampled."""
        return self.num_tokens - self.num_computed

    @property
    def decoding(self) -> bool:
        """Whether only the token sampled last is left to compute."""
        return self.admitted and self.num_remaining == 1 and self.num_tokens > self.num_prompt


@dataclass(frozen=True, kw_only=True)
class IdleSession:
    """A session that holds KV and has no request."""

    session_id: SessionId
    capacity: int
    last_used_ms: float


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything a plan depends on."""

    requests: tuple[RequestState, ...]
    idle: tuple[IdleSession, ...]
    pool: PoolSnapshot
    layout: KVLayout


@dataclass(frozen=True, kw_only=True)
class SegmentPlan:
    """Rows `[start, end)` of a request's tokens in one step."""

    request_id: RequestId
    start: int
    end: int
    samples: bool

    @property
    def num_rows(self) -> int:
        """Rows of the segment."""
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What happens to KV buffers before the step, in this order.

    Attributes:
        drop: Idle sessions that lose their KV.
        preempt: Requests that lose their KV and wait again; what they had is recomputed.
        grow: (request, capacity) of requests that run out of room.
        admit: (request, capacity) of requests that may compute from now on.
    """

    drop: tuple[SessionId, ...] = ()
    preempt: tuple[RequestId, ...] = ()
    grow: tuple[tuple[RequestId, int], ...] = ()
    admit: tuple[tuple[RequestId, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.drop or self.preempt or self.grow or self.admit)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step: what happens to memory first, then which rows are computed."""

    memory: MemoryPlan = field(default_factory=MemoryPlan)
    segments: tuple[SegmentPlan, ...] = ()
