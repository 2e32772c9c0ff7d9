"""A runtime on several ranks: rank 0 opens it, the others follow.

rank 0:  Runtime.open ─▶ joined ─▶ "open this" ─▶ load a part ─▶ … ─▶ "it has ended"
others:  follow ────────▶ joined ◀─────────────── load a part ─▶ Follower ─▶ the next one
"""

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from edgekv.config import PredictionOptions, RuntimeConfig, StoreOptions, SwapOptions
from edgekv.device import lent_streams, profile
from edgekv.engine.follower import Follower
from edgekv.engine.lead import Lead
from edgekv.errors import ConfigError, EdgeKVError, EngineFailed
from edgekv.models.hub import resolve
from edgekv.models.open_model import open_tokenizer
from edgekv.ranks.exchange import Exchange
from edgekv.ranks.group import Group
from edgekv.ranks.launched import Launched, join, launched
from edgekv.ranks.liveness import Liveness
from edgekv.ranks.orders import Orders, Verb, decoded, from_text, to_text
from edgekv.ranks.verdict import LOADING
from edgekv.runtime.loading import close_store, failing_for_all, load

OnFailure = Callable[[EngineFailed], None]
# A rank that is gone breaks the collectives of all, and whoever watches them says which rank it
# was: at once, or when that one has been silent for too long.
NAMED_S = 7.0
LEAVE_S = 2.0  # for rank 0 to take in that all have been told to go


class Ranks:
    """This process among the others, for as long as it lives."""

    def __init__(self, place: Launched) -> None:
        """Meet and join the others; on the thread that will compute."""
        self.failure: EngineFailed | None = None
        self._pid = os.getpid()
        self._engine_thread = threading.current_thread()
        self._taking = threading.Lock()
        self._has_failed = threading.Event()
        self._has_left = threading.Event()
        self._on_failure: OnFailure | None = None
        self.liveness = Liveness(place, self._failed)
        self.liveness.start()
        self.group: Group = join(place)
        watch = self.liveness
        self.exchange = Exchange(self.group, watch.note, watch.wake, watch.rest)

    def _failed(self, _rank: int, reason: str) -> None:
        self._take(EngineFailed(reason, hint="start all ranks again"))

    def _take(self, failure: EngineFailed) -> None:
        """The first failure counts: what others do then follows from it."""
        with self._taking:
            if self.failure is not None:
                return
            self.failure = failure
        self._has_failed.set()
        if self._on_failure is not None:
            self._on_failure(failure)

    def give_up(self, error: BaseException) -> None:
        """Rank 0's engine thread cannot go on: the others end; whose fault it is all are told."""
        if not isinstance(error, EngineFailed):
            if self._has_failed.wait(NAMED_S):
                return
            what = f"the ranks cannot compute together any more: {error}"
            failure = EngineFailed(what, hint="start all ranks again")
            failure.__cause__, error = error, failure
        self._take(error)
        self.liveness.fail(str(error))

    @property
    def is_stuck(self) -> bool:
        """Whether the engine thread is still there, though all is over."""
        return os.getpid() == self._pid and self._engine_thread.is_alive()

    def leave(self) -> None:
        """Rank 0 ends: let the others end too, and wait for none that does not answer."""
        if os.getpid() != self._pid:  # a process that rank 0 forked is nobody's rank
            return
        self._on_failure = lambda _: self._end_unless_left()
        if self.failure is None:
            with contextlib.suppress(RuntimeError, EngineFailed):
                self.exchange([Verb.LEAVE, 0])
        self._has_left.set()
        self.liveness.close()

    def _end_unless_left(self) -> None:
        """A rank is gone while all are told to go: perhaps because it was told first."""
        if not self._has_left.wait(LEAVE_S):
            os._exit(1)

    def lead(self, model: str, config: RuntimeConfig, on_failure: OnFailure) -> Lead:
        """Have the others load a model too, of whose failures `on_failure` is told."""
        self._on_failure = on_failure
        self._engine_thread = threading.current_thread()
        lead = Lead(self.exchange, Orders(), self.give_up)
        lead.orders.add(Verb.OPEN, *from_text(to_json(model, config)))
        try:
            lead.exchange()
        except RuntimeError as error:  # one has gone just now
            self.give_up(error)
            raise
        self.liveness.note(0, LOADING)
        return lead


_lock = threading.Lock()
_ranks: Ranks | None = None
_lead: Lead | None = None  # of the last runtime


@atexit.register  # early, and so that it runs late
def _end_without_engine_thread() -> None:
    """End here, if the engine thread waits for what does not come any more.

    It would wake up while the interpreter goes, and what MLX does then aborts the process.
    """
    if _ranks is not None and _ranks.is_stuck:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(1)


def joined(model: str, config: RuntimeConfig, on_failure: OnFailure) -> Lead | None:
    """Rank 0's hold on the others, of a process that was launched with some; on its engine thread.

    Raises:
        ConfigError: Another runtime of this process has them.
        EngineFailed: They do not come, or are gone.
    """
    global _ranks, _lead
    place = launched()
    if place is None or place.size == 1:
        return None
    with _lock:
        if _ranks is not None and _ranks.failure is not None:
            raise _ranks.failure.with_traceback(None)
        if _lead is not None and not _lead.closed:
            raise ConfigError(
                "the ranks work for another runtime of this process",
                hint="close it first: several ranks have one model at a time",
            )
        if _ranks is None:
            _ranks = Ranks(place)
            atexit.register(_ranks.leave)
        _lead = _ranks.lead(model, config, on_failure)
        return _lead


def follow(place: Launched) -> int:
    """Follow rank 0 until it ends; the status with which this process is to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 says when it is over
    with lent_streams():
        ranks = Ranks(place)
        try:
            while True:
                for verb, words in decoded(ranks.exchange().orders):
                    if verb is Verb.LEAVE:
                        ranks.liveness.close()
                        return 0
                    if verb is Verb.REST:
                        ranks.exchange.rest()
                    if verb is Verb.OPEN:  # the end of one that could not be opened is nothing
                        _follow_one(ranks, to_text(words)[0])
        except BaseException as error:
            if isinstance(error, RuntimeError):  # rank 0 ends this process, if another is gone
                threading.Event().wait(NAMED_S)
            ranks.liveness.fail(f"{type(error).__name__}: {error}")
            raise


def _follow_one(ranks: Ranks, text: str) -> None:
    """Have a part of one runtime's model, from its beginning to its end."""
    model, config = from_json(text)
    ranks.liveness.note(0, LOADING)
    try:
        with failing_for_all(ranks.group):
            path = resolve(model)
            tokenizer = open_tokenizer(path)
        loaded = load(path, model, tokenizer, profile(), config, group=ranks.group)
    except EdgeKVError:  # rank 0 knows, and says it to its caller
        return
    follower = Follower(loaded, config.swap)
    try:
        follower.serve(ranks.exchange)
    finally:
        follower.close()
        if loaded.store is not None:
            with contextlib.suppress(EdgeKVError):
                close_store(loaded.store)


def to_json(model: str, config: RuntimeConfig) -> str:
    """What another rank must know to load its part."""
    told = {field.name: getattr(config, field.name) for field in fields(config)}
    groups = {name: asdict(told.pop(name)) for name in ("swap", "store", "prediction")}
    return json.dumps({"model": model, "config": told, **groups}, default=str)


def from_json(text: str) -> tuple[str, RuntimeConfig]:
    """What `to_json` was given."""
    told: dict[str, Any] = json.loads(text)
    store = dict(told["store"])
    if store["folder"] is not None:
        store["folder"] = Path(store["folder"])
    config = RuntimeConfig(
        **told["config"],
        swap=SwapOptions(**told["swap"]),
        store=StoreOptions(**store),
        prediction=PredictionOptions(**told["prediction"]),
    )
    return told["model"], config
