"""Carries out the segments of a plan: the only caller of `mx.eval` in a step.

A step has three moments. `prepare` builds its graph, while the step before may still run. `submit`
hands it to the device; by then the step before has ended, else its readers would keep MLX from
updating KV in place and every layer would be copied. `wait` blocks until it is done.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from edgekv.engine.outbox import TokenLogprobs
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.sampler import RowLogprobs, RowSampling, sample
from edgekv.kv.session_kv import StagedView
from edgekv.models.attention import Segment
from edgekv.models.decoder import Decoder, PackedBatch
from edgekv.predict.packed import Part, run_packed
from edgekv.predict.state import Prediction, StagedState
from edgekv.sched.cost import EMPTY_STEP, StepShape
from edgekv.sched.plan import RepairPlan, SegmentPlan


@dataclass(kw_only=True)
class Step:
    """One step from its graph to its result."""

    work: list[tuple[Request, SegmentPlan]]
    views: list[StagedView]
    repairs: list[tuple[EngineSession, RepairPlan]] = field(default_factory=list)
    states: list[StagedState] = field(default_factory=list)
    checks: list[tuple[EngineSession, int]] = field(default_factory=list)  # rows of `sampled`
    shape: StepShape
    sampling: list[Request]
    sampled: mx.array | None  # (R,) uint32
    logprobs: dict[int, RowLogprobs] = field(default_factory=dict)
    seen: list[tuple[Request, mx.array]] = field(default_factory=list)
    submitted_ms: float = 0.0

    @property
    def sessions(self) -> list[EngineSession]:
        """Of the requests that computed."""
        return [request.session for request, _ in self.work]

    def row_of(self, request: Request) -> int:
        """Row of `sampled` that is this request's."""
        return self.sampling.index(request)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step sampled, by row."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs]


class Runner:
    """Builds, submits and awaits steps. Owned by the engine thread."""

    def __init__(self, decoder: Decoder, prediction: Prediction | None = None) -> None:
        self.decoder = decoder
        self._prediction = prediction

    def prepare(
        self,
        work: Sequence[tuple[Request, SegmentPlan]],
        running: Step | None,
        repairs: Sequence[tuple[EngineSession, RepairPlan]] = (),
    ) -> Step:
        """Build the graph of a step; `running` is the step whose tokens are not known yet."""
        assert work or repairs
        assert all(r.session.predicted or not plan.num_predicted for r, plan in work)
        views = [StagedView(request.session.kv, plan.start) for request, plan in work]
        shape = EMPTY_STEP
        for _, plan in work:
            shape = plan.added_to(shape)
        for _, repair in repairs:
            shape = repair.added_to(shape)
        step = Step(work=list(work), views=views, shape=shape, sampling=[], sampled=None)
        if repairs or any(request.session.predicted for request, _ in work):
            hidden, ends = self._run_predicted(step, repairs, running)
        else:
            segments = [Segment(v, plan.num_rows) for v, (_, plan) in zip(views, work, strict=True)]
            hidden = self.decoder.embed(_packed_tokens(work, running))
            hidden = self.decoder.run_layers(hidden, PackedBatch(segments))
            ends = list(itertools.accumulate(plan.num_rows for _, plan in work))
        self._add_sampling(step, hidden, ends, running)
        return step

    def _run_predicted(
        self,
        step: Step,
        repairs: Sequence[tuple[EngineSession, RepairPlan]],
        running: Step | None,
    ) -> tuple[mx.array | None, list[int]]:
        """Run a step of which some sessions' KV is predicted or repaired; see `run_packed`.

        Returns:
            Hidden states after all layers, and where among them each request's rows end, then each
            repair's.
        """
        assert self._prediction is not None
        step.repairs = list(repairs)
        states: dict[int, StagedState] = {}
        roots: dict[int, StagedView] = {}
        parts = []

        def staged(session: EngineSession) -> StagedState | None:
            if session.predicted is None:
                return None
            return states.setdefault(id(session), StagedState(session.predicted))

        for (request, plan), view in zip(step.work, step.views, strict=True):
            roots[id(request.session)] = view
            parts.append(self._part(request, plan, view, staged(request.session)))
        for session, repair in repairs:
            root = roots.get(id(session))
            if root is None:
                root = StagedView(session.kv, repair.start)
                step.views.append(root)
            view, state = root.at(repair.start), staged(session)
            parts.append(Part(view=view, num_rows=repair.num_rows, state=state, repair=True))
        step.states = list(states.values())
        tokens = _packed_tokens(step.work, running) if step.work else mx.array([], dtype=mx.uint32)
        if repairs and self._prediction.predictor.kind == "aux":
            ids = [t for s, r in repairs for t in _known_tokens(s)[r.start : r.end]]
            tokens = mx.concatenate([tokens, mx.array(ids, dtype=mx.uint32)])
        hidden, spans = run_packed(self.decoder, self._prediction, tokens, parts)
        return hidden, [end for _, end in spans]

    def _part(
        self, request: Request, plan: SegmentPlan, view: StagedView, state: StagedState | None
    ) -> Part:
        assert self._prediction is not None
        aux_rows = (0, 0)
        if self._prediction.predictor.kind == "aux" and (plan.num_predicted or plan.catch_up):
            assert state is not None
            start = state.state.aux_computed
            aux_rows = (start, plan.predict[1] if plan.num_predicted else start + plan.catch_up)
        return Part(
            view=view,
            num_rows=plan.num_rows,
            state=state,
            predicted=(plan.predict[0] - plan.start, plan.predict[1] - plan.start)
            if plan.num_predicted
            else (0, 0),
            aux_start=aux_rows[0],
            aux_tokens=request.tokens[slice(*aux_rows)],
        )

    def _add_sampling(
        self, step: Step, hidden: mx.array | None, ends: list[int], running: Step | None
    ) -> None:
        last_rows = []
        for (request, plan), end in zip(step.work, ends, strict=False):
            if plan.samples and not request.prefill_only:
                step.sampling.append(request)
                last_rows.append(end - 1)
        rows = [self._row_sampling(step, request, running) for request in step.sampling]
        for (session, repair), end in zip(step.repairs, ends[len(step.work) :], strict=True):
            for position, terms in _to_check(session, repair):
                step.checks.append((session, position))
                last_rows.append(end - (repair.end - position))
                rows.append(terms)
        if not last_rows:
            return
        assert hidden is not None
        if len(last_rows) < hidden.shape[0]:
            hidden = hidden[mx.array(last_rows)]
        logits = self.decoder.logits(hidden)
        step.sampled, step.logprobs = sample(logits, rows)

    def _row_sampling(self, step: Step, request: Request, running: Step | None) -> RowSampling:
        seen = None
        if request.sampling.repetition_penalty != 1.0:
            seen = self._seen(request, running)
            step.seen.append((request, seen))
        return RowSampling(
            params=request.sampling,
            seed=request.seed,
            position=request.num_generated + request.pending,
            seen=seen,
        )

    def _seen(self, request: Request, running: Step | None) -> mx.array:
        """The request's token set with the token sampled last, known or not."""
        if request.seen is None:
            seen = mx.zeros((self.decoder.config.vocab_size,), dtype=mx.bool_)
            seen[mx.array(request.tokens)] = True
        else:
            seen = copy.copy(request.seen)
        if request.pending:
            assert running is not None
            assert running.sampled is not None
            seen[running.sampled[running.row_of(request)]] = True
        elif request.num_generated:
            seen[request.tokens[-1]] = True
        return seen

    def submit(self, step: Step, now_ms: float) -> None:
        """Start a prepared step; the step before must have ended."""
        arrays = [array for view in step.views for array in view.commit()]
        arrays += [array for state in step.states for array in state.commit()]
        for request, seen in step.seen:
            request.seen = seen
            arrays.append(seen)
        for logprobs in step.logprobs.values():
            arrays += (logprobs.chosen, logprobs.top_ids, logprobs.top)
        if step.sampled is not None:
            arrays.append(step.sampled)
        step.submitted_ms = now_ms
        for request, plan in step.work:
            request.num_computed = plan.end
            request.pending = int(request in step.sampling)
        self._note_repaired(step)
        mx.async_eval(arrays)  # type: ignore[no-untyped-call]

    def _note_repaired(self, step: Step) -> None:
        """Up to where sessions with predicted KV will be exact."""
        for session, repair in step.repairs:
            assert session.predicted is not None
            session.predicted.repaired = repair.end
        for request, plan in step.work:
            state = request.session.predicted
            if state is None:
                continue
            if state.repaired == plan.start:
                state.repaired = plan.predict[0] if plan.num_predicted else plan.end
            request.num_predicted += plan.num_predicted
            state.aux_computed += plan.catch_up
            if plan.num_predicted:
                state.aux_computed = plan.predict[1]
            own = self._prediction is not None and self._prediction.predictor.kind == "self"
            state.trail_end = plan.end if own else state.aux_computed

    def wait(self, step: Step) -> StepResult:
        """Block until the step has ended (the GIL is released) and fetch what it sampled."""
        mx.synchronize()
        tokens = [] if step.sampled is None else [int(t) for t in np.array(step.sampled)]
        return StepResult(
            tokens=tokens,
            logprobs={i: _to_host(tokens[i], row) for i, row in step.logprobs.items()},
        )


def _known_tokens(session: EngineSession) -> list[int]:
    return session.kv.tokens if session.active is None else session.active.tokens


def _to_check(session: EngineSession, repair: RepairPlan) -> Iterator[tuple[int, RowSampling]]:
    """Rows under repair whose next token was sampled before, and how it was."""
    request = session.active
    if request is None or request.sampling.repetition_penalty != 1.0:
        return
    params = replace(request.sampling, logprobs=None)
    num_prompt = len(request.prompt_ids)
    for position in range(max(repair.start, num_prompt - 1), repair.end):
        output = position + 1 - num_prompt
        yield position, RowSampling(params=params, seed=request.seed, position=output)


def _to_host(token: int, row: RowLogprobs) -> TokenLogprobs:
    pairs = zip(np.array(row.top_ids), np.array(row.top), strict=True)
    return TokenLogprobs(
        token_id=token,
        logprob=float(np.array(row.chosen)),
        top=tuple((int(i), float(v)) for i, v in pairs),
    )


def _packed_tokens(work: Sequence[tuple[Request, SegmentPlan]], running: Step | None) -> mx.array:
    """Token ids `(N,)` of all rows; those that `running` samples come from its own output."""
    known: list[int] = []
    unknown: list[tuple[int, int]] = []  # (row here, row of running.sampled)
    for request, plan in work:
        ids = request.tokens[plan.start : plan.end]
        known += ids
        if len(ids) < plan.num_rows:
            assert running is not None
            assert plan.num_rows - len(ids) == request.pending == 1
            unknown.append((len(known), running.row_of(request)))
            known.append(0)
    if not unknown:
        return mx.array(known, dtype=mx.uint32)
    assert running is not None
    assert running.sampled is not None
    if len(unknown) == len(known) == running.sampled.size and all(a == b for a, b in unknown):
        return running.sampled
    order = list(range(len(known)))
    for row, source in unknown:
        order[row] = len(known) + source
    return mx.concatenate([mx.array(known, dtype=mx.uint32), running.sampled])[mx.array(order)]
