"""The few calls that the store makes on record files; a subclass can let them fail.

Linux and macOS differ in one: `F_NOCACHE`, which Linux lacks.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path

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
