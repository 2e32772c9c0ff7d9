"""What was said in a damaged index is carried over as far as it can be read; KV never wrongly."""

import sqlite3
from array import array
from contextlib import closing
from pathlib import Path

import pytest
from tiny_store import kept, open_store, record_files, tokens, verify_all, write

NUM_SESSIONS = 40


def text_of(number: int) -> str:
    return f'"what was said in {number:02}{" and on" * 300}"'  # two a page


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """The index of a store that was closed."""
    with open_store(tmp_path) as store:
        for number in range(NUM_SESSIONS):
            key = kept(store, "mail", f"s{number:02}", tokens(20, number)).key
            store.set_conversation(key, text_of(number))
        return store.folder / "index.sqlite"


def change(index: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(index, isolation_level=None)) as connection:
        connection.execute(statement, values)


def damage_page_with(index: Path, text: str) -> None:
    """The page on which this stands is one of something else."""
    content = bytearray(index.read_bytes())
    page = content.index(text[:30].encode()) // 4096 * 4096
    content[page : page + 4096] = b"\x07" * 4096
    index.write_bytes(content)


def said(root: Path) -> dict[str, str | None]:
    """What is found by who opens it."""
    with open_store(root) as store:
        figures = store.snapshot()
        assert (figures.num_index_lost, figures.num_tokens) == (1, 0)
        verify_all(store)
        assert not record_files(store)
        found = {session.name: session.conversation for session in store.sessions()}
    with open_store(root) as again:
        assert again.snapshot().num_index_lost == 0
        assert {s.name: s.conversation for s in again.sessions()} == found
    return found


def test_one_page_of_what_was_said(index: Path, tmp_path: Path) -> None:
    damage_page_with(index, text_of(20))
    found = said(tmp_path)
    assert "s20" not in found
    assert len(found) >= NUM_SESSIONS - 6
    assert all(text == text_of(int(name[1:])) for name, text in found.items())
    assert index.with_name("index.damaged.sqlite").exists()


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE links",
        "DROP TABLE records",
        "DELETE FROM meta",
        "UPDATE sessions SET session_key = -5 WHERE name = 's07'",
        "UPDATE sessions SET name = CAST(x'ff' AS TEXT) WHERE name = 's07'",
        "UPDATE conversations SET text = CAST(x'ff' AS TEXT) WHERE session_key = 8",
    ],
)
def test_what_else_is_damaged_costs_the_session_that_it_is_of(
    index: Path, tmp_path: Path, statement: str
) -> None:
    change(index, statement)
    lost = {"s07"} if "07" in statement or "8" in statement else set()
    assert said(tmp_path).keys() == {f"s{n:02}" for n in range(NUM_SESSIONS)} - lost


def test_damage_that_would_only_be_met_by_a_commit(index: Path, tmp_path: Path) -> None:
    """All rows can be read, but SQLite's own index of their names does not agree with them."""
    with closing(sqlite3.connect(index)) as connection:
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_sessions_1'"
        ).fetchone()
    content, start = bytearray(index.read_bytes()), (page - 1) * 4096
    at = content.index(b"mails07", start, start + 4096)
    content[at : at + 7] = b"mails99"
    index.write_bytes(content)
    assert said(tmp_path).keys() == {f"s{n:02}" for n in range(NUM_SESSIONS)}


def test_when_it_was_said(index: Path, tmp_path: Path) -> None:
    change(index, "UPDATE sessions SET created_s = 1000.5, used_s = 2000.5 WHERE name = 's03'")
    change(index, "UPDATE sessions SET used_s = 9e10 WHERE name = 's04'")
    change(index, "DROP TABLE links")
    with open_store(tmp_path, wall_clock_s=lambda: 5000.0) as store:
        times = {s.name: (s.created_s, s.used_s) for s in store.sessions()}
    assert times["s03"] == (1000.5, 2000.5)
    assert times["s04"][1] == 5000.0, "nothing was used after now"


@pytest.mark.parametrize("junk", [b"no header at all", b"SQLite format 3\0" + b"\0" * 84])
def test_nothing_can_be_read(index: Path, tmp_path: Path, junk: bytes) -> None:
    index.write_bytes(junk + index.read_bytes()[len(junk) :])
    assert said(tmp_path) == {}


def test_a_full_store_loses_none_of_it(index: Path, tmp_path: Path) -> None:
    """What finds no room in the new index stands in the one that was put aside."""
    damage_page_with(index, text_of(20))
    with open_store(tmp_path, disk_bytes=60_000) as store:
        assert len(store.sessions()) < NUM_SESSIONS
    assert text_of(39).encode() in index.with_name("index.damaged.sqlite").read_bytes()


# --- whose KV it is ---


@pytest.mark.parametrize("shared", [False, True])
def test_other_tokens_than_kv_was_computed_for(tmp_path: Path, shared: bool) -> None:
    """The header of a record, and its row, have the hash of the tokens; here the tokens change."""
    ids = tokens(60)
    with open_store(tmp_path) as store:
        key = kept(store, "mail", "a", ids[:20]).key
        write(store, key, ids[:40], start=20)
        write(store, key, ids, start=40)
        if shared:
            store.adopt(store.session("mail", "b", persistent=True).key, key, 30)
        folder = store.folder
    changed = array("I", ids[20:40])
    changed[15] ^= 1
    change(
        folder / "index.sqlite",
        "UPDATE records SET token_ids = ? WHERE start = 20",
        changed.tobytes(),
    )
    with open_store(tmp_path) as store:
        assert [list(s.token_ids) for s in store.sessions()] == [ids[:20]] * (1 + shared)
        assert store.snapshot().num_records_lost == 2
        assert store.match("mail", ids)[1] == 20
        verify_all(store)
