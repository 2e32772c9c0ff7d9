"""Memory for KV on its way to disk: a fixed number of equal buffers, taken and given back."""

import mmap

PAGE_BYTES = mmap.PAGESIZE


class Staging:
    """Buffers of one size. Owned by the engine thread.

    Their bytes are taken from the pool's budget as a whole, and from the system when first used;
    from then on they are recycled, because new pages cost more than the copy into them.
    """

    def __init__(self, *, num_buffers: int, buffer_bytes: int) -> None:
        self.num_buffers = num_buffers
        self.buffer_bytes = self.rounded(buffer_bytes)
        self._free: list[memoryview] = []
        self._num_made = 0

    @staticmethod
    def rounded(num_bytes: int) -> int:
        """What a buffer for `num_bytes` takes: whole pages."""
        return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES

    @property
    def total_bytes(self) -> int:
        """What all buffers take once they were used."""
        return self.num_buffers * self.buffer_bytes

    @property
    def num_free(self) -> int:
        """Buffers that `take` can give."""
        return len(self._free) + self.num_buffers - self._num_made

    def take(self) -> memoryview:
        """A buffer, with what it held before; the caller has asked `num_free`."""
        assert self.num_free > 0
        if self._free:
            return self._free.pop()
        self._num_made += 1
        # Anonymous and page-aligned, so that the disk can take it as it is.
        return memoryview(mmap.mmap(-1, self.buffer_bytes))

    def give(self, buffer: memoryview) -> None:
        """Take a buffer back; nobody reads it any more."""
        assert buffer.nbytes == self.buffer_bytes
        assert len(self._free) < self._num_made
        self._free.append(buffer)


NO_STAGING = Staging(num_buffers=0, buffer_bytes=PAGE_BYTES)
