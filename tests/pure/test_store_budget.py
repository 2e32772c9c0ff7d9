"""What a store may take beside others: claims, which are raised before anything is written."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from faulty_files import FaultyFiles

from edgekv.store import budget
from edgekv.store.budget import Budget, Limits
from edgekv.store.folder import folder_bytes, folder_lock, store_folders

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LOCK_BYTES = 4096  # of a store in which there is nothing but its lock


def limits(disk_bytes: int = GIB, free_reserve_bytes: int = 0) -> Limits:
    return Limits(disk_bytes=disk_bytes, free_reserve_bytes=free_reserve_bytes)


class Place:
    """A store's folder with its lock, and a budget."""

    def __init__(self, root: Path, name: str, limits: Limits, *, kv_bytes: int = 0) -> None:
        self.folder = root / name
        (self.folder / "kv").mkdir(parents=True)
        if kv_bytes:
            os.truncate(os.open(self.folder / "kv" / "1.kv", os.O_CREAT | os.O_RDWR), kv_bytes)
        self.lock = ExitStack()
        self.lock.enter_context(folder_lock(self.folder))
        self.files = FaultyFiles()
        self.budget = Budget(self.folder, limits, self.files, kv_bytes=kv_bytes)

    def close(self) -> None:
        self.budget.close()
        self.lock.close()

    def kill(self) -> None:
        self.lock.close()

    @property
    def claim(self) -> str:
        return (self.folder / "claim").read_text().strip()


def test_the_index_has_a_reserve() -> None:
    assert limits(8 * GIB).index_reserve_bytes == 16 * MIB
    assert limits(8 * MIB).index_reserve_bytes == MIB
    assert limits(MIB).index_reserve_bytes == MIB // 4
    assert limits(1000).index_reserve_bytes == 1000
    assert limits(0).index_reserve_bytes == 0


def test_steps_are_small_where_the_budget_is() -> None:
    assert limits(8 * GIB).step_bytes == 64 * MIB
    assert limits(32 * MIB).step_bytes == MIB
    assert limits(0).step_bytes == 0


def test_a_claim_is_raised_in_steps(tmp_path: Path) -> None:
    place = Place(tmp_path, "a", limits(64 * MIB))
    ours = place.budget
    assert place.claim == f"{8 * MIB} open"  # the index's reserve
    assert ours.lacking_bytes(kv_bytes=MIB) == 0
    assert ours.claim_bytes == 11 * MIB  # and a step of 2 MiB
    ours.take(MIB)
    assert ours.lacking_bytes(kv_bytes=2 * MIB) == 0
    assert place.claim == f"{11 * MIB} open"
    ours.take(2 * MIB)
    assert ours.lacking_bytes(kv_bytes=1) == 0
    assert place.claim == f"{13 * MIB + 1} open"


def test_what_is_claimed_is_others_no_more(tmp_path: Path) -> None:
    first, second = (Place(tmp_path, name, limits(64 * MIB)) for name in "ab")
    assert first.budget.lacking_bytes(kv_bytes=40 * MIB) == 0
    first.budget.take(40 * MIB)
    assert second.budget.lacking_bytes(kv_bytes=10 * MIB) == 4 * MIB
    assert second.budget.others_bytes == 50 * MIB
    assert second.budget.lacking_bytes(kv_bytes=6 * MIB) == 0
    assert second.budget.claim_bytes == 14 * MIB  # no room for a step ahead
    assert first.budget.lacking_bytes(kv_bytes=3 * MIB) == MIB
    first.budget.give(30 * MIB)
    first.budget.lower_claim()
    assert first.claim == f"{20 * MIB} open"
    assert second.budget.lacking_bytes(kv_bytes=30 * MIB) == 0


def test_who_closes_claims_what_is_there(tmp_path: Path) -> None:
    first = Place(tmp_path, "a", limits(64 * MIB), kv_bytes=5 * MIB)
    first.close()
    assert first.claim == f"{5 * MIB + 2 * LOCK_BYTES} closed"  # its lock and its claim
    second = Place(tmp_path, "b", limits(64 * MIB))
    assert second.budget.others_bytes == folder_bytes(first.folder)


def test_a_claim_that_nobody_keeps_is_counted_anew(tmp_path: Path) -> None:
    first = Place(tmp_path, "a", limits(64 * MIB), kv_bytes=5 * MIB)
    assert first.budget.lacking_bytes(kv_bytes=40 * MIB) == 0
    first.kill()
    second = Place(tmp_path, "b", limits(64 * MIB))
    assert second.budget.others_bytes == folder_bytes(first.folder) < 6 * MIB
    assert first.claim == f"{folder_bytes(first.folder)} closed"


@pytest.mark.parametrize(
    "text", ["", "much open", "7", "-", "-7 closed", f"{9**20} closed", "\0" * 32]
)
def test_a_claim_that_makes_no_sense_is_none(tmp_path: Path, text: str) -> None:
    first = Place(tmp_path, "a", limits(64 * MIB), kv_bytes=5 * MIB)
    first.close()
    (first.folder / "claim").write_text(text)
    second = Place(tmp_path, "b", limits(64 * MIB))
    assert second.budget.others_bytes == folder_bytes(first.folder)


def test_the_nearer_limit_counts(tmp_path: Path) -> None:
    place = Place(tmp_path, "a", limits(64 * MIB, free_reserve_bytes=4 * GIB))
    place.files.free_bytes = 4 * GIB + 5
    assert place.budget.lacking_free_bytes(5) == 0
    assert place.budget.lacking_free_bytes(7) == 2
    assert place.budget.could_hold(5)
    assert not place.budget.could_hold(6)
    place.files.free_bytes = 3 * GIB
    assert place.budget.lacking_free_bytes(0) == GIB
    assert "are free on the volume" in str(place.budget.refused(kv_bytes=MIB))
    assert "are taken in" in str(place.budget.refused(text_bytes=MIB))
    place.files.free_bytes = GIB * GIB
    assert not place.budget.could_hold(57 * MIB)
    assert place.budget.could_hold(56 * MIB)


def test_a_lower_budget_says_how_much_is_too_much(tmp_path: Path) -> None:
    place = Place(tmp_path, "a", limits(16 * MIB), kv_bytes=20 * MIB)
    assert place.budget.lacking_bytes() == 6 * MIB
    assert place.claim == f"{22 * MIB} open"
    place.budget.give(8 * MIB)
    assert place.budget.lacking_bytes() == 0
    assert place.claim == f"{14 * MIB + MIB // 2} open"


def test_kv_of_an_idle_store_can_be_dropped(tmp_path: Path) -> None:
    first = Place(tmp_path, "a", limits(64 * MIB), kv_bytes=5 * MIB)
    second = Place(tmp_path, "b", limits(64 * MIB))
    ((used_s, folder),) = second.budget.idle_stores()
    assert (used_s, folder) == (0.0, first.folder)
    assert budget.drop_kv(folder) == 0  # somebody has it open
    first.close()
    assert budget.drop_kv(folder) == 5 * MIB
    assert second.budget.idle_stores() == []
    assert first.claim == f"{2 * LOCK_BYTES} closed"
    assert store_folders(tmp_path) == [first.folder, second.folder]


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
