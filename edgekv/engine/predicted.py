"""Prompts whose middle is predicted: `ExactPrefill`'s other side.

    begin ─▶ ends of the prompt, and its middle predicted ─▶ look ─▶ decode ahead ─▶ recede ─▶ exact
                                                                       │    └───◀── ask again ◀──┘
                                                                       └ repair, behind it

It keeps hidden states, or the auxiliary's KV, beside a session's KV until that is exact, and an
auxiliary's for the next turn while there is room.

Only exact KV is shared, stored, or reused by a request that did not ask for prediction.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from edgekv.config import PredictionOptions
from edgekv.engine.ahead import Ahead
from edgekv.engine.prefill import ExactPrefill, Forward, Repairs, Told, Unsure, Work
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.steps import PACKED, PartWords
from edgekv.ids import SessionId
from edgekv.kv.layout import KVLayout
from edgekv.kv.pool import KVPool
from edgekv.kv.provenance import Provenance, Span
from edgekv.kv.session_kv import SessionKV, common_prefix
from edgekv.kv.view import StagedView
from edgekv.models.decoder import Decoder
from edgekv.predict.gate import Gate
from edgekv.predict.packed import Part, run_packed
from edgekv.predict.state import (
    PredictedState,
    Prediction,
    StagedState,
    side_layout,
)
from edgekv.ranks.orders import Verb
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.plan import RepairState, SegmentPlan

Again = tuple[EngineSession, Span]  # a session's tokens that are computed though they are there

# "auto" predicts where that takes at most this part of the exact prefill's time, as estimated. The
# estimate knows nothing of a few rows' second pass through the upper layers: at 64 tokens it says
# 0.78 where 1.07 was measured, at 128 tokens 0.66 for 0.79.
GAIN = 0.75
# However small an auxiliary is: what its rows look like to a map takes memory that no pool counts.
ROOM_MIN = 0.25


class PredictedPrefill(ExactPrefill):
    """The middle of long prompts is predicted. Owned by the engine thread."""

    def __init__(
        self,
        prediction: Prediction,
        pool: KVPool,
        options: PredictionOptions,
        num_layers: int,
        keep: Callable[[Gate], None] = lambda _: None,
    ) -> None:
        """No session is known yet.

        `pool` is for what is kept beside predicted KV, `num_layers` are the base's, and `keep` is
        for `Ahead`.
        """
        super().__init__()  # nothing is predicted where layers have a state
        self.prediction = prediction
        self.pool = pool
        self.budget_bytes = pool.snapshot().budget_bytes
        self._has_aux = prediction.predictor.kind == "aux"
        self._options = options
        self._sessions: dict[SessionId, EngineSession] = {}  # that have state
        first = prediction.predictor.first_layer
        self._repair_share = (num_layers - first) / num_layers
        self.ahead = Ahead(prediction.gate, options, self._repair_share, keep)

    # --- requests ---

    def begin(self, request: Request, cost: CostModel, now_ms: float, share: float) -> None:
        """Decide what is predicted of a request that is about to compute."""
        session = request.session
        # Of an earlier turn, and not repaired: this answer rests on it too.
        request.approximate |= session.kv.provenance.exact_prefix < session.kv.num_tokens
        request.looks, request.look, request.looked_at = False, (), ()
        if not request.num_generated:  # what was before a preemption is gone
            request.num_predicted, request.asking, request.askings = 0, 0, ()
        left_ms = share * (self._options.ttft_target_ms - (now_ms - request.submitted_ms))
        request.predict = self._span(request, cost, left_ms)
        if request.predict == (0, 0) or not self._open(session):
            request.predict = (0, 0)  # also where there is no memory for what prediction keeps
            return
        request.approximate = True
        request.predicted_share = self.prediction.row_share
        if self._has_aux:  # of a smaller model: 1,024 rows took 14% less in two steps than in four
            request.predicted_room = max(ROOM_MIN, self.prediction.row_share)
        request.warm_share = self._repair_share
        request.looks = not request.confirms and self._options.look > 0
        self.ahead.begin(request, cost)

    def _span(self, request: Request, cost: CostModel, left_ms: float) -> tuple[int, int]:
        if request.prefill == "exact" or request.prefill_only or request.num_generated:
            return (0, 0)
        start = request.session.kv.num_tokens + self._options.sinks
        end = len(request.tokens) - self._options.window
        if end <= start:
            return (0, 0)
        span = (start, end)
        if request.prefill == "auto":
            pays = not request.confirms or self.ahead.pays(request, span, cost)
            if not pays or not self._worthwhile(request, span, cost, left_ms):
                return (0, 0)
        return span

    def _worthwhile(
        self, request: Request, span: tuple[int, int], cost: CostModel, left_ms: float
    ) -> bool:
        exact = replace(request.state(), cheap=(0, 0), num_extra=0)
        state = request.session.predicted
        done = 0 if state is None else state.side_end
        predicted = replace(
            exact,
            cheap=span,
            cheap_share=self.prediction.row_share,
            num_extra=max(0, span[0] - done) if self._has_aux else 0,
        )
        exact_ms, predicted_ms = (
            cost.step_ms(state.segment(state.num_rows_left).added_to(EMPTY_STEP))
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
        session.predicted = self.state_of(side)
        self._sessions[session.session_id] = session
        return True

    def state_of(self, side: SessionKV) -> PredictedState:
        """What is kept beside KV of which nothing is predicted yet."""
        trail = self.prediction.predictor.trail()
        return PredictedState(side=side, has_aux=self._has_aux, trail=trail)

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
        return [s for s in self._sessions.values() if s.active is None and s.kv.is_exact]

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
        state = session.predicted
        if state is not None:
            state.kept_end = min(state.kept_end, session.kv.num_tokens)
        self.settled(session)
        state = session.predicted
        if state is not None and state.side_end > session.kv.num_tokens:
            # The rows before, which features look back on, are not kept that far.
            state.side_end, state.trail = 0, self.prediction.predictor.trail()
            assert state.side.buffers is not None
            state.side.buffers.order(Verb.TRAIL)

    def settled(self, session: EngineSession) -> None:
        """Drop the state of a session that has become exact, but for an auxiliary's KV."""
        if not self._has_aux and session.kv.is_exact and not _is_ahead(session):
            self.drop(session)

    def goes_ahead(self, request: Request, unsure: Unsure) -> bool:
        """See `Ahead`."""
        return self.ahead.goes_ahead(request, unsure)

    def recede(self, request: Request, unsure: Unsure | None) -> int:
        """See `Ahead`."""
        return self.ahead.recede(request, unsure)

    def look(self, request: Request, weights: np.ndarray) -> int:
        """See `Ahead`."""
        return self.ahead.look(request, weights)

    def left(self, request: Request) -> None:
        """See `Ahead`."""
        self.ahead.left(request)

    def close(self) -> None:
        """See `Ahead`."""
        self.ahead.close()

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

    # --- steps ---

    def reusable(self, request: Request) -> int:
        """Predicted KV too, for a request that predicts."""
        session = request.session
        if session.predicted is None or request.prefill == "exact":
            return super().reusable(request)
        return common_prefix(session.kv.tokens, request.prompt_ids[: request.reusable_max])

    def run(self, decoder: Decoder, tokens: mx.array, work: Work, repairs: Repairs) -> Forward:
        """Build the graph of a step, of which some sessions' KV may be predicted or repaired."""
        if not repairs and all(request.session.predicted is None for request, _ in work):
            assert not any(plan.num_cheap or plan.num_extra for _, plan in work)
            return super().run(decoder, tokens, work, repairs)
        states: dict[EngineSession, StagedState] = {}
        views: dict[EngineSession, StagedView] = {}
        parts = []
        for request, plan in work:
            view = views[request.session] = StagedView(request.session.kv, plan.start)
            parts.append(self._part(request, plan, view, _staged(request.session, states)))
        num_main = len(work) + len(repairs)
        again: list[Again] = [(session, (p.start, p.end)) for session, p in repairs]
        for request, plan in work:
            again += [(request.session, span) for span in _first_rows(request.look, plan.num_extra)]
        for session, (start, end) in again:
            view = views.setdefault(session, StagedView(session.kv, start)).at(start)
            state = _staged(session, states)
            parts.append(Part(view=view, num_rows=end - start, state=state, repair=True))
        if self._has_aux:
            ids = [token for s, (start, end) in again for token in s.kv.tokens[start:end]]
            tokens = mx.concatenate([tokens, mx.array(ids, dtype=mx.uint32)])
        elif any(part.repair for part in parts[: len(work)]):
            tokens = _without_warm(tokens, parts[: len(work)])
        order = sorted(range(len(parts)), key=lambda i: parts[i].repair)  # repair comes last
        ordered = [parts[i] for i in order]
        packed = run_packed(decoder, self.prediction, tokens, ordered)
        end_of = {i: end for i, (_, end) in zip(order, packed.spans, strict=True)}
        return Forward(
            hidden=packed.hidden,
            ends=[end_of[i] for i in range(num_main)],
            views=list(views.values()),
            states=list(states.items()),
            glances={work[order[i]][0]: weights for i, weights in packed.glances.items()},
            told=lambda: Told(PACKED, self._words(parts, order, work, again)),
        )

    def _words(
        self, parts: Sequence[Part], order: Sequence[int], work: Work, again: Sequence[Again]
    ) -> list[PartWords]:
        """A step's parts for other ranks, in the order in which they run."""
        ids: list[Sequence[int]] = [r.tokens[plan.start : plan.end] for r, plan in work]
        ids += [session.kv.tokens[slice(*span)] for session, span in again]
        return [
            PartWords(
                number=part.view.number,
                offset=part.start,
                num_rows=part.num_rows,
                beside=part.state.view.number if part.state is not None else 0,
                predicted=part.predicted,
                repair=part.repair,
                glance=part.glance,
                aux_start=part.aux_start,
                aux_tokens=part.aux_tokens,
                tokens=tokens if self._has_aux or not part.repair else (),
            )
            for part, tokens in ((parts[i], ids[i]) for i in order)
        ]

    def _part(
        self, request: Request, plan: SegmentPlan, view: StagedView, state: StagedState | None
    ) -> Part:
        if request.num_warm:
            assert plan.num_rows <= request.num_warm
            return Part(
                view=view,
                num_rows=plan.num_rows,
                state=state,
                repair=True,
                glance=self._glances(request, plan),
            )
        aux_rows = (0, 0)
        if self._has_aux and (plan.num_cheap or plan.num_extra) and not request.look:
            assert state is not None
            start = state.state.side_end
            aux_rows = (start, plan.cheap[1] if plan.num_cheap else start + plan.num_extra)
        return Part(
            view=view,
            num_rows=plan.num_rows,
            state=state,
            predicted=(plan.cheap[0] - plan.start, plan.cheap[1] - plan.start)
            if plan.num_cheap
            else (0, 0),
            aux_start=aux_rows[0],
            aux_tokens=request.tokens[slice(*aux_rows)],
            glance=self._glances(request, plan),
        )

    def _glances(self, request: Request, plan: SegmentPlan) -> bool:
        """Whether a segment's last row is to say where it looks: before it answers, or ahead."""
        if not plan.samples or request.predict == (0, 0):
            return False
        return request.looks or bool(request.askings)

    def submitted(self, work: Work, repairs: Repairs) -> None:
        """Repaired rows are exact, and so are those behind them that are computed, if all are."""
        for session, repair in repairs:
            provenance = session.kv.provenance
            assert provenance.exact_prefix == repair.start
            provenance.mark(repair.start, repair.end, "exact")
            if session.active is not None:
                session.active.num_repaired += repair.num_rows
        for request, plan in work:
            kv, state = request.session.kv, request.session.predicted
            ids = request.tokens[plan.start : plan.end]
            head = plan.cheap[0] - plan.start if plan.num_cheap else plan.num_rows
            kv.append(ids[:head], _computed(kv))
            kv.append(ids[head : head + plan.num_cheap], "predicted")
            kv.append(ids[head + plan.num_cheap :], _computed(kv))
            request.num_predicted += plan.num_cheap
            if state is not None and not state.has_aux:
                state.side_end = state.kept_end = max(state.kept_end, plan.end)
            elif state is not None:
                state.side_end += 0 if request.look else plan.num_extra
                if plan.num_cheap:
                    state.side_end = plan.cheap[1]
            for start, end in _first_rows(request.look, plan.num_extra):
                is_exact = start <= kv.provenance.exact_prefix
                kv.provenance.mark(start, end, "exact" if is_exact else "computed")
            request.look = tuple(_behind(request.look, plan.num_extra))

    # --- repair ---

    def repairs(self) -> tuple[RepairState, ...]:
        """What can be repaired now, most urgent first: answers that have begun, idle sessions."""
        if self._options.repair == "off":
            return ()
        found = []
        for session in sorted(self._sessions.values(), key=_repair_order):
            state, request, kv = session.predicted, session.active, session.kv
            if state is None or not kv.resident:
                continue
            if request is not None and not self._repairs_behind(request):
                continue
            start, end = kv.provenance.exact_prefix, kv.num_tokens
            if end > start:
                found.append(
                    RepairState(
                        session_id=session.session_id,
                        app=session.app,
                        start=start,
                        end=end,
                        share=self._repair_share,
                        eager=self._options.repair == "eager",
                    )
                )
        return tuple(found)

    @staticmethod
    def _repairs_behind(request: Request) -> bool:
        """Whether what was predicted becomes exact while the answer goes on over it."""
        return not request.confirms and request.admitted and request.has_begun

    def check_integrity(self, sessions: Iterable[EngineSession]) -> None:
        """Assert that states and their memory agree."""
        self.pool.check_integrity()
        owned_bytes = 0
        for session in sessions:
            state, kv = session.predicted, session.kv
            assert state is not None or session.kv.is_exact
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


def _computed(kv: SessionKV) -> Provenance:
    """What rows are that run through all layers behind a session's KV."""
    return "exact" if kv.is_exact else "computed"


def _staged(session: EngineSession, states: dict[EngineSession, StagedState]) -> StagedState | None:
    """What the step adds to what a session keeps, once for its rows and their repair."""
    if session.predicted is None:
        return None
    return states.setdefault(session, StagedState(session.predicted))


def _first_rows(spans: Sequence[Span], num_rows: int) -> Iterator[Span]:
    """So many of the tokens of spans, from the first on."""
    for start, end in spans:
        if num_rows:
            yield start, min(end, start + num_rows)
            num_rows -= min(end - start, num_rows)


def _behind(spans: Sequence[Span], num_rows: int) -> Iterator[Span]:
    """The tokens of spans behind the first so many."""
    for start, end in spans:
        first = min(end, start + num_rows)
        num_rows -= first - start
        if first < end:
            yield first, end


def _without_warm(tokens: mx.array, parts: Sequence[Part]) -> mx.array:
    """Of the tokens of parts, those whose hidden states are not kept."""
    ends = itertools.accumulate(part.num_rows for part in parts)
    rows = [
        row
        for part, end in zip(parts, ends, strict=True)
        if not part.repair
        for row in range(end - part.num_rows, end)
    ]
    return tokens[mx.array(rows, dtype=mx.int32)]


def _is_ahead(session: EngineSession) -> bool:
    """Whether what is kept is needed although all KV is exact.

    First chunks of a prompt may be exact to their end; and an answer may wait for exact KV.
    """
    request = session.active
    if request is None:
        return False
    return request.num_warm > 0 or session.kv.num_tokens < request.predict[1]


def side_bytes(prediction: Prediction, base: KVLayout, budget_bytes: int) -> int:
    """What of a pool's budget is set aside, so that whatever sessions fit have room beside."""
    side = side_layout(prediction, base).token_bytes
    return budget_bytes * side // (side + base.token_bytes)
