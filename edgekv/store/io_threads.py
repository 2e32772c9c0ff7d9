"""Threads that read and write, so that the engine thread does not wait for the disk.

    submit(kind, run, tag) ──▶ restore ──▶ reader threads ──┐
        engine thread          write   ──▶ writer threads ──┴──▶ done(IoDone), to the engine's inbox

Readers serve restores alone, so that none ever waits behind a write.

By hand, because `ThreadPoolExecutor` takes no more jobs once the interpreter ends, which is before
`atexit` closes a runtime that was forgotten and writes what it has; nor does it bound its queue.
"""

import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from edgekv.clock import Clock, MonotonicClock
from edgekv.errors import EdgeKVError, EngineFailed, RuntimeClosed

T = TypeVar("T", bound=BaseException)

IoKind = Literal["restore", "write"]


@dataclass(frozen=True, kw_only=True)
class IoDone:
    """A job has ended.

    Attributes:
        kind: As submitted.
        tag: As submitted.
        error: What it raised, without the traceback, whose frames would keep buffers alive. An
            `EngineFailed` is a bug of ours, its cause chained with its traceback: raise it.
        ran_ms: Start to end.
    """

    kind: IoKind
    tag: object
    error: EdgeKVError | OSError | None
    ran_ms: float


@dataclass
class _Job:
    kind: IoKind
    run: Callable[[], object]
    tag: object


class IoThreads:
    """Reader and writer threads over bounded queues. Any thread may submit; one closes.

    Jobs of one kind start in the order in which they were submitted, but several run at once:
    who needs one to end before another starts submits the second when the first is done.
    """

    def __init__(
        self,
        *,
        num_readers: int,
        num_writers: int,
        queue_max: int,
        done: Callable[[IoDone], None],
        clock: Clock | None = None,
    ) -> None:
        """Start the threads.

        Args:
            num_readers: Threads that serve restores.
            num_writers: Threads that serve all else.
            queue_max: Jobs of each kind that may wait.
            done: Called once a job, on the thread that ran it. It must not wait for the thread
                that submits, nor submit: it posts.
            clock: For the times in `IoDone`.
        """
        assert min(num_readers, num_writers, queue_max) >= 1
        self._queue_max = queue_max
        self._done = done
        self._clock = clock or MonotonicClock()
        self._lock = threading.Lock()  # guards what follows; held for no longer than a few lines
        self._queues: dict[IoKind, queue.SimpleQueue[_Job | None]] = {
            "restore": queue.SimpleQueue(),
            "write": queue.SimpleQueue(),
        }
        self._num_waiting: Counter[IoKind] = Counter()
        self._closed = False
        self._failure: BaseException | None = None  # of `done`: nobody else can be told
        self._threads = [
            *(self._start("restore", "reader") for _ in range(num_readers)),
            *(self._start("write", "writer") for _ in range(num_writers)),
        ]

    def _start(self, kind: IoKind, role: str) -> tuple[threading.Thread, IoKind]:
        # A daemon, so that a forgotten `close` cannot hang the process.
        name = f"edgekv-{role}"
        thread = threading.Thread(target=self._main, args=(kind,), name=name, daemon=True)
        thread.start()
        return thread, kind

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
            if self._num_waiting[kind] >= self._queue_max:
                return False
            self._num_waiting[kind] += 1
            self._queues[kind].put(_Job(kind, run, tag))
        return True

    def close(self) -> None:
        """Run what is queued, then end the threads; every job gets its `done` before.

        Raises:
            EngineFailed: `done` has raised.
        """
        with self._lock:
            if not self._closed:
                for _, kind in self._threads:
                    self._queues[kind].put(None)
            self._closed = True
        for thread, _ in self._threads:
            thread.join()
        self._raise_if_failed()

    def _raise_if_failed(self) -> None:
        if self._failure is not None:
            raise EngineFailed("the report of an I/O job failed") from self._failure

    def _main(self, kind: IoKind) -> None:
        while self._serve_one(self._queues[kind]):
            pass  # no local of this frame outlives a job: its closure holds a session's buffers

    def _serve_one(self, jobs: "queue.SimpleQueue[_Job | None]") -> bool:
        """Wait for a job and run it; False if none will come."""
        job = jobs.get()
        if job is None:
            return False
        with self._lock:
            self._num_waiting[job.kind] -= 1
        started_ms = self._clock.now_ms()
        error = run_job(job.run)
        ran_ms = self._clock.now_ms() - started_ms
        try:
            self._done(IoDone(kind=job.kind, tag=job.tag, error=error, ran_ms=ran_ms))
        except BaseException as bug:  # noqa: BLE001 - raised to who submits or closes next
            self._failure = self._failure or bug
        return True


def run_job(run: Callable[[], object]) -> EdgeKVError | OSError | None:
    """Run a job; return what it raised, as `IoDone.error` says."""
    try:
        run()
    except (EdgeKVError, OSError) as expected:
        return _without_frames(expected)
    except BaseException as bug:  # noqa: BLE001 - reported to the owner
        failure = EngineFailed(f"an I/O job failed: {bug!r}")
        failure.__cause__ = bug
        return failure
    return None


def _without_frames(error: T) -> T:
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
