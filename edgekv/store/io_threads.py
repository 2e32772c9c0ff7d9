"""Threads that read and write, so that the engine thread does not wait for the disk.

    submit(kind, run, tag) ──▶ restore ──▶ reader threads ──┐
        engine thread          write   ──▶ writer threads ──┼──▶ done(IoDone)
                               evict   ──▶ writer threads ──┘    posts to the engine's inbox

Readers serve restores alone, so that none ever waits behind a write. Writers write before they
evict. Without readers the writers serve everything, restores first.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from edgekv.clock import Clock, MonotonicClock
from edgekv.errors import EdgeKVError, EngineFailed, RuntimeClosed

T = TypeVar("T", bound=BaseException)

IoKind = Literal["restore", "write", "evict"]
KINDS: tuple[IoKind, ...] = ("restore", "write", "evict")  # most urgent first


@dataclass(frozen=True, kw_only=True)
class IoDone:
    """A job has ended.

    Attributes:
        kind: As submitted.
        tag: As submitted.
        result: What the job returned; None after an error.
        error: What it raised, without the traceback, whose frames would keep buffers alive. An
            `EngineFailed` is a bug of ours, its cause chained; a `RuntimeClosed` of a job that
            never ran comes from `close`.
        queued_ms: Submit to start.
        ran_ms: Start to end.
    """

    kind: IoKind
    tag: object
    result: object | None
    error: EdgeKVError | OSError | None
    queued_ms: float
    ran_ms: float


@dataclass
class _Job:
    kind: IoKind
    run: Callable[[], object]
    tag: object
    submitted_ms: float
    started_ms: float | None = None


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
            num_readers: Threads that serve restores alone; 0 leaves restores to the writers.
            num_writers: Threads that serve writes and evictions, at least 1.
            queue_max: Jobs of each kind that may wait.
            done: Called once a job, on the thread that ran it (on the closing one if it never
                ran). It must not wait for the thread that submits, nor submit: it posts.
            clock: For the times in `IoDone`.
        """
        assert num_readers >= 0
        assert num_writers >= 1
        assert queue_max >= 1
        self._queue_max = queue_max
        self._done = done
        self._clock = clock or MonotonicClock()
        self._lock = threading.Lock()  # guards what follows; held for no longer than a few lines
        self._job_for_reader = threading.Condition(self._lock)
        self._job_for_writer = threading.Condition(self._lock)
        self._queues: dict[IoKind, deque[_Job]] = {kind: deque() for kind in KINDS}
        self._num_pending = 0
        self._closed = False
        self._failure: BaseException | None = None  # of `done`: nobody else can be told
        read, write = (KINDS[:1], KINDS[1:]) if num_readers else ((), KINDS)
        self._wake = dict.fromkeys(read, self._job_for_reader)
        self._wake |= dict.fromkeys(write, self._job_for_writer)
        # Daemons, so that a forgotten `close` cannot hang the process.
        self._threads = [
            threading.Thread(target=self._main, args=args, name=f"edgekv-{role}", daemon=True)
            for role, count, args in (
                ("reader", num_readers, (read, self._job_for_reader)),
                ("writer", num_writers, (write, self._job_for_writer)),
            )
            for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_pending(self) -> int:
        """Jobs whose `done` has not returned yet."""
        return self._num_pending

    def submit(self, kind: IoKind, run: Callable[[], object], tag: object) -> bool:
        """Queue a job. Never waits for one: the engine thread has steps to run.

        Returns:
            False if `queue_max` jobs of this kind wait already; then nothing was queued, and the
            caller tries again after some `done`.

        Raises:
            RuntimeClosed: `close` was called.
            EngineFailed: `done` has raised.
        """
        job = _Job(kind, run, tag, self._clock.now_ms())
        with self._lock:
            self._raise_if_failed()
            if self._closed:
                raise RuntimeClosed("the I/O threads have ended")
            if len(self._queues[kind]) >= self._queue_max:
                return False
            self._queues[kind].append(job)
            self._num_pending += 1
            self._wake[kind].notify()
        return True

    def close(self, *, drain: bool) -> None:
        """End the threads, readers first, and wait for them; every job gets its `done` before.

        Args:
            drain: Run what is queued; otherwise what has not started ends with `RuntimeClosed`.

        Raises:
            EngineFailed: `done` has raised.
        """
        assert threading.current_thread() not in self._threads, "a thread cannot wait for itself"
        with self._lock:
            self._closed = True
            dropped = [] if drain else [job for queue in self._queues.values() for job in queue]
            if not drain:
                for queue in self._queues.values():
                    queue.clear()
            self._job_for_reader.notify_all()
            self._job_for_writer.notify_all()
        for job in dropped:
            self._report(job, None, RuntimeClosed("the I/O threads ended before this job began"))
        for thread in self._threads:
            thread.join()
        self._raise_if_failed()

    def _raise_if_failed(self) -> None:
        if self._failure is not None:
            raise EngineFailed("the report of an I/O job failed") from self._failure

    def _main(self, kinds: Sequence[IoKind], wake: threading.Condition) -> None:
        while self._serve_one(kinds, wake):
            pass  # no local of this frame outlives a job: its closure holds a session's buffers

    def _serve_one(self, kinds: Sequence[IoKind], wake: threading.Condition) -> bool:
        """Wait for a job and run it; False if none will come."""
        with wake:
            while (queue := self._most_urgent(kinds)) is None:
                if self._closed:
                    return False
                wake.wait()
            job = queue.popleft()
        job.started_ms = self._clock.now_ms()
        result: object | None = None
        error: EdgeKVError | OSError | None = None
        try:
            result = job.run()
        except (EdgeKVError, OSError) as expected:
            error = _without_frames(expected)
        except BaseException as bug:  # noqa: BLE001 - reported to the owner
            error = EngineFailed(f"an I/O job failed: {bug!r}")
            error.__cause__ = bug
        self._report(job, result, error)
        return True

    def _most_urgent(self, kinds: Sequence[IoKind]) -> deque[_Job] | None:
        return next((self._queues[kind] for kind in kinds if self._queues[kind]), None)

    def _report(
        self, job: _Job, result: object | None, error: EdgeKVError | OSError | None
    ) -> None:
        now_ms = self._clock.now_ms()
        started_ms = now_ms if job.started_ms is None else job.started_ms
        done = IoDone(
            kind=job.kind,
            tag=job.tag,
            result=result,
            error=error,
            queued_ms=started_ms - job.submitted_ms,
            ran_ms=now_ms - started_ms,
        )
        try:
            self._done(done)
        except BaseException as bug:  # noqa: BLE001 - raised to who submits or closes next
            with self._lock:
                self._failure = self._failure or bug
        finally:
            with self._lock:
                self._num_pending -= 1


def _without_frames(error: T) -> T:
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
