"""What a store may take, agreed with all others under the root before anything is written.

                    disk_bytes, all stores under the root
    ├──────────────────────────────────────┬──────────────────┬───────────────┤
      claim of this store                    other stores' claims    left
      records │ index, or its reserve │ a step ahead

A claim is a line in the store's folder: how much it may take, and whether a process has it open.
It is raised before the store grows, in steps, under the root's lock; so what all stores take stays
below the sum of the claims, and that below the budget, without anybody counting others' files. A
claim that cannot be trusted, for the process was killed or of the first release, is counted anew.

A second limit is the volume: `free_reserve_bytes` of it stay free of KV. The index need not heed
it: what was said is small, and cannot be computed again. What one of the limits is exceeded by,
because somebody lowered it or filled the volume, has to be given back.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from edgekv.errors import StoreBusy, StoreFull, StoreUnusable
from edgekv.store.disk_io import Files
from edgekv.store.folder import (
    CLAIM_NAME,
    DAMAGED_NAME,
    files_of,
    folder_bytes,
    folder_lock,
    has_kv,
    index_files,
    is_in_use,
    remove_kv,
    root_lock,
    store_folders,
    used_s,
)
from edgekv.store.record import taken_bytes

STEP_BYTES = 64 << 20
_STEP_SHARE = 32  # of a small budget a step is one part in so many
# An index of a few sessions takes 128 KiB, its log and the log's index included.
_INDEX_BYTES_MIN = 256 << 10
_INDEX_BYTES_MAX = 16 << 20
_CLAIM_CHARS = 32


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much disk the stores under a root may take."""

    disk_bytes: int  # all of them together
    free_reserve_bytes: int  # what KV leaves free on the volume

    @property
    def index_reserve_bytes(self) -> int:
        """Room that KV leaves to the index, whose growth nobody plans."""
        wanted = max(_INDEX_BYTES_MIN, self.disk_bytes // 8)
        return min(_INDEX_BYTES_MAX, wanted, self.disk_bytes)

    @property
    def step_bytes(self) -> int:
        """A claim is raised by so much more than is needed, if there is room."""
        return min(STEP_BYTES, self.disk_bytes // _STEP_SHARE)


class Budget:
    """One store's part of the disk. Owned by the thread whose turn at the disk it is.

    Attributes:
        kv_bytes: Record files, those included that are being written or could not be removed.
        index_bytes: All else in the folder, as of the last look.
        claim_bytes: How much the store may take by now.
        others_bytes: The claims of other stores, as of the last look.
        peak_bytes: The most that all took.
    """

    def __init__(self, folder: Path, limits: Limits, files: Files, *, kv_bytes: int) -> None:
        """Claim what is there. Raises OSError."""
        self.limits = limits
        self.kv_bytes = kv_bytes
        self.claim_bytes = self.others_bytes = self.peak_bytes = 0
        self._folder = folder
        self._root = folder.parent
        self._files = files
        self._index_paths = [*index_files(folder), folder / DAMAGED_NAME]
        grows = {CLAIM_NAME, *(path.name for path in self._index_paths)}
        fixed = (size for name, size in files_of(folder).items() if name not in grows)
        self._fixed_bytes = sum(fixed) + taken_bytes(_CLAIM_CHARS)
        self.look()
        with root_lock(self._root):
            self.others_bytes = self._claimed_by_others()
            self._claim(self.needed_bytes())
        if self.claim_bytes > limits.disk_bytes - self.others_bytes:
            self.claim_bytes = 0  # is said anew once what is too much has gone
        self._note_peak()

    @property
    def root_bytes(self) -> int:
        """What all stores take; of the others, what they may."""
        return self.kv_bytes + self.index_bytes + self.others_bytes

    def look(self) -> None:
        """See how large the index is by now. Raises OSError."""
        self.index_bytes = self._fixed_bytes
        for path in self._index_paths:
            with contextlib.suppress(FileNotFoundError):
                self.index_bytes += taken_bytes(path.stat().st_size)
        self._note_peak()

    def _free_bytes(self) -> int:
        return self._files.volume_free_bytes(self._folder)

    def needed_bytes(self, *, kv_bytes: int = 0, text_bytes: int = 0) -> int:
        """What this store takes with so much more KV and index, its reserve included."""
        index_bytes = max(self.index_bytes + text_bytes, self.limits.index_reserve_bytes)
        return self.kv_bytes + kv_bytes + index_bytes

    # --- more ---

    def lacking_bytes(self, *, kv_bytes: int = 0, text_bytes: int = 0) -> int:
        """How much KV of this store has to go before so much may be added; 0 if none.

        Raises the claim if that helps. Raises OSError.
        """
        needed_bytes = self.needed_bytes(kv_bytes=kv_bytes, text_bytes=text_bytes)
        if needed_bytes <= self.claim_bytes:
            return 0
        with root_lock(self._root):
            self.others_bytes = self._claimed_by_others()
            allowed_bytes = self.limits.disk_bytes - self.others_bytes
            if needed_bytes > allowed_bytes:
                return needed_bytes - allowed_bytes
            self._claim(min(needed_bytes + self.limits.step_bytes, allowed_bytes))
        return 0

    def lacking_free_bytes(self, kv_bytes: int) -> int:
        """By how much the volume's reserve falls short with so much more KV. Raises OSError."""
        return max(self.limits.free_reserve_bytes + kv_bytes - self._free_bytes(), 0)

    def could_hold(self, kv_bytes: int) -> bool:
        """Whether so much KV would find room if all other KV went, that of other stores too."""
        limits = self.limits
        free_bytes = self.kv_bytes + self._free_bytes() - limits.free_reserve_bytes
        needed_bytes = self.needed_bytes() - self.kv_bytes + kv_bytes
        allowed_bytes = limits.disk_bytes - self._claimed_by_others(in_use=True)
        return needed_bytes <= allowed_bytes and kv_bytes <= free_bytes

    def take(self, kv_bytes: int) -> None:
        """So much KV is written from now on."""
        self.kv_bytes += kv_bytes
        self._note_peak()

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.root_bytes)

    # --- less ---

    def give(self, kv_bytes: int) -> None:
        """So much KV was removed, or not written."""
        self.kv_bytes -= kv_bytes
        assert self.kv_bytes >= 0

    def lower_claim(self) -> None:
        """Let others have what this store will not need soon. Raises OSError."""
        step_bytes = self.limits.step_bytes
        if self.claim_bytes > self.needed_bytes() + 2 * step_bytes:
            with root_lock(self._root):
                self._claim(self.needed_bytes() + step_bytes)

    def close(self) -> None:
        """Claim exactly what is there; nothing is written any more. Raises OSError."""
        with root_lock(self._root):
            self._claim(folder_bytes(self._folder), is_open=False)

    def idle_stores(self) -> list[tuple[float, Path]]:
        """Others that have KV: (Unix time of the last use, folder), the one used first first."""
        return sorted((used_s(other), other) for other in self._others() if has_kv(other))

    # --- claims ---

    def _others(self) -> list[Path]:
        return [folder for folder in store_folders(self._root) if folder != self._folder]

    def _claimed_by_others(self, *, in_use: bool = False) -> int:
        """What they may take, or those of them that are in use."""
        others = (other for other in self._others() if not in_use or is_in_use(other))
        return sum(_claimed_bytes(other, self.limits.disk_bytes) for other in others)

    def _claim(self, num_bytes: int, *, is_open: bool = True) -> None:
        _write_claim(self._folder, num_bytes, is_open=is_open)
        self.claim_bytes = num_bytes

    def refused(self, *, kv_bytes: int = 0, text_bytes: int = 0) -> StoreFull:
        """Why so many bytes find no room. Raises OSError."""
        free_bytes, limits = self._free_bytes(), self.limits
        if kv_bytes and free_bytes - kv_bytes < limits.free_reserve_bytes:
            return StoreFull(
                f"{size_text(kv_bytes)} find no room: {size_text(free_bytes)} are free on the "
                f"volume of {self._root}, {size_text(limits.free_reserve_bytes)} stay so",
                hint="free some space, or lower free_reserve_bytes",
            )
        return StoreFull(
            f"{size_text(kv_bytes + text_bytes)} find no room: {size_text(self.root_bytes)} of "
            f"{size_text(limits.disk_bytes)} are taken in {self._root}",
            hint="raise disk_bytes, or remove sessions",
        )


def _claimed_bytes(folder: Path, most_bytes: int) -> int:
    """How much another store may take; a claim beyond the whole budget makes no sense."""
    was_killed = False
    with contextlib.suppress(OSError, ValueError):  # there is none, or it makes no sense
        number, state = (folder / CLAIM_NAME).read_bytes()[:_CLAIM_CHARS].split()
        is_closed = state == b"closed" and int(number) <= most_bytes
        if number.isdigit() and (is_closed or is_in_use(folder)):
            return int(number)
        was_killed = number.isdigit()
    counted_bytes = folder_bytes(folder)
    if was_killed:
        with contextlib.suppress(OSError):
            _write_claim(folder, counted_bytes, is_open=False)
    return counted_bytes


def _write_claim(folder: Path, num_bytes: int, *, is_open: bool) -> None:
    text = f"{num_bytes} {'open' if is_open else 'closed'}\n".rjust(_CLAIM_CHARS)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(folder / CLAIM_NAME, flags, 0o600)
    try:
        os.pwrite(fd, text.encode("ascii"), 0)
    finally:
        os.close(fd)


def drop_kv(folder: Path) -> int:
    """Remove the KV of a store that nobody has open; bytes that are free now."""
    nobody_has_it = contextlib.suppress(StoreBusy, StoreUnusable, OSError)
    with nobody_has_it, folder_lock(folder), root_lock(folder.parent):
        before_bytes = folder_bytes(folder)
        remove_kv(folder)
        left_bytes = folder_bytes(folder)
        _write_claim(folder, left_bytes, is_open=False)
        return before_bytes - left_bytes
    return 0


def size_text(num_bytes: int) -> str:
    """A size as a person reads it."""
    size, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{num_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
