"""Which bytes of the store's address space are taken: a buddy allocator, pure arithmetic.

The address space is cut into arenas of 2^k bytes (one per segment file), which halve into blocks of
powers of two, each aligned to its own size. A request takes the smallest block that holds it and at
once gives back what the block has too much, so that less than one minimum block is wasted:

    192 KiB from 512 KiB free     [64 64 64|      taken     ]
                                           [64]              given back, order 0
                                               [   256     ] given back, order 2

What is freed merges with its buddy whenever that is free too. Unlike in memory, an extent need not
be aligned to its size: it begins where the row of free blocks begins that its block ends. Else
records of 4 MiB and a header, 8 MiB apart, would leave half of the disk to smaller ones:

    [  4 MiB + h  |-- 4 MiB − h --|---------- 8 MiB ----------]
                  [  4 MiB + h  |------------ 12 MiB − 2h ----]    the next one
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK_BYTES = 64 << 10


@dataclass(frozen=True)
class Extent:
    """A run of bytes [offset, offset + num_bytes) in the address space."""

    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """The offset after the last byte."""
        return self.offset + self.num_bytes


class Extents:
    """Free and taken extents of a growing address space. Owned by whoever holds the store's lock.

    All offsets and sizes are multiples of `block_bytes`. No extent crosses from one arena to the
    next. Among equally small free blocks the lowest is taken, so that the end of the space empties
    and can be given back.
    """

    def __init__(self, *, arena_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        assert block_bytes > 0
        assert arena_bytes >= block_bytes
        assert arena_bytes % block_bytes == 0
        assert (arena_bytes // block_bytes).bit_count() == 1
        self.block_bytes = block_bytes
        self.arena_bytes = arena_bytes
        self.size_bytes = 0
        self.used_bytes = 0
        # Offsets of free blocks in order, by the exponent of their size in minimum blocks.
        self._free: list[list[int]] = [[] for _ in range((arena_bytes // block_bytes).bit_length())]
        self._taken: dict[int, int] = {}  # offset → bytes

    @property
    def extent_bytes_max(self) -> int:
        """The largest extent that can ever be had."""
        return self.arena_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of the address space that nobody has."""
        return self.size_bytes - self.used_bytes

    def rounded(self, num_bytes: int) -> int:
        """Bytes that an extent for `num_bytes` takes: whole minimum blocks."""
        return -(-num_bytes // self.block_bytes) * self.block_bytes

    def allocate(self, num_bytes: int) -> Extent | None:
        """Take an extent of at least `num_bytes`, rounded up to whole minimum blocks.

        Returns:
            None if there are not so many free bytes in a row; see `size_needed`.
        """
        assert 0 < num_bytes <= self.arena_bytes
        extent_bytes = self.rounded(num_bytes)
        start = self._place(extent_bytes)
        if start is None:
            return None
        taken = self.reserve(Extent(start, extent_bytes))
        assert taken
        return Extent(start, extent_bytes)

    def _place(self, extent_bytes: int) -> int | None:
        """Where so many bytes are free in a row."""
        if extent_bytes > self.free_bytes:
            return None
        order = self._order_for(extent_bytes)
        fitting = next((o for o in range(order, len(self._free)) if self._free[o]), None)
        if fitting is not None:
            return self._run_start(self._free[fitting][0])
        return self._run_of(extent_bytes)

    def _run_start(self, offset: int) -> int:
        """Where the free bytes right before an address begin, in the same arena."""
        arena_start = offset // self.arena_bytes * self.arena_bytes
        while True:
            below = (
                offset - self._block_bytes(order)
                for order in range(len(self._free))
                if self._is_free(order, offset - self._block_bytes(order))
            )
            start = next(below, None)
            if start is None or start < arena_start:
                return offset
            offset = start

    def _run_of(self, extent_bytes: int) -> int | None:
        """The first row of free blocks, none of which is large enough, that together are."""
        start = end = 0
        for offset, num_bytes in sorted(
            (at, self._block_bytes(o)) for o, at in self._free_blocks()
        ):
            if offset != end or offset % self.arena_bytes == 0:
                start = offset
            end = offset + num_bytes
            if end - start >= extent_bytes:
                return start
        return None

    def reserve(self, extent: Extent) -> bool:
        """Take exactly this extent, which an index says is in use.

        Returns:
            False, and nothing changes, if any of it lies outside the space, is taken, or is not
            made of whole blocks inside one arena: the index is wrong then.
        """
        holes = self._holes(extent) if self._plausible(extent) else []
        if not holes:
            return False
        for order, offset in holes:
            self._remove(order, offset)
        for order, offset in holes:
            self._give(offset, extent.offset)
            self._give(extent.end, offset + self._block_bytes(order))
        self._take(extent)
        return True

    def _holes(self, extent: Extent) -> list[tuple[int, int]]:
        """The free blocks, as (order, offset), that together cover an extent; none if some lack."""
        holes, position = [], extent.offset
        while position < extent.end:
            around = (
                (order, position - position % self._block_bytes(order))
                for order in range(len(self._free))
            )
            hole = next((block for block in around if self._is_free(*block)), None)
            if hole is None:
                return []
            holes.append(hole)
            position = hole[1] + self._block_bytes(hole[0])
        return holes

    def free(self, extent: Extent) -> None:
        """Give an extent back, all of it."""
        taken_bytes = self._taken.pop(extent.offset)
        assert taken_bytes == extent.num_bytes
        self.used_bytes -= taken_bytes
        self._give(extent.offset, extent.end)

    def size_needed(self, num_bytes: int) -> int:
        """The least size of the space, at least the present one, at which `num_bytes` would fit."""
        extent_bytes = self.rounded(num_bytes)
        if self._place(extent_bytes) is not None:
            return self.size_bytes
        arena_end = -(-self.size_bytes // self.arena_bytes) * self.arena_bytes
        start = (
            self.size_bytes if self.size_bytes == arena_end else self._run_start(self.size_bytes)
        )
        return (start if start + extent_bytes <= arena_end else arena_end) + extent_bytes

    def grow(self, size_bytes: int) -> None:
        """Append free bytes until the space has `size_bytes`."""
        assert size_bytes >= self.size_bytes
        assert size_bytes % self.block_bytes == 0
        start, self.size_bytes = self.size_bytes, size_bytes
        self._give(start, size_bytes)

    def size_used(self) -> int:
        """The offset after the last taken byte: what `shrink` can go down to."""
        return max((offset + taken for offset, taken in self._taken.items()), default=0)

    def shrink(self, size_bytes: int) -> None:
        """Cut the space down to `size_bytes`; nothing behind may be taken."""
        assert self.size_used() <= size_bytes <= self.size_bytes
        assert size_bytes % self.block_bytes == 0
        behind = [
            (order, offset)
            for order, offset in self._free_blocks()
            if offset + self._block_bytes(order) > size_bytes
        ]
        for order, offset in behind:
            self._remove(order, offset)
        self.size_bytes = size_bytes
        for _, offset in behind:
            self._give(offset, max(offset, size_bytes))

    def _plausible(self, extent: Extent) -> bool:
        whole = extent.offset % self.block_bytes == extent.num_bytes % self.block_bytes == 0
        inside = 0 <= extent.offset < extent.end <= self.size_bytes
        one_arena = extent.offset // self.arena_bytes == (extent.end - 1) // self.arena_bytes
        return whole and inside and one_arena

    def _take(self, extent: Extent) -> Extent:
        assert extent.offset not in self._taken
        self._taken[extent.offset] = extent.num_bytes
        self.used_bytes += extent.num_bytes
        return extent

    def _give(self, start: int, end: int) -> None:
        """Make [start, end) free: the largest aligned blocks it is made of, each merged."""
        while start < end:
            unit = start // self.block_bytes
            aligned = (unit & -unit).bit_length() - 1 if unit else len(self._free) - 1
            fitting = ((end - start) // self.block_bytes).bit_length() - 1
            order = min(aligned, fitting, len(self._free) - 1)
            self._merge(order, start)
            start += self._block_bytes(order)

    def _merge(self, order: int, offset: int) -> None:
        """Add a free block, joined with its buddy as long as that is free."""
        while order < len(self._free) - 1:
            buddy = offset ^ self._block_bytes(order)
            if not self._is_free(order, buddy):
                break
            self._remove(order, buddy)
            offset = min(offset, buddy)
            order += 1
        insort(self._free[order], offset)

    def _is_free(self, order: int, offset: int) -> bool:
        blocks = self._free[order]
        index = bisect_left(blocks, offset)
        return index < len(blocks) and blocks[index] == offset

    def _remove(self, order: int, offset: int) -> None:
        assert self._is_free(order, offset)
        del self._free[order][bisect_left(self._free[order], offset)]

    def _block_bytes(self, order: int) -> int:
        return self.block_bytes << order

    def _order_for(self, extent_bytes: int) -> int:
        """The exponent of the smallest block that holds `extent_bytes`."""
        return (extent_bytes // self.block_bytes - 1).bit_length()

    def _free_blocks(self) -> Iterator[tuple[int, int]]:
        return ((order, offset) for order, blocks in enumerate(self._free) for offset in blocks)

    def check_integrity(self) -> None:
        """Assert that free and taken blocks cover the space once, and that no two could merge."""
        runs = [(offset, offset + taken) for offset, taken in self._taken.items()]
        for order, offset in self._free_blocks():
            size = self._block_bytes(order)
            assert offset % size == 0
            runs.append((offset, offset + size))
            buddy_free = self._is_free(order, offset ^ size)
            assert order == len(self._free) - 1 or not buddy_free, "buddies were not merged"
        position = 0
        for start, end in sorted(runs):
            assert start == position < end, "a hole or an overlap"
            position = end
        assert position == self.size_bytes
        assert sum(self._taken.values()) == self.used_bytes
        for offset, taken in self._taken.items():
            assert self._plausible(Extent(offset, taken))
