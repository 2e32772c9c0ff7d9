"""Carries out the segments of a plan: the only caller of `mx.eval` in a step.

A step has three moments. `prepare` builds its graph, while the step before may still run. `submit`
hands it to the device; by then the step before has ended, else its readers would keep MLX from
updating KV in place and every layer would be copied. `wait` blocks until it is done.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from edgekv.engine.outbox import TokenLogprobs
from edgekv.engine.request import Request
from edgekv.engine.sampler import RowLogprobs, RowSampling, sample
from edgekv.kv.session_kv import StagedView
from edgekv.models.attention import Segment
from edgekv.models.decoder import Decoder, PackedBatch
from edgekv.sched.cost import EMPTY_STEP, StepShape
from edgekv.sched.plan import SegmentPlan


@dataclass(kw_only=True)
class Step:
    """One step from its graph to its result."""

    work: list[tuple[Request, SegmentPlan]]
    views: list[StagedView]
    shape: StepShape
    sampling: list[Request]
    sampled: mx.array | None  # (R,) uint32
    logprobs: dict[int, RowLogprobs] = field(default_factory=dict)
    seen: list[tuple[Request, mx.array]] = field(default_factory=list)
    submitted_ms: float = 0.0

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

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def prepare(self, work: Sequence[tuple[Request, SegmentPlan]], running: Step | None) -> Step:
        """Build the graph of a step; `running` is the step whose tokens are not known yet."""
        assert work
        views = [StagedView(request.session.kv, plan.start) for request, plan in work]
        batch = PackedBatch(
            [Segment(v, plan.num_rows) for v, (_, plan) in zip(views, work, strict=True)]
        )
        shape = EMPTY_STEP
        for _, plan in work:
            shape = shape.plus(plan.num_rows, plan.start)
        hidden = self.decoder.embed(_packed_tokens(work, running))
        hidden = self.decoder.run_layers(hidden, batch)
        step = Step(work=list(work), views=views, shape=shape, sampling=[], sampled=None)
        self._add_sampling(step, hidden, running)
        return step

    def _add_sampling(self, step: Step, hidden: mx.array, running: Step | None) -> None:
        last_rows, row = [], 0
        for request, plan in step.work:
            row += plan.num_rows
            if plan.samples and not request.prefill_only:
                step.sampling.append(request)
                last_rows.append(row - 1)
        if not last_rows:
            return
        if len(last_rows) < hidden.shape[0]:
            hidden = hidden[mx.array(last_rows)]
        logits = self.decoder.logits(hidden)
        rows = [self._row_sampling(step, request, running) for request in step.sampling]
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
        mx.async_eval(arrays)  # type: ignore[no-untyped-call]

    def wait(self, step: Step) -> StepResult:
        """Block until the step has ended (the GIL is released) and fetch what it sampled."""
        mx.synchronize()
        tokens = [] if step.sampled is None else [int(t) for t in np.array(step.sampled)]
        return StepResult(
            tokens=tokens,
            logprobs={i: _to_host(tokens[i], row) for i, row in step.logprobs.items()},
        )


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
