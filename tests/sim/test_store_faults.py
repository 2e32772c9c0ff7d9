"""The Nth file call fails, is short or meets flipped bits, for every N of a run; the index refuses.

After each: typed errors only, sessions that hold a prefix of what they should, records that are
whole or refused by name, no extent leaked, and a store that works on.
"""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_files import CALLS_THAT_MEET, Fault, FaultKind, FaultyFiles
from tiny_store import (
    MIB,
    TOKEN_BYTES,
    kv_of,
    open_store,
    read,
    restored,
    tokens,
    verify_all,
    write,
)

from edgekv.errors import EdgeKVError, StoreError, StoreFull, StoreUnusable
from edgekv.store import Store
from edgekv.store.index import Index

KINDS: tuple[FaultKind, ...] = ("EIO", "ENOSPC", "EINTR", "short", "torn", "lost", "flip")
THE_REST_IS_LONG = [
    kind if kind in {"EIO", "flip"} else pytest.param(kind, marks=pytest.mark.long)
    for kind in KINDS
]
BUDGET = 2 * MIB
NAMES = "abcd"


def said(name: str) -> list[int]:
    return tokens(2600, seed=ord(name))


def try_to(run: Callable[[], object]) -> bool:
    """Whether something went well; what goes wrong must be typed."""
    try:
        run()
    except (EdgeKVError, OSError):
        return False
    return True


def play(store: Store) -> None:
    """Write, evict, share, cut, read; a caller who goes on after every error."""
    for turn in range(2):
        for name in NAMES:
            session = store.session("app", name, persistent=name != "b")
            start = store.stored_end(session.key)
            end = min(start + 1300, 2600)
            if start < end:
                try_to(
                    lambda k=session.key, n=name, s=start, e=end: write(store, k, said(n)[:e], s)
                )
        key = store.session("app", "d", persistent=True).key
        try_to(lambda k=key, t=turn: store.set_conversation(k, f"turn {t}"))
        read_all(store)
        store.truncate(store.session("app", "c", persistent=True).key, 900)


def read_all(store: Store) -> None:
    """Read everything as a restore does: what is refused is quarantined, what errs is left."""
    for session in store.sessions():
        assert list(session.token_ids) == said(session.name)[: session.num_tokens]
        for ref, payload in restored(store, session, StoreError, OSError):
            assert payload == kv_of(said(session.name)[: ref.end], ref.start), "wrong KV was served"


def run_with(root: Path, faults: list[Fault], seed: int = 0) -> FaultyFiles:
    """A store's life with faults, then the next one without."""
    files = FaultyFiles(faults, seed=seed)
    try:
        store = open_store(root, disk_bytes=BUDGET, files=files)
    except StoreError:
        return files
    play(store)
    files.faults = []
    read_all(store)  # what was written wrong is found now
    verify_all(store)
    assert store.snapshot().peak_bytes <= BUDGET
    for name in NAMES[1:]:
        store.remove(store.session("app", name, persistent=True).key)
    key = store.session("app", "d", persistent=True).key
    write(store, key, said("d")[:100])
    files.faults = [Fault(f.call, files.counts[f.call] + 1, f.kind) for f in faults if f.forever]
    try_to(store.close)
    files.faults = []
    again = open_store(root, disk_bytes=BUDGET, files=files)
    figures = again.snapshot()
    assert figures.num_index_lost == figures.num_records_lost == 0
    verify_all(again)
    again.close()
    return files


def test_without_faults(tmp_path: Path) -> None:
    files = run_with(tmp_path, [])
    calls = ("open", "preadv", "pwritev", "close", "unlink", "volume_free_bytes")
    assert all(files.counts[call] for call in calls), files.counts


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("kind", THE_REST_IS_LONG)
def test_every_call_fails_once(tmp_path: Path, kind: FaultKind) -> None:
    counts = run_with(tmp_path / "none", []).counts
    met: set[str] = set()
    for call in sorted(CALLS_THAT_MEET.get(kind, counts.keys() - {"*"})):
        for nth in range(1, counts[call] + 1):
            files = run_with(tmp_path / f"{call}-{nth}", [Fault(call, nth, kind)], seed=nth)
            met.update(call for call, _ in files.injected)
    assert met >= CALLS_THAT_MEET.get(kind, {"open", "close", "unlink", "pwritev", "preadv"})


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("call", ["preadv", "pwritev", "close", "volume_free_bytes", "unlink"])
def test_a_call_fails_from_now_on(tmp_path: Path, call: str) -> None:
    for nth in (1, 2, 4):
        files = run_with(tmp_path / str(nth), [Fault(call, nth, "EIO", forever=True)])
        assert files.injected or nth > 1


def refuse_commits(
    monkeypatch: pytest.MonkeyPatch, refused: set[int], error: type[sqlite3.Error], code: int
) -> list[int]:
    """Let SQLite refuse the commits of these numbers (from 1), after all statements ran."""
    numbers: list[int] = []
    put_meta = Index.apply

    def apply(self: Index, *args: Any, **options: Any) -> None:
        numbers.append(len(numbers) + 1)
        if numbers[-1] in refused:
            failure = error("injected")
            failure.sqlite_errorcode = code
            options["meta"] = Refusing(failure)
        put_meta(self, *args, **options)

    monkeypatch.setattr(Index, "apply", apply)
    return numbers


class Refusing:
    """Rows that cannot be had: the transaction is in its middle."""

    def __init__(self, failure: sqlite3.Error) -> None:
        self._failure = failure

    def __iter__(self) -> "Refusing":
        return self

    def __next__(self) -> tuple[str, int]:
        raise self._failure


@pytest.mark.slow
@pytest.mark.faults
def test_every_commit_fails_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        numbers = refuse_commits(patch, set(), sqlite3.OperationalError, sqlite3.SQLITE_FULL)
        run_with(tmp_path / "none", [])
    for nth in range(2, len(numbers) - 4):  # not those of the check and of the end
        with monkeypatch.context() as patch:
            refuse_commits(patch, {nth}, sqlite3.OperationalError, sqlite3.SQLITE_FULL)
            run_with(tmp_path / str(nth), [])


def test_an_index_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    ids = tokens(500)
    key = store.session("app", "a", persistent=True).key
    write(store, key, ids[:200])
    with monkeypatch.context() as patch:
        forever = set(range(1000))
        refuse_commits(patch, forever, sqlite3.OperationalError, sqlite3.SQLITE_IOERR_WRITE)
        with pytest.raises(StoreUnusable):
            write(store, key, ids, start=200)
        with pytest.raises(StoreUnusable):
            store.set_conversation(key, "x")
        other = store.session("app", "b", persistent=True).key
        with pytest.raises(StoreUnusable):
            store.remove(other)
        assert store.stored_end(key) == 200
        found = store.find("app", "a")
        assert found is not None
        assert read(store, found.records[0]) == kv_of(ids[:200])
    verify_all(store)
    write(store, key, ids, start=200)
    verify_all(store)
    store.close()
    again = open_store(tmp_path)
    assert again.stored_end(key) == 500
    assert [s.name for s in again.sessions()] == ["a"]
    again.close()


def test_an_index_that_is_full(tmp_path: Path) -> None:
    """SQLite's own limit on pages behaves as a full volume does."""
    store = open_store(tmp_path)
    key = store.session("app", "a", persistent=True).key
    write(store, key, tokens(100))
    store._disk.index._writer.execute("PRAGMA max_page_count = 20")
    with pytest.raises(StoreFull, match="full"):
        store.set_conversation(key, "x" * 100_000)
    store.set_conversation(key, "short")
    verify_all(store)
    store.close()


def test_the_token_size_is_the_stores(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    key = store.session("app", "a", persistent=True).key
    with pytest.raises(AssertionError):
        store.write(key, 0, [1, 2, 3], [bytes(TOKEN_BYTES * 2)])
    store.check_integrity()
    store.close()
