"""One turn of the engine after another: inbox → plan → step → outbox.

    caller ──inbox──▶ take ─▶ plan ─▶ prepare(n+1) ─▶ wait(n) ─▶ move ─▶ submit(n+1) ─▶ deliver(n)
      ▲                                                                                     │
      └──────────────────────────────────────── outbox ◀────────────────────────────────────┘

A turn plans once, and does one of three things: it computes a step, or changes who has memory, or
waits for a message. Step n+1's graph is built while step n runs, and step n's text is delivered
while step n+1 runs, so the device waits only for what lies between `wait` and `submit`:
microseconds, and KV that moves (a group copied to staging, memory for a session that arrives),
which is kept to a part of the target.

A prepared step is thrown away if it does not hold any more (`Step.holds`: somebody in it has left)
and, for the sake of what is news to its plan, once: somebody came, can compute by now, or left
memory that others wait for. Then a step is owed, and comes first.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from edgekv.clock import Clock
from edgekv.engine.inbox import (
    AppTerms,
    Call,
    Cancel,
    CloseSession,
    ForgetApp,
    Inbox,
    IoReady,
    Message,
    Pressure,
    Shutdown,
    Submit,
    Suspend,
)
from edgekv.engine.ledger import EngineCounters, Ledger
from edgekv.engine.outbox import FinishReason, TokenLogprobs
from edgekv.engine.prefill import Unsure
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.runner import Draw, Drawn, Runner, Step
from edgekv.sched.compose import prefill_share, tbt_target
from edgekv.sched.cost import CostModel, StepShape
from edgekv.sched.plan import MemoryPlan, StepPlan
from edgekv.sched.scheduler import SchedulerConfig, plan_step

MOVE_SHARE = 0.15  # of the time-between-tokens target, for moving KV between two steps


class Said(NamedTuple):
    """What a request's caller is to be told."""

    request: Request
    token: int | None  # None: the end
    logprobs: TokenLogprobs | None = None
    last: bool = False  # what was shown ahead beyond it does not hold


class Loop:
    """What happens on the engine thread, turn by turn. Owned by that thread; starts none itself."""

    def __init__(
        self, runner: Runner, ledger: Ledger, inbox: Inbox, config: SchedulerConfig, clock: Clock
    ) -> None:
        self.runner = runner
        self.ledger = ledger
        self._inbox = inbox
        self._config = config
        self._clock = clock
        self._running: Step | None = None
        self._shutdown = False
        self._owes_step = False  # one was thrown away for somebody, or had to wait for memory
        self._untold: list[Said] = []  # in order
        self._evaluated: list[tuple[Request, int, mx.array]] = []  # see `Step`
        self._suspending: list[tuple[EngineSession, Future[int]]] = []
        self._cost = CostModel()
        self._timed: list[tuple[StepShape, float]] = []  # steps that the model has not seen yet
        self._ended_ms: float | None = None  # when the last step ended, if somebody decodes since

    def turn(self) -> bool:
        """One turn of the loop; False when it was the last."""
        if not self._owes_step:
            self._take_in(block=False)
        if self._shutdown:
            if self._running is not None:
                self.runner.wait(self._running)
            return False
        if self._running is None:
            self._move()
        now_ms = self._clock.now_ms()
        snapshot = self.ledger.snapshot(self._cost, self._config.policy, now_ms)
        plan = plan_step(now_ms, snapshot, self._cost, self._config)
        self.ledger.counted.num_plans += 1
        self.ledger.counted.plan_ms += self._clock.now_ms() - now_ms
        if plan.memory:
            self._change_memory(plan.memory)
        elif plan.computes:
            self._compute(plan)
        else:
            self._rest()
        return True

    def _compute(self, plan: StepPlan) -> None:
        """Prepare a step behind the one that runs, and submit it once that has ended."""
        work = [(self.ledger.requests[s.request_id], s) for s in plan.segments]
        repairs = [(self.ledger.sessions[r.session_id], r) for r in plan.repairs]
        if lacking := self.ledger.without_slots(work):
            if self._running is not None:
                self._owes_step = True
                self.end_running()  # what it reads moves; then it is planned anew
                self._deliver()
                return
            if not all(self.ledger.swap.make_slots(r.session) for r in lacking):
                return  # it is planned anew without those that wait for staging
        num_news = self.ledger.num_news
        step = self.runner.prepare(work, self._running, repairs)
        self.end_running()
        if any(said.request.telling.first_visible_ms is None for said in self._untold):
            self._deliver()  # somebody waits for a first token; a step would take its time first
        self._take_in(block=False)
        self._move()
        if step.holds and (self._owes_step or self.ledger.num_news == num_news):
            self.runner.submit(step, self._clock.now_ms())
            if self._ended_ms is not None:
                self._cost = self._cost.observe_between(step.submitted_ms - self._ended_ms)
                self._ended_ms = None
            self.ledger.submitted(work)
            for request, _ in work:
                if request.first_step_ms is None:
                    request.first_step_ms = step.submitted_ms
            self._running, self._owes_step = step, False
        else:
            self.ledger.counted.num_steps_thrown += 1
            self._owes_step = True
        del step  # unevaluated: what it holds would keep the next one from updating in place
        self._deliver()

    def _change_memory(self, plan: MemoryPlan) -> None:
        """Carry out what the plan wants of memory, once no step runs."""
        self._owes_step = True
        if self._running is None:
            self.ledger.apply(plan, self._clock.now_ms())
        else:
            self.end_running()  # it may free what is lacking: then it is planned anew
            self._deliver()

    def _rest(self) -> None:
        """Nobody can compute: let the last step end, or wait for a message."""
        self._owes_step = False
        self._ended_ms = None
        self._deliver()
        if self._running is not None:
            self.end_running()
        elif not self.ledger.arrivals.pending:
            assert self.ledger.swap.busy or not self.ledger.requests, "nobody can run"
            lead = self.runner.lead
            if lead.waits:
                lead.poll()
            else:
                lead.rests()
            self._take_in(block=not lead.waits)

    def _move(self) -> None:
        """Between two steps: what arrives gets memory, what has arrived can compute."""
        now_ms = self._clock.now_ms()
        decoding = self.ledger.decoding()
        if not decoding:
            self._ended_ms = None
        target_ms = tbt_target(decoding, self._cost, self._config.tbt_target_ms)
        share_ms = MOVE_SHARE * target_ms if decoding else float("inf")
        ready = self.ledger.arrivals.advance(now_ms + share_ms)
        ready += self.ledger.collect()
        share = prefill_share(decoding, self._cost, target_ms)
        for request in ready:
            self.ledger.complete(request, now_ms, self._cost, share)
            self._end_if_warm(request)
        self._suspend()
        self.ledger.give_back()

    def _suspend(self) -> None:
        """Let sessions leave that were told to, and tell of those that have left."""
        waiting, self._suspending = self._suspending, []
        for session, told in waiting:
            if self.ledger.suspended(session):
                told.set_result(session.kv.stored)
            else:
                self._suspending.append((session, told))

    # --- messages ---

    def _take_in(self, *, block: bool) -> None:
        """Handle the messages that wait."""
        for message in self._inbox.take(block=block):
            self._handle(message)

    def _handle(self, message: Message) -> None:
        match message:
            case Submit(request):
                self.ledger.enter(request, self._clock.now_ms())
                self._end_if_warm(request)
            case Cancel(request_id) if request_id in self.ledger.requests:
                self._leave(self.ledger.requests[request_id], "cancelled")
            case CloseSession(session):
                self._close(session)
            case Suspend(session, told):
                self._suspending.append((session, told))
            case Call(run):
                run()
            case AppTerms() | ForgetApp():
                self.ledger.hear_of(message, self._clock.now_ms())
            case Pressure(fraction):
                self.ledger.soft_fraction = fraction
            case IoReady():
                pass  # `_move` collects
            case Shutdown():
                self._shutdown = True

    def _close(self, session: EngineSession) -> None:
        session.closed = True
        if session.active is None:
            self.ledger.forget(session)
        else:
            self._leave(session.active, "cancelled")

    def _end_if_warm(self, request: Request) -> None:
        """End a request that only wanted KV and got all of it from the cache."""
        if request.prefill_only and request.exhausted(self.ledger.tokens_max):
            self._leave(request, "length")

    def _leave(self, request: Request, reason: FinishReason) -> None:
        self.ledger.leave(request, reason, self._clock.now_ms())
        self._inbox.finished(request.request_id)
        self._untold.append(Said(request, None))
        self.ledger.swap.note_tail(request.session)

    # --- a step's end ---

    def end_running(self) -> None:
        """Wait for the running step, if there is one, and take in what came of it."""
        step, self._running = self._running, None
        if step is None:
            return
        drawn = self.runner.wait(step)
        now_ms = self._clock.now_ms()
        self._ended_ms = now_ms
        elapsed_ms = now_ms - step.submitted_ms
        self._timed.append((step.shape, elapsed_ms))
        self.ledger.charge(step.work, step.repairs, elapsed_ms, self._cost, now_ms)
        self._record(step, drawn, now_ms)
        for session in step.sessions:
            self.ledger.prefill.settled(session)
            self.ledger.swap.write_behind(session)
        for request, _ in step.work:
            if request.finish_reason is None and not request.pending:
                if request.at_end:
                    self._leave(request, "stop")
                elif request.exhausted(self.ledger.tokens_max):
                    self._leave(request, "length")

    def _record(self, step: Step, drawn: Sequence[Drawn], now_ms: float) -> None:
        """Take in what came of a step: tokens that were there before are looked at first."""
        for request, plan in step.work:
            num_prompt = len(request.prompt_ids)
            known = request.session.kv.provenance.exact_prefix if request.confirms else plan.end
            request.outbox.prefill_progress = (min(plan.end, known, num_prompt), num_prompt)
        num_new = len(step.new)
        corrected = set()  # what else was drawn for them follows a token that is gone
        for draw, result in zip(step.checks, drawn[num_new:], strict=True):
            request = draw.request
            if request.finish_reason is not None or request in corrected:
                continue
            if not self._check(draw, result, now_ms):
                corrected.add(request)
        for draw, result in zip(step.new, drawn[:num_new], strict=True):
            if draw.request.finish_reason is None:
                draw.request.pending = 0
                if draw.request not in corrected:
                    self._take_new(draw, result, step.glances.get(draw.request), now_ms)
        for request, weights in step.glances.items():
            if request.looks and request.finish_reason is None:
                self.ledger.look(request, np.array(weights))
        self._evaluated += step.evaluated

    def _take_new(self, draw: Draw, result: Drawn, glance: mx.array | None, now_ms: float) -> None:
        request, token = draw.request, result.token
        if token is None:
            self._fail(request)
        elif request.confirms and not draw.exact:
            unsure = Unsure(result.margin, None if glance is None else np.array(glance))
            self._take_ahead(request, token, unsure, now_ms)
        else:
            self._append(request, result, now_ms)

    def _append(
        self, request: Request, result: Drawn, now_ms: float, *, last: bool = False
    ) -> None:
        """The next token of an answer, which stays, or the end of it."""
        token = result.token
        assert token is not None
        if request.ends_with(token):
            request.at_end = True
            return
        request.append(token, now_ms)
        request.num_confirmed += request.confirms
        self._untold.append(Said(request, token, result.logprobs, last))
        for forced in request.follow(self.ledger.tokens_max, now_ms):
            self._untold.append(Said(request, forced))

    def _take_ahead(self, request: Request, token: int, unsure: Unsure, now_ms: float) -> None:
        """Show a token that was sampled over predicted KV, unless it had better wait.

        One that would end the answer does: an answer ends exactly.
        """
        ends = request.ends_with(token)
        if ends or request.num_generated + 1 >= request.max_output(self.ledger.tokens_max):
            self.ledger.recede(request, None)
        elif not self.ledger.prefill.goes_ahead(request, unsure):
            self.ledger.recede(request, unsure)
        elif not request.telling.push_ahead(token, now_ms):
            self.ledger.recede(request, None)  # it would be told this token again
        else:
            request.append(token, now_ms)

    def _check(self, draw: Draw, result: Drawn, now_ms: float) -> bool:
        """Whether exact KV says what was said over predicted KV; if not, it goes on from there."""
        request = draw.request
        if not request.confirms:
            request.num_compared += 1
            request.num_agreed += request.tokens[draw.position + 1] == result.token
            return True
        if result.token is None:
            self._fail(request)
            return False
        ends = request.ends_with(result.token)
        if request.confirm(draw.index, None if ends else result.token):
            self._untold.append(Said(request, result.token, result.logprobs))
            return True
        request.pending = 0  # what is sampled behind it in this step is gone too
        self._append(request, result, now_ms, last=True)
        self.ledger.cut(request, draw.position + 1)
        return False

    def _fail(self, request: Request) -> None:
        """End a request whose next token cannot be chosen, or let its last row run again.

        That is so while its mask is not there. Unless its grammar is why it ends, its KV is of no
        use to anybody.
        """
        if request.mask is not None:
            self.ledger.cut(request, request.num_computed - 1)
            return
        if request.constraint is not None and request.constraint.error is not None:
            request.failure = request.constraint.error
        else:
            request.failure = self.runner.not_finite(request.session.kv)
            self.ledger.discard(request.session)
        self._leave(request, "cancelled")

    def _deliver(self) -> None:
        """What can wait until the next step runs: text, endings, the cost model."""
        for shape, ms in self._timed:
            self._cost = self._cost.observe(shape, ms)
        self._timed.clear()
        for request, start, logits in self._evaluated:
            assert request.logits is not None
            request.logits[start : start + len(logits)] = np.array(logits, copy=False)
        self._evaluated.clear()
        while self._untold:  # a stop string ends a request, and its end is told too
            untold, self._untold = self._untold, []
            for request, token, logprobs, last in untold:
                now_ms = self._clock.now_ms()
                if token is None:
                    request.tell_end(now_ms)
                    self._inbox.told(request.request_id)
                elif not request.telling.at_stop:
                    stops = request.telling.push(token, logprobs, now_ms, last=last)
                    if stops and request.finish_reason is None:
                        self._leave(request, "stop")

    # --- from outside ---

    def observe(self, shape: StepShape, ms: float) -> None:
        """Teach the cost model a step that was timed elsewhere."""
        self._cost = self._cost.observe(shape, ms)

    def counters(self) -> EngineCounters:
        """What was computed and moved so far, as a value."""
        counted = self.ledger.counted
        return replace(
            counted,
            tbt_target_ms=tbt_target([], self._cost, self._config.tbt_target_ms),
            service_ms=dict(counted.service_ms),
            swap=replace(counted.swap),
        )

    def close(self) -> None:
        """Keep what outlives the process; nothing runs any more."""
        self.ledger.prefill.close()
        self.ledger.swap.close(list(self.ledger.sessions.values()))

    def check_integrity(self) -> None:
        """Assert all invariants, between two turns."""
        self.end_running()
        self.ledger.check_integrity()
