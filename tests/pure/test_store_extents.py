"""Extents: the buddy allocator against a map with one entry a block."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgekv.store.extents import BLOCK_BYTES, Extent, Extents

ARENA = 16


def small(size=0) -> Extents:
    """Arenas of 16 blocks of one byte."""
    extents = Extents(arena_bytes=ARENA, block_bytes=1)
    extents.grow(size)
    return extents


def test_what_a_power_of_two_has_too_much_is_given_back():
    extents = Extents(arena_bytes=1 << 30)
    extents.grow(64 << 20)
    extent = extents.allocate((5 << 20) + 4096)
    assert extent == Extent(0, (5 << 20) + BLOCK_BYTES)
    assert extents.used_bytes == extent.num_bytes
    assert extents.allocate((3 << 20) - BLOCK_BYTES) is not None  # all of it fits in what was left
    extents.check_integrity()
    assert extents.free_bytes == (64 << 20) - (8 << 20) - BLOCK_BYTES + BLOCK_BYTES


def test_nothing_is_lost_between_neighbours():
    extents = small(ARENA)
    taken = [extents.allocate(3) for _ in range(4)]
    singles = [extents.allocate(1) for _ in range(4)]
    assert extents.free_bytes == 0
    assert extents.allocate(1) is None
    for extent in taken + singles:
        extents.free(extent)
    assert extents.allocate(ARENA) == Extent(0, ARENA)


def test_records_a_little_larger_than_a_power_of_two_lie_side_by_side():
    extents = small(2 * ARENA)
    taken = [extents.allocate(5) for _ in range(6)]
    taken.sort(key=lambda extent: extent.offset)
    assert [extent.offset for extent in taken] == [0, 5, 10, 16, 21, 26]
    extents.free(taken[1])
    extents.free(taken[2])
    assert extents.allocate(11) == Extent(5, 11)  # [5, 6) [6, 8) [8, 16) in a row
    extents.check_integrity()


def test_the_smallest_and_lowest_hole_is_taken():
    extents = small(2 * ARENA)
    low, keep, high = extents.allocate(2), extents.allocate(2), extents.allocate(2)
    extents.free(high)
    extents.free(low)
    assert extents.allocate(2) == low
    assert keep.offset == 2


def test_no_extent_crosses_from_one_arena_to_the_next():
    extents = small(2 * ARENA)
    extents.allocate(9)
    assert extents.allocate(ARENA) == Extent(ARENA, ARENA)
    assert not extents.reserve(Extent(15, 2))
    assert extents.extent_bytes_max == ARENA


def test_too_large_for_ever_is_a_bug():
    with pytest.raises(AssertionError):
        small(ARENA).allocate(ARENA + 1)
    with pytest.raises(AssertionError):
        small(ARENA).allocate(0)


def test_freeing_twice_or_something_else_is_a_bug():
    extents = small(ARENA)
    extent = extents.allocate(4)
    with pytest.raises(AssertionError):
        extents.free(Extent(0, 3))
    extents = small(ARENA)
    extents.allocate(4)
    extents.free(extent)
    with pytest.raises(KeyError):
        extents.free(extent)


@pytest.mark.parametrize(
    "extent",
    [
        Extent(-64, 64),
        Extent(0, 0),
        Extent(32, 64),
        Extent(64, 100),
        Extent(512, 64),
        Extent(64, -64),
        Extent(960, 128),
    ],
)
def test_an_index_that_is_wrong_reserves_nothing(extent):
    extents = Extents(arena_bytes=512, block_bytes=64)
    extents.grow(512 if extent.offset < 900 else 1024)
    assert not extents.reserve(extent)
    assert extents.used_bytes == 0
    extents.check_integrity()


def test_reserving_again_what_was_allocated_makes_the_same_map():
    before = small(3 * ARENA)
    taken = [before.allocate(n) for n in (1, 5, 11, 2, 7, 3, 4)]
    before.free(taken.pop(2))
    after = small(3 * ARENA)
    assert all(after.reserve(extent) for extent in reversed(taken))
    assert not any(after.reserve(extent) for extent in taken)
    assert vars(after)["_free"] == vars(before)["_free"]
    after.check_integrity()


def test_shrinking_stops_at_what_is_taken():
    extents = small(3 * ARENA)
    keep = [extents.allocate(2), extents.allocate(3)]
    far = extents.allocate(ARENA)
    assert extents.size_used() == 2 * ARENA
    extents.shrink(extents.size_used())
    extents.free(far)
    extents.shrink(extents.size_used())
    assert extents.size_bytes == keep[1].end == 5
    with pytest.raises(AssertionError):
        extents.shrink(4)
    extents.check_integrity()
    extents.grow(ARENA)
    assert extents.allocate(8) == Extent(5, 8)


class ExtentsMachine(RuleBasedStateMachine):
    """Every block of the space is somebody's or nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = small()
        self.taken: list[Extent] = []

    def owned(self) -> list[bool]:
        blocks = [False] * self.extents.size_bytes
        for extent in self.taken:
            blocks[extent.offset : extent.end] = [True] * extent.num_bytes
        return blocks

    @staticmethod
    def has_room(owned: list[bool], num_bytes: int) -> bool:
        """Whether so many blocks in a row are nobody's, in one arena."""
        arenas = [owned[at : at + ARENA] for at in range(0, len(owned), ARENA)]
        return any(
            not any(arena[at : at + num_bytes])
            for arena in arenas
            for at in range(len(arena) - num_bytes + 1)
        )

    @rule(num_bytes=st.integers(1, ARENA))
    def allocate(self, num_bytes: int) -> None:
        owned = self.owned()
        extent = self.extents.allocate(num_bytes)
        assert (extent is not None) == self.has_room(owned, num_bytes)
        if extent is not None:
            assert extent.num_bytes == num_bytes
            assert not any(owned[extent.offset : extent.end])
            self.taken.append(extent)

    @rule(num_bytes=st.integers(1, ARENA))
    def allocate_growing(self, num_bytes: int) -> None:
        owned, size = self.owned(), self.extents.size_needed(num_bytes)
        if size > 5 * ARENA:
            return
        free = [False] * (size - len(owned))
        assert self.has_room(owned + free, num_bytes)
        assert not free or not self.has_room(owned + free[1:], num_bytes)
        self.extents.grow(size)
        self.allocate(num_bytes)
        assert self.taken[-1].num_bytes == num_bytes

    @rule(offset=st.integers(-2, 5 * ARENA), num_bytes=st.integers(-1, ARENA + 1))
    def reserve(self, offset: int, num_bytes: int) -> None:
        extent, owned = Extent(offset, num_bytes), self.owned()
        possible = (
            num_bytes > 0
            and 0 <= offset < extent.end <= len(owned)
            and offset // ARENA == (extent.end - 1) // ARENA
            and not any(owned[offset : extent.end])
        )
        assert self.extents.reserve(extent) == possible
        if possible:
            self.taken.append(extent)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.extents.free(self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1))))

    @precondition(lambda self: self.extents.size_bytes < 4 * ARENA)
    @rule(num_bytes=st.integers(1, ARENA))
    def grow(self, num_bytes: int) -> None:
        self.extents.grow(self.extents.size_bytes + num_bytes)

    @rule(spare=st.integers(0, ARENA))
    def shrink(self, spare: int) -> None:
        least = max((extent.end for extent in self.taken), default=0)
        assert self.extents.size_used() == least
        self.extents.shrink(min(least + spare, self.extents.size_bytes))

    @invariant()
    def nothing_is_lost(self) -> None:
        self.extents.check_integrity()
        assert self.extents.used_bytes == sum(self.owned())
        assert self.extents.free_bytes == self.extents.size_bytes - sum(self.owned())


TestExtentsMachine = ExtentsMachine.TestCase
TestExtentsMachine.settings = settings(
    max_examples=30, stateful_step_count=30, derandomize=True, deadline=None
)
