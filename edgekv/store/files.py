"""The few file calls that the store makes, as a protocol, so that tests can make them fail.

`OS_FILES` is the operating system. Whether it is macOS or Linux shows only in which calls it has:
`F_NOCACHE` and `F_PREALLOCATE` there, `posix_fallocate` here.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

Buffer = memoryview | bytearray | bytes

BUFFERS_MAX = 1024  # IOV_MAX of Linux and macOS
CALL_BYTES_MAX = 1 << 30  # macOS refuses calls of 2 GiB, Linux shortens them

# <sys/fcntl.h> of macOS: what Python's module does not name.
_F_PREALLOCATE = 42
_F_ALLOCATEALL = 0x4
_F_PEOFPOSMODE = 3
_FSTORE = struct.Struct("=Iiqqq")  # flags, position mode, offset, length, bytes allocated (out)


class Files(Protocol):
    """System calls on files. Thread-safe as the system's are; any of them may raise OSError."""

    def open(self, path: Path, *, create: bool) -> int:
        """Open for reading and writing, 0600 if new; never follows a link. Returns a descriptor."""
        ...

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        ...

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """One call: fill buffers from `offset` on. Returns bytes read, perhaps fewer than asked."""
        ...

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """One call: write buffers at `offset`. Returns bytes written, perhaps fewer than asked."""
        ...

    def allocate(self, fd: int, start: int, end: int) -> None:
        """Extend a file of `start` bytes to `end`, with space on the volume if that can be had."""
        ...

    def truncate(self, fd: int, num_bytes: int) -> None:
        """Cut a file."""
        ...

    def size(self, fd: int) -> int:
        """Length of a file in bytes."""
        ...

    def fsync(self, fd: int) -> None:
        """Hand what was written to the drive."""
        ...

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        ...

    def volume_free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write on the volume that holds `path`."""
        ...


class OsFiles:
    """Files of the operating system."""

    def open(self, path: Path, *, create: bool) -> int:
        """Open for reading and writing, 0600 if new; on macOS past the page cache."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        fd = os.open(path, flags, 0o600)
        no_cache: int | None = getattr(fcntl, "F_NOCACHE", None)
        if no_cache is not None:
            # KV that is read once should not push other apps' pages out of the unified memory.
            fcntl.fcntl(fd, no_cache, 1)
        return fd

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """One `preadv`; the GIL is released meanwhile."""
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """One `pwritev`; the GIL is released meanwhile."""
        return os.pwritev(fd, buffers, offset)

    def allocate(self, fd: int, start: int, end: int) -> None:
        """Extend a file with space on the volume; a file system that cannot gets a sparse end."""
        assert 0 <= start < end
        try:
            _preallocate(fd, start, end)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}:
                raise
        os.ftruncate(fd, end)

    def truncate(self, fd: int, num_bytes: int) -> None:
        """Cut a file."""
        os.ftruncate(fd, num_bytes)

    def size(self, fd: int) -> int:
        """Length of a file in bytes."""
        return os.fstat(fd).st_size

    def fsync(self, fd: int) -> None:
        """Hand what was written to the drive, which may still hold it in its own cache."""
        os.fsync(fd)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def volume_free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write on the volume that holds `path`."""
        volume = os.statvfs(path)
        return volume.f_bavail * volume.f_frsize


def _preallocate(fd: int, start: int, end: int) -> None:
    """Have the volume set space aside for [start, end) of a file of `start` bytes."""
    if hasattr(fcntl, "F_NOCACHE"):
        request = _FSTORE.pack(_F_ALLOCATEALL, _F_PEOFPOSMODE, 0, end - start, 0)
        fcntl.fcntl(fd, _F_PREALLOCATE, request)
    elif hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, start, end - start)


OS_FILES: Files = OsFiles()


def read_at(files: Files, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    """Fill all buffers from `offset` on, in as few calls as it takes.

    Returns:
        Bytes read: less than the buffers hold only where the file ends.

    Raises:
        OSError: A call failed; what the buffers hold is undefined.
    """
    return _transfer(lambda head, at: files.preadv(fd, head, at), buffers, offset)


def write_at(files: Files, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write all buffers at `offset`, in as few calls as it takes.

    Raises:
        OSError: A call failed, or wrote nothing; what stands in the file is undefined.
    """
    written = _transfer(lambda head, at: files.pwritev(fd, head, at), buffers, offset)
    if written != sum(memoryview(buffer).nbytes for buffer in buffers):
        raise OSError(errno.EIO, f"a write at {offset + written} wrote nothing")


def _transfer(
    call: Callable[[Sequence[Buffer], int], int], buffers: Sequence[Buffer], offset: int
) -> int:
    """Repeat `call` on what is left until nothing is, or it moves nothing; return bytes moved."""
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    views = [view for view in views if view.nbytes]
    index, moved_bytes = 0, 0
    while index < len(views):
        try:
            num_bytes = call(_head(views, index), offset + moved_bytes)
        except InterruptedError:  # Python repeats its own calls (PEP 475), others may not
            continue
        if num_bytes == 0:
            break
        moved_bytes += num_bytes
        while index < len(views) and num_bytes >= views[index].nbytes:
            num_bytes -= views[index].nbytes
            index += 1
        if num_bytes:
            views[index] = views[index][num_bytes:]
    return moved_bytes


def _head(views: Sequence[memoryview], index: int) -> list[memoryview]:
    """As many views from `index` on as one call takes; the last of them may be cut."""
    left, head = CALL_BYTES_MAX, []
    for view in islice(views, index, index + BUFFERS_MAX):
        head.append(view if view.nbytes <= left else view[:left])
        left -= head[-1].nbytes
        if left == 0:
            break
    return head
