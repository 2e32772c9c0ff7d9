"""What a store may take: decisions about size, pure.

                    disk_bytes, all stores under the root
    ├──────────────────────────────┬───────────────┬─────────────┬────────┤
      this store's segment files     other stores    index reserve   left
      (preallocated, grow in steps)                  (what its index may still grow)

A second limit is the volume: `free_reserve_bytes` of it stay free. What one of the limits is
exceeded by, because somebody lowered it or filled the volume, has to be given back.
"""

from dataclasses import dataclass

STEP_BYTES = 64 << 20
# An index of a few sessions takes 128 KiB, its log and the log's index included.
_INDEX_BYTES_MIN = 256 << 10
_INDEX_BYTES_MAX = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much disk the stores under a root may take.

    Attributes:
        disk_bytes: All of them together.
        free_reserve_bytes: What stays free on the volume.
    """

    disk_bytes: int
    free_reserve_bytes: int

    @property
    def index_reserve_bytes(self) -> int:
        """Room that segment files leave to the index, whose growth nobody plans."""
        wanted = max(_INDEX_BYTES_MIN, self.disk_bytes // 8)
        return min(_INDEX_BYTES_MAX, wanted, self.disk_bytes)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What is taken at one moment.

    Attributes:
        root_bytes: By all stores under the root.
        index_bytes: By this store's index; part of the above.
        free_bytes: Free on the volume.
    """

    root_bytes: int
    index_bytes: int
    free_bytes: int


def left_bytes(limits: Limits, usage: Usage) -> int:
    """How much the segment files may grow; below 0, how much they should shrink."""
    reserve_bytes = max(limits.index_reserve_bytes - usage.index_bytes, 0)
    by_budget = limits.disk_bytes - usage.root_bytes - reserve_bytes
    return min(by_budget, usage.free_bytes - limits.free_reserve_bytes)


def excess_bytes(limits: Limits, usage: Usage, num_bytes: int) -> int:
    """By how much a limit would be exceeded if `num_bytes` were added; 0 if none would."""
    by_budget = usage.root_bytes + num_bytes - limits.disk_bytes
    by_volume = limits.free_reserve_bytes + num_bytes - usage.free_bytes
    return max(by_budget, by_volume, 0)


def grown_bytes(
    size_bytes: int, needed_bytes: int, left: int, *, block_bytes: int, step_bytes: int = STEP_BYTES
) -> int | None:
    """The size to grow to: at least what is needed, a step more if that is allowed.

    Returns:
        None if what is needed is not allowed.
    """
    assert needed_bytes >= size_bytes
    allowed_bytes = (size_bytes + max(left, 0)) // block_bytes * block_bytes
    if needed_bytes > allowed_bytes:
        return None
    return max(needed_bytes, min(size_bytes + step_bytes, allowed_bytes))


def shrunk_bytes(
    limits: Limits, usage: Usage, size_bytes: int, num_bytes: int, *, block_bytes: int
) -> int:
    """The size of the segment files at which `num_bytes` may be added elsewhere.

    As it is if no limit would be exceeded, else so small that the index has its reserve again; 0
    if that is all one can do.
    """
    if not excess_bytes(limits, usage, num_bytes):
        return size_bytes
    kept_bytes = size_bytes + left_bytes(limits, usage) - num_bytes
    return max(kept_bytes, 0) // block_bytes * block_bytes


def size_text(num_bytes: int) -> str:
    """A size as a person reads it."""
    size, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{num_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
