"""Files whose calls fail as told: the Nth of a kind errs, comes up short, or meets flipped bits.

    files = FaultyFiles([Fault("pwritev", 3, "ENOSPC")])     # the third pwritev
    files = FaultyFiles([Fault("*", n, "EIO")])              # the nth call of any kind
    files = FaultyFiles([Fault("preadv", 5, "EIO", forever=True)])

Run once without faults, read `files.counts`, then run again for every N. `files.injected` says what
was done, so that a test can tell whether its fault was met at all.
"""

import errno
import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgekv.store.disk_io import OS_FILES, Buffer, Files

FaultKind = Literal[
    "EIO",
    "ENOSPC",
    "EINTR",
    "short",  # preadv, pwritev: only some of the bytes, and says so
    "torn",  # preadv, pwritev: only some of the bytes, then EIO
    "lost",  # pwritev: says that all was written, and wrote nothing
    "flip",  # preadv, pwritev: one bit of what passes is another
]

CALLS_THAT_MEET: dict[FaultKind, set[str]] = {
    "short": {"preadv", "pwritev"},
    "torn": {"preadv", "pwritev"},
    "lost": {"pwritev"},
    "flip": {"preadv", "pwritev"},
}


@dataclass(frozen=True)
class Fault:
    """What happens to the `nth` call (from 1) of a method of `Files`; "*" counts all of them."""

    call: str
    nth: int
    kind: FaultKind
    forever: bool = False

    def hits(self, call: str, counts: Counter[str]) -> bool:
        if self.call not in {call, "*"}:
            return False
        return counts[self.call] == self.nth or (self.forever and counts[self.call] > self.nth)


class FaultyFiles(Files):
    """Files over others. Thread-safe; with several threads N is in order of arrival.

    Set `free_bytes` to make the volume look as full as that.
    """

    def __init__(
        self, faults: Sequence[Fault] = (), *, seed: int = 0, files: Files = OS_FILES
    ) -> None:
        self.faults = list(faults)
        self.counts: Counter[str] = Counter()
        self.injected: list[tuple[str, FaultKind]] = []
        self.free_bytes: int | None = None
        self._random = random.Random(seed)
        self._files = files
        self.buffers_max = files.buffers_max
        self._lock = threading.Lock()

    def open(self, path: Path, *, create: bool) -> int:
        self._meet("open")
        return self._files.open(path, create=create)

    def close(self, fd: int) -> None:
        # As the system does it: the descriptor is gone, whatever close says.
        self._files.close(fd)
        self._meet("close")

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        kind = self._meet("preadv")
        if kind in {"short", "torn"}:
            num_read = self._files.preadv(fd, self._some(buffers), offset)
            return self._unless_torn(kind, num_read)
        num_read = self._files.preadv(fd, buffers, offset)
        if kind == "flip" and num_read:
            self._flip(buffers, num_read)
        return num_read

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        kind = self._meet("pwritev")
        if kind in {"short", "torn"}:
            written = self._files.pwritev(fd, self._some(buffers), offset)
            return self._unless_torn(kind, written)
        num_bytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        if kind == "lost":
            return num_bytes
        if kind == "flip":
            buffers = [bytearray(buffer) for buffer in buffers]
            self._flip(buffers, num_bytes)
        return self._files.pwritev(fd, buffers, offset)

    def unlink(self, path: Path) -> None:
        self._meet("unlink")
        self._files.unlink(path)

    def volume_free_bytes(self, path: Path) -> int:
        self._meet("volume_free_bytes")
        if self.free_bytes is not None:
            return self.free_bytes
        return self._files.volume_free_bytes(path)

    def _meet(self, call: str) -> FaultKind | None:
        """Count a call; raise, or return what is to happen to its bytes."""
        with self._lock:
            self.counts[call] += 1
            self.counts["*"] += 1
            fault = next((f for f in self.faults if f.hits(call, self.counts)), None)
            if fault is None or call not in CALLS_THAT_MEET.get(fault.kind, {call}):
                return None
            self.injected.append((call, fault.kind))
        if fault.kind in {"EIO", "ENOSPC", "EINTR"}:
            raise OSError(getattr(errno, fault.kind), f"injected into {call} {fault.nth}")
        return fault.kind

    def _unless_torn(self, kind: FaultKind | None, num_bytes: int) -> int:
        if kind == "torn":
            raise OSError(errno.EIO, f"injected after {num_bytes} bytes")
        return num_bytes

    def _some(self, buffers: Sequence[Buffer]) -> list[memoryview]:
        """A random beginning of buffers: at least a byte, and where possible not all."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        with self._lock:
            left = self._random.randint(1, max(sum(v.nbytes for v in views) - 1, 1))
        some = []
        for view in views:
            some.append(view[:left])
            left -= some[-1].nbytes
        return [view for view in some if view.nbytes]

    def _flip(self, buffers: Sequence[Buffer], num_bytes: int) -> None:
        with self._lock:
            index, bit = self._random.randrange(num_bytes), self._random.randrange(8)
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            if index < view.nbytes:
                view[index] ^= 1 << bit
                return
            index -= view.nbytes
