"""The engine thread: it alone calls MLX; everybody else talks to its inbox."""

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import mlx.core as mx
import numpy as np

from edgekv.clock import Clock
from edgekv.config import Sampling, SwapOptions
from edgekv.device import give_back_freed_pages, lent_streams
from edgekv.engine.inbox import (
    Call,
    Cancel,
    CloseSession,
    ForgetApp,
    Inbox,
    IoReady,
    Pressure,
    Shutdown,
    Suspend,
)
from edgekv.engine.lead import ALONE_LEAD, Lead, SharedIo
from edgekv.engine.ledger import EVALUATION, EngineCounters, Ledger
from edgekv.engine.loop import Loop
from edgekv.engine.outbox import Failed
from edgekv.engine.predicted import PredictedPrefill
from edgekv.engine.prefill import ExactPrefill
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.restores import Arrivals
from edgekv.engine.runner import Runner
from edgekv.engine.swap import SwapManager, SwapTwin
from edgekv.engine.writes import Staging
from edgekv.errors import CapacityError, EngineFailed, RuntimeClosed
from edgekv.ids import RequestId
from edgekv.kv.layout import PoolSnapshot
from edgekv.kv.pool import KVPool
from edgekv.kv.session_kv import SessionKV
from edgekv.metrics import AppUsage
from edgekv.models.config import DecoderConfig, prompt_macs
from edgekv.models.decoder import Decoder
from edgekv.process import rest_at_forks, uninterrupted
from edgekv.sched.memory import tokens_max
from edgekv.sched.scheduler import SchedulerConfig
from edgekv.store import Store
from edgekv.store.disk_io import Io, IoDone, IoThreads
from edgekv.tokenizer import IncrementalDetokenizer
from edgekv.tokenizer.vocabulary import Vocabulary

IO_QUEUE_MAX = 1024
WARM_UP_ROWS = (1, 16, 1, 16, 64)  # kernels get compiled, the cost model a start
# Of an evaluation in one step: its logits are copied on the engine thread, where 8 MiB take 2 ms,
# or 18 ms if their pages are new.
EVALUATED_BYTES_MAX = 8 << 20
DEFAULT_SWAP = SwapOptions()
FAILED_WAIT_S = 2.0  # for the engine thread to end once another rank has failed


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What the engine thread works with, made on that thread."""

    decoder: Decoder  # the model
    pool: KVPool  # memory for KV, `staging` not counted
    staging: Staging  # memory for KV on its way to disk
    store: Store | None  # where it goes; None if KV is only ever in memory
    prefill: ExactPrefill = field(default_factory=ExactPrefill)  # how prompts get their KV
    lead: Lead = ALONE_LEAD  # of other ranks, if there are any


class Engine:
    """The engine thread and its inbox. Public methods may be called from any thread."""

    def __init__(
        self,
        load: Callable[[], Loaded],
        config: SchedulerConfig,
        num_requests_max: int,
        clock: Clock,
        *,
        swap: SwapOptions = DEFAULT_SWAP,
        swap_twin: SwapTwin | None = None,
    ) -> None:
        self._load: Callable[[], Loaded] | None = load  # until then: it may refer to our owner
        self._config = config
        self._swap_options = swap
        self._swap_twin = swap_twin
        self._clock = clock
        self.inbox = Inbox(num_requests_max)
        # Set by the engine thread before `start` returns.
        self.predicts = False
        self._decoder_config: DecoderConfig | None = None
        self.loop: Loop | None = None  # the engine thread's; others may look, not touch
        self._io: IoThreads | None = None
        self._lead = ALONE_LEAD
        self._failure: EngineFailed | None = None  # of another rank; set by whoever watches them
        # By store key, those that somebody still works with: closed ones too, while their KV moves.
        self._kept: WeakValueDictionary[int, EngineSession] = WeakValueDictionary()
        self._ready: Future[None] = Future()
        self.thread = threading.Thread(target=self._main, name="edgekv-engine", daemon=True)

    def start(self) -> None:
        """Start the thread and wait until the model is loaded; raises what loading raised."""
        rest_at_forks(self, self.thread.start)
        try:
            self._ready.result()
        except BaseException:
            uninterrupted(self.close)
            raise

    def submit(self, request: Request) -> None:
        """See `Inbox.submit`."""
        self.inbox.submit(request)

    def cancel(self, request_id: RequestId) -> None:
        """End a request at the next chunk or token; a finished one is left alone."""
        self.inbox.post(Cancel(request_id))

    def kept_session(
        self,
        app: str,
        name: str,
        key: int,
        token_ids: Sequence[int],
        state_ends: Sequence[int] = (),
    ) -> EngineSession:
        """The engine's side of a stored session, of whose tokens `token_ids` have KV on disk.

        And `state_ends` of them a state, where layers have one; see `SessionKV.adopt`.
        Opened by one caller at a time. Of one that was closed a moment ago, and whose KV is still
        on its way to disk, it is the same: it goes on where the other ended.
        """
        session = self._kept.get(key)
        if session is None:
            session = EngineSession(
                app=app,
                store_name=name,
                persistent=True,
                key=key,
                kv=SessionKV.on_disk(token_ids, state_ends),
            )
            self._kept[key] = session
        return session

    def close_session(self, session: EngineSession) -> None:
        """Free a session's KV, ending its request if it has one."""
        if session.asked:
            self.inbox.post(CloseSession(session))

    def forget_app(self, name: str) -> None:
        """Give an app the usual terms, and drop its account once it owes nothing to others.

        After its sessions were closed. What it goes on asking is asked as by a new app.
        """
        self.inbox.post(ForgetApp(name))

    def forgotten(self, app: str, name: str) -> None:
        """A session's KV must be on no disk any more: other ranks have a part of it."""
        if not self._lead.alone:
            self.inbox.post(Call(lambda: self._lead.forgotten(app, name)))

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Logits of every position, `(T, vocab)` float32: a background request, in chunks.

        Raises:
            CapacityError: The memory cannot hold the result. Others as in `submit`.
        """
        config = self._decoder_config
        assert config is not None
        try:
            logits = np.empty((len(token_ids), config.vocab_size), dtype=np.float32)
            for row in logits:  # have the system give it pages here, not on the engine thread
                row[:] = 0.0
        except MemoryError as error:
            raise CapacityError(str(error), hint="pass fewer tokens at a time") from error
        request = _evaluation(token_ids, logits, config, self._clock.now_ms())
        self.submit(request)
        try:
            event = request.outbox.get(None)
        finally:
            self.close_session(request.session)  # cancels it, if the caller was interrupted
        if isinstance(event, Failed):
            raise event.error
        return logits

    def set_pressure(self, fraction: float) -> None:
        """Which fraction of the pool sessions should own at most."""
        self.inbox.post(Pressure(fraction))

    def suspend(self, session: EngineSession) -> int:
        """Take an idle session out of memory; return how many of its tokens are on disk then."""
        told: Future[int] = Future()
        return self.inbox.ask(Suspend(session, told), told)

    def counters(self) -> EngineCounters:
        """What was computed and moved so far."""
        return self.inbox.call(lambda: self._the_loop().counters())

    def usage(self) -> dict[str, AppUsage]:
        """What each app has here that asked something."""
        return self.inbox.call(lambda: self._the_loop().ledger.usage())

    def pool_snapshot(self) -> PoolSnapshot:
        """The pool's figures between two steps."""
        snapshot = self.inbox.call(lambda: self._the_loop().ledger.pool.snapshot())
        return replace(snapshot, freed_bytes=mx.get_cache_memory())

    def check_integrity(self) -> None:
        """Assert all invariants between steps (AssertionError on the caller's thread)."""
        self.inbox.call(lambda: self._the_loop().check_integrity())

    def rest(self, timeout_s: float) -> Callable[[], None]:
        """See `edgekv.process.Rests`: no step runs meanwhile."""
        resting, resume = threading.Event(), threading.Event()

        def run() -> None:
            self._the_loop().end_running()
            resting.set()
            resume.wait()

        if self.thread is threading.current_thread():
            return resume.set
        while self.thread.is_alive() and not self._ready.done():  # loading computes, too
            with contextlib.suppress(TimeoutError):
                self._ready.exception(timeout=0.05)
        if self.loop is not None:
            self.inbox.post(Call(run))
            end = time.monotonic() + timeout_s
            try:
                while self.thread.is_alive() and time.monotonic() < end and not resting.wait(0.05):
                    pass
            except BaseException:
                resume.set()
                raise
        return resume.set

    def close(self) -> None:
        """End the thread; unfinished requests fail with RuntimeClosed."""
        self.inbox.post(Shutdown())
        # It may wait for a rank that does not answer, and ends with the process then.
        self.thread.join(None if self._failure is None else FAILED_WAIT_S)

    def _the_loop(self) -> Loop:
        assert self.loop is not None
        return self.loop

    # --- the engine thread ---

    def _main(self) -> None:
        with lent_streams():
            try:
                self._serve()
            finally:
                if self._io is not None:
                    with contextlib.suppress(EngineFailed):  # `done` has told all callers
                        self._io.close()
                if self._failure is None:
                    with contextlib.suppress(RuntimeError, EngineFailed):  # as its callers know
                        self._lead.close()
                self.loop = None
                mx.clear_cache()
                give_back_freed_pages()  # each thread's heap keeps its own: 15 MB a runtime

    def _serve(self) -> None:
        try:
            self.loop = loop = self._make_loop(self._loaded())
        except BaseException as error:  # noqa: BLE001 - handed to `start`, which raises it
            self.inbox.end(RuntimeClosed("the runtime did not start"))
            _let_go(error)
            self._give_up(error)
            self._not_ready(self._failure or error)
            return
        self._ready.set_result(None)
        try:
            while loop.turn():
                pass
            loop.close()
        except BaseException as error:  # noqa: BLE001 - reported to every waiting caller
            del loop
            _let_go(error)
            self._give_up(error)
            self.inbox.end(self._failure or _failure_of(error))
        else:
            self.inbox.end(RuntimeClosed("the runtime was closed"))

    def _give_up(self, error: BaseException) -> None:
        """Other ranks wait for this one in the middle of something, and nothing can follow it."""
        if self._failure is None and not self._lead.alone:
            named = isinstance(error, EngineFailed | RuntimeError)
            self._lead.give_up(error if named else _failure_of(error))

    def rank_failed(self, failure: EngineFailed) -> None:
        """Another rank is gone, or does not answer: every caller is told; any thread.

        The engine thread may wait for that rank, and nothing interrupts it there.
        """
        self._failure = failure
        self.inbox.end(failure)
        self._not_ready(failure)

    def _not_ready(self, error: BaseException) -> None:
        """Tell `start`, unless it knows more."""
        with contextlib.suppress(InvalidStateError):
            self._ready.set_exception(error)

    def _loaded(self) -> Loaded:
        load, self._load = self._load, None
        assert load is not None
        return load()

    def _make_loop(self, loaded: Loaded) -> Loop:
        limit = tokens_max(loaded.pool.layout, loaded.pool.snapshot().sessions_bytes)
        self._lead = loaded.lead
        swap = self._make_swap(loaded)
        arrivals = Arrivals(loaded.pool, swap.swap_in, self._clock)
        ledger = Ledger(loaded.pool, limit, swap, arrivals, loaded.prefill)
        self.predicts = isinstance(loaded.prefill, PredictedPrefill)
        self._decoder_config = loaded.decoder.config
        runner = Runner(loaded.decoder, loaded.prefill, loaded.lead)
        loop = Loop(runner, ledger, self.inbox, self._config, self._clock)
        for num_rows in WARM_UP_ROWS:
            rows = min(num_rows, limit, loaded.pool.layout.rows_max)
            loop.observe(*runner.time_rows(rows, loaded.pool, self._clock))
        mx.reset_peak_memory()
        return loop

    def _make_swap(self, loaded: Loaded) -> SwapManager:
        options = self._swap_options
        if self._swap_twin is not None and loaded.store is not None:
            return self._swap_twin.make(loaded.store, loaded.pool, self._clock)
        ended: queue.SimpleQueue[IoDone] | SharedIo = queue.SimpleQueue()

        def done(io: IoDone) -> None:
            try:
                ended.put(io)
                self.inbox.post(IoReady())
            except BaseException as error:  # the engine would wait for it, and all its callers
                self.inbox.end(_failure_of(error))
                raise

        if loaded.store is not None:
            self._io = IoThreads(
                num_readers=options.num_readers,
                num_writers=options.num_writers,
                queue_max=IO_QUEUE_MAX,
                done=done,
            )
        io: Io | None = self._io
        if loaded.store is not None and self._io is not None and not loaded.lead.alone:
            io = ended = SharedIo(self._io, loaded.store, loaded.lead)
        return SwapManager(
            loaded.store,
            io,
            ended,
            loaded.pool,
            loaded.staging,
            self._clock,
            behind=options.mode == "reuse",
            lead=loaded.lead,
        )


def _let_go(error: BaseException) -> None:
    """Free what was loaded, though somebody keeps the error and its traceback."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def _failure_of(error: BaseException) -> EngineFailed:
    failure = EngineFailed(
        f"the engine stopped: {type(error).__name__}: {error}",
        hint="this is a bug in edgekv; please report it",
    )
    failure.__cause__ = error
    return failure


def _evaluation(
    token_ids: list[int], logits: np.ndarray, config: DecoderConfig, now_ms: float
) -> Request:
    """A request for the logits of a text, in a session of its own."""
    row_macs = prompt_macs(config, 0, len(token_ids)) / len(token_ids)
    return Request(
        session=EngineSession(app=EVALUATION),
        priority="background",
        prompt_ids=token_ids,
        sampling=Sampling(max_tokens=1),
        detokenizer=IncrementalDetokenizer(Vocabulary(tokens=[], scheme="byte_level")),
        submitted_ms=now_ms,
        prefill_only=True,
        logits=logits,
        row_share=1.0 + config.hidden_size * config.vocab_size / row_macs,
        rows_max=max(1, EVALUATED_BYTES_MAX // (logits.itemsize * config.vocab_size)),
    )
