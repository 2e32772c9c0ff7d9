"""One turn of the engine after another: inbox → plan → step → outbox.

    caller ──inbox──▶ take ─▶ plan ─▶ prepare(n+1) ─▶ wait(n) ─▶ move ─▶ submit(n+1) ─▶ deliver(n)
      ▲                                                                                     │
      └──────────────────────────────────────── outbox ◀────────────────────────────────────┘

Step n+1's graph is built while step n runs, and step n's text is delivered while step n+1 runs, so
the device waits only for what lies between `wait` and `submit`: microseconds, and KV that moves (a
group copied to staging, memory for a session that arrives), which is kept to a part of the target.
"""

import mlx.core as mx
import numpy as np

from edgekv.clock import Clock
from edgekv.engine.deliver import Deliverer
from edgekv.engine.evaluate import evaluate_logits
from edgekv.engine.inbox import (
    AppTerms,
    Call,
    Cancel,
    CloseSession,
    Inbox,
    IoReady,
    Message,
    Pressure,
    Shutdown,
    Submit,
)
from edgekv.engine.ledger import EngineCounters, Ledger
from edgekv.engine.outbox import FinishReason
from edgekv.engine.predictions import record, record_repair
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.runner import Runner, Step, StepResult
from edgekv.sched.compose import prefill_share
from edgekv.sched.cost import CostModel, StepShape
from edgekv.sched.plan import StepPlan
from edgekv.sched.scheduler import SchedulerConfig, plan_step

WARM_UP_ROWS = (1, 16, 1, 16, 64)
MOVE_SHARE = 0.15  # of the time-between-tokens target, for moving KV between two steps


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
        self._deliverer = Deliverer(clock)
        self._running: Step | None = None
        self._shutdown = False
        self._changed = False  # a plan made before may not hold any more
        self._cost = CostModel()
        self._timed: list[tuple[StepShape, float]] = []  # steps that the model has not seen yet

    def warm_up(self) -> None:
        """Short evaluations of a few lengths: kernels get compiled, the cost model a start."""
        for num_rows in WARM_UP_ROWS:
            num_rows = min(num_rows, self.ledger.tokens_max)
            start_ms = self._clock.now_ms()
            self.evaluate([0] * num_rows)
            elapsed_ms = self._clock.now_ms() - start_ms
            shape = StepShape(num_rows=num_rows, num_pairs=num_rows * num_rows)
            self._cost = self._cost.observe(shape, elapsed_ms)
        mx.reset_peak_memory()

    def turn(self) -> bool:
        """One turn of the loop; False when it was the last."""
        self._take_in(block=self._rests and not self._shutdown)
        if self._shutdown:
            if self._running is not None:
                self.runner.wait(self._running)
            return False
        plan = self._plan()
        if plan.memory:
            self._change_memory()
            return True
        work = [(self.ledger.requests[s.request_id], s) for s in plan.segments]
        repairs = [(self.ledger.sessions[r.session_id], r) for r in plan.repairs]
        step = self.runner.prepare(work, self._running, repairs) if work or repairs else None
        ended = self._end_running()
        if self._deliverer.begins:  # somebody waits for it; a step would take its time first
            ended |= self._deliver()
        changed = self._take_in(block=False)
        self._move()
        if step is not None and not ended and not changed:
            self.runner.submit(step, self._clock.now_ms())
            self._note_first_step(step)
            self._running = step
        # Else somebody left or came: the prepared step is thrown away unevaluated, and the next
        # turn plans for what is so now.
        del step
        self._deliver()
        return True

    @property
    def _rests(self) -> bool:
        """Whether there is nothing to do until a message comes."""
        if self._running is not None or self.ledger.arrivals.pending:
            return False
        if not self.ledger.requests and not self.ledger.repairs():
            return True
        plan = self._plan()
        nothing = not plan.memory and not plan.segments and not plan.repairs
        assert not nothing or self.ledger.swap.busy or not self.ledger.requests, "nobody can run"
        return nothing

    def _change_memory(self) -> None:
        """Carry out what the plan wants of memory, once no step runs."""
        self._end_running()
        self._deliver()
        plan = self._plan()  # again: the step that ended may have freed what was lacking
        self.ledger.apply(plan.memory, self._clock.now_ms())
        self._move()
        self._deliver()  # the next turn may wait for a message before it does

    def _move(self) -> None:
        """Between two steps: what arrives gets memory, what has arrived can compute."""
        now_ms = self._clock.now_ms()
        decoding = [s for r in self.ledger.requests.values() if (s := r.state()).decoding]
        share_ms = MOVE_SHARE * self._config.tbt_target_ms if decoding else float("inf")
        ready = self.ledger.arrivals.advance(now_ms + share_ms)
        for session in self.ledger.swap.collect():
            request = self.ledger.arrived(session)
            if request is not None:
                ready.append(request)
        share = prefill_share(decoding, self._cost, self._config.tbt_target_ms)
        for request in ready:
            self.ledger.complete(request, now_ms, self._cost, share)
            self._end_if_warm(request)
        self.ledger.give_back()

    def _take_in(self, *, block: bool) -> bool:
        """Handle the messages that wait; True if a plan made before may not hold any more.

        I/O changes no plan that was made, and calls only if they say so: whoever asks for figures
        all the time keeps no step from starting.
        """
        self._changed = False
        for message in self._inbox.take(block=block):
            self._handle(message)
            self._changed |= not isinstance(message, Call | IoReady)
        return self._changed

    def _end_if_warm(self, request: Request) -> None:
        """End a request that only wanted KV and got all of it from the cache."""
        if request.prefill_only and request.exhausted(self.ledger.tokens_max):
            self._leave(request, "length")

    def _plan(self) -> StepPlan:
        return plan_step(
            self._clock.now_ms(), self.ledger.snapshot(self._cost), self._cost, self._config
        )

    def _note_first_step(self, step: Step) -> None:
        for request, _ in step.work:
            if request.first_step_ms is None:
                request.first_step_ms = step.submitted_ms

    def _handle(self, message: Message) -> None:
        match message:
            case Submit(request):
                self._end_prediction(request.session)
                self.ledger.enter(request, self._clock.now_ms())
                self._end_if_warm(request)
            case Cancel(request_id):
                if request_id in self.ledger.requests:
                    self._end_prediction(self.ledger.requests[request_id].session)
                if request_id in self.ledger.requests:
                    self._leave(self.ledger.requests[request_id], "cancelled")
            case CloseSession(session):
                self._close_session(session)
            case Call(run):
                run()
            case AppTerms() | Pressure():
                self.ledger.set_terms(message, self._clock.now_ms())
            case IoReady():
                pass  # `_move` collects
            case Shutdown():
                self._shutdown = True

    def _close_session(self, session: EngineSession) -> None:
        session.closed = True
        self._end_prediction(session)
        if session.active is not None:
            self._leave(session.active, "cancelled")
        else:
            self.ledger.forget(session)

    def _end_prediction(self, session: EngineSession) -> None:
        """Let a step end that may predict or repair a session's KV, before somebody changes it."""
        if session.predicted is not None:
            self._end_running()

    def _leave(self, request: Request, reason: FinishReason) -> None:
        self.ledger.leave(request, reason, self._clock.now_ms())
        self._inbox.finished(request.request_id)
        self._deliverer.finish(request)

    def _end_running(self) -> bool:
        """Wait for the running step and take its tokens in.

        Returns:
            Whether a request ended by it, or predicted KV: a step that was prepared does not hold.
        """
        step, self._running = self._running, None
        if step is None:
            return False
        result = self.runner.wait(step)
        now_ms = self._clock.now_ms()
        elapsed_ms = now_ms - step.submitted_ms
        self._timed.append((step.shape, elapsed_ms))
        self.ledger.charge(step.work, step.repairs, elapsed_ms, self._cost, now_ms)
        exact_again = self._record_kv(step)
        self._record_tokens(step, result, now_ms)
        ended = [
            request
            for request, _ in step.work
            if request.finish_reason is None
            and not request.pending
            and (request.at_eos or request.exhausted(self.ledger.tokens_max))
        ]
        for request in ended:
            self._leave(request, "stop" if request.at_eos else "length")
        return bool(ended) or exact_again

    def _record_kv(self, step: Step) -> bool:
        """Note what is computed; True if some session's predicted KV is exact by now."""
        for session, repair in step.repairs:
            record_repair(session, repair)
        for request, plan in step.work:
            if request.finish_reason is None:
                assert request.session.kv.num_tokens == plan.start
                record(request.session, plan, request.tokens[plan.start : plan.end])
                prompt = len(request.prompt_ids)
                request.outbox.prefill_progress = (min(plan.end, prompt), prompt)
        sessions = {id(s): s for s in (*(s for s, _ in step.repairs), *step.sessions)}
        exact_again = [self.ledger.exact_again(session) for session in sessions.values()]
        for session in sessions.values():
            self.ledger.swap.write_behind(session)
        return any(exact_again)

    def _record_tokens(self, step: Step, result: StepResult, now_ms: float) -> None:
        self._record_checks(step, result)
        for row, request in enumerate(step.sampling):
            if request.finish_reason is not None:
                continue
            request.pending = 0
            token = result.tokens[row]
            if token in request.eos_ids and not request.sampling.ignore_eos:
                request.at_eos = True
            else:
                request.tokens.append(token)
                request.note_token(now_ms)
                self._deliverer.add(request, token, result.logprobs.get(row))

    def _record_checks(self, step: Step, result: StepResult) -> None:
        """Compare what was emitted over predicted KV with what exact KV says."""
        exact = result.tokens[len(step.sampling) :]
        for (session, position), token in zip(step.checks, exact, strict=True):
            request = session.active
            if request is not None and position + 1 < len(request.tokens):
                request.num_compared += 1
                request.num_agreed += request.tokens[position + 1] == token

    def _deliver(self) -> bool:
        """What can wait until the next step runs: text, endings, the cost model.

        Returns:
            Whether a request ended by what it said.
        """
        for shape, ms in self._timed:
            self._cost = self._cost.observe(shape, ms)
        self._timed.clear()
        stopped = [r for r in self._deliverer.deliver() if r.finish_reason is None]
        for request in stopped:
            self._leave(request, "stop")
        self._deliverer.deliver()
        return bool(stopped)

    def evaluate(self, token_ids: list[int]) -> np.ndarray:
        """Logits `(T, vocab)` of a text; see `evaluate_logits`."""
        return evaluate_logits(
            self.runner.decoder, self.ledger, token_ids, rows_max=self._config.prefill_rows_max
        )

    def suspend(self, session: EngineSession) -> int:
        """Take an idle session out of memory and wait until it is; return its tokens on disk."""
        self._end_running()
        kv = session.kv
        if kv.moving:
            self.ledger.swap.finish()
        if session.active is None and kv.resident and kv.buffers is not None:
            self.ledger.swap_out(session)
            self.ledger.swap.finish()
            self._changed = True  # a step may be prepared that repairs this session
        return kv.stored

    def counters(self) -> EngineCounters:
        """What was computed and moved so far."""
        return self.ledger.counters()

    def close(self) -> None:
        """Keep what outlives the process; nothing runs any more."""
        self.ledger.swap.close(list(self.ledger.sessions.values()))

    def check_integrity(self) -> None:
        """Assert all invariants, between two steps."""
        self._end_running()
        self.ledger.check_integrity()
