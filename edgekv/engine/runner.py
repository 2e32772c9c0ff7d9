"""Carries out the segments of a plan: the only caller of `mx.eval` in a step.

A step has three moments. `prepare` builds its graph, while the step before may still run. `submit`
hands it to the device; by then the step before has ended, else its readers would keep MLX from
updating KV in place and every layer would be copied. `wait` blocks until it is done.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from edgekv.clock import Clock
from edgekv.engine.outbox import TokenLogprobs
from edgekv.engine.prefill import ExactPrefill, Forward, Repairs, Work
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.sampler import RowLogprobs, RowSampling, chosen_logits, sample
from edgekv.errors import LogitsNotFinite
from edgekv.kv.pool import KVPool
from edgekv.kv.session_kv import SessionKV, StagedView
from edgekv.models.attention import Segment
from edgekv.models.decoder import Decoder, PackedBatch
from edgekv.sched.cost import EMPTY_STEP, StepShape
from edgekv.sched.plan import RepairPlan


@dataclass(kw_only=True)
class Step:
    """One step from its graph to its result."""

    work: Work  # requests and their rows
    repairs: Repairs  # sessions and rows whose KV becomes exact
    shape: StepShape  # what it costs
    forward: Forward | None = None  # the graph of its layers; None once it is submitted
    # Requests whose next token it samples, by row of `sampled`.
    sampling: list[Request] = field(default_factory=list)
    # Requests and positions whose next token it samples again, in the rows behind.
    checks: list[tuple[Request, int]] = field(default_factory=list)
    sampled: mx.array | None = None  # `(R,)` uint32
    chosen: mx.array | None = None  # `(R,)` float32, the logits of what it samples
    logprobs: dict[int, RowLogprobs] = field(default_factory=dict)  # by row of `sampled`
    # What requests with a repetition penalty have seen, this step's token not included.
    seen: list[tuple[Request, mx.array]] = field(default_factory=list)
    # Requests, their first row, and `(rows, vocab)` float32 logits.
    evaluated: list[tuple[Request, int, mx.array]] = field(default_factory=list)
    submitted_ms: float = 0.0  # when it was

    @property
    def sessions(self) -> list[EngineSession]:
        """All whose KV it writes, each once."""
        sessions = [request.session for request, _ in self.work] + [s for s, _ in self.repairs]
        return list(dict.fromkeys(sessions))

    @property
    def holds(self) -> bool:
        """Whether everybody in it is as its graph was built for, so that it can be submitted."""
        assert self.forward is not None
        return (
            all(r.runs and r.num_computed == plan.start for r, plan in self.work)
            and all(_is_due(session, plan) for session, plan in self.repairs)
            and all(view.holds for view in self.forward.views)
            and all(s.predicted is staged.state for s, staged in self.forward.states)
        )

    def row_of(self, request: Request) -> int:
        """Row of `sampled` that is this request's."""
        return self.sampling.index(request)


class Runner:
    """Builds, submits and awaits steps. Owned by the engine thread."""

    def __init__(self, decoder: Decoder, prefill: ExactPrefill) -> None:
        self.decoder = decoder
        self._prefill = prefill

    def prepare(self, work: Work, running: Step | None, repairs: Repairs = ()) -> Step:
        """Build the graph of a step; `running` is the step whose tokens are not known yet."""
        assert work or repairs
        shape = EMPTY_STEP
        for _, segment in work:
            shape = segment.added_to(shape)
        for _, repair in repairs:
            shape = repair.added_to(shape)
        step = Step(work=work, repairs=repairs, shape=shape)
        tokens = _packed_tokens(work, running)
        step.forward = self._prefill.run(self.decoder, tokens, work, repairs)
        self._add_logits(step, step.forward, running)
        return step

    def time_rows(self, num_rows: int, pool: KVPool, clock: Clock) -> tuple[StepShape, float]:
        """Run a prompt of so many rows that nobody asked, and say how long it took."""
        kv = SessionKV()
        kv.buffers = pool.allocate(pool.layout.capacity_for(num_rows))
        while not kv.buffers.ready:
            kv.buffers.make_ready()
        start_ms = clock.now_ms()
        view = StagedView(kv, 0)
        hidden = self.decoder.embed(mx.zeros((num_rows,), dtype=mx.uint32))
        hidden = self.decoder.run_layers(hidden, PackedBatch([Segment(view, num_rows)]))
        mx.eval(self.decoder.logits(hidden[-1:]), view.commit())
        elapsed_ms = clock.now_ms() - start_ms
        kv.drop(pool)
        return EMPTY_STEP.plus(num_rows, 0), elapsed_ms

    def _add_logits(self, step: Step, forward: Forward, running: Step | None) -> None:
        """Sample what is to be sampled; logits of no other rows but an evaluation's."""
        hidden, ends = forward.hidden, forward.ends
        last_rows, terms = [], []
        for (request, plan), end in zip(step.work, ends, strict=False):
            if request.logits is not None:
                assert hidden is not None
                logits = self.decoder.logits(hidden[end - plan.num_rows : end])
                step.evaluated.append((request, plan.start, logits.astype(mx.float32)))
            elif plan.samples and not request.prefill_only:
                step.sampling.append(request)
                last_rows.append(end - 1)
                terms.append(self._row_sampling(step, request, running))
        for (session, repair), end in zip(step.repairs, ends[len(step.work) :], strict=True):
            for request, position, sampling in _to_check(session, repair):
                step.checks.append((request, position))
                last_rows.append(end - (repair.end - position))
                terms.append(sampling)
        if not last_rows:
            return
        assert hidden is not None
        if len(last_rows) < hidden.shape[0]:
            hidden = hidden[mx.array(last_rows)]
        logits = self.decoder.logits(hidden)
        step.sampled, step.logprobs = sample(logits, terms)
        step.chosen = chosen_logits(logits, step.sampled)

    def _row_sampling(self, step: Step, request: Request, running: Step | None) -> RowSampling:
        seen = None
        if request.sampling.repetition_penalty != 1.0:
            seen = self._seen(request, running)
            step.seen.append((request, seen))
        return RowSampling(
            params=request.sampling,
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
        """Start a prepared step that holds; the step before must have ended."""
        forward, step.forward = step.forward, None
        assert forward is not None
        arrays = [array for view in forward.views for array in view.commit()]
        arrays += [array for _, state in forward.states for array in state.commit()]
        for request, seen in step.seen:
            request.seen = seen
            arrays.append(seen)
        for logprobs in step.logprobs.values():
            arrays += (logprobs.chosen, logprobs.top_ids, logprobs.top)
        arrays += [logits for _, _, logits in step.evaluated]
        if step.sampled is not None and step.chosen is not None:
            arrays += (step.sampled, step.chosen)
        step.submitted_ms = now_ms
        for request in step.sampling:
            request.pending = 1
        self._prefill.submitted(step.work, step.repairs)
        mx.async_eval(arrays)  # type: ignore[no-untyped-call]

    def wait(self, step: Step) -> tuple[list[int | None], dict[int, TokenLogprobs]]:
        """Block until the step has ended (the GIL is released); what it sampled, by row.

        A token is None where its logit is no number, and so none can be chosen.
        """
        mx.synchronize()
        if step.sampled is None or step.chosen is None:
            return [], {}
        sound = np.isfinite(np.array(step.chosen))
        pairs = zip(np.array(step.sampled), sound, strict=True)
        tokens = [int(token) if is_sound else None for token, is_sound in pairs]
        rows = [(i, tokens[i], row) for i, row in step.logprobs.items()]
        return tokens, {i: _to_host(token, row) for i, token, row in rows if token is not None}

    def not_finite(self, kv: SessionKV) -> LogitsNotFinite:
        """Why no token can follow a session's KV: the first layer in which it is no number."""
        assert kv.buffers is not None
        num_layers = self.decoder.config.num_layers
        where = f"behind the keys and values of all {num_layers} layers, which are sound"
        for layer, arrays in enumerate(zip(kv.buffers.keys, kv.buffers.values, strict=True)):
            if not all(mx.isfinite(array[:, : kv.num_tokens]).all().item() for array in arrays):
                where = f"first seen in the keys and values of layer {layer} of {num_layers}"
                break
        return LogitsNotFinite(
            f"no token can follow the first {kv.num_tokens}: its logits are no numbers; {where}"
        )


def _is_due(session: EngineSession, repair: RepairPlan) -> bool:
    kv = session.kv
    return kv.provenance.exact_prefix == repair.start and kv.num_tokens >= repair.end


def _to_check(
    session: EngineSession, repair: RepairPlan
) -> Iterator[tuple[Request, int, RowSampling]]:
    """Rows under repair whose next token was sampled before, and how it was."""
    request = session.active
    if request is None or request.sampling.repetition_penalty != 1.0:
        return
    params = replace(request.sampling, logprobs=None)
    num_prompt = len(request.prompt_ids)
    for position in range(max(repair.start, num_prompt - 1), repair.end):
        output = position + 1 - num_prompt
        yield request, position, RowSampling(params=params, position=output)


def _to_host(token: int, row: RowLogprobs) -> TokenLogprobs:
    pairs = zip(np.array(row.top_ids), np.array(row.top), strict=True)
    return TokenLogprobs(
        token_id=token,
        logprob=float(np.array(row.chosen)),
        top=tuple((int(i), float(v)) for i, v in pairs),
    )


def _packed_tokens(work: Work, running: Step | None) -> mx.array:
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
