"""The façade: what is written is read, cut, shared, restarted."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_store import (
    TOKEN_BYTES,
    kept,
    kv_of,
    open_store,
    read,
    record_files,
    tokens,
    verify,
    verify_all,
    write,
)

from edgekv.errors import ConfigError, RecordCorrupt, StoreBusy, StoreStale, StoreUnusable
from edgekv.store import Store
from edgekv.store.disk_io import OS_FILES, Buffer, Files


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ids = tokens(100)
    key = store.session("mail", "inbox", persistent=True).key
    assert store.stored_end(key) == 0
    first = write(store, key, ids[:60])
    second = write(store, key, ids, start=60)
    assert (first.start, first.end, second.start, second.end) == (0, 60, 60, 100)
    assert read(store, second) == kv_of(ids, 60)
    found = store.find("mail", "inbox")
    assert found is not None
    assert list(found.token_ids) == ids
    assert found.records == (first, second)
    assert found.payload_bytes == 100 * TOKEN_BYTES
    assert store.lookup(key) == found
    assert store.lookup(key + 1) is None
    verify_all(store)
    store.close()


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    kept(store, "mail", "inbox", tokens(200))
    before = kept(store, "notes", "a", tokens(50, seed=1))
    store.set_conversation(before.key, '{"said": "hello"}')
    store.close()
    store.close()
    again = open_store(tmp_path)
    after = again.find("notes", "a")
    assert after is not None
    assert after.conversation == '{"said": "hello"}'
    assert (after.key, after.token_ids, after.records) == (
        before.key,
        before.token_ids,
        before.records,
    )
    assert [s.name for s in again.sessions()] == ["a", "inbox"]
    assert again.snapshot().num_index_lost == again.snapshot().num_records_lost == 0
    verify_all(again)
    again.close()


def test_what_does_not_persist_dies_with_the_process(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    key = store.session("mail", "unnamed-1", persistent=False).key
    write(store, key, tokens(100))
    store.set_conversation(key, "nobody will ask for it")
    verify_all(store)
    store.close()
    again = open_store(tmp_path)
    assert again.sessions() == []
    assert again.snapshot().used_bytes == 0
    assert again.snapshot().num_records_lost == 0
    again.close()


def test_a_session_can_become_persistent(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    key = store.session("mail", "draft", persistent=False).key
    write(store, key, tokens(100))
    assert store.session("mail", "draft", persistent=True).key == key
    assert store.session("mail", "draft", persistent=False).persistent
    store.close()
    again = open_store(tmp_path)
    assert [s.num_tokens for s in again.sessions()] == [100]
    verify_all(again)
    again.close()


@pytest.mark.parametrize("cut", [0, 1, 59, 60, 61, 99, 100, 500])
def test_truncating_keeps_the_prefix(tmp_path: Path, cut: int) -> None:
    store = open_store(tmp_path)
    ids = tokens(100)
    key = store.session("mail", "inbox", persistent=True).key
    write(store, key, ids[:60])
    write(store, key, ids, start=60)
    store.truncate(key, cut)
    assert store.stored_end(key) == min(cut, 100)
    verify_all(store)
    store.close()
    again = open_store(tmp_path)
    assert again.stored_end(key) == min(cut, 100)
    verify_all(again)
    edited = ids[:cut] + tokens(30, seed=9)
    write(again, key, edited, start=min(cut, 100))
    verify_all(again)
    again.close()


def test_writing_before_the_end_forgets_the_rest(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    session = kept(store, "mail", "inbox", tokens(100))
    edited = [*session.token_ids[:40], *tokens(20, seed=3)]
    write(store, session.key, edited, start=40)
    after = store.find("mail", "inbox")
    assert after is not None
    assert list(after.token_ids) == edited
    assert [(r.start, r.use_end, r.end) for r in after.records] == [(0, 40, 100), (40, 60, 60)]
    verify_all(store)
    store.close()


def test_a_prefix_is_stored_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    system = tokens(150)
    donor = kept(store, "mail", "a", system + tokens(30, seed=1))
    used_bytes = store.snapshot().used_bytes
    key = store.session("mail", "b", persistent=True).key
    prompt = system + tokens(40, seed=2)
    assert store.match("mail", prompt, but_not=key) == (donor.key, 150)
    assert store.adopt(key, donor.key, 150) == 150
    assert store.snapshot().used_bytes == used_bytes
    assert store.snapshot().num_tokens == 180
    verify_all(store)
    store.remove(donor.key)
    assert store.snapshot().used_bytes == used_bytes
    write(store, key, prompt, start=150)
    verify_all(store)
    store.close()
    again = open_store(tmp_path)
    verify_all(again)
    again.remove(key)
    assert again.snapshot().used_bytes == 0
    again.close()


def test_adopting_never_shortens(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ids = tokens(100)
    donor = kept(store, "mail", "a", ids)
    session = kept(store, "mail", "b", ids[:80])
    assert store.adopt(session.key, donor.key, 70) == 80
    assert store.adopt(session.key, 999, 70) == 80
    assert store.adopt(999, donor.key, 70) == 0
    assert store.adopt(session.key, donor.key, 100) == 100
    assert store.snapshot().num_records == 1
    verify_all(store)
    store.close()


def test_a_persistent_session_keeps_what_it_adopted_from_one_that_is_not(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    donor = store.session("mail", "unnamed", persistent=False).key
    write(store, donor, tokens(100))
    key = store.session("mail", "named", persistent=True).key
    store.adopt(key, donor, 90)
    store.close()
    again = open_store(tmp_path)
    assert again.stored_end(key) == 90
    verify_all(again)
    again.close()


def test_nothing_is_shared_between_apps(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ids = tokens(100)
    kept(store, "mail", "a", ids)
    assert store.match("notes", ids) == (0, 0)
    assert store.find("notes", "a") is None
    assert store.match("mail", []) == (0, 0)
    store.close()


def test_wear_counts_new_kv_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ids = tokens(100)
    key = store.session("mail", "a", persistent=True).key
    write(store, key, ids)
    write(store, key, ids)
    write(store, key, ids + tokens(20, seed=1))
    figures = store.snapshot()
    assert figures.num_writes == 3
    assert figures.kv_written_bytes == 120 * TOKEN_BYTES
    assert figures.written_bytes == 320 * TOKEN_BYTES + 3 * 4096
    store.close()
    again = open_store(tmp_path)
    assert again.snapshot().written_bytes == 0
    assert again.snapshot().total_written_bytes == figures.written_bytes
    assert again.snapshot().total_kv_written_bytes == figures.kv_written_bytes
    again.close()


def test_calls_are_counted(tmp_path: Path) -> None:
    class OneBufferACall(Files):
        def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
            return super().pwritev(fd, buffers[:1], offset)

    ids, kv = tokens(10), kv_of(tokens(10))
    pieces = [kv[at : at + 16] for at in range(0, len(kv), 16)]
    for name, files, num_calls in (("a", OS_FILES, 1), ("b", OneBufferACall(), len(pieces) + 1)):
        store = open_store(tmp_path / name, files=files)
        key = store.session("mail", "a", persistent=False).key
        ref = store.write(key, 0, ids, pieces)
        assert store.snapshot().num_write_calls == num_calls
        store.write(key, 0, ids, pieces)
        with pytest.raises(StoreStale):
            read(store, ref)
        found = store.find("mail", "a")
        assert found is not None
        assert read(store, found.records[0]) == kv
        assert store.snapshot().num_reads == store.snapshot().num_read_calls == 1
        assert store.snapshot().num_stale == 1
        store.close()


def test_a_write_that_leaves_a_gap_is_stale(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    session = kept(store, "mail", "a", tokens(50))
    with pytest.raises(StoreStale, match="50 tokens"):
        write(store, session.key, tokens(100), start=60)
    with pytest.raises(StoreStale, match="gone"):
        write(store, 999, tokens(10))
    store.remove(session.key)
    store.remove(session.key)
    with pytest.raises(StoreStale):
        read(store, session.records[0])
    with pytest.raises(StoreStale):
        store.set_conversation(session.key, "late")
    store.truncate(session.key, 0)
    store.touch(session.key)
    store.quarantine(session.key, 0)
    store.check_integrity()
    store.close()


def test_a_damaged_record_is_refused_and_quarantined_everywhere(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ids = tokens(100)
    a = kept(store, "mail", "a", ids[:60])
    write(store, a.key, ids, start=60)
    b = store.session("mail", "b", persistent=True).key
    store.adopt(b, a.key, 100)
    bad = store.sessions()[0].records[1]
    with record_files(store)[1].open("r+b") as file:
        file.seek(4096 + 77)
        (old,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([old ^ 4]))
    with pytest.raises(RecordCorrupt, match="checksum"):
        read(store, bad)
    store.quarantine(b, bad.start)
    assert store.stored_end(a.key) == store.stored_end(b) == 60
    assert store.snapshot().num_corrupt == 1
    verify_all(store)
    store.close()


def test_names_are_checked(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for app, name in [("", "x"), ("x", ""), ("x" * 1025, "x"), ("x", "\ud800"), ("x", 3)]:
        with pytest.raises(ConfigError):
            store.session(app, name, persistent=True)  # type: ignore[arg-type]
    kept(store, "mail 'quoted' 日本", "\0\n--", tokens(10))
    store.close()
    again = open_store(tmp_path)
    assert again.find("mail 'quoted' 日本", "\0\n--") is not None
    again.close()


def test_used_sessions_come_first(tmp_path: Path) -> None:
    clock = iter([9.0, 100.0, 100.0, 100.0, 50.0, 100.0, 100.0, 100.0])
    store = open_store(tmp_path, wall_clock_s=lambda: next(clock))
    keys = [store.session("mail", name, persistent=True).key for name in "abc"]
    store.touch(keys[0])  # the clock was put back meanwhile
    assert [s.name for s in store.sessions()] == ["a", "c", "b"]
    store.close()


def test_a_store_has_one_owner(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(StoreBusy, match="in use by process") as caught:
        open_store(tmp_path)
    assert "store folder" in caught.value.hint
    store.close()
    open_store(tmp_path).close()


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    session = kept(store, "mail", "a", tokens(10))
    store.close()
    for call in (
        lambda: write(store, session.key, tokens(20)),
        lambda: read(store, session.records[0]),
        lambda: store.set_conversation(session.key, "x"),
    ):
        with pytest.raises(StoreUnusable, match="closed"):
            call()


def test_a_process_that_was_forked_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    key = kept(store, "mail", "a", tokens(10)).key
    store.session("mail", "unnamed", persistent=False)
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        for call in (
            store.sessions,
            store.flush,
            lambda: store.find("mail", "a"),
            lambda: write(store, key, tokens(20), start=10),
            lambda: store.set_conversation(key, '"the child\'s"'),
            lambda: store.remove(key),
        ):
            with pytest.raises(StoreUnusable, match="forked"):
                call()
        store.close()
    assert len(store.sessions()) == 2
    write(store, key, tokens(20), start=10)
    verify_all(store)
    store.close()


def test_files_are_private(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "kv"
    store = open_store(root)
    kept(store, "mail", "a", tokens(10))
    paths = [root, *root.rglob("*")]
    assert len(paths) > 5
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    store.close()


def test_stores_can_be_looked_at_meanwhile(tmp_path: Path) -> None:
    assert Store.open_readonly(tmp_path / "nothing") == []
    store = open_store(tmp_path)
    kept(store, "mail", "a", tokens(10))
    latest = kept(store, "mail", "b", tokens(20, seed=1))
    store.set_conversation(latest.key, "[]")
    (view,) = Store.open_readonly(tmp_path)
    assert (view.model, view.in_use, view.damage) == ("tiny", True, "")
    assert view.token_bytes == TOKEN_BYTES
    assert view.file_bytes == store.snapshot().root_bytes or view.file_bytes > 0
    assert view.sessions == tuple(store.sessions())
    with pytest.raises(StoreBusy):
        Store.reopen(view)
    store.close()
    (view,) = Store.open_readonly(tmp_path)
    assert not view.in_use
    assert [s.name for s in view.sessions] == ["b", "a"]


def test_a_store_can_be_reopened_without_its_model(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    kept(store, "mail", "a", tokens(500))
    kept(store, "mail", "b", tokens(500, seed=1))
    store.close()
    (view,) = Store.open_readonly(tmp_path)
    with Store.reopen(view) as again:
        again.remove(view.sessions[0].key)
    (after,) = Store.open_readonly(tmp_path)
    assert [s.name for s in after.sessions] == ["a"]
    assert after.file_bytes < view.file_bytes
    store = open_store(tmp_path)
    (session,) = store.sessions()
    verify(store, session)
    store.close()


def test_a_closed_store_says_so_to_whoever_looks(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    key = kept(store, "mail", "a", tokens(10)).key
    store.close()
    for look in (
        store.sessions,
        store.flush,
        lambda: store.find("mail", "a"),
        lambda: store.session("mail", "a", persistent=True),
        lambda: store.session("mail", "new", persistent=True),
        lambda: store.remove(key),
    ):
        with pytest.raises(StoreUnusable, match="closed"):
            look()
