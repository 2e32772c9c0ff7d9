"""One model, one pool, one engine thread, shared by the apps of a process."""

import contextlib
import itertools
import operator
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from edgekv.clock import MonotonicClock
from edgekv.config import (
    PREFILL_MODES,
    PrefillMode,
    Priority,
    RuntimeConfig,
    check_choice,
    check_float,
    check_int,
    check_priority,
    pool_bytes_from_gib,
)
from edgekv.device import DeviceProfile, profile
from edgekv.engine.engine import Engine, Loaded
from edgekv.engine.inbox import AppTerms
from edgekv.engine.ledger import EngineCounters
from edgekv.engine.swap import SwapTwin
from edgekv.errors import ConfigError, PromptEmpty, PromptTooLong, TooManySessions
from edgekv.kv.layout import PoolSnapshot
from edgekv.models.hub import Progress, resolve
from edgekv.models.open_model import open_tokenizer
from edgekv.pressure import PressureMonitor
from edgekv.runtime.app import App
from edgekv.runtime.conversation import Conversation
from edgekv.runtime.keeper import ConversationKeeper, KeptSession
from edgekv.runtime.loading import close_store, is_private, load
from edgekv.runtime.persistence import with_system
from edgekv.runtime.session import Session
from edgekv.sched.memory import tokens_max
from edgekv.sched.policy import Policy, policy_of
from edgekv.sched.scheduler import SchedulerConfig
from edgekv.store import Store, StoreSnapshot
from edgekv.store.files import OS_FILES
from edgekv.tokenizer import Tokenizer

DEFAULT_MODEL = "smollm2-135m"
NAME_LENGTH_MAX = 256

_warned = threading.Event()


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
        self.tokenizer: Tokenizer = open_tokenizer(path)
        self._store_files = OS_FILES if swap_twin is None else swap_twin.files
        self._clock = MonotonicClock()
        self._lock = threading.Lock()
        self._apps: dict[str, App] = {}
        self._sessions: dict[tuple[str, str], Session] = {}
        self._names = itertools.count(1)
        self._store: Store | None = None
        self._engine = Engine(
            self._load,
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
        self._keeper = self._make_keeper()
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
    ) -> "Runtime":
        """Load a model.

        Args:
            model: A known name, a Hugging Face repo id, a folder, or a GGUF file.
            pool_gib: KV budget in GiB; overrides `config.pool_bytes`.
            config: Limits and targets.
            progress: Called while something is downloaded.
            policy: Who goes first, in place of the policy that `config` names.
            swap_twin: What moves KV, in place of what `config` names; for benches.

        Raises:
            ModelError: The model cannot be had or is not what it says it is.
            ConfigError: An option has a value that is not allowed.
            PoolTooSmall: The pool cannot hold even a short session.
        """
        config = config or RuntimeConfig()
        if pool_gib is not None:
            config = replace(config, pool_bytes=pool_bytes_from_gib(pool_gib))
        return cls(resolve(model, progress=progress), model, config, policy, swap_twin)

    def _load(self) -> Loaded:
        """Runs on the engine thread, which owns all that MLX makes."""
        loaded, warning = load(
            self.path,
            self.model_name,
            self.device,
            self.config,
            self.tokenizer.fingerprint,
            self._store_files,
        )
        if warning:
            print(warning, file=sys.stderr)  # noqa: T201 - what is said will not be kept
        self.context_max = tokens_max(loaded.pool.layout, loaded.pool.snapshot().sessions_bytes)
        self._store = loaded.store
        return loaded

    @property
    def predicts(self) -> bool:
        """Whether a KV predictor is loaded."""
        return self._engine.predicts

    def _make_keeper(self) -> ConversationKeeper | None:
        """Of a store that others may read later."""
        if self._store is None or self.config.swap.mode != "reuse" or is_private(self._store):
            return None
        return ConversationKeeper(
            self._store, self._engine.write, vocab_size=self.tokenizer.vocab_size
        )

    def app(
        self,
        name: str = "default",
        *,
        weight: float = 1.0,
        priority: Priority = "interactive",
        pinned_bytes: int = 0,
        prefill: PrefillMode | None = None,
    ) -> App:
        """The app of this name, with these terms from now on.

        Args:
            name: Its name.
            weight: Its share of the service, relative to the other apps of its class.
            priority: Its class.
            pinned_bytes: KV memory that no other app can take from its sessions.
            prefill: See `App`.

        Raises:
            ConfigError: A value is not allowed.
        """
        _check_name("app name", name)
        weight = check_float("weight", weight, 0.001, 1000.0)
        priority = check_priority(priority)
        check_int("pinned_bytes", pinned_bytes, 0, 1 << 50)
        if prefill is not None:
            check_choice("prefill", prefill, PREFILL_MODES)
        with self._lock:
            app = self._apps.setdefault(name, App(self, name, weight, priority))
            app.weight, app.priority, app.prefill = weight, priority, prefill
            self._engine.set_terms(AppTerms(name, weight, priority, pinned_bytes))
        return app

    def _open_session(self, app: App, name: str | None, system: str | None) -> Session:
        is_named = name is not None
        if name is not None:
            _check_name("session name", name)
        with self._lock:
            if name is None:
                names = (f"session-{number}" for number in self._names)
                name = next(name for name in names if self._is_free(app, name))
            session = self._sessions.get((app.name, name))
            if session is not None:
                if system is not None and session.system != system:
                    raise ConfigError(
                        f"session {name!r} is open with another system prompt",
                        hint="close it first, or use another name",
                    )
                return session
            if len(self._sessions) >= self.config.num_sessions_max:
                raise TooManySessions(
                    f"{len(self._sessions)} sessions are open",
                    hint="close some, or raise num_sessions_max",
                )
            conversation, kept = self._conversation(app, name, system, is_named=is_named)
            session = Session(
                app,
                name,
                conversation=conversation,
                kept=kept,
                engine=self._engine,
                tokenizer=self.tokenizer,
                tokens_max=self.context_max,
                clock=self._clock,
                forget=self._forget_session,
                prefill=self.config.prediction.prefill,
            )
            self._sessions[app.name, name] = session
        return session

    def _is_free(self, app: App, name: str) -> bool:
        """Whether nobody has this name, so that an unnamed session may bear it."""
        if (app.name, name) in self._sessions:
            return False
        return self._keeper is None or not self._keeper.knows(app.name, name)

    def _conversation(
        self, app: App, name: str, system: str | None, *, is_named: bool
    ) -> tuple[Conversation, KeptSession | None]:
        """What a session begins with, and where it is kept; only those with a name are."""
        if self._keeper is None or not is_named:
            return with_system(system), None
        return self._keeper.open(app.name, name, system)

    def _remove_session(self, app: App, name: str) -> bool:
        with self._lock:
            session = self._sessions.get((app.name, name))
        if session is not None:
            session.close()
        was_stored = self._keeper is not None and self._keeper.remove(app.name, name)
        return was_stored or session is not None

    def _forget_session(self, session: Session) -> None:
        with self._lock:
            self._sessions.pop((session.app.name, session.name), None)

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
        ids = [_token_id(token, self.tokenizer.vocab_size) for token in token_ids]
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
        """
        logits = self.logits(token_ids)
        scores = np.empty(len(logits) - 1, dtype=np.float32)
        for row, token in enumerate(token_ids[1:]):  # in float64, of one row at a time
            wide = logits[row].astype(np.float64)
            top = wide.max()
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
        """
        if self._monitor is not None:
            self._monitor.close()
        self._engine.close()
        if self._keeper is not None:
            self._keeper.flush()
        self._close_store()

    def _close_store(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            close_store(store)

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _token_id(value: object, vocab_size: int) -> int:
    """An id as a plain int, from any integer type (numpy's too)."""
    with contextlib.suppress(TypeError):  # what is no integer is refused below, by name
        value = operator.index(value)  # type: ignore[arg-type]
    return check_int("token id", value, 0, vocab_size - 1)


def _check_name(field: str, name: object) -> None:
    if not isinstance(name, str) or not 1 <= len(name) <= NAME_LENGTH_MAX:
        raise ConfigError.of(field, name, f"a string of 1 to {NAME_LENGTH_MAX} characters")
    # No file can hold lone surrogates, and NUL begins the names that unnamed sessions have there.
    if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in name):
        raise ConfigError.of(field, name, "Unicode text, without NUL and lone surrogates")


def _warn_once(warning: str) -> None:
    if warning and not _warned.is_set():
        _warned.set()
        print(warning, file=sys.stderr)  # noqa: T201 - the one line that users of a CPU must see
