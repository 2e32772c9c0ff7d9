"""Budget and free-space reserve: counted before, evicted for, given back, never exceeded."""

import time
from pathlib import Path

import pytest
from faulty_files import Fault, FaultyFiles
from tiny_store import BUDGET, MIB, TOKEN_BYTES, kept, open_store, tokens, verify_all, write

from edgekv.errors import StoreFull
from edgekv.store import Store
from edgekv.store.folder import root_bytes

LARGE = 1900  # tokens: 475 KiB, an extent of 512 KiB


def fill(store: Store, num_sessions: int) -> list[int]:
    """Write new persistent sessions one after the other; their keys."""
    first = len(store.sessions())
    seeds = range(first, first + num_sessions)
    return [kept(store, "mail", f"s{seed}", tokens(LARGE, seed)).key for seed in seeds]


def within_budget(store: Store, disk_bytes: int = BUDGET) -> bool:
    figures = store.snapshot()
    return max(root_bytes(store.folder.parent), figures.peak_bytes) <= disk_bytes


def test_the_one_used_least_recently_goes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = fill(store, 10)
    store.touch(keys[0])
    keys += fill(store, 8)
    ends = {key: store.stored_end(key) for key in keys}
    gone = [key for key in keys if ends[key] == 0]
    assert gone
    assert gone == keys[1 : 1 + len(gone)]
    assert ends[keys[0]] == LARGE
    assert store.snapshot().num_evicted == len(gone)
    assert len(store.sessions()) == 18
    assert within_budget(store)
    verify_all(store)
    store.close()


def test_a_suffix_goes_before_its_prefix(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ids = tokens(LARGE * 4)
    key = store.session("mail", "long", persistent=True).key
    for end in range(LARGE, len(ids) + 1, LARGE):
        write(store, key, ids[:end], start=end - LARGE)
    store.set_conversation(key, '"kept"')
    while store.stored_end(key) == len(ids):
        fresh = store.session("mail", f"x{len(store.sessions())}", persistent=False).key
        write(store, fresh, tokens(LARGE))
    assert store.stored_end(key) == LARGE * 3
    verify_all(store)
    store.close()
    again = open_store(tmp_path)
    found = again.find("mail", "long")
    assert found is not None
    assert (found.num_tokens, found.conversation) == (LARGE * 3, '"kept"')
    verify_all(again)
    again.close()


def test_the_pinned_stay(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = fill(store, 5)
    for key in keys:
        store.pin(key)
    store.pin(keys[0])
    store.unpin(keys[0])
    last = fill(store, 25)
    assert [store.stored_end(key) for key in keys] == [LARGE] * 5
    for key in last:
        store.pin(key)
    with pytest.raises(StoreFull, match="find no room") as caught:
        write(store, store.session("mail", "one more", persistent=True).key, tokens(LARGE))
    assert "disk_bytes" in caught.value.hint
    assert store.snapshot().num_full == 1
    verify_all(store)
    store.unpin(keys[3])
    write(store, store.session("mail", "one more", persistent=True).key, tokens(LARGE))
    assert store.stored_end(keys[3]) == 0
    verify_all(store)
    store.close()


def test_what_can_never_fit_evicts_nobody(tmp_path: Path) -> None:
    store = open_store(tmp_path, disk_bytes=2 * MIB, segment_bytes=4 * MIB)
    keys = fill(store, 2)
    greedy = store.session("mail", "greedy", persistent=True).key
    for num_tokens in (2 * MIB // TOKEN_BYTES, 4 * MIB // TOKEN_BYTES):
        with pytest.raises(StoreFull):
            write(store, greedy, tokens(num_tokens))
    assert [store.stored_end(key) for key in keys] == [LARGE] * 2
    verify_all(store)
    store.close()


def test_a_budget_of_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path, disk_bytes=0)
    key = store.session("mail", "a", persistent=True).key
    with pytest.raises(StoreFull):
        write(store, key, tokens(10))
    with pytest.raises(StoreFull):
        store.set_conversation(key, "{}")
    assert not list(store.folder.glob("segment-*"))
    store.check_integrity()
    store.close()


def test_the_reserve_of_the_volume_is_kept(tmp_path: Path) -> None:
    files = FaultyFiles()
    files.free_bytes = 6 * MIB
    store = open_store(tmp_path, files=files, free_reserve_bytes=5 * MIB)
    fill(store, 1)
    assert store.snapshot().file_bytes <= 2 * MIB
    files.free_bytes = 5 * MIB
    fill(store, 1)  # what is preallocated may be used, by eviction
    assert store.snapshot().num_evicted == 1
    files.free_bytes = 4 * MIB
    key = store.session("mail", "late", persistent=True).key
    with pytest.raises(StoreFull, match=r"4\.0 MiB are free on the volume"):
        write(store, key, tokens(LARGE))
    assert store.snapshot().used_bytes == 0  # somebody needs the space more than we do
    assert not list(store.folder.glob("segment-*"))
    verify_all(store)
    store.close()


def test_a_lower_budget_is_kept_from_the_start(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, 12)
    store.close()
    assert root_bytes(tmp_path) > 6 * MIB
    store = open_store(tmp_path, disk_bytes=3 * MIB)
    assert root_bytes(tmp_path) <= 3 * MIB
    assert store.snapshot().num_records > 0
    assert len(store.sessions()) == 12
    fill(store, 4)
    assert root_bytes(tmp_path) <= 3 * MIB
    verify_all(store)
    store.close()


def test_a_long_conversation_pushes_kv_out(tmp_path: Path) -> None:
    store = open_store(tmp_path, disk_bytes=4 * MIB)
    keys = fill(store, 8)
    for index in range(8):
        store.set_conversation(keys[index % 3], "x" * 400_000)
        assert root_bytes(tmp_path) <= 4 * MIB
    assert 0 < store.snapshot().num_records < 8
    with pytest.raises(StoreFull):
        store.set_conversation(keys[0], "x" * 4_000_000)
    verify_all(store)
    store.close()
    again = open_store(tmp_path, disk_bytes=4 * MIB)
    assert [len(s.conversation or "") for s in again.sessions() if s.key in keys[:3]] == [
        400_000
    ] * 3
    again.close()


def test_kv_in_use_is_not_pushed_out(tmp_path: Path) -> None:
    store = open_store(tmp_path, disk_bytes=4 * MIB)
    keys = fill(store, 5)
    for key in keys:
        store.pin(key)
    store.set_conversation(keys[0], "x" * 100_000)
    with pytest.raises(StoreFull):
        store.set_conversation(keys[0], "x" * 2_000_000)
    assert [store.stored_end(key) for key in keys] == [LARGE] * 5
    found = store.find("mail", "s0")
    assert found is not None
    assert found.conversation == "x" * 100_000
    verify_all(store)
    store.close()


def test_freed_space_is_given_back_on_close(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = fill(store, 10)
    for key in keys[3:]:
        store.remove(key)
    before = root_bytes(tmp_path)
    store.close()
    assert root_bytes(tmp_path) < before - 2 * MIB
    again = open_store(tmp_path)
    verify_all(again)
    again.close()


@pytest.mark.slow
def test_stores_share_one_budget(tmp_path: Path) -> None:
    first = open_store(tmp_path, fingerprint="a" * 64)
    fill(first, 12)
    second = open_store(tmp_path, fingerprint="b" * 64)
    fill(second, 12)  # the first is in use, so these evict each other
    assert first.snapshot().num_records == 12
    assert 0 < second.snapshot().num_records < 12
    assert root_bytes(tmp_path) <= BUDGET
    verify_all(first)
    verify_all(second)
    first.close()
    fill(second, 6)  # now nobody uses the first, and it was used least recently
    assert not list(first.folder.glob("segment-*"))
    assert second.snapshot().num_records > 2
    verify_all(second)
    second.close()
    first = open_store(tmp_path, fingerprint="a" * 64)
    assert len(first.sessions()) == 12
    assert first.snapshot().num_records == 0
    assert first.snapshot().num_records_lost == 12
    verify_all(first)
    first.close()


def test_a_store_used_later_is_not_taken_from(tmp_path: Path) -> None:
    first = open_store(tmp_path, fingerprint="a" * 64)
    fill(first, 6)
    late_s = 60.0  # what decides for the first is a file's time, by a clock of a few ms a tick
    second = open_store(tmp_path, fingerprint="b" * 64, wall_clock_s=lambda: time.time() - late_s)
    (oldest,) = fill(second, 1)
    late_s = 0.0
    first.touch(1)
    first.close()
    while second.snapshot().num_evicted == 0:
        fill(second, 1)
    assert second.stored_end(oldest) == 0
    assert list(first.folder.glob("segment-*"))
    verify_all(second)
    second.close()


def test_a_full_volume_is_a_full_store(tmp_path: Path) -> None:
    files = FaultyFiles([Fault("allocate", 3, "ENOSPC", forever=True)])
    store = open_store(tmp_path, files=files)
    keys = fill(store, 4)
    assert store.snapshot().num_evicted > 0
    verify_all(store)
    for key in keys:
        store.pin(key)
    with pytest.raises(StoreFull):
        fill(store, 1)
    files.faults = [Fault("pwritev", files.counts["pwritev"] + 1, "ENOSPC")]
    for key in keys:
        store.unpin(key)
    with pytest.raises(StoreFull, match="no KV can be written"):
        write(store, keys[0], tokens(10))
    assert store.snapshot().num_full == 2
    verify_all(store)
    store.close()


@pytest.mark.slow
def test_the_space_is_used_again_for_ever(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for turn in range(40):
        key = store.session("mail", f"s{turn % 6}", persistent=turn % 2 == 0).key
        write(store, key, tokens(100 + 97 * turn, seed=turn))
    assert within_budget(store)
    verify_all(store)
    store.close()
