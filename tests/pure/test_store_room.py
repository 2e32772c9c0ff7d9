"""Budget and free-space reserve: counted before, evicted for, given back, never exceeded."""

import time
from pathlib import Path

import pytest
from faulty_files import Fault, FaultyFiles
from tiny_store import (
    BUDGET,
    MIB,
    TOKEN_BYTES,
    kept,
    open_store,
    record_files,
    root_bytes,
    tokens,
    verify_all,
    write,
)

from edgekv.errors import StoreFull
from edgekv.store import Store
from edgekv.store.index import Index
from edgekv.store.record import taken_bytes

LARGE = 1900  # tokens: 475 KiB, an extent of 512 KiB


def fill(store: Store, num_sessions: int) -> list[int]:
    """Write new persistent sessions one after the other; their keys."""
    first = len(store.sessions())
    seeds = range(first, first + num_sessions)
    return [kept(store, "mail", f"s{seed}", tokens(LARGE, seed)).key for seed in seeds]


def files_bytes(store: Store) -> int:
    return sum(taken_bytes(path.stat().st_size) for path in record_files(store))


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


def test_one_that_was_just_used_stays(tmp_path: Path) -> None:
    """A session that comes back is touched first; its records are read one after the other."""
    store = open_store(tmp_path)
    keys = fill(store, 5)
    for key in keys:
        store.touch(key)
    fill(store, 8)
    store.touch(keys[0])
    fill(store, 6)
    assert [store.stored_end(key) for key in keys] == [LARGE, 0, 0, 0, 0]
    verify_all(store)
    store.close()


def test_what_can_never_fit_evicts_nobody(tmp_path: Path) -> None:
    store = open_store(tmp_path, disk_bytes=2 * MIB)
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
    assert not record_files(store)
    store.check_integrity()
    store.close()


def test_the_reserve_of_the_volume_is_kept(tmp_path: Path) -> None:
    files = FaultyFiles()
    files.free_bytes = 6 * MIB
    store = open_store(tmp_path, files=files, free_reserve_bytes=5 * MIB)
    fill(store, 1)
    files.free_bytes = 5 * MIB + 100_000
    (key,) = fill(store, 1)  # in place of the other
    assert store.snapshot().num_evicted == store.snapshot().num_records == 1
    files.free_bytes = 4 * MIB
    with pytest.raises(StoreFull, match=r"4\.0 MiB are free on the volume"):
        fill(store, 1)
    assert store.snapshot().used_bytes == 0  # somebody needs the space more than we do
    assert not record_files(store)
    store.set_conversation(key, "what was said is small, and is kept")
    verify_all(store)
    store.close()


def test_what_is_being_written_counts_as_written(tmp_path: Path) -> None:
    files = FaultyFiles()
    files.free_bytes = 6 * MIB
    store = open_store(tmp_path, files=files, free_reserve_bytes=5 * MIB)
    first, second = (store.session("mail", name, persistent=True).key for name in "ab")

    def write_other(*_: object, **__: object) -> int:
        files.open = open_file  # type: ignore[method-assign]
        with pytest.raises(StoreFull):
            write(store, second, tokens(3000))
        return open_file(*_, **__)  # type: ignore[arg-type]

    open_file, files.open = files.open, write_other  # type: ignore[method-assign]
    write(store, first, tokens(3000))
    verify_all(store)
    store.close()


def test_a_lower_budget_is_kept_from_the_start(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, 12)
    store.close()
    assert root_bytes(tmp_path) > 5 * MIB
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


def test_text_pushes_all_kv_out_before_it_is_refused(tmp_path: Path) -> None:
    """KV can be computed again; what was said cannot."""
    store = open_store(tmp_path, disk_bytes=4 * MIB)
    keys = fill(store, 5)
    with pytest.raises(StoreFull, match="are taken in") as caught:
        store.set_conversation(keys[0], "x" * 4_000_000)
    assert "disk_bytes" in caught.value.hint
    store.set_conversation(keys[0], "x" * 1_700_000)
    assert root_bytes(tmp_path) <= 4 * MIB
    assert [store.stored_end(key) for key in keys] == [0] * 5
    found = store.find("mail", "s0")
    assert found is not None
    assert found.conversation == "x" * 1_700_000
    verify_all(store)
    store.close()


def test_text_is_kept_on_a_volume_without_room_for_kv(tmp_path: Path) -> None:
    files = FaultyFiles()
    files.free_bytes = 100 * MIB
    store = open_store(tmp_path, files=files, free_reserve_bytes=4 << 30)
    key = store.session("mail", "a", persistent=True).key
    with pytest.raises(StoreFull):
        write(store, key, tokens(10))
    store.set_conversation(key, '"said"')
    store.close()
    with open_store(tmp_path) as again:
        (session,) = again.sessions()
        assert (session.conversation, session.num_tokens) == ('"said"', 0)


def test_kv_makes_room_for_text_on_a_full_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    keys = fill(store, 4)
    apply, num_refused = Index.apply, 0

    def full(self: Index, *args: object, **options: object) -> None:
        nonlocal num_refused
        if len(record_files(store)) > 2:
            num_refused += 1
            raise StoreFull("the volume is full")
        apply(self, *args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Index, "apply", full)
        store.set_conversation(keys[3], "short")
    assert num_refused > 1
    found = store.find("mail", "s3")
    assert found is not None
    assert (found.conversation, found.num_tokens) == ("short", LARGE)
    verify_all(store)
    store.close()


def test_freed_space_is_given_back_at_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = fill(store, 10)
    before = root_bytes(tmp_path)
    for key in keys[3:]:
        store.remove(key)
    assert root_bytes(tmp_path) < before - 3 * MIB
    store.truncate(keys[0], 0)  # memory alone: with the next commit
    assert len(record_files(store)) == 3
    store.flush()
    assert len(record_files(store)) == 2
    store.forget(keys[1])
    assert len(record_files(store)) == 2
    store.close()
    assert len(record_files(store)) == 1
    again = open_store(tmp_path)
    verify_all(again)
    again.close()


def test_a_file_that_cannot_be_removed_still_counts(tmp_path: Path) -> None:
    files = FaultyFiles()
    store = open_store(tmp_path, files=files)
    keys = fill(store, 3)
    files.faults = [Fault("unlink", files.counts["unlink"] + 1, "EIO")]
    store.remove(keys[0])
    assert store.snapshot().num_records == 2
    assert store.snapshot().used_bytes == files_bytes(store)
    assert len(record_files(store)) == 3
    store.check_integrity()
    store.flush()
    assert len(record_files(store)) == 2
    assert store.snapshot().used_bytes == files_bytes(store)
    verify_all(store)
    store.close()


@pytest.mark.slow
def test_stores_share_one_budget(tmp_path: Path) -> None:
    first = open_store(tmp_path, fingerprint="a" * 64)
    fill(first, 10)
    second = open_store(tmp_path, fingerprint="b" * 64)
    fill(second, 12)  # the first is in use, so these evict each other
    assert first.snapshot().num_records == 10
    assert 0 < second.snapshot().num_records < 12
    assert root_bytes(tmp_path) <= BUDGET
    verify_all(first)
    verify_all(second)
    first.close()
    fill(second, 6)  # now nobody uses the first, and it was used least recently
    assert not record_files(first)
    assert second.snapshot().num_records > 2
    verify_all(second)
    second.close()
    first = open_store(tmp_path, fingerprint="a" * 64)
    assert len(first.sessions()) == 10
    assert first.snapshot().num_records == 0
    assert first.snapshot().num_records_lost == 10
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
    assert record_files(first)
    verify_all(second)
    second.close()


@pytest.mark.parametrize("call", ["open", "pwritev", "close"])
def test_a_full_volume_is_a_full_store(tmp_path: Path, call: str) -> None:
    files = FaultyFiles()
    store = open_store(tmp_path, files=files)
    keys = fill(store, 4)
    files.faults = [Fault(call, files.counts[call] + 1, "ENOSPC")]
    with pytest.raises(StoreFull, match="no KV can be written"):
        write(store, keys[0], tokens(10))
    assert store.snapshot().num_full == 1
    assert len(record_files(store)) == 3
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
