"""Threads that read and write, so that the engine thread does not wait for the disk.

    submit(kind, run, tag) ──▶ restore ──▶ reader threads ──┐
        engine thread          write   ──▶ writer threads ──┴──▶ done(IoDone), to the engine's inbox

Readers serve restores alone, so that none ever waits behind a write.

By hand, because `ThreadPoolExecutor` takes no more jobs once the interpreter ends, which is before
`atexit` closes a runtime that was forgotten and writes what it has; nor does it bound its queue.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edgekv.clock import MonotonicClock
from edgekv.errors import EdgeKVError, EngineFailed, RuntimeClosed

IoKind = Literal["restore", "write"]
Job = tuple[Callable[[], object], object]  # what to run, and its tag


@dataclass(frozen=True, kw_only=True)
class IoDone:
    """A job has ended."""

    kind: IoKind  # as submitted
    tag: object  # as submitted
    # What it raised, without the traceback, whose frames would keep buffers alive. An
    # `EngineFailed` is a bug of ours, its cause chained with its traceback: raise it.
    error: EdgeKVError | OSError | None
    ran_ms: float  # start to end


class IoThreads:
    """Reader and writer threads over bounded queues. Any thread may submit; one closes.

    Jobs of one kind start in the order in which they were submitted, but several run at once:
    who needs one to end before another starts submits the second when the first is done.
    """

    def __init__(
        self, *, num_readers: int, num_writers: int, queue_max: int, done: Callable[[IoDone], None]
    ) -> None:
        """Start the threads; of each kind `queue_max` jobs may wait.

        `done` is called once a job, on the thread that ran it. It must not wait for the thread
        that submits, nor submit: it posts.
        """
        assert min(num_readers, num_writers, queue_max) >= 1
        self._done = done
        self._clock = MonotonicClock()
        self._lock = threading.Lock()  # so that nothing is queued behind the end
        self._queues: dict[IoKind, queue.Queue[Job | None]] = {
            "restore": queue.Queue(queue_max),
            "write": queue.Queue(queue_max),
        }
        self._closed = False
        self._failure: BaseException | None = None  # of `done`: nobody else can be told
        sizes: dict[IoKind, int] = {"restore": num_readers, "write": num_writers}
        self._threads = [(kind, self._start(kind)) for kind in sizes for _ in range(sizes[kind])]

    def _start(self, kind: IoKind) -> threading.Thread:
        # A daemon, so that a forgotten `close` cannot hang the process.
        name = "edgekv-reader" if kind == "restore" else "edgekv-writer"
        thread = threading.Thread(target=self._main, args=(kind,), name=name, daemon=True)
        thread.start()
        return thread

    def submit(self, kind: IoKind, run: Callable[[], object], tag: object) -> bool:
        """Queue a job. Never waits for one: the engine thread has steps to run.

        Returns:
            False if `queue_max` jobs of this kind wait already; then nothing was queued, and the
            caller tries again after some `done`.

        Raises:
            RuntimeClosed: `close` was called.
            EngineFailed: `done` has raised.
        """
        with self._lock:
            self._raise_if_failed()
            if self._closed:
                raise RuntimeClosed("the I/O threads have ended")
            try:
                self._queues[kind].put_nowait((run, tag))
            except queue.Full:
                return False
        return True

    def close(self) -> None:
        """Run what is queued, then end the threads; every job gets its `done` before.

        Raises:
            EngineFailed: `done` has raised.
        """
        with self._lock:
            was_closed, self._closed = self._closed, True
        for kind, _ in self._threads if not was_closed else ():
            self._queues[kind].put(None)
        for _, thread in self._threads:
            thread.join()
        self._raise_if_failed()

    def _raise_if_failed(self) -> None:
        if self._failure is not None:
            raise EngineFailed("the report of an I/O job failed") from self._failure

    def _main(self, kind: IoKind) -> None:
        while self._serve_one(kind):
            pass  # no local of this frame outlives a job: its closure holds a session's buffers

    def _serve_one(self, kind: IoKind) -> bool:
        """Wait for a job and run it; False if none will come."""
        job = self._queues[kind].get()
        if job is None:
            return False
        run, tag = job
        started_ms = self._clock.now_ms()
        error = _error_of(run)
        ran_ms = self._clock.now_ms() - started_ms
        try:
            self._done(IoDone(kind=kind, tag=tag, error=error, ran_ms=ran_ms))
        except BaseException as bug:  # noqa: BLE001 - raised to who submits or closes next
            self._failure = self._failure or bug
        return True


def _error_of(run: Callable[[], object]) -> EdgeKVError | OSError | None:
    """Run a job; what it raised, as `IoDone.error` says."""
    try:
        run()
    except (EdgeKVError, OSError) as expected:
        link: BaseException | None = expected
        while link is not None:
            link.__traceback__ = None
            link = link.__cause__ or link.__context__
        return expected
    except BaseException as bug:  # noqa: BLE001 - reported to the owner
        failure = EngineFailed(f"an I/O job failed: {bug!r}")
        failure.__cause__ = bug
        return failure
    return None
