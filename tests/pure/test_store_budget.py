"""Decisions about size."""

import pytest

from edgekv.store import budget
from edgekv.store.budget import Limits, Usage

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 64 * KIB


def usage(root_bytes: int = 0, index_bytes: int = 0, free_bytes: int = 100 * GIB) -> Usage:
    return Usage(root_bytes=root_bytes, index_bytes=index_bytes, free_bytes=free_bytes)


def limits(disk_bytes: int = GIB, free_reserve_bytes: int = 0) -> Limits:
    return Limits(disk_bytes=disk_bytes, free_reserve_bytes=free_reserve_bytes)


def test_the_index_has_a_reserve() -> None:
    assert limits(8 * GIB).index_reserve_bytes == 16 * MIB
    assert limits(8 * MIB).index_reserve_bytes == MIB
    assert limits(MIB).index_reserve_bytes == MIB // 4
    assert limits(1000).index_reserve_bytes == 1000
    assert limits(0).index_reserve_bytes == 0
    assert budget.left_bytes(limits(GIB), usage(100 * MIB, MIB)) == GIB - 115 * MIB
    # What it has taken of its reserve is in what the root takes.
    assert budget.left_bytes(limits(GIB), usage(100 * MIB, 20 * MIB)) == GIB - 100 * MIB


def test_the_nearer_limit_counts() -> None:
    tight = limits(GIB, free_reserve_bytes=4 * GIB)
    assert budget.left_bytes(tight, usage(free_bytes=4 * GIB + 5)) == 5
    assert budget.left_bytes(tight, usage(free_bytes=3 * GIB)) == -GIB
    assert budget.excess_bytes(tight, usage(free_bytes=3 * GIB), 0) == GIB
    assert budget.excess_bytes(tight, usage(GIB + 7), 0) == 7
    assert budget.excess_bytes(tight, usage(GIB), 0) == 0
    assert budget.excess_bytes(tight, usage(GIB - 5), 6) == 1


@pytest.mark.parametrize(
    ("size", "needed", "left", "expected"),
    [
        (0, BLOCK, GIB, 64 * MIB),  # a step
        (0, 100 * MIB, GIB, 100 * MIB),  # more than a step
        (0, BLOCK, 3 * BLOCK + 1, 3 * BLOCK),  # what is left of one
        (0, BLOCK, BLOCK - 1, None),
        (0, BLOCK, -5, None),
        (4 * BLOCK, 5 * BLOCK, BLOCK, 5 * BLOCK),
        (4 * BLOCK, 4 * BLOCK, -5, 4 * BLOCK),
    ],
)
def test_growing(size: int, needed: int, left: int, expected: int | None) -> None:
    assert budget.grown_bytes(size, needed, left, block_bytes=BLOCK) == expected


def test_shrinking_gives_the_index_its_reserve_again() -> None:
    small = limits(8 * MIB)
    size = budget.shrunk_bytes(small, usage(10 * MIB), 9 * MIB, 0, block_bytes=BLOCK)
    assert size == 6 * MIB
    assert budget.shrunk_bytes(small, usage(8 * MIB), 7 * MIB, 0, block_bytes=BLOCK) == 7 * MIB
    assert budget.shrunk_bytes(small, usage(90 * MIB), 7 * MIB, 0, block_bytes=BLOCK) == 0
    assert budget.shrunk_bytes(small, usage(8 * MIB), 7 * MIB, 1, block_bytes=BLOCK) < 6 * MIB


def test_sizes_are_said_for_people() -> None:
    sizes = [0, 1023, 1024, 5 * MIB + MIB // 2, 8 * GIB, 1 << 62]
    assert [budget.size_text(size) for size in sizes] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "5.5 MiB",
        "8.0 GiB",
        "4194304.0 TiB",
    ]
