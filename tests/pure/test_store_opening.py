"""Opening what is damaged, half missing, too new, foreign or not ours."""

import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_files import Fault, FaultyFiles
from tiny_store import (
    FINGERPRINT,
    kept,
    layers_of,
    open_store,
    record_files,
    tokens,
    verify_all,
    write,
)

from edgekv.errors import StoreUnusable
from edgekv.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with three sessions, a conversation and three record files, closed."""
    store = open_store(tmp_path)
    for seed in range(3):
        key = kept(store, "mail", f"s{seed}", tokens(3000, seed)).key
    store.set_conversation(key, '"said"')
    store.close()
    assert len(record_files(store)) == 3
    return store.folder


def index(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(folder / "index.sqlite", isolation_level=None)


def works(store: Store) -> None:
    """Assert that a store that was opened can be used."""
    verify_all(store)
    key = kept(store, "mail", "after", tokens(300)).key
    verify_all(store)
    store.remove(key)
    store.check_integrity()
    store.close()


def test_index_deleted_files_stay(tmp_path: Path, folder: Path) -> None:
    (folder / "index.sqlite").unlink()
    store = open_store(tmp_path)
    assert store.sessions() == []
    assert store.snapshot().num_index_lost == 1
    assert store.snapshot().used_bytes == 0
    assert record_files(store) == []
    works(store)


def test_files_deleted_index_stays(tmp_path: Path, folder: Path) -> None:
    shutil.rmtree(folder / "kv")
    store = open_store(tmp_path)
    assert [(s.name, s.num_tokens) for s in store.sessions()] == [("s2", 0), ("s1", 0), ("s0", 0)]
    assert store.sessions()[0].conversation == '"said"'
    assert store.snapshot().num_records_lost == 3
    works(store)


@pytest.mark.parametrize("missing", range(3))
def test_one_file_deleted(tmp_path: Path, folder: Path, missing: int) -> None:
    sorted((folder / "kv").iterdir())[missing].unlink()
    store = open_store(tmp_path)
    assert sorted(s.num_tokens for s in store.sessions()) == [0, 3000, 3000]
    assert store.snapshot().num_records_lost == 1
    works(store)


@pytest.mark.parametrize("num_bytes", [0, 100_001])
def test_a_file_cut_short(tmp_path: Path, folder: Path, num_bytes: int) -> None:
    os.truncate(next((folder / "kv").iterdir()), num_bytes)
    store = open_store(tmp_path)
    assert store.snapshot().num_records_lost == 1
    assert len(record_files(store)) == 2
    works(store)


def test_files_that_nobody_has_are_removed(tmp_path: Path, folder: Path) -> None:
    for name in ("00000000000000ff.kv", "00000000000000fe.tmp", "segment.kv", "note"):
        (folder / "kv" / name).write_bytes(b"half a record")
    store = open_store(tmp_path)
    assert len(record_files(store)) == len(list((folder / "kv").iterdir())) == 3
    assert store.snapshot().num_records_lost == 0
    works(store)


def test_a_leftover_that_cannot_be_removed_costs_a_write(tmp_path: Path, folder: Path) -> None:
    left = folder / "kv" / "0000000000000004.kv"  # of a process that was killed as it wrote
    left.write_bytes(b"half a record")
    files = FaultyFiles([Fault("unlink", 1, "EIO", forever=True)])
    store = open_store(tmp_path, files=files)
    key = store.session("mail", "s0", persistent=True).key
    with pytest.raises(FileExistsError):
        write(store, key, tokens(3100), start=3000)
    assert left.read_bytes() == b"half a record"
    write(store, key, tokens(3100), start=3000)
    verify_all(store)
    files.faults = []
    store.flush()
    assert not left.exists()
    assert len(record_files(store)) == 4
    works(store)


def test_a_link_is_not_followed(tmp_path: Path, folder: Path) -> None:
    path = next((folder / "kv").iterdir())
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    store = open_store(tmp_path)
    assert store.snapshot().num_records_lost == 1
    assert (tmp_path / "elsewhere").exists()
    assert not path.exists()
    works(store)


def test_only_the_log_is_left_of_the_index(tmp_path: Path, folder: Path) -> None:
    """As if somebody had removed the database beside a killed process's log."""
    with_log = tmp_path / "copy"
    store = open_store(tmp_path)
    kept(store, "mail", "in the log", tokens(10))
    shutil.copytree(tmp_path, with_log)
    store.close()
    (with_log / folder.name / "index.sqlite").unlink()
    assert (with_log / folder.name / "index.sqlite-wal").stat().st_size > 0
    store = open_store(with_log)
    assert store.sessions() == []
    works(store)


@pytest.mark.parametrize("junk", [b"", b"junk", b"\0" * 8192, os.urandom(40_000)])
def test_an_index_that_is_none(tmp_path: Path, folder: Path, junk: bytes) -> None:
    (folder / "index.sqlite").write_bytes(junk)
    store = open_store(tmp_path)
    assert store.sessions() == []
    assert store.snapshot().used_bytes == 0
    assert store.snapshot().num_index_lost == 1
    # An empty file is what a process killed while it makes an index leaves.
    assert (folder / "index.damaged.sqlite").exists() == bool(junk)
    works(store)


def test_a_damaged_page(tmp_path: Path, folder: Path) -> None:
    path = folder / "index.sqlite"
    content = bytearray(path.read_bytes())
    for page in range(1, len(content) // 4096):
        content[page * 4096 : page * 4096 + 64] = os.urandom(64)
    path.write_bytes(content)
    store = open_store(tmp_path)
    assert store.snapshot().num_index_lost == 1
    works(store)
    assert not [*folder.glob("*damaged*-wal")]


def test_an_index_of_something_else(tmp_path: Path, folder: Path) -> None:
    (folder / "index.sqlite").unlink()
    with sqlite3.connect(folder / "index.sqlite") as other:
        other.execute("CREATE TABLE cookies(a)")
    other.close()
    store = open_store(tmp_path)
    assert store.snapshot().num_index_lost == 1
    works(store)


BORDER = (1 << 63) - 1
BAD_ROWS = {
    "another's": "UPDATE records SET record_id = record_id + 100",
    "negative": "UPDATE records SET record_id = -record_id",
    "text": "UPDATE records SET start = 'zero'",
    "blob": "UPDATE records SET payload_bytes = x'00'",
    "null-ish": "UPDATE records SET tokens_xxh3 = 0",
    "short ids": "UPDATE records SET token_ids = x'01020304'",
    "range": 'UPDATE records SET "end" = start',
    "odd payload": "UPDATE records SET payload_bytes = payload_bytes - 1",
    "huge": "UPDATE records SET record_id = record_id + (1 << 62)",
    "border": f"UPDATE records SET record_id = {BORDER} WHERE record_id = 2",
    "border of a range": f'UPDATE records SET start = {BORDER} - 3000, "end" = {BORDER}',
    "links": "DELETE FROM links",
    "records": "DELETE FROM records",
    "use_end": "UPDATE links SET use_end = 1 << 40",
    "border of a link": f"UPDATE links SET use_end = {BORDER}",
    "dangling": "UPDATE links SET record_id = 77",
    "link text": "UPDATE links SET record_id = 'x'",
    "sessions": "DELETE FROM sessions",
    "session key": f"UPDATE sessions SET session_key = {BORDER} WHERE name = 's1'",
    "session key below": f"UPDATE sessions SET session_key = -{BORDER} WHERE name = 's1'",
    "name": "UPDATE sessions SET name = x'ff' WHERE name = 's1'",
    "not utf-8": "UPDATE sessions SET name = CAST(x'ff' AS TEXT) WHERE name = 's1'",
    "time": "UPDATE sessions SET used_s = 'yesterday'",
    "no end": "UPDATE sessions SET used_s = 9e999",
    "far": "UPDATE sessions SET created_s = 1e300, used_s = -1e300",
    "no layers": "DELETE FROM meta WHERE name = 'layers'",
    "layers": "UPDATE meta SET value = '[[1,2,3]]' WHERE name = 'layers'",
    "layers of nothing": "UPDATE meta SET value = '[]' WHERE name = 'layers'",
    "layers a number": "UPDATE meta SET value = 3 WHERE name = 'layers'",
    "layers deep": f"UPDATE meta SET value = '{'[' * 100_000}' WHERE name = 'layers'",
    "no meta": "DELETE FROM meta",
    "no column": "ALTER TABLE records DROP COLUMN token_ids",
    "no table": "DROP TABLE links",
    "wear": "UPDATE meta SET value = 'much' WHERE name = 'kv_written_bytes'",
    "much wear": f"UPDATE meta SET value = {BORDER} WHERE name = 'kv_written_bytes'",
}


@pytest.mark.parametrize("statement", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_rows_that_make_no_sense(tmp_path: Path, folder: Path, statement: str) -> None:
    connection = index(folder)
    connection.execute(statement)
    connection.close()
    store = open_store(tmp_path)
    works(store)
    again = open_store(tmp_path)  # what was found once is not found again
    assert again.snapshot().num_records_lost == again.snapshot().num_index_lost == 0
    works(again)


@pytest.mark.parametrize("statement", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_whoever_only_looks_is_told(tmp_path: Path, folder: Path, statement: str) -> None:
    """`sessions list` and `sessions rm`: a view that says its damage, or one that can be used."""
    connection = index(folder)
    connection.execute(statement)
    connection.close()
    (view,) = Store.open_readonly(tmp_path)
    for session in view.sessions:
        time.gmtime(session.used_s)
        time.gmtime(session.created_s)
    with contextlib.suppress(StoreUnusable), Store.reopen(view) as store:
        for session in store.sessions():
            store.remove(session.key)
    works(open_store(tmp_path))


@pytest.mark.parametrize(
    "value", ["'x'", "7", "x'00'", "NULL", "''", "'0123456789abcdef0123456789abcdefé'"]
)
def test_a_fingerprint_that_makes_no_sense(tmp_path: Path, folder: Path, value: str) -> None:
    connection = index(folder)
    connection.execute(f"UPDATE meta SET value = {value} WHERE name = 'fingerprint'")
    connection.close()
    with pytest.raises(StoreUnusable):
        Store.reopen(Store.open_readonly(tmp_path)[0])
    if value == "'x'":  # it might be another store's
        return
    store = open_store(tmp_path)
    assert [session.conversation for session in store.sessions()] == ['"said"']
    works(store)


def test_who_goes_to_another_folder_has_the_store_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store(Path("kv"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    works(store)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_newer_version_is_not_touched(tmp_path: Path, folder: Path) -> None:
    connection = index(folder)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    before = {path: path.read_bytes() for path in folder.glob("kv/*")}
    assert before
    with pytest.raises(StoreUnusable, match="version 7, this edgekv reads 2") as caught:
        open_store(tmp_path)
    assert "update" in caught.value.hint
    assert {path: path.read_bytes() for path in folder.glob("kv/*")} == before
    (view,) = Store.open_readonly(tmp_path)
    assert "version 7" in view.damage
    with pytest.raises(StoreUnusable):
        Store.reopen(view)


@pytest.mark.parametrize(
    "options", [{"fingerprint": FINGERPRINT[:32] + "f" * 32}, {"layers": layers_of(512)}]
)
def test_a_store_of_other_kv(tmp_path: Path, folder: Path, options: dict[str, object]) -> None:
    with pytest.raises(StoreUnusable, match="another model"):
        open_store(tmp_path, **options)
    works(open_store(tmp_path))


def test_a_folder_that_was_renamed(tmp_path: Path, folder: Path) -> None:
    folder.rename(tmp_path / ("f" * 32))
    with pytest.raises(StoreUnusable, match="another model"):
        open_store(tmp_path, fingerprint="f" * 64)
    (view,) = Store.open_readonly(tmp_path)
    with pytest.raises(StoreUnusable, match="does not have the name"):
        Store.reopen(view)


def test_a_model_may_be_called_something_else(tmp_path: Path, folder: Path) -> None:
    store = open_store(tmp_path, model="renamed")
    assert len(store.sessions()) == 3
    works(store)
    (view,) = Store.open_readonly(tmp_path)
    assert view.model == "renamed"


def _file_as_root(root: Path) -> None:
    root.write_text("no folder")


def _file_as_folder(root: Path) -> None:
    root.mkdir()
    (root / FINGERPRINT[:32]).write_text("no folder")


def _link_as_folder(root: Path) -> None:
    root.mkdir()
    (root / "elsewhere").mkdir()
    (root / FINGERPRINT[:32]).symlink_to(root / "elsewhere")


def _link_as_lock(root: Path) -> None:
    (root / FINGERPRINT[:32]).mkdir(parents=True)
    (root / FINGERPRINT[:32] / "lock").symlink_to(root / "elsewhere")


def _link_as_index(root: Path) -> None:
    (root / FINGERPRINT[:32]).mkdir(parents=True)
    (root / FINGERPRINT[:32] / "index.sqlite").symlink_to(root / "elsewhere")


def _folder_as_index(root: Path) -> None:
    (root / FINGERPRINT[:32] / "index.sqlite").mkdir(parents=True)


def _link_as_kv(root: Path) -> None:
    (root / FINGERPRINT[:32]).mkdir(parents=True)
    (root / "elsewhere").mkdir()
    (root / FINGERPRINT[:32] / "kv").symlink_to(root / "elsewhere")


def _file_as_kv(root: Path) -> None:
    (root / FINGERPRINT[:32]).mkdir(parents=True)
    (root / FINGERPRINT[:32] / "kv").write_text("no folder")


def _folder_as_segment(root: Path) -> None:
    (root / FINGERPRINT[:32] / "segment-0000.kv").mkdir(parents=True)


@pytest.mark.parametrize(
    "prepare",
    [
        _file_as_root,
        _file_as_folder,
        _link_as_folder,
        _link_as_lock,
        _link_as_index,
        _folder_as_index,
        _link_as_kv,
        _file_as_kv,
        _folder_as_segment,
    ],
)
def test_a_place_that_is_no_store(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    prepare(tmp_path / "kv")
    with pytest.raises(StoreUnusable) as caught:
        open_store(tmp_path / "kv")
    assert caught.value.hint
    assert not (tmp_path / "kv" / "elsewhere").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path, folder: Path) -> None:
    for path in (folder, tmp_path):
        path.chmod(0o500)
        with pytest.raises(StoreUnusable, match="Permission denied"):
            open_store(path / "kv" if path is tmp_path else tmp_path)
        path.chmod(0o700)


def test_a_system_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a read-only volume does, which root cannot make of a folder."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreUnusable, match="Read-only file system"):
        open_store(tmp_path)


def test_a_volume_that_cannot_be_asked(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(StoreUnusable, match="injected"):
        open_store(tmp_path, files=FaultyFiles([Fault("volume_free_bytes", 1, "EIO")]))
    works(open_store(tmp_path))


def test_what_is_not_kept_is_said(tmp_path: Path, folder: Path) -> None:
    (folder / "index.sqlite").write_bytes(b"junk" * 5000)
    (view,) = Store.open_readonly(tmp_path)
    assert view.sessions == ()
    assert view.damage
    with pytest.raises(StoreUnusable):
        Store.reopen(view)
    (folder / "index.sqlite").write_bytes(b"")  # somebody is about to make it
    (view,) = Store.open_readonly(tmp_path)
    assert (view.sessions, view.damage, view.model) == ((), "", "")
    with pytest.raises(StoreUnusable):
        Store.reopen(view)
    (tmp_path / "file").write_text("not a store")
    (tmp_path / "other").mkdir()
    assert len(Store.open_readonly(tmp_path)) == 1
    with pytest.raises(StoreUnusable):
        Store.open_readonly(tmp_path / "file")


def test_leftovers_of_sessions_that_did_not_persist(tmp_path: Path) -> None:
    """What a killed process had open in memory alone is free space to the next one."""
    copy = tmp_path / "copy"
    store = open_store(tmp_path / "kv")
    kept(store, "mail", "named", tokens(100))
    write(store, store.session("mail", "unnamed", persistent=False).key, tokens(100, seed=1))
    shutil.copytree(tmp_path / "kv", copy)
    store.close()
    again = open_store(copy)
    assert [s.name for s in again.sessions()] == ["named"]
    assert again.snapshot().num_records == 1
    assert len(record_files(again)) == 1
    works(again)
