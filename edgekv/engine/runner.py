"""Carries out the segments of a plan: the only caller of `mx.eval` in a step.

A step has three moments. `prepare` builds its graph, while the step before may still run. `submit`
hands it to the device; by then the step before has ended, else its readers would keep MLX from
updating KV in place and every layer would be copied. `wait` blocks until it is done.

What a grammar allows next is known only by the token before it. So tokens of constrained rows are
chosen by a second graph, behind the first one, which is submitted without waiting for a mask.
"""

import copy
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from edgekv.clock import Clock
from edgekv.engine.lead import ALONE_LEAD, Lead
from edgekv.engine.outbox import TokenLogprobs
from edgekv.engine.prefill import ExactPrefill, Forward, Repairs, Rows, Told, Work, run_exact
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.sampler import RowLogprobs, RowSampling, Sampled, sample
from edgekv.engine.steps import EXACT, PartWords
from edgekv.errors import LogitsNotFinite
from edgekv.kv.pool import KVPool
from edgekv.kv.session_kv import SessionKV
from edgekv.kv.view import StagedView
from edgekv.models.decoder import Decoder
from edgekv.sched.cost import EMPTY_STEP, StepShape
from edgekv.sched.plan import RepairPlan, SegmentPlan
from edgekv.tokenizer.constraint import Constraint

# Masks that take long are computed on threads, and waited for no longer than this.
_MASK_THREADS_MAX = 4
_MASK_WAIT_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A row of a step whose logits say which is the `index`-th token of an answer.

    `exact`: all KV that it reads is exact, or becomes so in this step.
    """

    request: Request
    index: int
    exact: bool

    @property
    def position(self) -> int:
        """The row's place in its session."""
        return len(self.request.prompt_ids) - 1 + self.index


class Drawn(NamedTuple):
    """What came of a draw; no token where its logit is no number, and so none can be chosen."""

    token: int | None
    logprobs: TokenLogprobs | None = None
    margin: float = float("inf")  # see `sample`


@dataclass(frozen=True, kw_only=True)
class ConstrainedRows:
    """Rows whose tokens can be chosen only once it is known what their grammars allow."""

    rows: list[int]  # among the step's draws
    logits: mx.array  # of these, `(R, vocab)`
    terms: list[RowSampling]


@dataclass(kw_only=True)
class Step:
    """One step from its graph to its result."""

    work: Work  # requests and their rows
    repairs: Repairs  # sessions and rows whose KV becomes exact
    shape: StepShape  # what it costs
    num_retracted: list[int]  # of each request's tokens, when the graph was built
    forward: Forward | None = None  # the graph of its layers; None once it is submitted
    new: list[Draw] = field(default_factory=list)  # of the next token, in order of `sampled`
    checks: list[Draw] = field(default_factory=list)  # of tokens that are there, in the rows behind
    sampled: Sampled | None = None
    constrained: ConstrainedRows | None = None  # rows of `new` that `sampled` has not yet
    # What requests with a repetition penalty have seen, this step's token not included.
    seen: list[tuple[Request, mx.array]] = field(default_factory=list)
    glances: dict[Request, mx.array] = field(default_factory=dict)  # see `Forward`
    # Requests, their first row, and `(rows, vocab)` float32 logits.
    evaluated: list[tuple[Request, int, mx.array]] = field(default_factory=list)
    asked: list[list[int]] = field(default_factory=list)  # rows, by call of `Decoder.logits`
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
            and all(not p.samples or p.end == len(r.tokens) for r, p in self.work)
            and [r.num_retracted for r, _ in self.work] == self.num_retracted
            and all(_is_due(session, plan) for session, plan in self.repairs)
            and all(view.holds for view in self.forward.views)
            and all(s.predicted is staged.state for s, staged in self.forward.states)
        )

    def row_of(self, request: Request) -> int:
        """Row of `sampled` that is this request's next token."""
        return next(row for row, draw in enumerate(self.new) if draw.request is request)


class Runner:
    """Builds, submits and awaits steps. Owned by the engine thread."""

    def __init__(self, decoder: Decoder, prefill: ExactPrefill, lead: Lead = ALONE_LEAD) -> None:
        self.decoder = decoder
        self.lead = lead
        self._prefill = prefill
        self._masks = futures.ThreadPoolExecutor(_MASK_THREADS_MAX, "edgekv-grammar")

    def prepare(self, work: Work, running: Step | None, repairs: Repairs = ()) -> Step:
        """Build the graph of a step; `running` is the step whose tokens are not known yet."""
        assert work or repairs
        shape = EMPTY_STEP
        for _, segment in work:
            shape = segment.added_to(shape)
        for _, repair in repairs:
            shape = repair.added_to(shape)
        num_retracted = [request.num_retracted for request, _ in work]
        step = Step(work=work, repairs=repairs, shape=shape, num_retracted=num_retracted)
        self.lead.group.begin()
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
        words = PartWords(
            number=view.number, offset=0, num_rows=num_rows, num_kept=1, tokens=[0] * num_rows
        )
        self.lead.submit(Told(EXACT, [words]), [[num_rows - 1]], cuts_rows=False)
        self.lead.group.begin()
        tokens = mx.zeros((num_rows,), dtype=mx.uint32)
        rows = Rows(view, num_rows, num_rows)
        hidden = run_exact(self.decoder, tokens, [rows], cuts_rows=False)
        assert hidden is not None
        mx.eval(self.decoder.logits(hidden[-1:]), view.commit(), hidden)
        elapsed_ms = clock.now_ms() - start_ms
        kv.drop(pool)
        return EMPTY_STEP.plus(num_rows, 0), elapsed_ms

    def _add_logits(self, step: Step, forward: Forward, running: Step | None) -> None:
        """Sample what is to be sampled; logits of no other rows but an evaluation's."""
        hidden, ends = forward.hidden, forward.ends
        rows, terms = [], []
        step.glances = forward.glances
        looking = {request for request in forward.glances if request.looks}
        for (request, plan), end in zip(step.work, ends, strict=False):
            if request.logits is not None:
                assert hidden is not None
                step.asked.append(list(range(end - plan.num_rows, end)))
                logits = self.decoder.logits(hidden[end - plan.num_rows : end])
                step.evaluated.append((request, plan.start, logits.astype(mx.float32)))
            elif plan.samples and not request.prefill_only and request not in looking:
                draw = _next_draw(request, plan)
                step.new.append(draw)
                rows.append(end - 1)
                terms.append(self._row_sampling(step, draw, running))
        plans: list[tuple[Request | None, SegmentPlan | RepairPlan]] = [
            *((r if r.confirms and _is_exact(r, p) else None, p) for r, p in step.work),
            *((session.active, repair) for session, repair in step.repairs),
        ]
        for (asker, part), end in zip(plans, ends, strict=True):
            for draw in _checks(asker, part):
                step.checks.append(draw)
                rows.append(end - (part.end - draw.position))
                terms.append(self._sampling_again(draw))
        if not rows:
            return
        assert hidden is not None
        step.asked.append(rows)
        if rows != list(range(hidden.shape[0])):
            hidden = hidden[mx.array(rows)]
        _choose(step, self.decoder.logits(hidden), terms)

    def _row_sampling(self, step: Step, draw: Draw, running: Step | None) -> RowSampling:
        request, seen = draw.request, None
        if request.sampling.repetition_penalty != 1.0:
            seen = self._seen(request, running)
            step.seen.append((request, seen))
        return RowSampling(
            params=request.sampling,
            position=draw.index,
            seen=seen,
            counts=self._counts(draw, running),
            margin=request.confirms and not draw.exact,
        )

    def _sampling_again(self, draw: Draw) -> RowSampling:
        """How a token was sampled that is there."""
        request, seen = draw.request, None
        params = request.sampling
        if not request.confirms:
            params = replace(params, logprobs=None)  # they were told
        if params.repetition_penalty != 1.0:
            seen = self._seen_in(request.tokens[: draw.position + 1])
        counts = self._counts(draw, None)
        return RowSampling(params=params, position=draw.index, seen=seen, counts=counts)

    def _counts(self, draw: Draw, running: Step | None) -> mx.array | None:
        """How often the answer holds each token before a draw, if that is penalised."""
        request, first = draw.request, len(draw.request.prompt_ids)
        if not (request.sampling.presence_penalty or request.sampling.frequency_penalty):
            return None
        answer = request.tokens[first : first + draw.index]
        counts = mx.array(np.bincount(answer, minlength=self.decoder.config.vocab_size), mx.float32)
        if len(answer) < draw.index:
            assert running is not None
            assert running.sampled is not None
            counts = counts.at[running.sampled.tokens[running.row_of(request)]].add(1)
        return counts

    def _seen_in(self, tokens: list[int]) -> mx.array:
        seen = mx.zeros((self.decoder.config.vocab_size,), dtype=mx.bool_)
        seen[mx.array(tokens)] = True
        return seen

    def _seen(self, request: Request, running: Step | None) -> mx.array:
        """The request's token set with the token sampled last, known or not."""
        known = request.seen
        seen = self._seen_in(request.tokens) if known is None else copy.copy(known)
        if request.pending:
            assert running is not None
            assert running.sampled is not None
            seen[running.sampled.tokens[running.row_of(request)]] = True
        elif request.num_generated:
            seen[request.tokens[-1]] = True
        return seen

    def submit(self, step: Step, now_ms: float) -> None:
        """Start a prepared step that holds; the step before must have ended."""
        forward, step.forward = step.forward, None
        assert forward is not None
        assert forward.told is not None
        if not self.lead.alone:
            cuts_rows = self._prefill.cuts_rows
            self.lead.submit(forward.told(), step.asked, cuts_rows=cuts_rows)
        arrays = [array for view in forward.views for array in view.commit()]
        arrays += [array for _, state in forward.states for array in state.commit()]
        for request, seen in step.seen:
            request.seen = seen
            arrays.append(seen)
        arrays += [*forward.unread, *step.glances.values()]
        arrays += [logits for _, _, logits in step.evaluated]
        if step.sampled is not None:
            arrays += step.sampled.arrays
        if step.constrained is not None:
            arrays.append(step.constrained.logits)
        step.submitted_ms = now_ms
        for draw in step.new:
            draw.request.pending = 1
        self._prefill.submitted(step.work, step.repairs)
        mx.async_eval(arrays)  # type: ignore[no-untyped-call]
        if step.constrained is not None:
            self._choose_constrained(step, step.constrained)

    def _choose_constrained(self, step: Step, waiting: ConstrainedRows) -> None:
        """Choose the tokens of constrained rows, while the device computes the layers before.

        Where a mask is not there in time nothing is drawn of its row, which the loop runs again.
        """
        requests = [step.new[row].request for row in waiting.rows]
        size = waiting.logits.shape[-1]
        for request in requests:
            if request.mask is None:
                assert request.constraint is not None
                request.mask = self._mask(request.constraint, size)
        futures.wait([r.mask for r in requests if r.mask], _MASK_WAIT_S)
        allowed = np.zeros((len(requests), size), dtype=np.bool_)
        for row, request in enumerate(requests):
            if request.mask is not None and request.mask.done():
                allowed[row] = request.mask.result()
                request.mask = None
        chosen = sample(waiting.logits, waiting.terms, mx.array(allowed))
        if step.sampled is not None:
            num_rows = step.sampled.tokens.size + len(waiting.rows)
            others = [row for row in range(num_rows) if row not in waiting.rows]
            chosen = step.sampled.joined(chosen, others + waiting.rows)
        step.sampled, step.constrained = chosen, None
        mx.async_eval(chosen.arrays)  # type: ignore[no-untyped-call]

    def _mask(self, constraint: Constraint, size: int) -> futures.Future[np.ndarray]:
        """A mask, which is there at once unless such of this grammar are known to take long."""
        if constraint.is_slow:
            return self._masks.submit(constraint.mask, size)
        mask: futures.Future[np.ndarray] = futures.Future()
        mask.set_result(constraint.mask(size))
        return mask

    def wait(self, step: Step) -> list[Drawn]:
        """Block until the step has ended (the GIL is released); what came of its draws."""
        mx.synchronize()
        sampled = step.sampled
        if sampled is None:
            return []
        mx.eval(sampled.arrays)  # raises what ranks failed in, which `np.array` would pass over
        sound = np.isfinite(np.array(sampled.chosen))
        drawn = []
        for row, (token, is_sound) in enumerate(zip(np.array(sampled.tokens), sound, strict=True)):
            if not is_sound:
                drawn.append(Drawn(None))
                continue
            logprobs = sampled.logprobs.get(row)
            told = None if logprobs is None else _to_host(int(token), logprobs)
            margin = sampled.margins.get(row)
            margin_or_all = float("inf") if margin is None else float(np.array(margin))
            drawn.append(Drawn(int(token), told, margin_or_all))
        return drawn

    def not_finite(self, kv: SessionKV) -> LogitsNotFinite:
        """Why no token can follow a session's KV: the first layer in which it is no number."""
        assert kv.buffers is not None
        num_layers = self.decoder.config.num_layers
        where = f"behind what all {num_layers} layers keep, which is sound"
        for layer, pair in enumerate(zip(kv.buffers.keys, kv.buffers.values, strict=True)):
            state = kv.states.now.get(layer)
            end = kv.num_tokens - kv.buffers.first_token(layer)
            kept = state or [array[:, :end] for array in pair]
            if not all(mx.isfinite(array).all().item() for array in kept):
                what = "state" if state else "keys and values"
                where = f"first seen in the {what} of layer {layer} of {num_layers}"
                break
        return LogitsNotFinite(
            f"no token can follow the first {kv.num_tokens}: its logits are no numbers; {where}"
        )


def _choose(step: Step, logits: mx.array, terms: list[RowSampling]) -> None:
    """Choose tokens by the logits of a step's draws; those that are constrained can only wait."""
    rows = [row for row, draw in enumerate(step.new) if draw.request.constraint is not None]
    if not rows:
        step.sampled = sample(logits, terms)
        return
    others = [row for row in range(len(terms)) if row not in rows]
    if others:
        step.sampled = sample(logits[mx.array(others)], [terms[row] for row in others])
    logits = logits[mx.array(rows)]
    step.constrained = ConstrainedRows(rows=rows, logits=logits, terms=[terms[row] for row in rows])


def _is_due(session: EngineSession, repair: RepairPlan) -> bool:
    kv = session.kv
    return kv.provenance.exact_prefix == repair.start and kv.num_tokens >= repair.end


def _is_exact(request: Request, plan: SegmentPlan) -> bool:
    return not plan.num_cheap and request.session.kv.is_exact


def _next_draw(request: Request, plan: SegmentPlan) -> Draw:
    index = request.num_generated + request.pending
    return Draw(request=request, index=index, exact=_is_exact(request, plan))


def _checks(request: Request | None, plan: SegmentPlan | RepairPlan) -> Iterator[Draw]:
    """The exact rows of a plan whose next token was sampled over predicted KV."""
    if request is None:
        return
    first = len(request.prompt_ids) - 1
    sampled = request.num_generated + request.pending
    for index in range(max(plan.start - first, request.num_confirmed), plan.end - first):
        if index < sampled:
            yield Draw(request=request, index=index, exact=True)


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
    sampled = running.sampled.tokens
    if len(unknown) == len(known) == sampled.size and all(a == b for a, b in unknown):
        return sampled
    order = list(range(len(known)))
    for row, source in unknown:
        order[row] = len(known) + source
    return mx.concatenate([mx.array(known, dtype=mx.uint32), sampled])[mx.array(order)]
