"""The engine thread: it alone calls MLX; everybody else talks to its inbox."""

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from edgekv.clock import Clock
from edgekv.engine.inbox import Cancel, CloseSession, Inbox, Shutdown
from edgekv.engine.ledger import Ledger
from edgekv.engine.loop import Loop
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.runner import Runner
from edgekv.errors import EngineFailed, RuntimeClosed
from edgekv.ids import RequestId
from edgekv.kv.layout import PoolSnapshot
from edgekv.kv.pool import KVPool
from edgekv.models.decoder import Decoder
from edgekv.sched.memory import tokens_max
from edgekv.sched.scheduler import SchedulerConfig


@dataclass(frozen=True)
class Loaded:
    """What the engine thread works with, made on that thread."""

    decoder: Decoder
    pool: KVPool


class Engine:
    """The engine thread and its inbox. Public methods may be called from any thread."""

    def __init__(
        self,
        load: Callable[[], Loaded],
        config: SchedulerConfig,
        num_requests_max: int,
        clock: Clock,
    ) -> None:
        self._config = config
        self._clock = clock
        self.inbox = Inbox(num_requests_max)
        self.loop: Loop | None = None  # the engine thread's; others may look, not touch
        self._ready: Future[None] = Future()
        self.thread = threading.Thread(
            target=self._main, args=(load,), name="edgekv-engine", daemon=True
        )

    def start(self) -> None:
        """Start the thread and wait until the model is loaded; raises what loading raised."""
        self.thread.start()
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
        self.inbox.submit(request)

    def cancel(self, request_id: RequestId) -> None:
        """End a request at the next chunk or token; a finished one is left alone."""
        self.inbox.post(Cancel(request_id))

    def close_session(self, session: EngineSession) -> None:
        """Free a session's KV, ending its request if it has one."""
        self.inbox.post(CloseSession(session))

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Logits of every position, `(T, vocab)` float32; see `evaluate_logits`."""
        return self.inbox.call(lambda: self._the_loop().evaluate(token_ids))

    def pool_snapshot(self) -> PoolSnapshot:
        """The pool's figures between two steps."""
        return self.inbox.call(lambda: self._the_loop().ledger.pool.snapshot())

    def check_integrity(self) -> None:
        """Assert all invariants between steps (AssertionError on the caller's thread)."""
        self.inbox.call(lambda: self._the_loop().check_integrity())

    def close(self) -> None:
        """End the thread; unfinished requests fail with RuntimeClosed."""
        atexit.unregister(self.close)
        self.inbox.post(Shutdown())
        self.thread.join()

    def _the_loop(self) -> Loop:
        assert self.loop is not None
        return self.loop

    # --- the engine thread ---

    def _main(self, load: Callable[[], Loaded]) -> None:
        try:
            self._serve(load)
        finally:
            self.loop = None
            mx.clear_cache()
            # MLX gave this thread a stream with a thread of its own; left alone, it would be
            # destroyed while running, at exit, and abort the process.
            mx.clear_streams()

    def _serve(self, load: Callable[[], Loaded]) -> None:
        try:
            self.loop = loop = self._make_loop(load())
        except BaseException as error:  # noqa: BLE001 - handed to `start`, which raises it
            self.inbox.end(RuntimeClosed("the runtime did not start"))
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            while loop.turn():
                pass
        except BaseException as error:  # noqa: BLE001 - reported to every waiting caller
            failure = EngineFailed(
                f"the engine stopped: {type(error).__name__}: {error}",
                hint="this is a bug in edgekv; please report it",
            )
            failure.__cause__ = error
            self.inbox.end(failure)
        else:
            self.inbox.end(RuntimeClosed("the runtime was closed"))

    def _make_loop(self, loaded: Loaded) -> Loop:
        limit = tokens_max(loaded.pool.layout, loaded.pool.snapshot().budget_bytes)
        ledger = Ledger(loaded.pool, limit)
        loop = Loop(Runner(loaded.decoder), ledger, self.inbox, self._config, self._clock)
        loop.warm_up()
        return loop
