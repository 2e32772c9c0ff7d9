"""A whole engine on one thread: loop, ledger, pool, staging, lanes, restores and a real store.

    world = World(folder, seed=1)
    session = world.session("mail", "inbox")
    world.ask(session, prompt, 20)
    world.settle()              # until nothing is left to do; every answer is checked
    world.restart()             # or crash(): what is on disk at this moment, and nothing else

Only the model is make-believe (`sim_model`), and I/O happens in an order drawn from the seed.
"""

import contextlib
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from sim_io import Idle, SimClock, SimEnded, SimInbox, SimIo
from sim_model import MODELS, SimRunner, answer_to, check_session

from edgekv.bench.sessions.slow_swap import TWINS
from edgekv.config import Priority, Sampling
from edgekv.engine.engine import Engine, Loaded
from edgekv.engine.inbox import AppTerms, Cancel, CloseSession, Pressure, Shutdown, Suspend
from edgekv.engine.ledger import Ledger
from edgekv.engine.loop import Loop
from edgekv.engine.prefill import ExactPrefill
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.restores import Arrivals
from edgekv.engine.swap import SwapManager
from edgekv.engine.writes import NO_STAGING, Staging
from edgekv.errors import StoreError
from edgekv.kv.pool import KVPool
from edgekv.runtime.loading import layer_states
from edgekv.sched.memory import tokens_max
from edgekv.sched.policy import policy_of
from edgekv.sched.scheduler import SchedulerConfig
from edgekv.store import Store
from edgekv.store.disk_io import OS_FILES, Files

FINGERPRINT = "feedface" * 8
GROUP_TOKENS = 32
TURNS_MAX = 20_000
NUM_OPENING = 3  # tokens of a prompt that open the answer


class Silent:
    """A detokenizer for tokens that nobody reads."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


@dataclass(eq=False, kw_only=True)
class SimSession:
    """What a `Session` of the runtime knows."""

    app: str
    name: str | None
    engine: EngineSession


@dataclass(kw_only=True)
class Options:
    """What a world is like."""

    mode: str = "reuse"
    policy: str = "fair"
    pool_tokens: int = 640
    num_staging: int = 4
    queue_max: int = 1024
    disk_bytes: int = 64 << 20
    io_share: float = 0.15
    pinned_tokens: int = 0  # of app-0
    background: bool = False  # app-1 is
    tails: bool = True  # what is left of a session when an answer has ended is written
    model: str = "kv"  # of `sim_model.MODELS`


@dataclass
class Asked:
    """A request, and what its prompt was when it was asked."""

    session: SimSession
    request: Request
    expected: tuple[int, ...]
    cancelled: bool = False


@dataclass
class World:
    """See the module. Use it on one thread."""

    folder: Path
    seed: int = 0
    options: Options = field(default_factory=Options)
    files: Files = OS_FILES

    def __post_init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.num_open_errors = 0
        self.num_lives = 0
        self.num_restored = 0  # tokens, as the requests say
        self.answers: dict[tuple[str, int], tuple[int, ...]] = {}
        self._draw = random.Random(self.seed)
        self._wall_s = 1e9
        self.open()

    # --- life and death ---

    def open(self) -> None:
        options = self.options
        whole = options.model == "windows" and options.mode not in {"reuse", "off"}
        self.layout = layout = MODELS["kv" if whole else options.model]
        self.num_lives += 1
        self.asked: list[Asked] = []
        self.sessions: dict[tuple[str, str], SimSession] = {}
        self.store = None if options.mode == "off" else self._open_store()
        self.clock = SimClock(self._draw, io_share=options.io_share)
        self.inbox = SimInbox()
        ended = SimEnded(self.inbox)
        self.io = SimIo(self._draw, ended.put, queue_max=options.queue_max)
        self.staging = NO_STAGING
        if self.store is not None and options.mode in {"async", "reuse"}:
            self.staging = Staging(
                num_buffers=options.num_staging,
                buffer_bytes=GROUP_TOKENS * layout.token_bytes + layout.state_bytes,
            )
        staging_bytes = self.staging.total_bytes
        pool_bytes = layout.capacity_bytes(options.pool_tokens) + staging_bytes
        pool_bytes += 2 * layout.states_bytes  # of two sessions more
        self.pool = KVPool(layout, mx.float32, pool_bytes, staging_bytes=staging_bytes)
        self.swap = self._make_swap(ended)
        if not options.tails:
            self.swap.note_tail = lambda _: None
        ledger = Ledger(
            self.pool,
            tokens_max(layout, self.pool.snapshot().sessions_bytes),
            self.swap,
            Arrivals(self.pool, self.swap.swap_in, self.clock),
            ExactPrefill(),
        )
        self.runner = SimRunner(layout)
        config = SchedulerConfig(
            tbt_target_ms=20.0, prefill_rows_max=64, policy=policy_of(options.policy)
        )
        self.loop = Loop(self.runner, ledger, self.inbox, config, self.clock)
        # Its thread is never started: what it knows of sessions is wanted.
        self._kept = Engine(self._no_model, config, 1, self.clock)
        self.terms("app-0", pinned_bytes=layout.capacity_bytes(options.pinned_tokens))
        self.terms("app-1", priority=self._priority("app-1"))
        ended.io = self.inbox.io = self.clock.io = self.io

    @staticmethod
    def _no_model() -> Loaded:
        raise AssertionError

    def _open_store(self) -> Store:
        while True:
            try:
                return Store.open(
                    self.folder,
                    model="sim",
                    fingerprint=FINGERPRINT,
                    layers=layer_states(self.layout, "float32"),
                    disk_bytes=self.options.disk_bytes,
                    free_reserve_bytes=0,
                    files=self.files,
                    wall_clock_s=self._now_s,
                )
            except StoreError:
                self.num_open_errors += 1
                if self.num_open_errors > 3:
                    raise

    def _now_s(self) -> float:
        self._wall_s += 1.0
        return self._wall_s

    def _make_swap(self, ended: SimEnded) -> SwapManager:
        if self.options.mode in TWINS:
            assert self.store is not None
            return TWINS[self.options.mode].make(self.store, self.pool, self.clock)
        return SwapManager(
            self.store,
            None if self.store is None else self.io,
            ended,
            self.pool,
            self.staging,
            self.clock,
            behind=self.options.mode == "reuse",
        )

    def close(self) -> None:
        """As the runtime ends: the loop, the I/O threads, the store."""
        self.inbox.post(Shutdown())
        while self.loop.turn():
            pass
        self.loop.close()
        self.io.drain()
        if self.store is not None:
            try:
                self.store.close()
            except (StoreError, OSError):
                self.totals["num_close_errors"] += 1
        self._count()  # what closing met, too
        self.store = None

    def restart(self) -> None:
        self.close()
        self.open()

    def crash(self) -> None:
        """Go on with what the files hold now: what memory knew is gone."""
        store = self.store
        after = self.folder.with_name(f"{self.folder.name}+")
        if self.folder.exists():
            shutil.copytree(self.folder, after)
        self._count()
        self.store = None
        if store is not None:
            with contextlib.suppress(StoreError, OSError):
                store.close()  # what this does is seen by nobody any more
        self.folder = after
        self.open()

    def _count(self) -> None:
        counted = dict(vars(self.swap.counters))
        if self.store is not None:
            counted |= vars(self.store.snapshot())
        for name, value in counted.items():
            if name.startswith("num_") or name in {"written_bytes", "kv_written_bytes"}:
                self.totals[name] += value

    # --- what callers do ---

    def terms(self, app: str, **terms: Any) -> None:
        """What an app may have; the defaults are the runtime's."""
        terms = {"weight": 1.0, "priority": "interactive", "pinned_bytes": 0} | terms
        self.inbox.post(AppTerms(app, **terms))

    def everything_again(self) -> None:
        """Ask every stored session once more: all that is on disk is read, and checked."""
        if self.store is None:
            return
        for stored in self.store.sessions():
            room = self.loop.ledger.tokens_max - 2
            if stored.persistent and stored.num_tokens:
                prompt = [*stored.token_ids[:room], 1]
                self.ask(self.session(stored.app, stored.name), prompt, 1)
        self.settle()

    @property
    def num_events(self) -> int:
        """Everything that was counted because the disk was not as it should be."""
        names = ("num_io_errors", "num_corrupt", "num_full", "num_evicted", "num_index_lost")
        names += ("num_records_lost", "num_not_removed", "num_close_errors")
        return self.num_open_errors + sum(self.totals[name] for name in names)

    def pressure(self, fraction: float) -> None:
        self.inbox.post(Pressure(fraction))

    def session(self, app: str, name: str | None = None) -> SimSession:
        """The open session of this name, or a new one, which begins as `Session` does."""
        if name is not None and (app, name) in self.sessions:
            return self.sessions[app, name]
        engine = EngineSession(app=app)
        if name is None:
            return SimSession(app=app, name=name, engine=engine)
        if self.store is not None and self.options.mode == "reuse":
            stored = self.store.session(app, name, persistent=True)
            usable = stored.token_ids[: stored.resume_point(stored.num_tokens)]
            engine = self._kept.kept_session(app, name, stored.key, usable, stored.state_ends)
        self.sessions[app, name] = SimSession(app=app, name=name, engine=engine)
        return self.sessions[app, name]

    def ask(self, session: SimSession, prompt: Sequence[int], max_tokens: int) -> Asked:
        """Submit a request; with 0 tokens wanted it only computes the KV of its prompt."""
        request = Request(
            session=session.engine,
            priority=self._priority(session.app),
            prompt_ids=list(prompt),
            sampling=Sampling(max_tokens=max_tokens or None, ignore_eos=True),
            detokenizer=Silent(),  # type: ignore[arg-type]
            submitted_ms=self.clock.now_ms(),
            prefill_only=not max_tokens,
            num_asked=max(0, len(prompt) - NUM_OPENING),
        )
        num_tokens = request.max_output(self.loop.ledger.tokens_max)
        assert num_tokens > 0, "the runtime refuses such a prompt"
        if request.prefill_only:
            num_tokens = 0
        asked = Asked(session, request, answer_to(tuple(prompt), num_tokens))
        self.asked.append(asked)
        self.inbox.submit(request)
        return asked

    def _priority(self, app: str) -> Priority:
        return "background" if self.options.background and app == "app-1" else "interactive"

    def cancel(self, asked: Asked) -> None:
        asked.cancelled |= asked.request.finish_reason is None
        self.inbox.post(Cancel(asked.request.request_id))

    def close_session(self, session: SimSession) -> None:
        if session.name is not None:
            del self.sessions[session.app, session.name]
        for asked in self.asked:
            if asked.session is session and asked.request.finish_reason is None:
                asked.cancelled = True
        self.inbox.post(CloseSession(session.engine))

    # --- turns ---

    def turn(self) -> bool:
        """One turn of the loop; False if there is nothing to do."""
        try:
            assert self.loop.turn()
        except Idle:
            return False
        return True

    def turns(self, num_turns: int) -> None:
        for _ in range(num_turns):
            if not self.turn():
                return

    def until_ended(self, asked: Asked) -> None:
        for _ in range(TURNS_MAX):
            if asked.request.finish_reason is not None:
                return
            if not self.turn():
                assert asked.request.finish_reason is not None, "nothing moves, and no answer"
        raise AssertionError("a request is never answered")

    def settle(self) -> None:
        """Go on until nothing is left to do; then all must be answered, and nothing in motion."""
        for _ in range(TURNS_MAX):
            if not self.turn():
                break
        else:
            raise AssertionError("the engine never rests")
        self.check()

    def let_go(self) -> None:
        """Let I/O that is held back end, and settle."""
        self.io.held.clear()
        self.settle()

    def suspend_all(self) -> None:
        """Take every idle session out of memory, with the next messages."""
        for session in list(self.loop.ledger.sessions.values()):
            self.inbox.post(Suspend(session, Future()))  # type: ignore[arg-type]

    def check(self) -> None:
        """Everything that must hold when nothing is under way."""
        self.check_answers()
        with self._whole_disk():
            self.loop.check_integrity()
        assert not self.loop.ledger.requests
        assert self.io.num_pending == 0
        assert not self.swap.busy
        assert self.staging.num_free == self.staging.num_buffers
        snapshot = self.pool.snapshot()
        assert snapshot.peak_bytes <= snapshot.budget_bytes
        for session in self.loop.ledger.sessions.values():
            kv = session.kv
            assert not kv.moving
            check_session(kv)
        if self.store is not None:
            catalog = self.store._catalog
            assert all(s.num_writes == 0 for s in catalog.sessions.values())
            assert not self.store._disk._writing

    @contextlib.contextmanager
    def _whole_disk(self) -> Iterator[None]:
        """Looking at it meets no fault."""
        files = self.files
        faults, no_faults = getattr(files, "faults", []), []
        if faults:
            files.faults = no_faults  # type: ignore[attr-defined]
        yield
        if faults:
            files.faults = faults  # type: ignore[attr-defined]

    def check_answers(self) -> None:
        for asked in self.asked:
            request = asked.request
            assert request.finish_reason is not None, "a request is not answered"
            said = tuple(request.tokens[len(request.prompt_ids) :])
            if asked.cancelled:
                assert said == asked.expected[: len(said)]
            else:
                assert request.finish_reason == "length"
                assert said == asked.expected
            self.num_restored += request.num_restored
        self.asked.clear()

    def close_all(self) -> None:
        """Close every session; nothing of the pool may be owned then."""
        for session in list(self.loop.ledger.sessions.values()):
            self.inbox.post(CloseSession(session))
        self.sessions.clear()
        self.settle()
        assert self.pool.snapshot().used_bytes == 0
