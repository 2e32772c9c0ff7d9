"""The engine thread: inbox → plan → step → outbox, one turn after another.

    caller threads ──inbox──▶ drain ─▶ plan ─▶ prepare(n+1) ─▶ wait(n) ─▶ submit(n+1) ─▶ deliver(n)
          ▲                                                                                  │
          └─────────────────────────────────── outbox ◀──────────────────────────────────────┘

Step n+1's graph is built while step n runs, and step n's text is delivered while step n+1 runs, so
the device waits only for the few microseconds between `wait` and `submit`.
"""

import atexit
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import numpy as np

from edgekv.clock import Clock
from edgekv.engine.deliver import Deliverer
from edgekv.engine.evaluate import evaluate_logits
from edgekv.engine.ledger import Ledger
from edgekv.engine.outbox import Failed, FinishReason, Outbox
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.runner import Runner, Step, StepResult
from edgekv.errors import EdgeKVError, EngineFailed, QueueFull, RuntimeClosed
from edgekv.ids import RequestId
from edgekv.kv.layout import PoolSnapshot
from edgekv.kv.pool import KVPool
from edgekv.models.decoder import Decoder
from edgekv.sched.cost import CostModel, StepShape
from edgekv.sched.memory import tokens_max
from edgekv.sched.plan import StepPlan
from edgekv.sched.scheduler import SchedulerConfig, plan_step

T = TypeVar("T")


@dataclass(frozen=True)
class _Submit:
    request: Request


@dataclass(frozen=True)
class _Cancel:
    request_id: RequestId


@dataclass(frozen=True)
class _CloseSession:
    session: EngineSession


@dataclass(frozen=True)
class _Call:
    run: Callable[[], None]


class _Shutdown:
    pass


_Message = _Submit | _Cancel | _CloseSession | _Call | _Shutdown


@dataclass(frozen=True)
class Loaded:
    """What the engine thread works with, made on that thread."""

    decoder: Decoder
    pool: KVPool


class Engine:
    """The engine thread and its inbox. Public methods may be called from any thread."""

    def __init__(
        self, load: Callable[[], Loaded], config: SchedulerConfig, num_requests_max: int, clock: Clock
    ) -> None:
        self._config = config
        self._clock = clock
        self._num_requests_max = num_requests_max
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        # Outboxes of all unfinished requests, so that none waits for a thread that is gone.
        self._open: dict[RequestId, Outbox] = {}
        self._lock = threading.Lock()
        self._failure: EdgeKVError | None = None
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._main, args=(load,), name="edgekv-engine", daemon=True
        )

    # --- any thread ---

    def start(self) -> None:
        """Start the thread and wait until the model is loaded; raises what loading raised."""
        self._thread.start()
        # A daemon so that a forgotten `close` cannot hang the process; ended in order all the same.
        atexit.register(self.close)
        try:
            self._ready.result()
        except BaseException:
            self.close()
            raise

    def submit(self, request: Request) -> None:
        """Queue a request; its events come through its outbox.

        Raises:
            QueueFull: Too many requests are unfinished.
            RuntimeClosed, EngineFailed: The engine has ended.
        """
        with self._lock:
            self._raise_if_ended()
            if len(self._open) >= self._num_requests_max:
                raise QueueFull(
                    f"{len(self._open)} requests are waiting or running",
                    hint="wait for some to finish, or raise num_waiting_max",
                )
            self._open[request.request_id] = request.outbox
            self._inbox.put(_Submit(request))

    def cancel(self, request_id: RequestId) -> None:
        """End a request at the next chunk or token; a finished one is left alone."""
        self._inbox.put(_Cancel(request_id))

    def close_session(self, session: EngineSession) -> None:
        """Free a session's KV, ending its request if it has one."""
        self._inbox.put(_CloseSession(session))

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the engine thread, between steps, and return what it returns."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except EdgeKVError as error:
                future.set_exception(error)
            except AssertionError as error:
                future.set_exception(error)

        with self._lock:
            self._raise_if_ended()
            self._inbox.put(_Call(run))
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                with self._lock:
                    self._raise_if_ended()

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Logits of every position, `(T, vocab)` float32; see `evaluate_logits`."""
        return self.call(lambda: self._evaluate(token_ids))

    def pool_snapshot(self) -> PoolSnapshot:
        """The pool's figures between two steps."""
        return self.call(lambda: self._ledger.pool.snapshot())

    def check_integrity(self) -> None:
        """Assert all invariants between steps (AssertionError on the caller's thread)."""
        self.call(self._check_integrity)

    def close(self) -> None:
        """End the thread; unfinished requests fail with RuntimeClosed."""
        atexit.unregister(self.close)
        self._inbox.put(_Shutdown())
        self._thread.join()

    def _raise_if_ended(self) -> None:
        if self._failure is not None:
            raise self._failure

    # --- the engine thread ---

    def _main(self, load: Callable[[], Loaded]) -> None:
        try:
            self._serve(load)
        finally:
            self.__dict__.pop("_ledger", None)
            self.__dict__.pop("_runner", None)
            mx.clear_cache()
            # MLX gave this thread a stream with a thread of its own; left alone, it would be
            # destroyed while running, at exit, and abort the process.
            mx.clear_streams()

    def _serve(self, load: Callable[[], Loaded]) -> None:
        try:
            self._set_up(load())
        except BaseException as error:  # noqa: BLE001 - handed to `start`, which raises it
            self._end(RuntimeClosed("the runtime did not start"))
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            while self._turn():
                pass
        except BaseException as error:  # noqa: BLE001 - reported to every waiting caller
            failure = EngineFailed(
                f"the engine stopped: {type(error).__name__}: {error}",
                hint="this is a bug in edgekv; please report it",
            )
            failure.__cause__ = error
            self._end(failure)
        else:
            self._end(RuntimeClosed("the runtime was closed", hint="open a new one"))

    def _set_up(self, loaded: Loaded) -> None:
        limit = tokens_max(loaded.pool.layout, loaded.pool.snapshot().budget_bytes)
        self._runner = Runner(loaded.decoder)
        self._ledger = Ledger(loaded.pool, limit)
        self._deliverer = Deliverer(self._clock)
        self._running: Step | None = None
        self._shutdown = False
        self._cost = CostModel()
        self._warm_up()

    def _warm_up(self) -> None:
        """Short evaluations of a few lengths: kernels get compiled, the cost model a start."""
        for num_rows in (1, 16, 1, 16, 64):
            num_rows = min(num_rows, self._ledger.tokens_max)
            start_ms = self._clock.now_ms()
            self._evaluate([0] * num_rows)
            elapsed_ms = self._clock.now_ms() - start_ms
            shape = StepShape(num_rows=num_rows, num_pairs=num_rows * num_rows)
            self._cost = self._cost.observe(shape, elapsed_ms)
        mx.reset_peak_memory()

    def _end(self, failure: EdgeKVError) -> None:
        with self._lock:
            self._failure = failure
            outboxes = list(self._open.values())
            self._open.clear()
        for outbox in outboxes:
            outbox.put(Failed(error=failure))

    def _turn(self) -> bool:
        """One turn of the loop; False when it was the last."""
        self._drain(block=self._running is None and not self._ledger.requests)
        if self._shutdown:
            if self._running is not None:
                self._runner.wait(self._running)
            return False
        plan = self._plan()
        if plan.memory:
            self._end_running()
            self._deliver()
            plan = self._plan()  # again: the step that ended may have freed what was lacking
            self._ledger.apply(plan.memory, self._clock.now_ms())
            for request_id, _ in plan.memory.admit:
                self._end_if_warm(self._ledger.requests[request_id])
            self._deliver()  # the next turn may wait for a message before it does
            return True
        work = [(self._ledger.requests[s.request_id], s) for s in plan.segments]
        assert work or self._running is not None or not self._ledger.requests, "nobody can run"
        step = self._runner.prepare(work, self._running) if work else None
        ended = self._end_running()
        if step is not None and not ended and self._inbox.empty():
            self._runner.submit(step, self._clock.now_ms())
            self._note_first_step(step)
            self._running = step
        # Else somebody left or something arrived: the prepared step is thrown away unevaluated,
        # and the next turn plans for what is so now.
        del step
        self._deliver()
        return True

    def _end_if_warm(self, request: Request) -> None:
        """End a request that only wanted KV and got all of it from the cache."""
        if request.prefill_only and request.exhausted(self._ledger.tokens_max):
            self._leave(request, "length")

    def _plan(self) -> StepPlan:
        return plan_step(
            self._clock.now_ms(), self._ledger.snapshot(), self._cost, self._config
        )

    def _note_first_step(self, step: Step) -> None:
        for request, _ in step.work:
            if request.first_step_ms is None:
                request.first_step_ms = step.submitted_ms

    # --- inbox ---

    def _drain(self, *, block: bool) -> None:
        while True:
            try:
                message = self._inbox.get(block=block)
            except queue.Empty:
                return
            block = False
            self._handle(message)

    def _handle(self, message: _Message) -> None:
        match message:
            case _Submit(request):
                self._ledger.enter(request)
                self._end_if_warm(request)
            case _Cancel(request_id):
                if request := self._ledger.requests.get(request_id):
                    self._leave(request, "cancelled")
            case _CloseSession(session):
                session.closed = True
                if session.active is not None:
                    self._leave(session.active, "cancelled")
                else:
                    self._ledger.forget(session)
            case _Call(run):
                run()
            case _Shutdown():
                self._shutdown = True

    def _leave(self, request: Request, reason: FinishReason) -> None:
        self._ledger.leave(request, reason, self._clock.now_ms())
        with self._lock:
            self._open.pop(request.request_id, None)
        self._deliverer.finish(request)

    # --- steps ---

    def _end_running(self) -> bool:
        """Wait for the running step and take its tokens in; True if a request ended by it."""
        step, self._running = self._running, None
        if step is None:
            return False
        result = self._runner.wait(step)
        now_ms = self._clock.now_ms()
        self._cost = self._cost.observe(step.shape, now_ms - step.submitted_ms)
        self._record_kv(step)
        self._record_tokens(step, result, now_ms)
        ended = [
            request
            for request, _ in step.work
            if request.finish_reason is None
            and not request.pending
            and (request.at_eos or request.exhausted(self._ledger.tokens_max))
        ]
        for request in ended:
            self._leave(request, "stop" if request.at_eos else "length")
        return bool(ended)

    def _record_kv(self, step: Step) -> None:
        for request, plan in step.work:
            if request.finish_reason is None:
                assert request.session.kv.num_tokens == plan.start
                request.session.kv.append(request.tokens[plan.start : plan.end])
                prompt = len(request.prompt_ids)
                request.outbox.prefill_progress = (min(plan.end, prompt), prompt)

    def _record_tokens(self, step: Step, result: StepResult, now_ms: float) -> None:
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

    def _deliver(self) -> None:
        for request in self._deliverer.deliver():
            if request.finish_reason is None:
                self._leave(request, "stop")
        self._deliverer.deliver()

    # --- calls ---

    def _evaluate(self, token_ids: list[int]) -> np.ndarray:
        return evaluate_logits(
            self._runner.decoder, self._ledger, token_ids, rows_max=self._config.prefill_rows_max
        )

    def _check_integrity(self) -> None:
        self._end_running()
        self._ledger.check_integrity()
