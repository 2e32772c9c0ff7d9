"""The scheduler with a make-believe engine: time passes by a formula, KV is only counted.

It carries plans out as the engine does and asserts, at each, what a plan promises.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from edgekv.config import Priority
from edgekv.ids import RequestId, SessionId
from edgekv.kv.layout import KVLayout, PoolSnapshot
from edgekv.sched.cost import EMPTY_STEP, CostModel, StepShape
from edgekv.sched.memory import tokens_max
from edgekv.sched.plan import IdleSession, MemoryPlan, RequestState, Snapshot, StepPlan
from edgekv.sched.scheduler import SchedulerConfig, plan_step


@dataclass(kw_only=True, eq=False)
class SimSession:
    """A session's KV: how much room, and how many tokens of it are valid."""

    session_id: SessionId
    capacity: int = 0
    num_valid: int = 0
    last_used_ms: float = 0.0
    busy: bool = False


@dataclass(kw_only=True, eq=False)
class SimRequest:
    """One request; `first_token_ms` and `gaps_ms` are what its caller sees."""

    request_id: RequestId
    session: SimSession
    num_prompt: int
    num_output: int
    arrival_ms: float
    priority: Priority = "interactive"
    reserve_tokens: int = 64
    num_tokens: int = 0
    num_computed: int = 0
    admitted: bool = False
    num_preempted: int = 0
    first_token_ms: float | None = None
    last_token_ms: float = 0.0
    finished_ms: float | None = None
    gaps_ms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_tokens = self.num_prompt

    def state(self) -> RequestState:
        """As the scheduler sees it."""
        return RequestState(
            request_id=self.request_id,
            priority=self.priority,
            arrival_ms=self.arrival_ms,
            admitted=self.admitted,
            held_capacity=self.session.capacity,
            num_tokens=self.num_tokens,
            num_computed=self.num_computed,
            num_prompt=self.num_prompt,
            reserve_tokens=self.reserve_tokens,
        )


MACHINE = CostModel(weights=(5.0, 0.2, 0.002))  # of a step on the make-believe machine


class Simulation:
    """Requests run to their end under a budget; every plan is checked.

    Args:
        layout: Shapes of the KV that is counted.
        budget_bytes: Of the pool.
        config: Of the scheduler.
        cost_ms: What a step really takes.
        learns: The scheduler begins without an idea of that and learns from steps; otherwise it
            knows `MACHINE`.
    """

    def __init__(
        self,
        layout: KVLayout,
        budget_bytes: int,
        config: SchedulerConfig,
        *,
        cost_ms: Callable[[StepShape], float] = MACHINE.predict_ms,
        learns: bool = False,
    ) -> None:
        self.layout = layout
        self.budget_bytes = budget_bytes
        self.config = config
        self.cost_ms = cost_ms
        self.learns = learns
        self.cost = CostModel() if learns else MACHINE
        self.now_ms = 0.0
        self.num_steps = 0
        self.num_preemptions = 0
        self.sessions: list[SimSession] = []
        self.waiting: list[SimRequest] = []  # not yet arrived, by arrival
        self.running: dict[RequestId, SimRequest] = {}
        self.finished: list[SimRequest] = []

    @property
    def tokens_max(self) -> int:
        """Most tokens that a session can hold."""
        return tokens_max(self.layout, self.budget_bytes)

    def session(self) -> SimSession:
        """A new session without KV."""
        self.sessions.append(SimSession(session_id=SessionId(len(self.sessions))))
        return self.sessions[-1]

    def request(
        self, session: SimSession, num_prompt: int, num_output: int, arrival_ms: float, **options
    ) -> SimRequest:
        """A request to come. A session answers one at a time: it waits for the one before."""
        request = SimRequest(
            request_id=RequestId(len(self.waiting) + len(self.running) + len(self.finished)),
            session=session,
            num_prompt=num_prompt,
            num_output=min(num_output, self.tokens_max - num_prompt),
            arrival_ms=arrival_ms,
            **options,
        )
        assert request.num_output >= 1
        self.waiting.append(request)
        self.waiting.sort(key=lambda r: r.arrival_ms)
        return request

    def run(self, steps_max: int) -> None:
        """Until all requests have ended; more than `steps_max` steps is starvation."""
        plans_in_a_row = 0
        while self.waiting or self.running:
            self._arrive()
            plan = plan_step(self.now_ms, self.snapshot(), self.cost, self.config)
            if plan.memory:
                self.apply_memory(plan.memory)
                plans_in_a_row += 1
                assert plans_in_a_row <= 2 + 2 * len(self.running), "memory moves, nobody computes"
                continue
            plans_in_a_row = 0
            self.execute(plan)
            assert self.num_steps <= steps_max, "somebody starves"

    def _arrive(self) -> None:
        if not self.running:
            self.now_ms = max(self.now_ms, min(r.arrival_ms for r in self.waiting))
        for request in [r for r in self.waiting if r.arrival_ms <= self.now_ms]:
            if request.session.busy:
                continue
            self.waiting.remove(request)
            request.session.busy = True
            # Half of what the session holds is taken for a common prefix.
            request.session.num_valid = min(request.session.num_valid // 2, request.num_prompt - 1)
            request.num_computed = request.session.num_valid
            request.arrival_ms = self.now_ms
            self.running[request.request_id] = request

    def snapshot(self) -> Snapshot:
        """What the scheduler may know."""
        return Snapshot(
            requests=tuple(r.state() for r in self.running.values()),
            idle=tuple(
                IdleSession(
                    session_id=s.session_id, capacity=s.capacity, last_used_ms=s.last_used_ms
                )
                for s in self.sessions
                if s.capacity and not s.busy
            ),
            pool=PoolSnapshot(
                budget_bytes=self.budget_bytes,
                used_bytes=self.used_bytes,
                free_bytes=0,
                peak_bytes=self.used_bytes,
            ),
            layout=self.layout,
        )

    @property
    def used_bytes(self) -> int:
        """Capacity of all sessions."""
        return sum(self.layout.capacity_bytes(s.capacity) for s in self.sessions)

    def apply_memory(self, plan: MemoryPlan) -> None:
        """Carry a memory plan out, in its order, and assert that the budget holds throughout."""
        touched = [*plan.preempt, *(i for i, _ in plan.grow), *(i for i, _ in plan.admit)]
        assert len(set(touched)) == len(touched), "one request, one fate"
        by_id = {s.session_id: s for s in self.sessions}
        for session_id in plan.drop:
            session = by_id[session_id]
            assert not session.busy
            assert session.capacity
            session.capacity = session.num_valid = 0
        for request_id in plan.preempt:
            request = self.running[request_id]
            assert request.session.capacity, "nothing to give up"
            request.session.capacity = request.session.num_valid = 0
            request.admitted, request.num_computed = False, 0
            request.num_preempted += 1
            self.num_preemptions += 1
        for request_id, capacity in plan.grow:
            assert self.running[request_id].admitted
            self._resize(self.running[request_id], capacity)
        for request_id, capacity in plan.admit:
            request = self.running[request_id]
            assert not request.admitted
            if capacity > request.session.capacity:
                self._resize(request, capacity)
            request.admitted = True
            request.num_computed = request.session.num_valid

    def _resize(self, request: SimRequest, capacity: int) -> None:
        held = request.session.capacity
        assert capacity > held
        assert capacity >= request.num_tokens
        assert capacity == self.layout.capacity_for(min(capacity, self.layout.context_max))
        extra_bytes = self.layout.capacity_bytes(capacity - held)
        # Growing holds one layer twice at its worst moment.
        worst_bytes = extra_bytes + held * self.layout.largest_layer_token_bytes
        assert self.used_bytes + worst_bytes <= self.budget_bytes, "beyond the pool"
        request.session.capacity = capacity

    def execute(self, plan: StepPlan) -> None:
        """Run a step's segments and let the time pass that it takes."""
        self._check_segments(plan)
        shape = EMPTY_STEP
        for segment in plan.segments:
            shape = shape.plus(segment.num_rows, segment.start)
        elapsed_ms = self.cost_ms(shape)
        if self.learns:
            self.cost = self.cost.observe(shape, elapsed_ms)
        self.now_ms += elapsed_ms
        self.num_steps += 1
        for segment in plan.segments:
            request = self.running[segment.request_id]
            request.num_computed = request.session.num_valid = segment.end
            request.session.last_used_ms = self.now_ms
            if segment.samples:
                self._sample(request)

    def _check_segments(self, plan: StepPlan) -> None:
        ids = [s.request_id for s in plan.segments]
        assert ids, "requests wait and nobody computes"
        assert len(set(ids)) == len(ids)
        decoding = {r.request_id for r in self.running.values() if r.state().decoding}
        assert decoding <= set(ids), "all that decode take part in every step"
        for segment in plan.segments:
            request = self.running[segment.request_id]
            assert request.admitted
            assert segment.start == request.num_computed
            assert segment.start < segment.end <= request.num_tokens
            assert segment.end <= request.session.capacity
            assert segment.samples == (segment.end == request.num_tokens)
        prefill_rows = sum(s.num_rows for s in plan.segments if s.request_id not in decoding)
        assert prefill_rows <= self.config.prefill_rows_max

    def _sample(self, request: SimRequest) -> None:
        if request.first_token_ms is None:
            request.first_token_ms = self.now_ms
        else:
            request.gaps_ms.append(self.now_ms - request.last_token_ms)
        request.last_token_ms = self.now_ms
        request.num_tokens += 1
        if request.num_tokens - request.num_prompt < request.num_output:
            return
        request.finished_ms = self.now_ms
        request.session.busy = False
        del self.running[request.request_id]
        self.finished.append(request)
