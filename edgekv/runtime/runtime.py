"""One model, one pool, one engine thread, and the apps of a process that share them."""

import contextlib
import functools
import itertools
import operator
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from edgekv.clock import MonotonicClock
from edgekv.config import (
    PREFILL_MODES,
    PRIORITIES,
    PrefillMode,
    Priority,
    RuntimeConfig,
    check_choice,
    check_float,
    check_int,
    pool_bytes_from_gib,
    user_path,
)
from edgekv.device import DeviceProfile, profile
from edgekv.engine.engine import Engine, Loaded
from edgekv.engine.inbox import AppTerms
from edgekv.engine.ledger import EngineCounters
from edgekv.engine.shares import Shares
from edgekv.engine.swap import SwapTwin
from edgekv.errors import (
    ConfigError,
    EdgeKVError,
    LogitsNotFinite,
    PromptEmpty,
    PromptTooLong,
    RuntimeClosed,
    StoreError,
    TooManySessions,
)
from edgekv.kv.layout import PoolSnapshot
from edgekv.models.default_model import DEFAULT_MODEL
from edgekv.models.hub import Progress, resolve
from edgekv.models.open_model import open_tokenizer
from edgekv.pressure import PressureMonitor
from edgekv.runtime.conversation import Conversation
from edgekv.runtime.keeper import ConversationKeeper, SessionInfo, carry_over
from edgekv.runtime.loading import close_store, is_private, load
from edgekv.runtime.session import Session, check_system
from edgekv.sched.memory import tokens_max
from edgekv.sched.policy import Policy, policy_of
from edgekv.sched.scheduler import SchedulerConfig
from edgekv.store import Store, StoreSnapshot
from edgekv.store.disk_io import OS_FILES, Files
from edgekv.tokenizer import Tokenizer

NAME_LENGTH_MAX = 256


class App:
    """Who owns sessions: its weight and priority decide its share of compute.

    Cached KV is visible only to the app that made it.

    Attributes:
        prefill: Whether its prompts' KV is predicted, where neither request nor session says;
            None leaves it to the runtime.
    """

    def __init__(self, runtime: "Runtime", terms: AppTerms) -> None:
        self._runtime = runtime
        self._terms = terms  # as the engine has them; changed inside the runtime's lock
        self.prefill: PrefillMode | None = None

    @property
    def name(self) -> str:
        """Its name."""
        return self._terms.name

    @property
    def weight(self) -> float:
        """Its share relative to apps of the same class."""
        return self._terms.weight

    @property
    def priority(self) -> Priority:
        """Its class; "interactive" goes before "background"."""
        return self._terms.priority

    @property
    def pinned_bytes(self) -> int:
        """KV memory that no other app can take from its sessions."""
        return self._terms.pinned_bytes

    def session(self, name: str | None = None, *, system: str | None = None) -> Session:
        """Open a session, or find the open one of this name.

        Args:
            name: Its name within the app; None makes a new one.
            system: System prompt of a new session, or of one in which nothing was said yet.

        Raises:
            TooManySessions: The app has, or all apps have, as many open as they may.
            ConfigError: The name is empty, too long or no Unicode text, or the session of this
                name has another system prompt.
            StoreError: The store cannot be read.
            RuntimeClosed: The runtime was closed.
        """
        return self._runtime._open_session(self, name, system)

    def sessions(self) -> list[SessionInfo]:
        """Its named sessions that are stored, open or not, the one used last first.

        Raises:
            StoreError: The store cannot be read.
            RuntimeClosed: The runtime was closed.
        """
        self._runtime._raise_if_closed()
        keeper = self._runtime._keeper
        return [] if keeper is None else keeper.sessions(self.name)

    def remove(self, name: str) -> bool:
        """Close the session of this name, and forget what was said in it and its KV.

        Returns:
            Whether there was one.

        Raises:
            StoreError: The store cannot be written.
            RuntimeClosed: The runtime was closed.
        """
        runtime = self._runtime
        runtime._raise_if_closed()
        with runtime._lock:
            session = runtime._sessions.get((self.name, name))
        if session is not None:
            session.close()
        keeper = runtime._keeper
        was_stored = keeper is not None and keeper.remove(self.name, name)
        return was_stored or session is not None


class Runtime:
    """A loaded model and everything that serves it. Close it, or use it as a context manager."""

    def __init__(
        self,
        path: Path,
        model: str,
        config: RuntimeConfig,
        policy: Policy | None = None,
        swap_twin: SwapTwin | None = None,
    ) -> None:
        self.model_name = model
        self.path = path
        self.config = config
        self.device: DeviceProfile = profile()
        _warn_once(self.device.warning)
        self.tokenizer: Tokenizer = open_tokenizer(path).with_template(config.chat_template)
        for warning in self.tokenizer.warnings:
            _warn_once(f"warning: {warning}")
        self._clock = MonotonicClock()
        self._lock = threading.Lock()  # guards what follows; a session's may be taken inside it
        self._closed = False
        self._apps: dict[str, App] = {}
        self._sessions: dict[tuple[str, str], Session] = {}
        self._shares = Shares(
            config.num_sessions_max,
            error=TooManySessions,
            what="sessions are open",
            limit="num_sessions_max",
            remedy="close some",
        )
        self._names = itertools.count(1)
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

    @classmethod
    def open(
        cls,
        model: str = DEFAULT_MODEL,
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
        """
        config = config or RuntimeConfig()
        if pool_gib is not None:
            config = replace(config, pool_bytes=pool_bytes_from_gib(pool_gib))
        return cls(resolve(model, progress=progress), model, config, policy, swap_twin)

    def _load(self, files: Files) -> Loaded:
        """Runs on the engine thread, which owns all that MLX makes."""
        loaded = load(self.path, self.model_name, self.tokenizer, self.device, self.config, files)
        self.context_max = tokens_max(loaded.pool.layout, loaded.pool.snapshot().sessions_bytes)
        self._vocab_size = loaded.decoder.config.vocab_size
        self._store = store = loaded.store
        if store is not None and self.config.swap.mode == "reuse" and not is_private(store):
            with contextlib.suppress(StoreError):  # whoever looks at the sessions is told
                carry_over(store, is_place=self.path == user_path(self.model_name))
            self._keeper = ConversationKeeper(store, vocab_size=self._vocab_size)
        return loaded

    @property
    def predicts(self) -> bool:
        """Whether a KV predictor is loaded."""
        return self._engine.predicts

    def app(
        self,
        name: str = "default",
        *,
        weight: float | None = None,
        priority: Priority | None = None,
        pinned_bytes: int | None = None,
        num_waiting_max: int | None = None,
        num_sessions_max: int | None = None,
        prefill: PrefillMode | None = None,
    ) -> App:
        """The app of this name, a new one if there is none; what is given holds from now on.

        Args:
            name: Its name.
            weight: Its share of the service, relative to the other apps of its class; at first 1.
            priority: Its class; at first "interactive".
            pinned_bytes: KV memory that no other app can take from its sessions; at first none.
            num_waiting_max: Requests of it, submitted and not finished; at first it may have
                another while it has no more than are left of the limit for all apps.
            num_sessions_max: Open sessions of it; at first the same.
            prefill: See `App`.

        Raises:
            ConfigError: A value is not allowed.
        """
        _check_name("app name", name)
        if weight is not None:
            check_float("weight", weight, 0.001, 1000.0)
        if priority is not None:
            check_choice("priority", priority, PRIORITIES)
        if pinned_bytes is not None:
            check_int("pinned_bytes", pinned_bytes, 0, 1 << 50)
        asked: dict[str, Any] = {
            "weight": weight,
            "priority": priority,
            "pinned_bytes": pinned_bytes,
            "num_waiting_max": num_waiting_max,
            "num_sessions_max": num_sessions_max,
        }
        for limit in ("num_waiting_max", "num_sessions_max"):
            if asked[limit] is not None:
                check_int(limit, asked[limit], 1, 1 << 20)
        if prefill is not None:
            check_choice("prefill", prefill, PREFILL_MODES)
        given = {name: value for name, value in asked.items() if value is not None}
        with self._lock:
            app = self._apps.get(name) or App(self, AppTerms(name))
            terms = replace(app._terms, **given)
            if name not in self._apps or terms != app._terms:
                self._apps[name], app._terms = app, terms
                self._engine.inbox.post(terms)
            if prefill is not None:
                app.prefill = prefill
        return app

    def _open_session(self, app: App, name: str | None, system: str | None) -> Session:
        if name is not None:
            _check_name("session name", name)
        check_system(system)
        keeper = None if name is None else self._keeper
        with self._lock:
            self._raise_if_closed()
            if name is None:
                names = (f"session-{number}" for number in self._names)
                name = next(name for name in names if self._is_free(app, name))
            session = self._sessions.get((app.name, name))
            if session is not None and not session.closed:
                if system is not None and session.system != system:
                    raise ConfigError(
                        f"session {name!r} is open with another system prompt",
                        hint="close it first, or use another name",
                    )
                return session
            is_new = (app.name, name) not in self._sessions  # else of one that is being closed
            if is_new:
                self._shares.take(app.name, app._terms.num_sessions_max)
            try:
                if keeper is None:
                    session = Session(app, name, Conversation.begin(system), None)
                else:
                    session = Session(app, name, *keeper.open(app.name, name, system))
            except BaseException:
                if is_new:
                    self._shares.give_back(app.name)
                raise
            self._sessions[app.name, name] = session
        return session

    def _is_free(self, app: App, name: str) -> bool:
        """Whether nobody has this name, so that an unnamed session may bear it."""
        is_open = (app.name, name) in self._sessions
        return not is_open and (self._keeper is None or not self._keeper.knows(app.name, name))

    def _forget_session(self, session: Session) -> None:
        place = session.app.name, session.name
        with self._lock:
            if self._sessions.get(place) is session:  # not another of its name, opened meanwhile
                del self._sessions[place]
                self._shares.give_back(place[0])

    def _warn_of_plain_form(self) -> None:
        """Say once that conversations are written in a way that the model may not know."""
        if self.tokenizer.chat_template is None:
            _warn_once(
                f"warning: {self.model_name} has no chat template; its conversations are written "
                "as plain text (User: … Assistant: …)"
            )

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise RuntimeClosed("the runtime was closed")

    def _checked_ids(self, token_ids: Sequence[int]) -> list[int]:
        """Token ids as plain ints, from any integer type (numpy's too); others are an error."""
        ids = []
        for token in token_ids:
            if not isinstance(token, bool):
                with contextlib.suppress(TypeError):  # what is no integer is refused below, by name
                    token = operator.index(token)
            ids.append(check_int("token id", token, 0, self._vocab_size - 1))
        return ids

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Exact logits of every position, for evaluation: work of the background class.

        Args:
            token_ids: T tokens, 1 to `context_max`.

        Returns:
            `(T, vocab)` float32; row t predicts token t + 1.

        Raises:
            PromptEmpty, PromptTooLong, ConfigError: Too few, too many or unknown tokens.
            QueueFull: Too many requests are unfinished.
            CapacityError: The memory cannot hold the result.
        """
        ids = self._checked_ids(token_ids)
        if not ids:
            raise PromptEmpty("there are no tokens", hint="pass at least one token id")
        if len(ids) > self.context_max:
            raise PromptTooLong(
                f"{len(ids)} tokens; at most {self.context_max} fit", hint="pass fewer tokens"
            )
        return self._engine.logits(ids)

    def score(self, token_ids: Sequence[int]) -> np.ndarray:
        """Natural log-probability of each token but the first, given those before it.

        Returns:
            `(T - 1,)` float32; errors as in `logits`.

        Raises:
            LogitsNotFinite: There is no such probability.
        """
        token_ids = self._checked_ids(token_ids)
        logits = self.logits(token_ids)
        scores = np.empty(len(logits) - 1, dtype=np.float32)
        for row, token in enumerate(token_ids[1:]):  # in float64, of one row at a time
            wide = logits[row].astype(np.float64)
            top = wide.max()
            if not np.isfinite(top):
                raise LogitsNotFinite(f"the logits behind token {row} are no numbers")
            scores[row] = wide[int(token)] - top - np.log(np.exp(wide - top).sum())
        return scores

    @property
    def keeps_sessions(self) -> bool:
        """Whether named sessions outlive the process; not where another has the store."""
        return self._keeper is not None

    def store_snapshot(self) -> StoreSnapshot | None:
        """The figures of the store on disk right now; None without one."""
        return None if self._store is None else self._store.snapshot()

    def counters(self) -> EngineCounters:
        """What was computed, and moved between memory and disk, since the runtime was opened."""
        return self._engine.counters()

    def pool_snapshot(self) -> PoolSnapshot:
        """The KV pool's figures right now."""
        return self._engine.pool_snapshot()

    def check_integrity(self) -> None:
        """Assert the pool's and the sessions' invariants; AssertionError means a bug of ours."""
        self._engine.check_integrity()

    def close(self) -> None:
        """Stop the engine and free everything; unfinished requests fail with RuntimeClosed.

        What named sessions said and computed is on disk when this returns.

        Raises:
            NotKept: What was said last in some sessions could not be saved; all else is done.
        """
        with self._lock:
            self._closed = True
            sessions = list(self._sessions.values())
        if self._monitor is not None:
            self._monitor.close()
        for session in sessions:
            session._settle()
        with contextlib.ExitStack() as ends:  # each of them, whatever another raises
            ends.callback(self._close_store)
            if self._keeper is not None and self._store is not None:  # not closed before
                ends.callback(self._keeper.flush)
            ends.callback(self._engine.close)

    def _close_store(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            # What was said is saved by now, or `NotKept` says so; KV is computed again.
            with contextlib.suppress(StoreError):
                close_store(store)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except EdgeKVError as failure:
            if error is None:
                raise
            error.add_note(f"and as the runtime was closed: {failure}")


def _check_name(field: str, name: object) -> None:
    if not isinstance(name, str) or not 1 <= len(name) <= NAME_LENGTH_MAX:
        raise ConfigError.of(field, name, f"a string of 1 to {NAME_LENGTH_MAX} characters")
    # No file can hold lone surrogates, and NUL begins the names that unnamed sessions have there.
    if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in name):
        raise ConfigError.of(field, name, "Unicode text, without NUL and lone surrogates")


@functools.cache
def _warn_once(warning: str) -> None:
    if warning:
        print(warning, file=sys.stderr)  # noqa: T201 - nothing else would tell the user
