"""Which sessions and requests there are, and what a memory plan does to them."""

from edgekv.engine.outbox import FinishReason
from edgekv.engine.request import EngineSession, Request
from edgekv.ids import RequestId, SessionId
from edgekv.kv.pool import KVPool
from edgekv.sched.plan import IdleSession, MemoryPlan, Snapshot


class Ledger:
    """Sessions, requests and their KV buffers. Owned by the engine thread."""

    def __init__(self, pool: KVPool, tokens_max: int) -> None:
        self.pool = pool
        self.tokens_max = tokens_max
        self.sessions: dict[SessionId, EngineSession] = {}
        self.requests: dict[RequestId, Request] = {}

    def snapshot(self) -> Snapshot:
        """What the scheduler may know: requests that still have rows to compute, and the pool."""
        runnable = [r for r in self.requests.values() if not r.exhausted(self.tokens_max)]
        idle = tuple(
            IdleSession(
                session_id=s.session_id, capacity=s.kv.capacity, last_used_ms=s.last_used_ms
            )
            for s in self.sessions.values()
            if s.active is None and s.kv.buffers is not None
        )
        return Snapshot(
            requests=tuple(r.state() for r in runnable),
            idle=idle,
            pool=self.pool.snapshot(),
            layout=self.pool.layout,
        )

    def enter(self, request: Request) -> None:
        """Take a request in: what its session holds beyond the common prefix is forgotten."""
        session = request.session
        assert session.active is None
        self.sessions[session.session_id] = session
        self.requests[request.request_id] = request
        session.active = request
        session.kv.truncate(self._usable(request, session.kv.reusable_prefix(request.prompt_ids)))
        request.num_computed = session.kv.num_tokens

    @staticmethod
    def _usable(request: Request, prefix: int) -> int:
        """All cached tokens but the last, whose logits are needed for the first new one."""
        return prefix if request.prefill_only else min(prefix, len(request.prompt_ids) - 1)

    def leave(self, request: Request, reason: FinishReason, now_ms: float) -> None:
        """End a request; its session keeps the KV of every token that was computed."""
        assert request.finish_reason is None
        request.finish_reason = reason
        session = request.session
        session.active = None
        session.last_used_ms = now_ms
        del self.requests[request.request_id]
        if session.closed:
            self.forget(session)

    def forget(self, session: EngineSession) -> None:
        """Drop a session without a request and its KV."""
        assert session.active is None
        session.kv.drop(self.pool)
        self.sessions.pop(session.session_id, None)

    def apply(self, plan: MemoryPlan, now_ms: float) -> None:
        """Carry out a memory plan; no step may be running."""
        for session_id in plan.drop:
            assert self.sessions[session_id].active is None
            self.sessions[session_id].kv.drop(self.pool)
        for request_id in plan.preempt:
            request = self.requests[request_id]
            request.session.kv.drop(self.pool)
            request.admitted, request.num_computed = False, 0
        for request_id, capacity in plan.grow:
            kv = self.requests[request_id].session.kv
            assert kv.buffers is not None
            self.pool.grow(kv.buffers, capacity, kv.num_tokens)
        for request_id, capacity in plan.admit:
            self._admit(self.requests[request_id], capacity, now_ms)

    def _admit(self, request: Request, capacity: int, now_ms: float) -> None:
        kv = request.session.kv
        if kv.buffers is None:
            kv.buffers = self.pool.allocate(capacity)
        elif capacity > kv.capacity:
            self.pool.grow(kv.buffers, capacity, kv.num_tokens)
        self._share_prefix(request, now_ms)
        request.num_computed = kv.num_tokens
        request.admitted = True
        if request.first_step_ms is None:
            request.num_cached = min(kv.num_tokens, len(request.prompt_ids))

    def _share_prefix(self, request: Request, now_ms: float) -> None:
        """Copy the longest prefix that another session of the same app has, if it is longer.

        KV never crosses from one app to another: whether a prefix was cached shows in the time to
        first token, and so would tell one app what another asked.
        """
        session = request.session
        best, best_prefix = None, session.kv.num_tokens
        for other in self.sessions.values():
            if other is session or other.app != session.app:
                continue
            prefix = self._usable(request, other.kv.reusable_prefix(request.tokens))
            if prefix > best_prefix:
                best, best_prefix = other, prefix
        if best is not None:
            session.kv.copy_prefix(best.kv, best_prefix)
            best.last_used_ms = now_ms

    def check_integrity(self) -> None:
        """Assert that sessions, requests and pool agree; no step may be running."""
        self.pool.check_integrity()
        owned_bytes = 0
        for session in self.sessions.values():
            session.kv.check_integrity()
            if session.kv.buffers is not None:
                assert self.pool.owns(session.kv.buffers)
                owned_bytes += self.pool.layout.capacity_bytes(session.kv.capacity)
            if session.active is not None:
                assert self.requests[session.active.request_id] is session.active
        assert owned_bytes == self.pool.snapshot().used_bytes
        for request in self.requests.values():
            assert request.session.active is request
            assert request.num_computed <= len(request.tokens) + request.pending
