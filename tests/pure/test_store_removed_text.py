"""What was removed stands in no file of the store, though it is open: every byte is searched."""

import shutil
import sqlite3
from array import array
from contextlib import closing
from pathlib import Path

import pytest
from tiny_store import kept, open_store, tokens, verify_all

from edgekv.store import Store
from edgekv.store.folder import remove_damaged
from edgekv.store.index import Index

SECRET = "the launch code is swordfish"
LONG = f'"{SECRET * 500}"'  # on pages of its own
SHORT = f'"{SECRET}"'
IDS = tokens(400, seed=7)


def stands_in(root: Path, what: bytes) -> list[str]:
    """Files that hold it."""
    return sorted(p.name for p in root.rglob("*") if p.is_file() and what in p.read_bytes())


def said_in(root: Path) -> list[str]:
    return stands_in(root, SECRET.encode())


def ids_in(root: Path) -> list[str]:
    """Files that hold the tokens; KV of this test's store says nothing of them."""
    return stands_in(root, array("I", IDS[100:200]).tobytes())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """With a session beside that stays."""
    store = open_store(tmp_path)
    store.set_conversation(kept(store, "mail", "other", tokens(300)).key, '"stays"')
    return store


def say(store: Store, text: str) -> int:
    """A session in which something is said, over and over, and its KV is stored."""
    key = kept(store, "mail", "inbox", IDS).key
    for turn in range(3):
        store.set_conversation(key, f"{text}{' ' * turn}")
    return key


@pytest.mark.parametrize("text", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_session_that_is_removed(
    store: Store, tmp_path: Path, text: str, checkpointed: bool
) -> None:
    key = say(store, text)
    if checkpointed:  # it stands in the database, and has left the log
        store._disk.index._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert said_in(tmp_path)
    assert ids_in(tmp_path)
    store.remove(key)
    assert said_in(tmp_path) == ids_in(tmp_path) == []
    verify_all(store)
    store.close()
    assert said_in(tmp_path) == []
    with open_store(tmp_path) as again:
        assert [s.conversation for s in again.sessions()] == ['"stays"']


@pytest.mark.parametrize("after", ['""', f'"{"something else " * 2000}"'], ids=["short", "long"])
def test_what_is_taken_back(store: Store, tmp_path: Path, after: str) -> None:
    """By whatever follows, and its KV with it: it could be turned back into the text."""
    key = say(store, SHORT)
    store.set_conversation(key, after, taken_back=True)
    assert said_in(tmp_path) == ids_in(tmp_path) == []
    assert store.stored_end(key) == 0
    assert store.find("mail", "inbox").conversation == after  # type: ignore[union-attr]
    verify_all(store)
    store.close()


def test_what_others_share_of_the_kv_stays(store: Store) -> None:
    key = say(store, SHORT)
    store.adopt(store.session("mail", "heir", persistent=True).key, key, 100)
    store.set_conversation(key, '""', taken_back=True)
    assert [s.num_tokens for s in store.sessions() if s.name in {"heir", "inbox"}] == [100, 0]
    verify_all(store)
    store.close()


def test_as_soon_as_nobody_reads_the_log(store: Store, tmp_path: Path) -> None:
    key = say(store, SHORT)
    with closing(sqlite3.connect(store.folder / "index.sqlite", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM conversations").fetchall()
        store.remove(key)
        assert said_in(tmp_path) == ["index.sqlite-wal"]
    store.set_conversation(store.session("mail", "other", persistent=True).key, '"more"')
    assert said_in(tmp_path) == []
    store.close()


def test_a_process_that_was_killed_before_the_log_was_emptied(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = say(store, SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "_scrub", lambda index: None)
        store.remove(key)
        shutil.copytree(store.folder.parent, tmp_path / "killed")
    assert said_in(tmp_path / "killed") == ["index.sqlite-wal"]
    with open_store(tmp_path / "killed") as again:
        assert said_in(tmp_path / "killed") == []
        assert [s.name for s in again.sessions()] == ["other"]
    store.close()


# --- a damaged index ---


@pytest.fixture
def damaged(store: Store, tmp_path: Path) -> Path:
    """A root whose index was put aside, with what was said in it."""
    say(store, SHORT)
    store.close()
    path = store.folder / "index.sqlite"
    path.write_bytes(b"no header at all" + path.read_bytes()[16:])
    with open_store(tmp_path) as again:
        assert again.sessions() == []
        assert again.snapshot().num_index_lost == 1
        assert again.snapshot().file_bytes >= 4096 + aside(tmp_path).stat().st_size
    assert said_in(tmp_path) == ["index.damaged.sqlite"]
    return tmp_path


def aside(root: Path) -> Path:
    return next(root.rglob("index.damaged.sqlite"))


def test_it_is_kept_while_nothing_is_removed(damaged: Path) -> None:
    with open_store(damaged) as store:
        key = kept(store, "mail", "new", tokens(10)).key
        store.set_conversation(key, '"new"')
        store.truncate(key, 5)
    assert said_in(damaged) == ["index.damaged.sqlite"]


@pytest.mark.parametrize("how", ["removed", "taken back"])
def test_it_goes_with_what_is_removed(damaged: Path, how: str) -> None:
    """For nobody knows whether that stands in it, too."""
    with open_store(damaged) as store:
        key = kept(store, "mail", "new", tokens(10)).key
        before = store.snapshot().file_bytes
        if how == "removed":
            store.remove(key)
        else:
            store.set_conversation(key, '""', taken_back=True)
        assert said_in(damaged) == []
        assert store.snapshot().file_bytes < before
        verify_all(store)


def test_it_goes_when_all_is_removed_that_is_older(damaged: Path) -> None:
    written_s = aside(damaged).stat().st_mtime
    remove_damaged(damaged, before_s=written_s - 1)
    assert said_in(damaged) == ["index.damaged.sqlite"]
    remove_damaged(damaged, before_s=written_s + 1)
    assert said_in(damaged) == []
    remove_damaged(damaged, before_s=written_s + 1)
    remove_damaged(damaged / "nowhere", before_s=0.0)
