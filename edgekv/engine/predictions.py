"""Which sessions have predicted KV, what is predicted for a request, and what may be repaired.

    begin ─▶ chunks of the prompt: computed ends, predicted middle ─▶ decode ─▶ …
                └ state: hidden states or the auxiliary's KV             └ repair, behind the decode
    exact again ─▶ the state is dropped

Only exact KV is shared, stored, or reused by a request that did not ask for prediction.
"""

from collections.abc import Iterable

from edgekv.config import PredictionOptions
from edgekv.engine.request import EngineSession, Request
from edgekv.kv.layout import KVLayout
from edgekv.kv.pool import KVPool
from edgekv.predict.state import Prediction, open_state, side_layout
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.plan import RepairPlan, RepairState, SegmentPlan

GAIN = 0.9  # "auto" predicts where it takes at most this part of the exact prefill's time


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
        first = prediction.predictor.first_layer
        self._repair_share = (num_layers - first) / num_layers

    # --- requests ---

    def begin(self, request: Request, cost: CostModel) -> None:
        """Decide what is predicted of a request that is about to compute."""
        session = request.session
        # Of an earlier turn, and not repaired: this answer rests on it too.
        request.approximate |= session.predicted is not None
        request.predict = self._span(request, cost)
        if request.predict == (0, 0):
            return
        if session.predicted is None:
            room = min(session.kv.capacity, self.pool.layout.context_max)
            session.predicted = open_state(
                self.prediction, self.pool, room, session.kv.provenance.exact_prefix
            )
        if session.predicted is None:
            request.predict = (0, 0)  # no memory for what prediction keeps: exact, then
            return
        request.approximate = True
        request.predicted_share = self.prediction.row_share

    def _span(self, request: Request, cost: CostModel) -> tuple[int, int]:
        if request.prefill == "exact" or request.prefill_only or request.num_generated:
            return (0, 0)
        start = request.session.kv.num_tokens + self._options.sinks
        end = len(request.tokens) - self._options.window
        if end <= start:
            return (0, 0)
        if request.prefill == "auto" and not self._worthwhile(request, (start, end), cost):
            return (0, 0)
        return (start, end)

    def _worthwhile(self, request: Request, span: tuple[int, int], cost: CostModel) -> bool:
        done, end = request.session.kv.num_tokens, len(request.tokens)
        exact = SegmentPlan(request_id=request.request_id, start=done, end=end, samples=True)
        predicted = SegmentPlan(
            request_id=request.request_id,
            start=done,
            end=end,
            samples=True,
            predict=span,
            predicted_share=self.prediction.row_share,
        )
        exact_ms = cost.predict_ms(exact.added_to(EMPTY_STEP))
        predicted_ms = cost.predict_ms(predicted.added_to(EMPTY_STEP))
        return exact_ms > self._options.ttft_target_ms and predicted_ms < GAIN * exact_ms

    # --- sessions ---

    def drop(self, session: EngineSession) -> None:
        """A session's KV is exact from now on, or what was not is forgotten."""
        if session.predicted is not None:
            session.predicted.side.drop(self.pool)
            session.predicted = None

    def cut(self, session: EngineSession) -> None:
        """A session's KV was truncated."""
        state, kv = session.predicted, session.kv
        if state is None:
            return
        if kv.provenance.exact_prefix == kv.num_tokens:
            self.drop(session)
            return
        state.repaired = min(state.repaired, kv.num_tokens)
        if state.aux_computed > kv.num_tokens:
            # The rows before, which features look back on, are not kept that far.
            state.aux_computed = 0
            state.trail = self.prediction.predictor.trail()

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
        if not self.pool.can_grow(buffers, larger):
            return False
        self.pool.grow(buffers, larger, buffers.capacity)
        return True

    # --- repair ---

    def repairs(self, sessions: Iterable[EngineSession]) -> tuple[RepairState, ...]:
        """What can be repaired now: behind answers that have begun, and of idle sessions."""
        if self._options.repair == "off":
            return ()
        found = []
        for session in sessions:
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

    def ended(self, session: EngineSession) -> bool:
        """Drop the state of a session that has become exact; True if it has."""
        kv = session.kv
        if session.predicted is None or kv.provenance.exact_prefix < kv.num_tokens:
            return False
        self.drop(session)
        return True

    def check_integrity(self, sessions: Iterable[EngineSession]) -> None:
        """Assert that states and their memory agree."""
        self.pool.check_integrity()
        owned_bytes = 0
        for session in sessions:
            state, kv = session.predicted, session.kv
            assert state is not None or kv.provenance.exact_prefix == kv.num_tokens
            if state is not None:
                assert kv.resident
                assert state.side.buffers is not None
                assert self.pool.owns(state.side.buffers)
                owned_bytes += self.pool.layout.capacity_bytes(state.side.capacity)
        assert owned_bytes == self.pool.snapshot().used_bytes


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
