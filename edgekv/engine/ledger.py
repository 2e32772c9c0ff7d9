"""Which sessions and requests there are, and what a memory plan does to them."""

from collections import Counter, defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from edgekv.device import give_back_freed_pages
from edgekv.engine.inbox import AppTerms, ForgetApp
from edgekv.engine.outbox import FinishReason
from edgekv.engine.prefill import ExactPrefill, Repairs, Unsure, Work
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.restores import Arrivals
from edgekv.engine.swap import SwapCounters, SwapManager
from edgekv.ids import RequestId, SessionId
from edgekv.kv.layout import BLOCK_TOKENS
from edgekv.kv.pool import KVPool
from edgekv.kv.residency import Residency
from edgekv.kv.session_kv import common_prefix
from edgekv.metrics import AppUsage
from edgekv.sched.cost import CostModel
from edgekv.sched.demand import Demand
from edgekv.sched.fairness import Accounts, Plan, split_service
from edgekv.sched.plan import IdleSession, MemoryPlan, ParkedRequest, RequestState, Snapshot
from edgekv.sched.policy import Policy

EVALUATION = "\0evaluation"  # the app of `logits`: no user's name begins with NUL


@dataclass(kw_only=True)
class EngineCounters:
    """What was computed and moved so far."""

    num_steps: int = 0  # steps that ran
    num_rows: int = 0  # rows that they computed, prefill and decode
    num_plans: int = 0  # of a step, or of memory
    plan_ms: float = 0.0  # what they took
    # Steps that were prepared and thrown away, for somebody left or came.
    num_steps_thrown: int = 0
    # Time between tokens that one session that decodes is promised now.
    tbt_target_ms: float = 0.0
    # By app: its parts of the steps' times, and its restores; evaluations as one.
    service_ms: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    swap: SwapCounters  # what moved between memory and disk


class Ledger:
    """Sessions, requests and their KV buffers. Owned by the engine thread."""

    def __init__(
        self,
        pool: KVPool,
        tokens_max: int,
        swap: SwapManager,
        arrivals: Arrivals,
        prefill: ExactPrefill,
    ) -> None:
        self.pool = pool
        self.swap = swap
        self.arrivals = arrivals
        self.prefill = prefill
        self.tokens_max = tokens_max
        self.sessions: dict[SessionId, EngineSession] = {}
        self.requests: dict[RequestId, Request] = {}
        self.accounts = Accounts()
        self.accounts.register(EVALUATION, priority="background")
        self.demand = Demand()
        self.soft_fraction = 1.0  # of the pool, while the system is short of memory
        self.counted = EngineCounters(swap=swap.counters)  # its owners go on counting
        self.num_news = 0  # somebody came, can compute, or left while others wait for memory
        # Who a plan has to look at, so that it need not look at everybody:
        self._admitted: dict[RequestId, Request] = {}
        self._holders: dict[RequestId, Request] = {}  # that wait while their session has buffers
        self._idle: dict[SessionId, IdleSession] = {}

    def usage(self) -> dict[str, AppUsage]:
        """What each app has here, evaluations aside."""
        usage: defaultdict[str, AppUsage] = defaultdict(AppUsage)
        for request in self.requests.values():
            ours = usage[request.session.app]
            waits = not request.admitted or request.first_step_ms is None
            (ours.num_waiting if waits else ours.num_running)[request.priority] += 1
        for session in self.sessions.values():
            capacity_bytes = self.pool.layout.capacity_bytes(session.kv.capacity)
            usage[session.app].kv_bytes += capacity_bytes
        usage.pop(EVALUATION, None)
        return dict(usage)

    def decoding(self) -> list[RequestState]:
        """Requests that decode, as the scheduler sees them."""
        states = (r.state() for r in self._computing() if r.request_id not in self.demand)
        return [state for state in states if state.decoding]

    def _computing(self) -> Iterator[Request]:
        """Those that have memory, but for who waits for staging before its windows can roll."""
        return (r for r in self._admitted.values() if r.session not in self.swap.short)

    def snapshot(self, cost: CostModel, policy: Policy, now_ms: float) -> Snapshot:
        """What the scheduler may know."""
        pool = self.pool.snapshot()
        running = tuple(r.state() for r in self._computing() if not r.exhausted(self.tokens_max))
        known = Snapshot(
            requests=running,
            idle=tuple(self._idle.values()),
            pool=pool,
            layout=self.pool.layout,
            apps=self.accounts.apps,
            pins=self.accounts.pins,
            attended_ms=self.accounts.attended_ms,
            aged_turn_ms=self.accounts.aged_turn_ms,
            restore_ms_per_token=self.swap.restore_ms_per_token or cost.row_ms,
            soft_budget_bytes=int(self.soft_fraction * pool.sessions_bytes),
            num_steps=self.counted.num_steps,
            leaving_bytes=sum(
                self.pool.layout.capacity_bytes(s.kv.capacity) for s in self.swap.leaving
            ),
            repairs=self.prefill.repairs(),
        )
        heads = self._heads(known, policy, cost, now_ms)
        parked = self._parked(heads)
        waiting = tuple(r.state() for r in heads.values())
        return replace(known, requests=running + waiting, parked=parked)

    def _heads(
        self, known: Snapshot, policy: Policy, cost: CostModel, now_ms: float
    ) -> dict[RequestId, Request]:
        """Those that wait and are among the first in line; who came last gets a place there."""
        per_token = known.restore_ms_per_token
        for request_id in self.demand.unplaced:
            state = self.requests[request_id].state()
            urgency = policy.urgency(state, 0.0, per_token, cost)
            self.demand.place(request_id, urgency, state.arrival_ms)
        heads = self.demand.heads(policy.places(now_ms, known), self.accounts.pins)
        return {i: self.requests[i] for i in heads if i not in self._admitted}

    def _parked(self, heads: Container[RequestId]) -> tuple[ParkedRequest, ...]:
        """Those that wait further back, and whose session has buffers all the same."""
        states = []
        for request_id, request in [*self._holders.items()]:
            kv = request.session.kv
            if kv.buffers is None:
                del self._holders[request_id]  # what it brought along was taken
            elif request_id not in heads and not kv.moving:
                states.append(
                    ParkedRequest(
                        request_id=request_id, capacity=kv.capacity, app=request.session.app
                    )
                )
        return tuple(states[::-1])  # who came last is the least urgent, roughly

    def hear_of(self, app: AppTerms | ForgetApp, now_ms: float) -> None:
        """What an app may have from now on; of one that was closed nothing is remembered."""
        if isinstance(app, ForgetApp):
            self.accounts.register(app.name)
            self.counted.service_ms.pop(app.name, None)
            return
        self.accounts.register(
            app.name,
            weight=app.weight,
            priority=app.priority,
            pinned_bytes=app.pinned_bytes,
            now_ms=now_ms,
        )

    def give_back(self) -> None:
        """While the system is short of memory, what no session owns goes back to it."""
        if self.soft_fraction == 1.0:
            return
        pool = self.pool.snapshot()
        limit_bytes = pool.staging_bytes + int(self.soft_fraction * pool.sessions_bytes)
        trimmed = self.prefill.give_back(self.soft_fraction)
        if self.pool.trim(limit_bytes) or trimmed:
            give_back_freed_pages()

    def enter(self, request: Request, now_ms: float) -> None:
        """Take a request in: what its session holds beyond the common prefix is forgotten."""
        session = request.session
        assert session.active is None
        session.closed = False  # opened again before all of it had left
        self.num_news += not self.demand.is_crowded(session.app, request.priority)
        self.accounts.arrive(session.app, self.demand, now_ms)
        self.demand.came(request.request_id, session.app, request.priority)
        self.sessions[session.session_id] = session
        self.requests[request.request_id] = request
        session.active = request
        self._note_idle(session)
        if session.kv.buffers is not None:
            self._holders[request.request_id] = request
        request.rows_max = min(request.rows_max, self.pool.layout.rows_max)
        self._prefer_disk(request)
        self.swap.truncate(session, self.prefill.reusable(request))
        self.prefill.cut(session)

    def _prefer_disk(self, request: Request) -> None:
        """Take a session out of memory if more of its prompt can be had from disk.

        So it may be where layers have a state, of which memory has a few of the last ones alone, or
        a window, behind which it has none. Less than a block is sooner computed than all of its KV
        is read.
        """
        session, kv, layout = request.session, request.session.kv, self.pool.layout
        if not (layout.state_bytes or layout.window) or kv.buffers is None or not kv.resident:
            return
        if request.logits is not None:
            return  # its rows must all be computed
        wanted = request.prompt_ids[: request.reusable_max]
        known = common_prefix(kv.tokens, wanted)
        enough = kv.resume_point(known) + BLOCK_TOKENS
        own = kv.resume_point_on_disk(known)
        if own >= enough and self.swap.keeps:
            self.swap.go_back(session, own)
        elif self.swap.match(session, wanted) >= enough:
            self.swap.truncate(session, 0)
            kv.drop(self.pool)

    def recede(self, request: Request, unsure: Unsure | None) -> None:
        """An answer waits for what is nearer to exact KV, or is: its last tokens run again then."""
        self.swap.truncate(request.session, self.prefill.recede(request, unsure))
        self._note_line(request)

    def look(self, request: Request, weights: np.ndarray) -> None:
        """Where its last token looks is known: that is computed, and what was behind it again."""
        self.swap.truncate(request.session, self.prefill.look(request, weights))
        self._note_line(request)

    def cut(self, request: Request, num_tokens: int) -> None:
        """Forget the KV of tokens that are not a request's any more: all but its first."""
        self.swap.truncate(request.session, min(request.num_computed, num_tokens))
        self.prefill.cut(request.session)
        self._note_line(request)

    def _keep_exact(self, session: EngineSession) -> None:
        """Forget what of a session's KV is predicted."""
        if session.predicted is not None:
            self.swap.truncate(session, session.kv.provenance.exact_prefix)
            self.prefill.drop(session)

    def discard(self, session: EngineSession) -> None:
        """Forget a session's KV, which is not what it should be, on disk too."""
        self._keep_exact(session)
        self.swap.discard(session)

    def swap_out(self, session: EngineSession) -> None:
        """Take a session out of memory; what of its KV is predicted is forgotten."""
        self._keep_exact(session)
        self.swap.swap_out(session)
        self._note_idle(session)

    def without_slots(self, work: Work) -> list[Request]:
        """Those of a step's requests whose layers with a window must make room for it first."""
        layout = self.pool.layout
        return [r for r, plan in work if not r.session.kv.has_slots(layout, plan.end)]

    def _note_idle(self, session: EngineSession) -> None:
        """Whether a session is in memory and has no request may have changed, or since when."""
        self._idle.pop(session.session_id, None)
        known = session.session_id in self.sessions
        if known and session.active is None and session.kv.resident and session.kv.capacity:
            self._idle[session.session_id] = IdleSession(
                session_id=session.session_id,
                capacity=session.kv.capacity,
                last_used_ms=session.last_used_ms,
                app=session.app,
            )

    def _in_memory(self) -> Iterator[EngineSession]:
        """Sessions with buffers, and of those that wait some whose buffers were taken."""
        yield from (self.sessions[i] for i in self._idle)
        for requests in (self._admitted, self._holders):
            yield from (request.session for request in requests.values())

    def _note_line(self, request: Request) -> None:
        """Whether a request decodes may have changed."""
        in_line = request.request_id in self.demand
        if request.exhausted(self.tokens_max) or request.state().decoding:
            self.demand.decodes(request.request_id)
        elif not in_line:
            self.demand.waits(request.request_id, request.session.app, request.priority)

    def submitted(self, work: Work) -> None:
        """A step was submitted: who begins to decode with it is no longer in line."""
        for request, _ in work:
            if request.request_id in self.demand:
                self._note_line(request)

    def leave(self, request: Request, reason: FinishReason, now_ms: float) -> None:
        """End a request; its session keeps the KV of every token that was computed."""
        assert request.finish_reason is None
        request.finish_reason = reason
        self.prefill.left(request)
        session = request.session
        session.active = None
        session.last_used_ms = now_ms
        request.kv_bytes = self.pool.layout.capacity_bytes(session.kv.capacity)
        del self.requests[request.request_id]
        self._admitted.pop(request.request_id, None)
        self._holders.pop(request.request_id, None)
        self.demand.left(request.request_id, session.app)
        if session.app not in self.demand.unfinished:
            self.accounts.rest(session.app)
        self.num_news += len(self._admitted) < len(self.requests)
        self.arrivals.remove(request)
        request.arriving = False
        if session.closed:
            self.forget(session)
        else:
            self._note_idle(session)

    def forget(self, session: EngineSession) -> None:
        """Drop a closed session without a request; one that is being read back, when that ends."""
        assert session.active is None
        if session.kv.residency is not Residency.ARRIVING:
            self._keep_exact(session)
            self.swap.close_session(session)
            self.sessions.pop(session.session_id, None)
            self._idle.pop(session.session_id, None)

    def apply(self, plan: MemoryPlan, now_ms: float) -> None:
        """Carry out a memory plan; no step may be running.

        Whom the plan makes give way may take a while to leave. Who was to have the memory then
        waits, and is planned again when it is there.
        """
        for session_id in plan.drop:
            assert self.sessions[session_id].active is None
            self.swap_out(self.sessions[session_id])
        for request_id in plan.preempt:
            self._preempt(self.requests[request_id], now_ms)
        for request_id, capacity in plan.grow:
            buffers = self.requests[request_id].session.kv.buffers
            assert buffers is not None
            if self.pool.can_grow(buffers, capacity):
                self._grow(self.requests[request_id], capacity)
        for request_id, capacity in plan.admit:
            self._admit(self.requests[request_id], capacity)

    def _grow(self, request: Request, capacity: int) -> None:
        session, kv = request.session, request.session.kv
        assert kv.buffers is not None
        if not self.prefill.fits(session, capacity):
            # No room for what repair needs: what was predicted is computed, and so exact.
            self._keep_exact(session)
            request.prefill, request.predict = "exact", (0, 0)
            self._note_line(request)
        self.pool.grow(kv.buffers, capacity, kv.num_tokens)

    def charge(
        self, work: Work, repairs: Repairs, elapsed_ms: float, cost: CostModel, now_ms: float
    ) -> None:
        """A step has ended: its time is the service of those who took part."""
        plans: list[Plan] = [*(plan for _, plan in work), *(plan for _, plan in repairs)]
        self.counted.num_steps += 1
        self.counted.num_rows += sum(plan.num_rows for plan in plans)
        parts = split_service(plans, elapsed_ms, cost)
        by_app: defaultdict[str, float] = defaultdict(float)
        for session, repair in repairs:
            by_app[session.app] += parts[repair]
        for request, plan in work:
            part_ms = parts[plan]
            request.resident_ms += part_ms
            request.service_ms += part_ms
            request.served_ms = now_ms
            by_app[request.session.app] += part_ms
        for app, ms in by_app.items():
            self.counted.service_ms[app] += ms
        self.accounts.charge(by_app, self.demand, now_ms)

    def _preempt(self, request: Request, now_ms: float) -> None:
        assert not request.arriving
        self.swap_out(request.session)
        request.num_preemptions += request.admitted
        request.admitted = False
        request.queued_ms = now_ms
        self._admitted.pop(request.request_id, None)
        self.demand.waits(request.request_id, request.session.app, request.priority)
        if request.session.kv.buffers is not None:
            self._holders[request.request_id] = request

    def _admit(self, request: Request, capacity: int) -> None:
        kv = request.session.kv
        if kv.residency is Residency.SWAPPED and not kv.num_tokens:
            kv.drop(self.pool)  # all that was on disk is of no use to this prompt
        if kv.buffers is None:
            if not self.pool.can_allocate(capacity):
                return
            self._adopt_prefix(request)
            kv.buffers = self.pool.allocate(capacity)
        elif capacity > kv.capacity:
            if not self.pool.can_grow(kv.buffers, capacity):
                return
            self._grow(request, capacity)
        request.admitted = request.arriving = True
        request.resident_ms = 0.0
        self._admitted[request.request_id] = request
        self._holders.pop(request.request_id, None)
        self.arrivals.add(request)

    def collect(self) -> list[Request]:
        """Take in what I/O has ended; return the requests whose KV was read back."""
        arrived = []
        for session in self.swap.collect():
            if session.active is not None and session.active.arriving:
                arrived.append(session.active)
            elif session.active is None and session.closed:
                self.forget(session)
            else:
                self._note_idle(session)
        return arrived

    def suspended(self, session: EngineSession) -> bool:
        """Let a session leave memory if it is idle; True once there is nothing to wait for."""
        kv = session.kv
        if session.active is not None:
            return True
        if kv.resident and kv.buffers is not None:
            self.swap_out(session)
        return not kv.moving and not self.swap.writing(session)

    def complete(self, request: Request, now_ms: float, cost: CostModel, share: float) -> None:
        """An admitted request's KV is in memory: it computes from now on."""
        session = request.session
        self._share_prefix(request, now_ms)
        request.arriving = False
        self.num_news += 1
        request.num_restored += session.num_restored
        request.restore_ms += session.restore_ms
        if session.restore_ms:
            self.accounts.charge_restore(session.app, session.restore_ms)
            self.counted.service_ms[session.app] += session.restore_ms
        session.num_restored, session.restore_ms = 0, 0.0
        if request.first_step_ms is None:
            request.num_cached = min(session.kv.num_tokens, len(request.prompt_ids))
        self.prefill.begin(request, cost, now_ms, share)
        self._note_line(request)

    def _adopt_prefix(self, request: Request) -> None:
        """Let a session begin with what its app has on disk, if memory has less."""
        session = request.session
        if request.logits is not None:
            return
        usable = request.prompt_ids[: request.reusable_max]
        on_disk = self.swap.match(session, usable)
        if on_disk > max(session.kv.num_tokens, request.best_donor(self._in_memory())[1]):
            self.swap.adopt(session, usable)

    def _share_prefix(self, request: Request, now_ms: float) -> None:
        """Copy the longest prefix that another session of the same app has, if it is longer.

        KV never crosses from one app to another: whether a prefix was cached shows in the time to
        first token, and so would tell one app what another asked.
        """
        donor, prefix = request.best_donor(self._in_memory())
        if donor is not None and prefix > request.session.kv.num_tokens:
            request.session.kv.copy_prefix(donor.kv, prefix)
            self.swap.copied(request.session)
            self.prefill.cut(request.session)
            donor.last_used_ms = now_ms
            self._note_idle(donor)

    def check_integrity(self) -> None:
        """Assert that sessions, requests and pool agree; no step may be running."""
        self.pool.check_integrity()
        self.swap.check_integrity()
        self.prefill.check_integrity(self.sessions.values())
        owned_bytes = 0
        # Closed ones are forgotten here, and leave all the same.
        for session in {*self.sessions.values(), *self.swap.leaving}:
            session.kv.check_integrity(self.pool.layout)
            if session.kv.buffers is not None:
                assert self.pool.owns(session.kv.buffers)
                owned_bytes += self.pool.layout.capacity_bytes(session.kv.capacity)
                if session.kv.residency is Residency.SWAPPED:
                    assert session.active is not None
                    assert session.active.arriving
            if session.active is not None:
                assert self.requests[session.active.request_id] is session.active
        assert owned_bytes == self.pool.snapshot().used_bytes
        for request in self.requests.values():
            assert request.session.active is request
            assert request.num_computed <= len(request.tokens) + request.pending
        self._check_who_is_looked_at()

    def _check_who_is_looked_at(self) -> None:
        """Assert that what was noted is what looking at everybody would find."""
        for request in self.requests.values():
            request_id, kv = request.request_id, request.session.kv
            assert request.admitted == (request_id in self._admitted)
            assert request.admitted or kv.buffers is None or request_id in self._holders
            rests = request.exhausted(self.tokens_max) or request.state().decoding
            assert rests != (request_id in self.demand)
        assert {*self._admitted, *self._holders} <= {*self.requests}
        apps = [request.session.app for request in self.requests.values()]
        assert self.demand.unfinished == Counter(apps)
        noted = dict(self._idle)
        for session in self.sessions.values():
            self._note_idle(session)
        assert noted == self._idle
        assert {*noted} <= {*self.sessions}
        in_memory = {*self._in_memory()}
        assert all(
            s in in_memory for s in self.sessions.values() if s.kv.reusable_prefix(s.kv.tokens)
        )
