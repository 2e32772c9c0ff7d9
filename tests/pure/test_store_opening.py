"""Opening what is damaged, half missing, too new, foreign or not ours."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_files import Fault, FaultyFiles
from tiny_store import FINGERPRINT, kept, open_store, tokens, verify_all, write

from edgekv.errors import StoreUnusable
from edgekv.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with three sessions, a conversation and 3 segment files, closed."""
    store = open_store(tmp_path)
    for seed in range(3):
        key = kept(store, "mail", f"s{seed}", tokens(3000, seed)).key
    store.set_conversation(key, '"said"')
    store.close()
    assert len([*store.folder.glob("segment-*")]) == 3
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


def test_index_deleted_segments_stay(tmp_path: Path, folder: Path) -> None:
    (folder / "index.sqlite").unlink()
    store = open_store(tmp_path)
    assert store.sessions() == []
    assert store.snapshot().num_index_lost == 1
    assert store.snapshot().used_bytes == 0
    works(store)


def test_segments_deleted_index_stays(tmp_path: Path, folder: Path) -> None:
    for path in folder.glob("segment-*"):
        path.unlink()
    store = open_store(tmp_path)
    assert [(s.name, s.num_tokens) for s in store.sessions()] == [("s2", 0), ("s1", 0), ("s0", 0)]
    assert store.sessions()[0].conversation == '"said"'
    assert store.snapshot().num_records_lost == 3
    works(store)


@pytest.mark.parametrize("missing", range(3))
def test_one_segment_deleted(tmp_path: Path, folder: Path, missing: int) -> None:
    (folder / f"segment-{missing:04}.kv").unlink()
    store = open_store(tmp_path)
    assert len(store.sessions()) == 3
    assert store.snapshot().num_records_lost == 3 - missing
    works(store)


def test_a_segment_cut_short(tmp_path: Path, folder: Path) -> None:
    os.truncate(folder / "segment-0002.kv", 100_001)
    store = open_store(tmp_path)
    assert store.snapshot().num_records_lost == 1
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
    # An empty file is what a process killed while it makes an index leaves.
    assert store.snapshot().num_index_lost == int(bool(junk))
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


BAD_ROWS = {
    "overlap": 'UPDATE records SET "offset" = (SELECT min("offset") FROM records)',
    "outside": 'UPDATE records SET "offset" = "offset" + (1 << 40)',
    "negative": 'UPDATE records SET "offset" = -65536',
    "odd": 'UPDATE records SET "offset" = "offset" + 1',
    "text": "UPDATE records SET start = 'zero'",
    "blob": "UPDATE records SET payload_bytes = x'00'",
    "null-ish": "UPDATE records SET tokens_xxh3 = 0",
    "short ids": "UPDATE records SET token_ids = x'01020304'",
    "range": 'UPDATE records SET "end" = start',
    "small": "UPDATE records SET extent_bytes = 65536",
    "larger extent": "UPDATE records SET extent_bytes = extent_bytes + 65536",
    "odd payload": "UPDATE records SET payload_bytes = payload_bytes - 1",
    "huge": "UPDATE records SET record_id = record_id + (1 << 62)",
    "links": "DELETE FROM links",
    "records": "DELETE FROM records",
    "use_end": "UPDATE links SET use_end = 1 << 40",
    "dangling": "UPDATE links SET record_id = 77",
    "link text": "UPDATE links SET record_id = 'x'",
    "sessions": "DELETE FROM sessions",
    "name": "UPDATE sessions SET name = x'ff' WHERE name = 's1'",
    "not utf-8": "UPDATE sessions SET name = CAST(x'ff' AS TEXT) WHERE name = 's1'",
    "time": "UPDATE sessions SET used_s = 'yesterday'",
    "segment": "UPDATE meta SET value = 3 WHERE name = 'segment_bytes'",
    "no segment": "DELETE FROM meta WHERE name = 'segment_bytes'",
    "no meta": "DELETE FROM meta",
    "no column": "ALTER TABLE records DROP COLUMN token_ids",
    "no table": "DROP TABLE links",
    "wear": "UPDATE meta SET value = 'much' WHERE name = 'kv_written_bytes'",
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


def test_a_newer_version_is_not_touched(tmp_path: Path, folder: Path) -> None:
    connection = index(folder)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    before = {path: path.read_bytes() for path in folder.glob("segment-*")}
    with pytest.raises(StoreUnusable, match="version 7, this edgekv reads 1") as caught:
        open_store(tmp_path)
    assert "update" in caught.value.hint
    assert {path: path.read_bytes() for path in folder.glob("segment-*")} == before
    (view,) = Store.open_readonly(tmp_path)
    assert "version 7" in view.damage
    with pytest.raises(StoreUnusable):
        Store.reopen(view)


@pytest.mark.parametrize(
    "options", [{"fingerprint": FINGERPRINT[:32] + "f" * 32}, {"token_bytes": 512}]
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


def test_the_length_of_segments_stays(tmp_path: Path, folder: Path) -> None:
    store = open_store(tmp_path, segment_bytes=4 << 20)
    assert [s.num_tokens for s in store.sessions()] == [3000] * 3
    works(store)


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


@pytest.mark.parametrize("call", ["open", "size", "volume_free_bytes"])
def test_segments_that_cannot_be_opened(tmp_path: Path, folder: Path, call: str) -> None:
    with pytest.raises(StoreUnusable, match="injected"):
        open_store(tmp_path, files=FaultyFiles([Fault(call, 1, "EIO")]))
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
    works(again)
