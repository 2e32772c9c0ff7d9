"""What a process does to what it holds: it forks, it is interrupted, it ends.

A forked child has its parent's memory and none of its threads. Nobody there computes or writes, a
lock may be held for ever by who did not come along, and what looks like the parent's files still
are. So what is inherited is of no use: its methods refuse (`Home`), its properties say what was so
at the fork, nothing of it is ever finalised, and descriptors that lock files are closed at once,
for the parent could not give up a lock that its children hold, too.

The parent has to be kept from harm as well: OpenBLAS ends its threads at a fork (`pthread_atfork`),
and a product that they were computing waits for them for ever. So engines rest while it forks.
"""

import atexit
import contextlib
import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from edgekv.errors import ForkedProcess

REST_S = 10.0  # at most waited for an engine: longer than a step takes
forked_with_mlx = False  # this process was forked from one that had MLX loaded
forked_with_home = False  # or something that has a `Home`
_lock = threading.Lock()  # guards the descriptors; held around a fork
_lock_fds: set[int] = set()
_is_any_made = False
_fork_lock = threading.Lock()  # of the fork that is under way
_engines: "weakref.WeakSet[Rests]" = weakref.WeakSet()
_resume: list[Callable[[], None]] = []  # guarded by `_fork_lock`
_inherited: "weakref.WeakSet[Home]" = weakref.WeakSet()
_closing: set[threading.Thread] = set()  # what was dropped


class Rests(Protocol):
    """Something whose thread can be made to rest."""

    def rest(self, timeout_s: float) -> Callable[[], None]:
        """Have it rest, within so many seconds, until what is returned is called.

        One that still loads its model is waited for, however long that takes.
        """


def rest_at_forks(engine: Rests, begin: Callable[[], None]) -> None:
    """Begin something that rests whenever this process forks, and begins during no fork."""
    with _fork_lock:
        _engines.add(engine)
        begin()


class Home:
    """The process in which a thing was made: only there it works.

    Elsewhere no finaliser may touch it either: a child that drops its last reference to a
    database, and so closes it, could empty its parent's log.
    """

    def __init__(self, thing: object) -> None:
        global _is_any_made
        _is_any_made = True
        self._process_id = os.getpid()
        self._thing = thing
        _inherited.add(self)

    @property
    def is_here(self) -> bool:
        """Whether this is the process."""
        return os.getpid() == self._process_id

    def check(self) -> None:
        """Raise ForkedProcess in any other process."""
        if not self.is_here:
            raise ForkedProcess(
                f"the runtime belongs to process {self._process_id}, which forked this one"
            )


class HomeLock:
    """A lock that refuses in a forked child, where whoever holds it may not have come along."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._home.check()
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def open_locked(path: Path, flags: int) -> int:
    """Open a file (0600) that is to be locked; children that are forked do not have it open."""
    with _lock:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        _lock_fds.add(fd)
    return fd


def close_locked(fd: int) -> None:
    """Close what `open_locked` opened; nothing in a child, where the number may be another's."""
    with _lock:
        if fd in _lock_fds:
            _lock_fds.remove(fd)
            os.close(fd)


def _before() -> None:
    _fork_lock.acquire()
    try:
        for engine in list(_engines):
            _resume.append(engine.rest(REST_S))
    finally:  # of a Ctrl-C, too: the process forks whatever this raises
        _lock.acquire()


def _in_parent() -> None:
    _lock.release()
    for resume in _resume:
        resume()
    _resume.clear()
    _fork_lock.release()


def _in_child() -> None:
    global _lock, _fork_lock, forked_with_mlx, forked_with_home
    _lock, _fork_lock = threading.Lock(), threading.Lock()
    _resume.clear()
    _engines.clear()
    forked_with_mlx |= "mlx.core" in sys.modules
    for fd in _lock_fds:
        os.close(fd)
    _lock_fds.clear()
    forked_with_home |= _is_any_made
    for home in list(_inherited):
        # One reference that nobody gives back: not at the end of the interpreter either.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(home))


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)


def close_dropped(close: Callable[[], object]) -> None:
    """Close what was dropped: beside, for a finaliser runs on any thread, inside any lock."""
    thread = threading.Thread(target=close, name="edgekv-dropped", daemon=True)
    _closing.add(thread)
    # At the end of the interpreter none begins (from Python 3.12 on): nothing closes it then.
    with contextlib.suppress(RuntimeError):
        thread.start()


def wait_for_dropped() -> None:
    """Wait until what was dropped before is closed."""
    for thread in list(_closing):
        if thread.ident is not None:
            thread.join()
        _closing.discard(thread)


atexit.register(wait_for_dropped)


def uninterrupted(function: Callable[[], object]) -> None:
    """Run to the end, whatever Ctrl-C or a signal's handler raises meanwhile; raise that then."""
    outcome: Future[None] = Future()
    is_taken = threading.Lock()

    def run() -> None:
        if not is_taken.acquire(blocking=False):
            return
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised to the caller below
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    interrupt: BaseException | None = None
    thread = threading.Thread(target=run, name="edgekv-close", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # at the end of the interpreter no thread begins (from Python 3.12 on)
        run()
    except BaseException as error:  # noqa: BLE001 - raised below
        interrupt = error
        run()  # unless the thread has begun
    interrupt = _wait(outcome, thread) or interrupt
    if interrupt is not None:
        raise interrupt
    outcome.result()


def _wait(outcome: "Future[None]", thread: threading.Thread) -> BaseException | None:
    """Wait for both; what interrupted that last.

    For the thread's very end, too: what it frees last it must not free as the interpreter ends.
    """
    interrupt: BaseException | None = None
    while not outcome.done() or thread.is_alive():
        try:
            outcome.exception()
            if thread.is_alive():
                thread.join()
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            interrupt = error
    return interrupt
