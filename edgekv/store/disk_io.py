"""How bytes get to the disk: the few calls that the store makes on record files, and threads.

Linux and macOS differ in one call: `F_NOCACHE`, which Linux lacks. A subclass of `Files` can let
them fail.

    submit(kind, run, tag) ──▶ restore ──▶ reader threads ──┐
        engine thread          write   ──▶ writer threads ──┴──▶ done(IoDone), to the engine's inbox

Readers serve restores alone, so that none ever waits behind a write.

By hand, because `ThreadPoolExecutor` takes no more jobs once the interpreter ends, which is before
`atexit` closes a runtime that was forgotten and writes what it has; nor does it bound its queue.
"""

import errno
import fcntl
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from edgekv.clock import MonotonicClock
from edgekv.errors import EdgeKVError, EngineFailed, RuntimeClosed

Buffer = memoryview | bytearray | bytes

BUFFERS_MAX = 1024  # IOV_MAX of Linux and macOS
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
CALL_BYTES_MAX = 1 << 30  # macOS refuses calls of 2 GiB, Linux shortens them


class Files:
    """Calls of the operating system. Thread-safe; any of them may raise OSError.

    Attributes:
        buffers_max: Most buffers that one call is given.
    """

    buffers_max = BUFFERS_MAX

    def open(self, path: Path, *, create: bool) -> int:
        """Open a new file (0600) for writing, or an old one for reading; follows no link."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL if create else os.O_RDONLY
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        no_cache: int | None = getattr(fcntl, "F_NOCACHE", None)
        if no_cache is not None:
            # KV that is read once should not push other apps' pages out of the unified memory.
            fcntl.fcntl(fd, no_cache, 1)
        return fd

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """One call: fill buffers from `offset` on. Returns bytes read, perhaps fewer than asked."""
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """One call: write buffers at `offset`. Returns bytes written, perhaps fewer than asked."""
        return os.pwritev(fd, buffers, offset)

    def unlink(self, path: Path) -> None:
        """Remove a file; who has it open may go on."""
        path.unlink()

    def volume_free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write on the volume that holds `path`."""
        volume = os.statvfs(path)
        return volume.f_bavail * volume.f_frsize


OS_FILES = Files()


def read_from(files: Files, fd: int, buffers: Sequence[Buffer]) -> tuple[int, int]:
    """Fill all buffers from the beginning of a file, in as few calls as it takes.

    Returns:
        Bytes read, less than the buffers hold only where the file ends; and calls made.
    """
    num_bytes, num_calls, _ = _transfer(files.preadv, fd, buffers, files.buffers_max)
    return num_bytes, num_calls


def write_to(files: Files, fd: int, buffers: Sequence[Buffer]) -> int:
    """Write all buffers to the beginning of a file, in as few calls as it takes: so many.

    Raises OSError, also where a call writes nothing.
    """
    written, num_calls, is_all = _transfer(files.pwritev, fd, buffers, files.buffers_max)
    if not is_all:
        raise OSError(errno.EIO, f"a write at {written} wrote nothing")
    return num_calls


def total_bytes(buffers: Sequence[Buffer]) -> int:
    """Bytes of all buffers."""
    return sum(memoryview(buffer).nbytes for buffer in buffers)


def _transfer(
    call: Callable[[int, Sequence[Buffer], int], int],
    fd: int,
    buffers: Sequence[Buffer],
    buffers_max: int,
) -> tuple[int, int, bool]:
    """Repeat `call` until all is moved, or it moves nothing: bytes, calls, whether it was all."""
    views = [view for buffer in buffers if (view := memoryview(buffer).cast("B"))]
    index, moved_bytes, num_calls = 0, 0, 0
    while index < len(views):
        num_calls += 1
        try:
            num_bytes = call(fd, _head(views[index : index + buffers_max]), moved_bytes)
        except InterruptedError:  # Python repeats its own calls (PEP 475), others may not
            continue
        if num_bytes == 0:
            break
        moved_bytes += num_bytes
        while index < len(views) and num_bytes >= (size := len(views[index])):
            num_bytes -= size
            index += 1
        if num_bytes:
            views[index] = views[index][num_bytes:]
    return moved_bytes, num_calls, index == len(views)


def _head(views: Sequence[memoryview]) -> list[memoryview]:
    """As many of these views as one call takes; the last of them may be cut."""
    left, head = CALL_BYTES_MAX, []
    for view in views:
        head.append(view if len(view) <= left else view[:left])
        left -= len(head[-1])
        if left == 0:
            break
    return head


# --- threads ---

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


class Io(Protocol):
    """Who runs I/O jobs."""

    def submit(self, kind: IoKind, run: Callable[[], object], tag: object) -> bool:
        """See `IoThreads.submit`."""


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
