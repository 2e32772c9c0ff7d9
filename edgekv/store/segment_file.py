"""The files that hold records: `segment-0000.kv`, `segment-0001.kv`, …, one address space.

Each has the same number of bytes but the last, which grows in steps. Space is preallocated, so that
a write never has to look for it. Several files and not one, because a system lets only one thread
write to a file at a time, and some let nobody read it meanwhile.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from edgekv.errors import RecordCorrupt
from edgekv.store.extents import BLOCK_BYTES
from edgekv.store.files import OS_FILES, Buffer, Files, read_at, write_at

SEGMENT_BYTES = 1 << 30


class SegmentFile:
    """Segment files of one folder, as one address space [0, size_bytes).

    Any thread may read and write extents that nobody else writes to. `grow`, `shrink` and `close`
    are for one thread at a time, and nothing may be under way in what they take away.
    """

    def __init__(
        self, folder: Path, *, segment_bytes: int = SEGMENT_BYTES, files: Files = OS_FILES
    ) -> None:
        """Open the files that are there, up to the first that is missing or not full.

        No address leads to the files behind that one, nor to part of a block; they are removed.

        Raises:
            OSError: A file cannot be opened or removed.
        """
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._files = files
        self._fds: list[int] = []
        self.size_bytes = 0
        try:
            self._open_all()
        except OSError:
            self.close()
            raise

    def _open_all(self) -> None:
        while self.size_bytes == len(self._fds) * self._segment_bytes:
            path = self._path(len(self._fds))
            if not path.exists():
                break
            self._fds.append(self._files.open(path, create=False))
            self.size_bytes += self._whole_blocks(self._fds[-1])
        for path in sorted(self._folder.glob("segment-*.kv")):
            if path not in {self._path(index) for index in range(len(self._fds))}:
                self._files.unlink(path)

    def _whole_blocks(self, fd: int) -> int:
        """Bytes of a file that addresses lead to; growth that was cut short leaves others."""
        file_bytes = self._files.size(fd)
        num_bytes = min(file_bytes - file_bytes % BLOCK_BYTES, self._segment_bytes)
        if num_bytes < file_bytes:
            self._files.truncate(fd, num_bytes)
        return num_bytes

    def _path(self, index: int) -> Path:
        return self._folder / f"segment-{index:04}.kv"

    def path(self, offset: int) -> tuple[Path, int]:
        """The file that holds an address, and where in it."""
        return self._path(offset // self._segment_bytes), offset % self._segment_bytes

    def grow(self, size_bytes: int) -> None:
        """Preallocate up to `size_bytes`, making files as needed.

        Raises:
            OSError: The volume is full or refuses; `size_bytes` is then what was reached.
        """
        while self.size_bytes < size_bytes:
            index, start = divmod(self.size_bytes, self._segment_bytes)
            if index == len(self._fds):
                self._fds.append(self._files.open(self._path(index), create=True))
            end = min(size_bytes - index * self._segment_bytes, self._segment_bytes)
            try:
                self._files.allocate(self._fds[index], start, end)
            except OSError:
                # Part of it may have been had, and would not be counted.
                with contextlib.suppress(OSError):
                    self._files.truncate(self._fds[index], start)
                raise
            self.size_bytes = index * self._segment_bytes + end

    def shrink(self, size_bytes: int) -> None:
        """Give what is behind `size_bytes` back to the volume.

        Raises:
            OSError: The system refuses; `size_bytes` is then what was reached.
        """
        assert 0 <= size_bytes <= self.size_bytes
        while self._fds:
            last = len(self._fds) - 1
            keep = max(size_bytes - last * self._segment_bytes, 0)
            if keep:
                self._files.truncate(self._fds[last], keep)
                self.size_bytes = last * self._segment_bytes + keep
                break
            self._files.unlink(self._path(last))
            fd = self._fds.pop()
            self.size_bytes = min(self.size_bytes, last * self._segment_bytes)
            self._files.close(fd)

    def write(self, offset: int, buffers: Sequence[Buffer], *, vectored: bool = True) -> None:
        """Write buffers one after the other at an address; all of it inside one segment.

        Args:
            offset: Address of the first byte.
            buffers: What to write, C-contiguous; not copied.
            vectored: One call for all (that the system takes at once), else one per buffer.

        Raises:
            OSError: A write failed; what stands there is undefined.
        """
        fd, at = self._place(offset, buffers)
        for run in [buffers] if vectored else [[buffer] for buffer in buffers]:
            write_at(self._files, fd, run, at)
            at += _num_bytes(run)

    def read(self, offset: int, buffers: Sequence[Buffer], *, vectored: bool = True) -> None:
        """Fill buffers one after the other from an address; all of it inside one segment.

        Args:
            offset: Address of the first byte.
            buffers: Writable and C-contiguous; filled in place.
            vectored: One call for all (that the system takes at once), else one per buffer.

        Raises:
            OSError: A read failed; what the buffers hold is undefined.
            RecordCorrupt: The file is shorter than it was.
        """
        fd, at = self._place(offset, buffers)
        for run in [buffers] if vectored else [[buffer] for buffer in buffers]:
            num_read = read_at(self._files, fd, run, at)
            if num_read < _num_bytes(run):
                path, start = self.path(offset)
                raise RecordCorrupt(path, start, f"its length: the file ends at {at + num_read}")
            at += num_read

    def _place(self, offset: int, buffers: Sequence[Buffer]) -> tuple[int, int]:
        """The descriptor for these bytes, and where in its file they begin."""
        end = offset + _num_bytes(buffers)
        index, at = divmod(offset, self._segment_bytes)
        assert 0 <= offset < end <= self.size_bytes
        assert (end - 1) // self._segment_bytes == index
        return self._fds[index], at

    def sync(self) -> None:
        """Hand all that was written to the drive.

        Raises:
            OSError: The system reports that something was not written.
        """
        for fd in self._fds:
            self._files.fsync(fd)

    def close(self) -> None:
        """Close the files; nothing may be under way. Closing twice does nothing."""
        while self._fds:
            self._files.close(self._fds.pop())
        self.size_bytes = 0


def _num_bytes(buffers: Sequence[Buffer]) -> int:
    return sum(memoryview(buffer).nbytes for buffer in buffers)
