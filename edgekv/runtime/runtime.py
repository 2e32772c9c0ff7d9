"""One model, one pool, one engine thread, and the apps of a process that share them."""

import atexit
import contextlib
import functools
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self, Unpack
from weakref import ReferenceType, WeakValueDictionary, ref

import numpy as np

from edgekv import process
from edgekv.chat.said import Said, completion_of
from edgekv.chat.values import Completion
from edgekv.clock import MonotonicClock
from edgekv.config import (
    PrefillMode,
    RuntimeConfig,
    check_ids,
    check_kind,
    names_a_file,
    pool_bytes_from_gib,
    user_path,
)
from edgekv.device import DeviceProfile, profile, works_after_fork
from edgekv.engine.engine import Engine, Loaded
from edgekv.engine.inbox import AppTerms
from edgekv.engine.ledger import EngineCounters
from edgekv.engine.swap import SwapTwin
from edgekv.errors import (
    ConfigError,
    EdgeKVError,
    ForkedProcess,
    LogitsNotFinite,
    PromptEmpty,
    PromptTooLong,
    RuntimeClosed,
    StoreError,
    TooManySessions,
)
from edgekv.kv.layout import PoolSnapshot
from edgekv.metrics import AppUsage
from edgekv.models.default_model import DEFAULT_MODEL
from edgekv.models.hub import Progress, resolve
from edgekv.models.open_model import open_tokenizer
from edgekv.pressure import PressureMonitor
from edgekv.process import Home, HomeLock, close_dropped, uninterrupted, wait_for_dropped
from edgekv.ranks.launched import launched
from edgekv.runtime.app import App, Terms, check_name, checked
from edgekv.runtime.completions import Completions
from edgekv.runtime.keeper import ConversationKeeper, carry_over
from edgekv.runtime.loading import close_store, is_private, load
from edgekv.runtime.ranks import joined
from edgekv.runtime.session import Session, check_system
from edgekv.runtime.talk import OpenTalks, Talk
from edgekv.sched.memory import tokens_max
from edgekv.sched.policy import Policy, policy_of
from edgekv.sched.scheduler import SchedulerConfig
from edgekv.store import Store, StoreSnapshot
from edgekv.store.disk_io import OS_FILES, Files
from edgekv.tokenizer import Tokenizer


class Runtime:
    """A loaded model and everything that serves it. Close it, or use it as a context manager.

    One that is dropped is closed a moment later, with a ResourceWarning; one that is open at the
    end of the interpreter, then.
    """

    _closed = True  # unless it was opened

    def __init__(
        self,
        path: Path,
        model: str,
        config: RuntimeConfig,
        policy: Policy | None = None,
        swap_twin: SwapTwin | None = None,
    ) -> None:
        self._home = Home(self)
        self.model_name = model
        self.path = path
        self.config = config
        self.device: DeviceProfile = profile()
        _warn_once(self.device.warning)
        wait_for_dropped()  # one of them may have the store
        self.tokenizer: Tokenizer = open_tokenizer(path).with_template(config.chat_template)
        for warning in self.tokenizer.warnings:
            _warn_once(f"warning: {warning}")
        self._clock = MonotonicClock()
        self._closing = threading.Lock()  # of whoever closes
        self._ended = False  # guarded by that
        self._lock = HomeLock(self._home)  # guards what follows; a talk's may be taken inside it
        self._apps: WeakValueDictionary[str, App] = WeakValueDictionary()  # open ones, by name
        self._held: set[App] = set()  # of those the ones that somebody gave terms
        self._talks = OpenTalks(config.num_sessions_max)
        self._completions = Completions(self.tokenizer)
        self._store: Store | None = None
        self._keeper: ConversationKeeper | None = None  # of a store that others may read later
        files = OS_FILES if swap_twin is None else swap_twin.files
        self._engine = Engine(
            lambda: self._load(files),
            SchedulerConfig(
                tbt_target_ms=config.tbt_target_ms,
                prefill_rows_max=self.device.prefill_rows_max,
                policy=policy or policy_of(config.policy),
            ),
            config.num_waiting_max,
            self._clock,
            swap=config.swap,
            swap_twin=swap_twin,
        )
        try:
            self._engine.start()
        except BaseException:
            self._close_store()
            raise
        self._monitor = PressureMonitor.start(self._engine.set_pressure)
        self._closed = False
        # A forgotten `close` loses nothing: no exit waits for the engine thread, a daemon.
        self._at_exit = functools.partial(_close_at_exit, ref(self))
        atexit.register(self._at_exit)

    @classmethod
    def open(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        pool_gib: float | None = None,
        config: RuntimeConfig | None = None,
        progress: Progress | None = None,
        policy: Policy | None = None,
        swap_twin: SwapTwin | None = None,
    ) -> Self:
        """Load a model.

        Args:
            model: A known name, a Hugging Face repo id, a folder, or a GGUF file.
            pool_gib: KV budget in GiB; overrides `config.pool_bytes`.
            config: Limits and targets.
            progress: Called while something is downloaded.
            policy: Who goes first, in place of the policy that `config` names.
            swap_twin: What moves KV, in place of what `config` names; for benches.

        Raises:
            ModelError: The model cannot be had or is not what it says it is; nor its predictor.
            ConfigError: An option has a value that is not allowed.
            PoolTooSmall: The pool cannot hold even a short session.
            StoreError: The store's folder cannot be used.
            ForkedProcess: This process was forked from one that had used MLX.
        """
        if not names_a_file(model):
            raise ConfigError.of("model", model, "a name, a repo id or a path")
        config = RuntimeConfig() if config is None else config
        check_kind("config", config, RuntimeConfig, allowed="a RuntimeConfig or None")
        if process.forked_with_home or (process.forked_with_mlx and not works_after_fork()):
            raise ForkedProcess("MLX works in no process that was forked from one that used it")
        if pool_gib is not None:
            config = replace(config, pool_bytes=pool_bytes_from_gib(pool_gib))
        path = resolve(str(model), progress=progress)
        return cls(path, str(model), config, policy, swap_twin)

    def _load(self, files: Files) -> Loaded:
        """Runs on the engine thread, which owns all that MLX makes."""
        loaded = self._load_with_ranks(files)
        self.context_max = tokens_max(loaded.pool.layout, loaded.pool.snapshot().sessions_bytes)
        self.decoder_config = loaded.decoder.whole
        self._vocab_size = loaded.decoder.config.vocab_size
        self._store = store = loaded.store
        if store is not None and self.config.swap.mode == "reuse" and not is_private(store):
            with contextlib.suppress(StoreError):  # whoever looks at the sessions is told
                carry_over(store, is_place=self.path == user_path(self.model_name))
            self._keeper = ConversationKeeper(
                store, vocab_size=self._vocab_size, gone=self._engine.forgotten
            )
            loaded.lead.keep_only(store)
        return loaded

    def _load_with_ranks(self, files: Files) -> Loaded:
        """Load the model, or this rank's part where there are several."""
        what = (self.path, self.model_name, self.tokenizer, self.device, self.config, files)
        if files is not OS_FILES and launched() is not None:
            raise ConfigError(
                "twins of swapping move KV of one process", hint="run them without edgekv launch"
            )
        lead = joined(self.model_name, self.config, self._engine.rank_failed)
        if lead is None:
            return load(*what)
        try:
            return replace(load(*what, lead.group, lead.orders), lead=lead)
        except EdgeKVError:  # that all ranks have met
            with contextlib.suppress(EdgeKVError, RuntimeError):  # a rank that is gone is told of
                lead.close()
            raise
        except BaseException as error:
            lead.give_up(error)
            raise

    @property
    def predicts(self) -> bool:
        """Whether a KV predictor is loaded."""
        return self._engine.predicts

    @property
    def prefill(self) -> PrefillMode:
        """Whether prompts' KV is predicted, where nobody says."""
        return self.config.prediction.prefill

    def app(self, name: str = "default", **terms: Unpack[Terms]) -> App:
        """The app of this name, a new one if there is none; what is given holds from now on.

        Args:
            name: Its name.
            terms: What it may have; see `Terms`. Looking an app up leaves its terms alone.

        Raises:
            ConfigError: A value is not allowed.
            RuntimeClosed: The runtime was closed.
        """
        check_name("app name", name)
        given = checked(terms)
        with self._lock:
            self._check_open()
            app = self._apps.get(name)
            if app is None or app._closed:  # or is being closed
                app = self._apps[name] = App(self, AppTerms(name))
                self._engine.inbox.post(app._terms)
            app._take(given)
        return app

    def apps(self) -> list[App]:
        """The apps that are open. Raises RuntimeClosed."""
        with self._lock:
            self._check_open()
            return list(self._apps.values())

    def _hold(self, app: App, usual: bool) -> None:
        """Keep an app that somebody gave terms, though nobody refers to it; inside the lock."""
        (self._held.discard if usual else self._held.add)(app)

    def _close_app(self, app: App) -> None:
        with self._lock:
            if app._closed:
                return
            app._closed = True
            talks = [talk for talk in self._talks if talk.app_name == app.name]
            sessions = [s for talk in talks for s in talk.sessions if s.app is app]
        for session in sessions:
            session.close()
        for talk in talks:  # whose sessions were dropped
            talk.settle()
        with self._lock:
            for talk in talks:
                self._talks.end_if_left(talk)
            self._held.discard(app)
            if self._apps.get(app.name) is app:
                del self._apps[app.name]
                self._engine.forget_app(app.name)

    def _open_session(self, app: App, name: str | None, system: str | None) -> Session:
        if name is not None:
            check_name("session name", name)
        check_system(system)
        self._settle_dropped(app, name)
        try:
            return self._open_checked(app, name, system)
        except TooManySessions:
            self._end_dropped()
        return self._open_checked(app, name, system)

    def _open_checked(self, app: App, name: str | None, system: str | None) -> Session:
        with self._lock:
            app._check_open()
            talk = None if name is None else self._talks.get((app.name, name))
            if talk is None:
                talk = self._talks.begin(app, name, system)
            else:
                talk.take_system(system)
            session, talk.app = Session(app, talk), app
            talk.sessions.add(session)
        return session

    def _knows_session(self, app: App, name: str) -> bool:
        with self._lock:
            if self._talks.get((app.name, name)) is not None:
                return True
            return self._keeper is not None and self._keeper.knows(app.name, name)

    def _settle_dropped(self, app: App, name: str | None) -> None:
        """Take in what was said last in the session of this name, if that was dropped."""
        with self._lock:
            talk = None if name is None else self._talks.get((app.name, name))
        if talk is not None and not talk.sessions:
            talk.settle()

    def _end_dropped(self) -> None:
        """End what nobody can close any more, for its sessions were dropped."""
        with self._lock:
            dropped = [talk for talk in self._talks if not talk.sessions]
        for talk in dropped:
            talk.settle()
        with self._lock:
            for talk in dropped:
                self._talks.end_if_left(talk)

    def _leave_talk(self, session: Session) -> None:
        """A session was closed; with the last one of its name the conversation leaves memory."""
        with self._lock:
            session._talk.sessions.discard(session)
            self._talks.end_if_left(session._talk)

    def _remove_session(self, app: App, name: str) -> bool:
        with self._lock:
            app._check_open()
            talk = self._talks.get((app.name, name))
            if talk is not None:
                self._talks.end_if_left(talk, whoever=True)
            # Still inside the lock: who opens another one of its name gets a place of its own.
            was_stored = self._keeper is not None and self._keeper.remove(app.name, name)
        if talk is not None:
            talk.finish()
        return was_stored or talk is not None

    def _remove_stored(self, app_name: str) -> None:
        """Remove what is stored of an app, but for what somebody has open again by now."""
        keeper = self._keeper
        if keeper is None:
            return
        with self._lock:
            for info in keeper.sessions(app_name):
                if self._talks.get((app_name, info.name)) is None:
                    keeper.remove(app_name, info.name)

    def _warn_of_plain_form(self) -> None:
        """Say once that conversations are written in a way that the model may not know."""
        if self.tokenizer.chat_template is None:
            _warn_once(
                f"warning: {self.model_name} has no chat template; its conversations are written "
                "as plain text (User: … Assistant: …)"
            )

    def _check_open(self) -> None:
        """Raise RuntimeClosed if it was closed, or belongs to another process."""
        self._home.check()
        if self._closed:
            raise RuntimeClosed("the runtime was closed")

    def _checked_ids(self, token_ids: Iterable[int]) -> list[int]:
        """See `check_ids`; of more than fit only one more is looked at."""
        return check_ids(token_ids, self.context_max + 1, self._vocab_size)

    def count_tokens(self, asked: Completion | Said) -> int:
        """Tokens of a completion's prompt.

        Raises:
            ConfigError: It is none.
            RequestError: It cannot be written down.
            RuntimeClosed: The runtime was closed.
        """
        self._check_open()
        return self._completions.count(completion_of(asked))

    def logits(self, token_ids: Iterable[int]) -> np.ndarray:
        """Exact logits of every position, for evaluation: work of the background class.

        Args:
            token_ids: T tokens, 1 to `context_max`.

        Returns:
            `(T, vocab)` float32; row t predicts token t + 1.

        Raises:
            PromptEmpty, PromptTooLong, ConfigError: Too few, too many or unknown tokens.
            QueueFull: Too many requests are unfinished.
            CapacityError: The memory cannot hold the result.
            RuntimeClosed, EngineFailed: The engine has ended.
        """
        self._check_open()
        ids = self._checked_ids(token_ids)
        if not ids:
            raise PromptEmpty("there are no tokens", hint="pass at least one token id")
        if len(ids) > self.context_max:
            raise PromptTooLong(
                f"more than {self.context_max} tokens, which is what fits",
                hint="pass fewer tokens",
            )
        return self._engine.logits(ids)

    def score(self, token_ids: Iterable[int]) -> np.ndarray:
        """Natural log-probability of each token but the first, given those before it.

        Returns:
            `(T - 1,)` float32; errors as in `logits`.

        Raises:
            LogitsNotFinite: There is no such probability.
        """
        self._check_open()
        ids = self._checked_ids(token_ids)
        logits = self.logits(ids)
        scores = np.empty(len(logits) - 1, dtype=np.float32)
        for row, token in enumerate(ids[1:]):  # in float64, of one row at a time
            wide = logits[row].astype(np.float64)
            top = wide.max()
            if not np.isfinite(top):
                raise LogitsNotFinite(f"the logits behind token {row} are no numbers")
            scores[row] = wide[token] - top - np.log(np.exp(wide - top).sum())
        return scores

    @property
    def keeps_sessions(self) -> bool:
        """Whether named sessions outlive the process; not where another has the store."""
        return self._keeper is not None

    def store_snapshot(self) -> StoreSnapshot | None:
        """The figures of the store on disk right now; None without one. Raises RuntimeClosed."""
        self._check_open()
        store = self._store
        return None if store is None else store.snapshot()

    def counters(self) -> EngineCounters:
        """What was computed, and moved between memory and disk, since the runtime was opened.

        Raises:
            RuntimeClosed, EngineFailed: The engine has ended.
        """
        self._check_open()
        return self._engine.counters()

    def pool_snapshot(self) -> PoolSnapshot:
        """The KV pool's figures right now; errors as in `counters`."""
        self._check_open()
        return self._engine.pool_snapshot()

    def usage(self) -> dict[str, AppUsage]:
        """What each app has right now; of those that have something. Errors as in `counters`."""
        self._check_open()
        usage = self._engine.usage()
        with self._lock:
            num_open = Counter(talk.app_name for talk in self._talks)
        store = self._store
        num_stored = Counter[str]() if store is None else store.num_kept()
        for name in num_open | num_stored:
            ours = usage.setdefault(name, AppUsage())
            ours.num_open, ours.num_stored = num_open[name], num_stored[name]
        return usage

    def check_integrity(self) -> None:
        """Assert the pool's and the sessions' invariants; AssertionError means a bug of ours.

        Other errors as in `counters`.
        """
        self._check_open()
        self._engine.check_integrity()

    def close(self) -> None:
        """Stop the engine and free everything; unfinished requests fail with RuntimeClosed.

        What named sessions said and computed is on disk when this returns, what there was of
        unfinished answers, too. That is not to be interrupted: Ctrl-C is raised when it is done.
        Closing twice is nothing.

        Raises:
            NotKept: What was said last in some sessions could not be saved; all else is done.
            ForkedProcess: It is a parent process's, and nothing was touched.
        """
        with self._lock:
            self._closed = True
            talks = list(self._talks)
        uninterrupted(functools.partial(self._close, talks))

    def _close(self, talks: Sequence[Talk]) -> None:
        with self._closing, contextlib.ExitStack() as ends:  # each of them, whatever another raises
            if self._ended:
                return
            self._ended = True
            ends.callback(atexit.unregister, self._at_exit)
            ends.callback(self._close_store)
            if self._keeper is not None and self._store is not None:  # not closed before
                ends.callback(self._keeper.flush)
            ends.callback(self._engine.close)
            ends.callback(self._end_talks, talks)
            if self._monitor is not None:
                ends.callback(self._monitor.close)

    def _end_talks(self, talks: Sequence[Talk]) -> None:
        """Take in what there is of unfinished answers; who reads them is told why that is all."""
        for talk in talks:
            if talk.running is not None:
                talk.running.take_back(RuntimeClosed("the runtime was closed"))
        for talk in talks:
            talk.finish()

    def _close_store(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            # What was said is saved by now, or `NotKept` says so; KV is computed again.
            with contextlib.suppress(StoreError):
                close_store(store)

    def __del__(self) -> None:
        if not self._closed and self._home.is_here:
            close_dropped(self.close)
            what = f"the runtime of {self.model_name} was dropped, and not closed"
            warnings.warn(what, ResourceWarning, stacklevel=2, source=self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except EdgeKVError as failure:
            if error is None:
                raise
            error.add_note(f"and as the runtime was closed: {failure}")


def _close_at_exit(opened: ReferenceType[Runtime]) -> None:
    runtime = opened()
    if runtime is not None and runtime._home.is_here:
        runtime.close()


@functools.cache
def _warn_once(warning: str) -> None:
    if warning:
        print(warning, file=sys.stderr)  # noqa: T201 - nothing else would tell the user
