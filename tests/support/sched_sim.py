"""The scheduler with a make-believe engine: time passes by a formula, KV is only counted.

It carries plans out as the engine does and asserts, at each, what a plan promises. Swapping is
modelled where asked for: buffers of who is swapped out are free at once, though their bytes take a
while to leave; who is let in again owns buffers for a while before it can compute.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from sched_sim_parts import SimRequest, SimSession, SimSwap

from edgekv.config import Priority
from edgekv.ids import RequestId, SessionId
from edgekv.kv.layout import KVLayout, PoolSnapshot
from edgekv.sched.compose import TAIL_SHARE
from edgekv.sched.cost import EMPTY_STEP, CostModel, StepShape
from edgekv.sched.demand import Demand
from edgekv.sched.fairness import Accounts, split_service
from edgekv.sched.memory import tokens_max
from edgekv.sched.plan import (
    IdleSession,
    MemoryPlan,
    ParkedRequest,
    RequestState,
    Snapshot,
    StepPlan,
)
from edgekv.sched.scheduler import SchedulerConfig, plan_step

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
        swap: Without, what is taken away is computed again.
    """

    def __init__(
        self,
        layout: KVLayout,
        budget_bytes: int,
        config: SchedulerConfig,
        *,
        cost_ms: Callable[[StepShape], float] = MACHINE.step_ms,
        learns: bool = False,
        cost: CostModel = MACHINE,
        swap: SimSwap | None = None,
    ) -> None:
        self.layout = layout
        self.budget_bytes = budget_bytes
        self.soft_budget_bytes: int | None = None
        self.config = config
        self.cost_ms = cost_ms
        self.learns = learns
        # This machine always takes what it should.
        self.cost = CostModel() if learns else replace(cost, spread=1.0)
        self.swap = swap
        self.accounts = Accounts()
        self.demand = Demand()
        self.apps: list[str] = []
        self.now_ms = 0.0
        self.num_steps = 0
        self.num_preemptions = 0
        self.service_ms: Counter[str] = Counter()
        self.num_rows = 0
        self.sessions: list[SimSession] = []
        self.waiting: list[SimRequest] = []  # not yet arrived, by arrival
        self.running: dict[RequestId, SimRequest] = {}
        self.finished: list[SimRequest] = []
        self.on_finish: Callable[[SimRequest], None] = lambda request: None
        self.on_step: Callable[[], None] = lambda: None
        self._num_requests = 0
        self._reader_free_ms = 0.0
        self._plans_in_a_row = 0
        self._seen: tuple[RequestState, ...] = ()  # as the scheduler saw them last

    @property
    def tokens_max(self) -> int:
        """Most tokens that a session can hold."""
        return tokens_max(self.layout, self.budget_bytes)

    def app(
        self,
        name: str,
        *,
        weight: float = 1.0,
        priority: Priority = "interactive",
        pinned_bytes: int = 0,
    ) -> str:
        """An app with an account."""
        self.accounts.register(name, weight=weight, priority=priority, pinned_bytes=pinned_bytes)
        if name not in self.apps:
            self.apps.append(name)
        return name

    def session(self, app: str = "app") -> SimSession:
        """A new session without KV."""
        if app not in self.apps:
            self.app(app)
        self.sessions.append(SimSession(session_id=SessionId(len(self.sessions)), app=app))
        return self.sessions[-1]

    def request(
        self, session: SimSession, num_prompt: int, num_output: int, arrival_ms: float, **options
    ) -> SimRequest:
        """A request to come. A session answers one at a time: it waits for the one before."""
        options.setdefault("priority", self.accounts.app(session.app).priority)
        request = SimRequest(
            request_id=RequestId(self._num_requests),
            session=session,
            num_prompt=num_prompt,
            num_output=min(num_output, self.tokens_max - num_prompt),
            arrival_ms=arrival_ms,
            **options,
        )
        assert request.num_output >= 1
        self._num_requests += 1
        self.waiting.append(request)
        self.waiting.sort(key=lambda r: r.arrival_ms)
        return request

    def run(self, steps_max: int, until_ms: float = float("inf")) -> None:
        """Until all requests have ended, or a time; more than `steps_max` steps is starvation."""
        while (self.waiting or self.running) and self.now_ms < until_ms:
            self.turn()
            assert self.num_steps <= steps_max, "somebody starves"

    def turn(self) -> None:
        """One turn of the make-believe engine."""
        self._arrive()
        self._end_restores()
        self._look()
        plan = plan_step(self.now_ms, self.snapshot(), self.cost, self.config)
        if plan.memory:
            self.apply_memory(plan.memory)
            self._plans_in_a_row += 1
            assert self._plans_in_a_row <= 2 + 2 * len(self.running), "memory moves, nobody runs"
            return
        self._plans_in_a_row = 0
        if plan.segments:
            self.execute(plan)
        else:
            self._await_something()

    def _arrive(self) -> None:
        if not self.running:
            self.now_ms = max(self.now_ms, min(r.arrival_ms for r in self.waiting))
        due = [r for r in self.waiting if r.arrival_ms <= self.now_ms]
        for request in due:
            session = request.session
            if session.busy:
                continue
            self.waiting.remove(request)
            self.accounts.arrive(session.app, self.demand, self.now_ms)
            self.demand.came(request.request_id, session.app, request.priority)
            session.busy = True
            # Half of what the session holds is taken for a common prefix.
            session.num_valid = min(session.num_valid // 2, request.num_prompt - 1)
            session.num_stored = min(session.num_stored // 2, request.num_prompt - 1)
            request.num_computed = session.num_valid
            request.arrival_ms = max(request.arrival_ms, session.free_ms)
            request.queued_ms = request.arrival_ms
            self.running[request.request_id] = request

    def cancel(self, request: SimRequest) -> None:
        """End a request before its time; its session keeps its KV."""
        self._plans_in_a_row = 0
        assert request.arriving_until_ms is None, "the engine waits for its I/O first"
        self._leave(request)

    def _leave(self, request: SimRequest) -> None:
        app = request.session.app
        request.session.busy = False
        request.session.free_ms = self.now_ms
        del self.running[request.request_id]
        self.demand.left(request.request_id, app)
        if app not in self.demand.unfinished:
            self.accounts.rest(app)

    def _end_restores(self) -> None:
        for request in self.running.values():
            if request.arriving_until_ms is None or request.arriving_until_ms > self.now_ms:
                continue
            request.arriving_until_ms = None
            request.num_computed = request.session.num_valid = request.session.num_stored
            self._note_line(request)

    def _await_something(self) -> None:
        """Nobody can compute: let time pass until bytes have come or gone."""
        times = [r.arriving_until_ms for r in self.running.values() if r.arriving_until_ms]
        times += [
            r.session.leaving_until_ms
            for r in self.running.values()
            if not r.admitted and r.session.leaving_until_ms > self.now_ms
        ]
        assert times, "requests wait and nobody computes"
        self.now_ms = min(times)

    def _look(self) -> None:
        """Who the scheduler sees: all that are admitted, and the heads of the lines."""
        policy = self.config.policy
        per_token = self.restore_ms_per_token
        self._seen = tuple(r.state(self.now_ms) for r in self.running.values() if r.admitted)
        for request_id in self.demand.unplaced:
            state = self.running[request_id].state(self.now_ms)
            urgency = policy.urgency(state, 0.0, per_token, self.cost)
            self.demand.place(request_id, urgency, state.arrival_ms)
        places = policy.places(self.now_ms, self.snapshot())
        heads = self.demand.heads(places, self.accounts.pins)
        waiting = [r for i in heads if not (r := self.running[i]).admitted]
        self._seen += tuple(r.state(self.now_ms) for r in waiting)

    def _note_line(self, request: SimRequest) -> None:
        if request.state(self.now_ms).decoding:
            self.demand.decodes(request.request_id)
        elif request.request_id not in self.demand:
            self.demand.waits(request.request_id, request.session.app, request.priority)

    @property
    def restore_ms_per_token(self) -> float:
        """What a token costs that was taken away."""
        recompute_ms = self.cost.step_ms(EMPTY_STEP.plus(256, 256)) / 256
        return self.swap.restore_ms_per_token if self.swap else recompute_ms

    def _parked(self) -> tuple[ParkedRequest, ...]:
        seen = {r.request_id for r in self._seen}
        return tuple(
            ParkedRequest(request_id=r.request_id, capacity=r.session.capacity, app=r.session.app)
            for r in reversed(self.running.values())
            if r.session.capacity and r.request_id not in seen
        )

    def snapshot(self) -> Snapshot:
        """What the scheduler may know."""
        return Snapshot(
            requests=self._seen,
            idle=tuple(
                IdleSession(
                    session_id=s.session_id,
                    capacity=s.capacity,
                    last_used_ms=s.last_used_ms,
                    app=s.app,
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
            apps=self.accounts.apps,
            pins=self.accounts.pins,
            attended_ms=self.accounts.attended_ms,
            aged_turn_ms=self.accounts.aged_turn_ms,
            parked=self._parked(),
            restore_ms_per_token=self.restore_ms_per_token,
            soft_budget_bytes=self.soft_budget_bytes,
            num_steps=self.num_steps,
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
            assert not by_id[session_id].busy
            self._take_away(by_id[session_id])
        for request_id in plan.preempt:
            request = self.running[request_id]
            assert request.arriving_until_ms is None, "bytes are on their way into its buffers"
            self._take_away(request.session)
            request.admitted, request.num_computed = False, 0
            request.waiting_changed()
            request.queued_ms = self.now_ms
            self.demand.waits(request_id, request.session.app, request.priority)
            request.num_preempted += 1
            self.num_preemptions += 1
        for request_id, capacity in plan.grow:
            assert self.running[request_id].admitted
            self._resize(self.running[request_id], capacity)
        for request_id, capacity in plan.admit:
            self._admit(self.running[request_id], capacity)

    def _take_away(self, session: SimSession) -> None:
        assert session.capacity, "nothing to give up"
        if self.swap is not None:
            written = max(0, session.num_valid - session.num_stored)
            session.num_stored = session.num_valid
            session.leaving_until_ms = self.now_ms + written * self.swap.leave_ms_per_token
        session.capacity = session.num_valid = 0

    def _admit(self, request: SimRequest, capacity: int) -> None:
        session = request.session
        assert not request.admitted
        assert not request.state(self.now_ms).leaving
        if capacity > session.capacity:
            self._resize(request, capacity)
        request.admitted = True
        request.resident_ms = 0.0
        request.num_computed = session.num_valid
        self._note_line(request)
        missing = session.num_stored - session.num_valid
        if self.swap is not None and missing > 0:
            restore_ms = missing * self.swap.restore_ms_per_token
            self._reader_free_ms = max(self._reader_free_ms, self.now_ms) + restore_ms
            request.arriving_until_ms = self._reader_free_ms
            self.accounts.charge_restore(session.app, restore_ms)

    def _resize(self, request: SimRequest, capacity: int) -> None:
        held = request.session.capacity
        assert capacity > held
        assert capacity >= request.num_tokens
        assert capacity == self.layout.capacity_for(min(capacity, self.layout.context_max))
        extra_bytes = self.layout.capacity_bytes(capacity) - self.layout.capacity_bytes(held)
        # Growing holds one layer twice at its worst moment.
        largest = max(map(self.layout.layer_token_bytes, range(self.layout.num_layers)))
        worst_bytes = extra_bytes + held * largest
        assert self.used_bytes + worst_bytes <= self.budget_bytes, "beyond the pool"
        request.session.capacity = capacity

    def execute(self, plan: StepPlan) -> None:
        """Run a step's segments and let the time pass that it takes."""
        self._check_segments(plan)
        shape = EMPTY_STEP
        for segment in plan.segments:
            shape = shape.plus(segment.num_rows, segment.start)
        elapsed_ms = self.cost_ms(shape)
        self.now_ms += elapsed_ms
        self.num_steps += 1
        self.num_rows += shape.num_rows
        self._charge(plan, elapsed_ms)
        if self.learns:
            self.cost = self.cost.observe(shape, elapsed_ms)
        for segment in plan.segments:
            request = self.running[segment.request_id]
            request.num_computed = request.session.num_valid = segment.end
            request.session.last_used_ms = request.served_ms = self.now_ms
            if segment.samples:
                self._sample(request)
            if request.finished_ms is None:
                self._note_line(request)
        self.on_step()

    def _charge(self, plan: StepPlan, elapsed_ms: float) -> None:
        service_ms: Counter[str] = Counter()
        for segment, ms in split_service(plan.segments, elapsed_ms, self.cost).items():
            request = self.running[segment.request_id]
            request.resident_ms += ms
            request.service_ms += ms
            service_ms[request.session.app] += ms
        self.service_ms += service_ms
        self.accounts.charge(service_ms, self.demand, self.now_ms)

    def _check_segments(self, plan: StepPlan) -> None:
        ids = [s.request_id for s in plan.segments]
        assert len(set(ids)) == len(ids)
        states = {s.request_id: s for s in self._seen}
        decoding = {i for i, s in states.items() if s.decoding and not s.arriving}
        owed = {i for i in decoding if states[i].priority == "interactive"}
        assert owed <= set(ids), "all that decode take part in every step"
        for segment in plan.segments:
            request = self.running[segment.request_id]
            assert request.admitted
            assert request.arriving_until_ms is None
            assert segment.start == request.num_computed
            assert segment.start < segment.end <= request.num_tokens
            assert segment.end <= request.session.capacity
            assert segment.samples == (segment.end == request.num_tokens)
        prefill_rows = sum(s.num_rows for s in plan.segments if s.request_id not in decoding)
        assert prefill_rows <= (1 + TAIL_SHARE) * self.config.prefill_rows_max

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
        self._leave(request)
        self.finished.append(request)
        self.on_finish(request)
