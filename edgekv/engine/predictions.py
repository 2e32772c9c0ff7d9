"""Which sessions have predicted KV, what is predicted for a request, and what may be repaired.

    begin ─▶ chunks of the prompt: computed ends, predicted middle ─▶ decode ─▶ …
                └ state: hidden states or the auxiliary's KV             └ repair, behind the decode
    exact again ─▶ hidden states are dropped; the auxiliary's KV is kept for the next turn while
                   there is room

Only exact KV is shared, stored, or reused by a request that did not ask for prediction.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from edgekv.config import PredictionOptions
from edgekv.engine.request import EngineSession, Request
from edgekv.ids import SessionId
from edgekv.kv.layout import KVLayout
from edgekv.kv.pool import KVPool
from edgekv.kv.session_kv import SessionKV
from edgekv.predict.state import PredictedState, Prediction, side_layout
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.plan import RepairPlan, RepairState, SegmentPlan

# "auto" predicts where that takes at most this part of the exact prefill's time, as estimated. The
# estimate knows nothing of a few rows' second pass through the upper layers: at 64 tokens it says
# 0.78 where 1.07 was measured, at 128 tokens 0.66 for 0.79.
GAIN = 0.75


class Predictions:
    """Sessions' predicted KV. Owned by the engine thread."""

    def __init__(
        self, prediction: Prediction, pool: KVPool, options: PredictionOptions, num_layers: int
    ) -> None:
        """Nothing is predicted yet.

        Args:
            prediction: The predictor.
            pool: Of what is kept beside predicted KV.
            options: Limits and targets.
            num_layers: Of the base.
        """
        self.prediction = prediction
        self.pool = pool
        self._options = options
        self._sessions: dict[SessionId, EngineSession] = {}  # that have state
        first = prediction.predictor.first_layer
        self._repair_share = (num_layers - first) / num_layers

    # --- requests ---

    def begin(self, request: Request, cost: CostModel, now_ms: float, share: float) -> None:
        """Decide what is predicted of a request that is about to compute.

        Args:
            request: About to compute.
            cost: Estimates it.
            now_ms: Now.
            share: Part of the engine's time that prefill gets beside who decodes.
        """
        session = request.session
        # Of an earlier turn, and not repaired: this answer rests on it too.
        request.approximate |= session.kv.provenance.exact_prefix < session.kv.num_tokens
        if not request.num_generated:
            request.num_predicted = 0  # what was before a preemption is gone
        left_ms = share * (self._options.ttft_target_ms - (now_ms - request.submitted_ms))
        request.predict = self._span(request, cost, left_ms)
        if request.predict == (0, 0):
            return
        if not self._open(session):
            request.predict = (0, 0)  # no memory for what prediction keeps: exact, then
            return
        assert session.predicted is not None
        if self.prediction.predictor.kind == "self":
            session.predicted.aux_computed = request.predict[0]
        request.approximate = True
        request.predicted_share = self.prediction.row_share

    def _span(self, request: Request, cost: CostModel, left_ms: float) -> tuple[int, int]:
        if request.prefill == "exact" or request.prefill_only or request.num_generated:
            return (0, 0)
        start = request.session.kv.num_tokens + self._options.sinks
        end = len(request.tokens) - self._options.window
        if end <= start:
            return (0, 0)
        span = (start, end)
        if request.prefill == "auto" and not self._worthwhile(request, span, cost, left_ms):
            return (0, 0)
        return span

    def _worthwhile(
        self, request: Request, span: tuple[int, int], cost: CostModel, left_ms: float
    ) -> bool:
        exact = replace(request.state(), predict=(0, 0), behind=0)
        done = 0
        if request.session.predicted is not None:
            done = request.session.predicted.aux_computed
        predicted = replace(
            exact,
            predict=span,
            predicted_share=self.prediction.row_share,
            behind=max(0, span[0] - done) if self.prediction.predictor.kind == "aux" else 0,
        )
        exact_ms, predicted_ms = (
            cost.predict_ms(state.segment(state.num_rows_left).added_to(EMPTY_STEP))
            for state in (exact, predicted)
        )
        return exact_ms > left_ms and predicted_ms < GAIN * exact_ms

    # --- sessions ---

    def _open(self, session: EngineSession) -> bool:
        """Give a session state, if it has none; False if there is no room for it."""
        if session.predicted is not None:
            return True
        room = min(session.kv.capacity, self.pool.layout.context_max)
        capacity = self.pool.layout.capacity_for(room)
        if not self._make_room(lambda: self.pool.can_allocate(capacity)):
            return False
        side = SessionKV()
        side.buffers = self.pool.allocate(capacity)
        session.predicted = PredictedState(
            side=side,
            trail=self.prediction.predictor.trail(),
            repaired=session.kv.provenance.exact_prefix,
        )
        self._sessions[session.session_id] = session
        return True

    def _make_room(self, fits: Callable[[], bool]) -> bool:
        """Drop what is only kept for a next turn, least recently used first, until it fits."""
        while not fits():
            kept = self._kept()
            if not kept:
                return False
            self.drop(min(kept, key=lambda s: s.last_used_ms))
        return True

    def _kept(self) -> list[EngineSession]:
        """Sessions whose state nobody needs now."""
        return [s for s in self._sessions.values() if s.active is None and _is_exact(s)]

    def give_back(self, fraction: float) -> bool:
        """While the system is short of memory: keep nothing for next turns; True if any went."""
        kept = self._kept()
        for session in kept:
            self.drop(session)
        return self.pool.trim(int(fraction * self.pool.snapshot().budget_bytes)) or bool(kept)

    def drop(self, session: EngineSession) -> None:
        """A session's KV is exact from now on, or what was not is forgotten."""
        if session.predicted is not None:
            session.predicted.side.drop(self.pool)
            session.predicted = None
            del self._sessions[session.session_id]

    def cut(self, session: EngineSession) -> None:
        """A session's KV was truncated, or a prefix was copied into it."""
        state, kv = session.predicted, session.kv
        if state is None or self.ended(session):
            return
        state.repaired = kv.provenance.exact_prefix
        if state.trail_end > kv.num_tokens:
            # The rows before, which features look back on, are not kept that far.
            state.aux_computed = state.trail_end = 0
            state.trail = self.prediction.predictor.trail()

    def ended(self, session: EngineSession) -> bool:
        """Drop the state of a session that has become exact; True if it has.

        An auxiliary's KV is kept for the session's next turn.
        """
        if session.predicted is None or not _is_exact(session) or _is_ahead(session):
            return False
        if self.prediction.predictor.kind == "aux":
            return False
        self.drop(session)
        return True

    def fits(self, session: EngineSession, capacity: int) -> bool:
        """Let a session's state hold as many tokens as its KV; False if there is no room."""
        state = session.predicted
        if state is None:
            return True
        wanted = min(capacity, self.pool.layout.context_max)
        buffers = state.side.buffers
        assert buffers is not None
        if buffers.capacity >= wanted:
            return True
        larger = self.pool.layout.capacity_for(wanted)
        if not self._make_room(lambda: self.pool.can_grow(buffers, larger)):
            return False
        self.pool.grow(buffers, larger, buffers.capacity)
        return True

    # --- repair ---

    def repairs(self, sessions: Iterable[EngineSession]) -> tuple[RepairState, ...]:
        """What can be repaired now, most urgent first: answers that have begun, idle sessions."""
        if self._options.repair == "off":
            return ()
        found = []
        for session in sorted(sessions, key=_repair_order):
            state, request, kv = session.predicted, session.active, session.kv
            if state is None or not kv.resident:
                continue
            end = kv.num_tokens
            if request is not None:
                if not request.admitted or request.num_generated + request.pending == 0:
                    continue
                end = request.num_computed
            if end > state.repaired:
                found.append(
                    RepairState(
                        session_id=session.session_id,
                        app=session.app,
                        start=state.repaired,
                        end=end,
                        share=self._repair_share,
                        eager=self._options.repair == "eager",
                    )
                )
        return tuple(found)

    def check_integrity(self, sessions: Iterable[EngineSession]) -> None:
        """Assert that states and their memory agree."""
        self.pool.check_integrity()
        owned_bytes = 0
        for session in sessions:
            state, kv = session.predicted, session.kv
            assert state is not None or _is_exact(session)
            assert (state is not None) == (session.session_id in self._sessions)
            if state is not None:
                assert kv.resident
                assert state.side.buffers is not None
                assert self.pool.owns(state.side.buffers)
                owned_bytes += self.pool.layout.capacity_bytes(state.side.capacity)
        assert owned_bytes == self.pool.snapshot().used_bytes


def _repair_order(session: EngineSession) -> tuple[int, float]:
    """Answers that somebody reads, those in the background, then who was here last."""
    if session.active is None:
        return 2, -session.last_used_ms
    return int(session.active.priority != "interactive"), 0.0


def _is_exact(session: EngineSession) -> bool:
    return session.kv.provenance.exact_prefix == session.kv.num_tokens


def _is_ahead(session: EngineSession) -> bool:
    """Whether some of a prompt is still to be predicted: first chunks may be exact to their end."""
    request = session.active
    return request is not None and session.kv.num_tokens < request.predict[1]


def record(session: EngineSession, plan: SegmentPlan, token_ids: list[int]) -> None:
    """A step wrote KV for a request's rows: exact ones, if all before are, and predicted ones."""
    kv = session.kv
    exact = kv.provenance.exact_prefix == plan.start
    head = plan.predict[0] - plan.start if plan.num_predicted else plan.num_rows
    kv.append(token_ids[:head], "exact" if exact else "predicted")
    kv.append(token_ids[head:], "predicted")


def record_repair(session: EngineSession, plan: RepairPlan) -> None:
    """A step wrote exact KV over predicted KV."""
    kv = session.kv
    assert kv.provenance.exact_prefix == plan.start
    kv.provenance.mark(plan.start, plan.end, "exact")
    if session.active is not None:
        session.active.num_repaired += plan.num_rows


def side_bytes(prediction: Prediction, base: KVLayout, budget_bytes: int) -> int:
    """What of a pool's budget is set aside, so that whatever sessions fit have room beside."""
    side = side_layout(prediction, base).token_bytes
    return budget_bytes * side // (side + base.token_bytes)
