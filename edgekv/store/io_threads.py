"""Threads that read and write, so that the engine thread does not wait for the disk.

    submit(kind, run, tag) ──▶ restore ──▶ reader threads ──┐
        engine thread          write   ──▶ writer threads ──┼──▶ done(IoDone)
                               evict   ──▶ writer threads ──┘    posts to the engine's inbox

Readers serve restores alone, so that none ever waits behind a write. Writers write before they
evict. Without readers the writers serve everything, restores first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edgekv.errors import EdgeKVError

IoKind = Literal["restore", "write", "evict"]


@dataclass(frozen=True, kw_only=True)
class IoDone:
    """A job has ended.

    Attributes:
        kind: As submitted.
        tag: As submitted.
        result: What the job returned; None after an error.
        error: What it raised. An `EngineFailed` is a bug of ours, its cause chained; a
            `RuntimeClosed` says that the job never ran.
        queued_ms: Submit to start.
        ran_ms: Start to end.
    """

    kind: IoKind
    tag: object
    result: object | None
    error: EdgeKVError | OSError | None
    queued_ms: float
    ran_ms: float


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
    ) -> None:
        """Start the threads.

        Args:
            num_readers: Threads that serve restores alone; 0 leaves restores to the writers.
            num_writers: Threads that serve writes and evictions, at least 1.
            queue_max: Jobs of each kind that may wait.
            done: Called on an I/O thread after each job, once a job; must not wait for the thread
                that submits.
        """
        raise NotImplementedError

    @property
    def num_pending(self) -> int:
        """Jobs whose `done` has not returned yet."""
        raise NotImplementedError

    def submit(self, kind: IoKind, run: Callable[[], object], tag: object) -> bool:
        """Queue a job. Never waits: the engine thread has steps to run.

        Returns:
            False if `queue_max` jobs of this kind wait already; then nothing was queued, and the
            caller tries again after some `done`.

        Raises:
            RuntimeClosed: `close` was called.
        """
        raise NotImplementedError

    def close(self, *, drain: bool) -> None:
        """End the threads, readers first, and wait for them. Every job submitted gets its `done`.

        Args:
            drain: Run what is queued; otherwise what has not started ends with `RuntimeClosed`.
        """
        raise NotImplementedError
