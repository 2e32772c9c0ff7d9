"""An index, a log or a claim that anything may have happened to: a store opens, or says why not.

Whatever is read back is right: a damaged row never has foreign KV taken for a session's own.
"""

import contextlib
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import for_each_seed
from tiny_store import FINGERPRINT, kept, kv_of, open_store, restored, tokens, write

from edgekv.errors import StoreError, StoreStale, StoreUnusable
from edgekv.runtime.conversation import ChatMessage, Conversation, dump, load, stored_messages
from edgekv.store import Store

NUM_DAMAGES = 25  # a seed
TABLES = {
    "sessions": ("session_key", "app", "name", "created_s", "used_s"),
    "records": ("record_id", "start", '"end"', "payload_bytes", "token_ids", "tokens_xxh3"),
    "links": ("session_key", "position", "record_id", "use_end"),
    "conversations": ("session_key", "text"),
    "meta": ("name", "value"),
}
VALUES = (
    *("NULL", "0", "-1", "1", "3", "300", "1 << 31", "1 << 32", "1 << 61", "(1 << 61) - 1"),
    *("1 << 62", "9223372036854775807", "-9223372036854775808", "1.5", "-0.0", "9e999", "-9e999"),
    *(
        "1e300",
        "''",
        "'x'",
        "'7'",
        "x''",
        "x'00'",
        "x'ff'",
        "CAST(x'ff' AS TEXT)",
        "'a' || char(0)",
    ),
    *("zeroblob(16)", "zeroblob(100000)", "'[[]]'", "'{}'", "'[1, 2]'", f"'{FINGERPRINT}'"),
    *("randomblob(16)", "printf('%.*c', 100000, '[')", "'1' || printf('%.*c', 9999, '0')"),
)
SCHEMA = (
    "DROP TABLE {table}",
    "ALTER TABLE {table} DROP COLUMN {column}",
    "ALTER TABLE {table} RENAME COLUMN {column} TO other",
    "ALTER TABLE {table} RENAME TO other",
    "DELETE FROM {table}",
    "PRAGMA user_version = {number}",
    "PRAGMA application_id = {number}",
    "CREATE VIEW other AS SELECT * FROM {table}",
    "CREATE TRIGGER other BEFORE UPDATE ON {table} BEGIN SELECT RAISE(ABORT, 'no'); END",
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Roots of a store that was closed, and of one whose process was killed: its log is full."""
    root = tmp_path_factory.mktemp("originals")
    store = open_store(root / "closed")
    ids = tokens(900)
    for number in range(3):
        kept(store, "mail", f"s{number}", ids[: 300 + number])
    key = store.session("mail", "s2", persistent=True).key
    write(store, key, ids, start=302)
    store.adopt(store.session("mail", "heir", persistent=True).key, key, 900)
    store.set_conversation(key, dump(talk("first")))
    store.close()
    store = open_store(root / "closed")
    store.set_conversation(1, dump(talk("in the log")))
    shutil.copytree(root / "closed", root / "killed")
    store.close()
    return [root / "closed", root / "killed"]


def talk(text: str) -> Conversation:
    return Conversation(messages=(ChatMessage(role="user", content=text),))


# --- what may have happened ---


def change_rows(folder: Path, draw: random.Random) -> str:
    """A value, or the schema, is not what edgekv wrote."""
    table = draw.choice(sorted(TABLES))
    column = draw.choice(TABLES[table])
    statement = f"UPDATE OR REPLACE {table} SET {column} = {draw.choice(VALUES)}"
    if draw.random() < 0.6:
        statement += f" WHERE abs(random()) % 3 = {draw.randrange(3)}"
    if draw.random() < 0.15:
        number = draw.choice((0, 1, 2, 3, 99, -1, 0x656B7649))
        statement = draw.choice(SCHEMA).format(table=table, column=column, number=number)
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as index:
        index.isolation_level = None
        with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
            index.execute("PRAGMA ignore_check_constraints=ON")
            index.execute(statement)
    return statement


def change_bytes(folder: Path, draw: random.Random) -> str:
    """A file is torn, cut, swapped or junk in places."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    likely = [path for path in files if path.name in {"index.sqlite", "index.sqlite-wal"}]
    path = draw.choice(likely * 3 + files)
    content = bytearray(path.read_bytes())
    how = draw.choice(("flip", "flip", "zero", "junk", "cut", "append", "swap", "remove"))
    at = draw.randrange(len(content)) if draw.random() < 0.8 else draw.randrange(100) % len(content)
    if how == "flip":
        for _ in range(draw.choice((1, 1, 3, 50))):
            content[draw.randrange(at, len(content))] ^= 1 << draw.randrange(8)
    elif how in {"zero", "junk"}:
        size = min(draw.choice((1, 4, 100, 4096)), len(content) - at)
        content[at : at + size] = bytes(size) if how == "zero" else draw.randbytes(size)
    elif how == "cut":
        del content[at:]
    elif how == "append":
        content += draw.randbytes(draw.choice((1, 4096)))
    elif how == "swap":
        first, second = (draw.randrange(len(content) // 4096 + 1) * 4096 for _ in range(2))
        one, other = content[first : first + 4096], content[second : second + 4096]
        content[first : first + len(other)], content[second : second + len(one)] = other, one
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(content)
    return f"{path.name}: {how} at {at}"


# --- what must hold ---


def look(root: Path, *, and_remove: bool) -> None:
    """As `sessions list`, `show` and `rm` do."""
    for view in Store.open_readonly(root):
        for session in view.sessions:
            time.localtime(session.used_s)
            time.localtime(session.created_s)
            assert session.payload_bytes >= 0
            stored_messages(session.conversation)
            session.app.encode()
            session.name.encode()
        if and_remove:
            with contextlib.suppress(StoreError), contextlib.closing(Store.reopen(view)) as store:
                for session in store.sessions()[:1]:
                    store.remove(session.key)


def read_all(store: Store) -> None:
    for session in store.sessions():
        if session.conversation is not None:
            load(session.conversation, vocab_size=100)
        # Another session that shared a record may have found out what is wrong with it.
        for ref, payload in restored(store, session, StoreStale):
            assert payload[:256] == kv_of(session.token_ids[: ref.start + 1], ref.start)


def works(root: Path) -> bool:
    """Use a store as a runtime does; False if it cannot be opened, and says so."""
    try:
        store = open_store(root)
    except StoreUnusable:
        with pytest.raises(StoreUnusable):
            open_store(root)
        return False
    with store:
        read_all(store)
        store.check_integrity()
        key = store.session("mail", "after", persistent=True).key
        write(store, key, tokens(300, seed=1))
        store.set_conversation(key, dump(talk("after")))
        for session in store.sessions()[1:2]:
            store.remove(session.key)
        store.check_integrity()
    with open_store(root) as again:
        assert again.snapshot().num_index_lost == 0
        found = again.find("mail", "after")
        assert found is not None
        assert (found.conversation, found.num_tokens) == (dump(talk("after")), 300)
        read_all(again)
        again.check_integrity()
    return True


def test_whatever_has_happened_to_it(originals: list[Path], tmp_path: Path) -> None:
    num_working = 0

    def play(seed: int) -> None:
        nonlocal num_working
        draw = random.Random(seed)
        for number in range(NUM_DAMAGES):
            root = tmp_path / f"{seed}-{number}"
            shutil.copytree(draw.choice(originals), root)
            (folder,) = (path for path in root.iterdir() if path.is_dir())
            damage: Callable[[Path, random.Random], str] = draw.choice((change_rows, change_bytes))
            done = [damage(folder, draw) for _ in range(draw.choice((1, 1, 2, 4)))]
            try:
                look(root, and_remove=draw.random() < 0.3)
                num_working += works(root)
            except BaseException as error:
                error.add_note("; ".join(what[:200] for what in done))
                raise
            shutil.rmtree(root)

    for_each_seed(play, name="the store's index")
    assert num_working > NUM_DAMAGES / 2
