"""Several threads on one store: nobody waits behind a payload, nothing is torn, nothing leaks."""

import contextlib
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_store import MIB, kept, kv_of, open_store, read, tokens, verify, verify_all, write

from edgekv.errors import StoreFull, StoreStale
from edgekv.store import Store
from edgekv.store.disk_io import Buffer, Files
from edgekv.store.index import Index

PATIENCE_S = 30.0


class Gate:
    """Once it is shut, it stops the first who comes through until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self._shut = threading.Semaphore(0)

    def shut(self) -> None:
        self.reached.clear()
        self.opened.clear()
        self._shut.release()

    def pass_through(self) -> None:
        if self._shut.acquire(blocking=False):
            self.reached.set()
            assert self.opened.wait(PATIENCE_S)


class GatedFiles(Files):
    """Files whose reads and writes stop at a gate."""

    def __init__(self) -> None:
        self.reads, self.writes, self.ends = Gate(), Gate(), Gate()

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        self.reads.pass_through()
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        self.writes.pass_through()
        return super().pwritev(fd, buffers, offset)

    def close(self, fd: int) -> None:
        self.ends.pass_through()
        super().close(fd)


class Beside:
    """Runs something on a thread of its own while a gate holds it."""

    def __init__(self, gate: Gate, run: Callable[[], object]) -> None:
        self._gate = gate
        self._pool = ThreadPoolExecutor(1)
        gate.shut()
        self.future = self._pool.submit(run)
        assert gate.reached.wait(PATIENCE_S)

    def end(self) -> object:
        """Open the gate; what the thread returns or raises."""
        self._gate.opened.set()
        self._pool.shutdown()
        return self.future.result(PATIENCE_S)


def everything_else(store: Store, key: int, *, num_tokens: int = 100) -> None:
    """All calls that the engine thread makes."""
    assert store.match("app", tokens(50))[1] == 50
    other = store.session("app", "other", persistent=False).key
    assert store.adopt(other, key, 50) == 50
    store.truncate(other, 20)
    store.touch(other)
    assert store.stored_end(key) == 100
    assert store.snapshot().num_tokens == num_tokens
    assert store.find("app", "a") is not None
    store.forget(other)


@pytest.mark.parametrize("where", ["writes", "ends"])
def test_nobody_waits_for_a_write(tmp_path: Path, where: str) -> None:
    files = GatedFiles()
    store = open_store(tmp_path, files=files)
    a = kept(store, "app", "a", tokens(100)).key
    busy = store.session("app", "busy", persistent=True).key
    writing = Beside(getattr(files, where), lambda: write(store, busy, tokens(3000, seed=1)))
    everything_else(store, a)
    assert store.stored_end(busy) == 0
    store.check_integrity()
    writing.end()
    assert store.stored_end(busy) == 3000
    verify_all(store)
    store.close()


def test_nobody_waits_for_a_read(tmp_path: Path) -> None:
    files = GatedFiles()
    store = open_store(tmp_path, files=files)
    a = kept(store, "app", "a", tokens(100))
    reading = Beside(files.reads, lambda: read(store, a.records[0]))
    everything_else(store, a.key)
    store.check_integrity()
    write(store, a.key, tokens(200), start=100)
    store.truncate(a.key, 0)
    store.check_integrity()
    write(store, a.key, tokens(400))
    assert reading.end() == kv_of(tokens(100))
    verify_all(store)
    store.close()


def test_nobody_waits_for_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    a = kept(store, "app", "a", tokens(100)).key
    gate, put = Gate(), Index._put_session

    def slow_put(*args: object) -> None:
        gate.pass_through()
        put(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Index, "_put_session", slow_put)
    busy = store.session("app", "busy", persistent=True).key
    writing = Beside(gate, lambda: write(store, busy, tokens(300, seed=1)))
    everything_else(store, a, num_tokens=400)
    writing.end()
    verify_all(store)
    store.close()


@pytest.mark.parametrize("how", ["cut", "remove", "replace", "remove and name again"])
def test_a_write_that_comes_too_late_changes_nothing(tmp_path: Path, how: str) -> None:
    files = GatedFiles()
    store = open_store(tmp_path, files=files)
    ids = tokens(200)
    donor = kept(store, "app", "donor", tokens(300, seed=5))
    key = kept(store, "app", "a", ids[:100]).key
    writing = Beside(files.writes, lambda: write(store, key, ids, start=100))
    if how == "cut":
        store.truncate(key, 60)
    elif how == "replace":
        store.truncate(key, 0)
        assert store.adopt(key, donor.key, 100) == 100  # as long as before, but not the same
    else:
        store.remove(key)
    if how == "remove and name again":
        assert store.session("app", "a", persistent=True).key != key
    with pytest.raises(StoreStale, match="was cut while"):
        writing.end()
    assert store.snapshot().num_stale == 1
    assert store.stored_end(key) == {"cut": 60, "replace": 100}.get(how, 0)
    verify_all(store)
    store.close()


def test_a_record_that_is_read_may_be_removed(tmp_path: Path) -> None:
    files = GatedFiles()
    store = open_store(tmp_path, files=files, disk_bytes=2 * MIB)
    a = kept(store, "app", "a", tokens(1000))
    reading = Beside(files.reads, lambda: read(store, a.records[0]))
    store.remove(a.key)
    assert store.snapshot().used_bytes == 0
    for seed in range(20):
        kept(store, "app", f"s{seed}", tokens(900, seed))
    assert reading.end() == kv_of(tokens(1000))
    verify_all(store)
    store.close()


def test_a_session_that_is_written_is_not_evicted(tmp_path: Path) -> None:
    files = GatedFiles()
    store = open_store(tmp_path, files=files, disk_bytes=2 * MIB)
    ids = tokens(1000)
    key = kept(store, "app", "a", ids[:500]).key
    writing = Beside(files.writes, lambda: write(store, key, ids, start=500))
    for seed in range(1, 20):
        kept(store, "app", f"s{seed}", tokens(900, seed))
    assert store.snapshot().num_evicted > 0
    assert store.stored_end(key) == 500
    writing.end()
    assert store.stored_end(key) == 1000
    verify_all(store)
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_threads(tmp_path: Path, seed: int) -> None:
    """Writers, readers and an engine thread at once, on more sessions than fit."""
    store = open_store(tmp_path, disk_bytes=4 * MIB)
    names = [f"s{index}" for index in range(12)]
    taken = {name: threading.Lock() for name in names}  # one session's writes come in order
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(_write_often, store, names, taken, f"{seed} w{n}") for n in range(2)]
        jobs += [pool.submit(_read_often, store, names, f"{seed} r{n}") for n in range(3)]
        jobs += [pool.submit(_decide_often, store, names, f"{seed} e")]
        for job in jobs:
            job.result(PATIENCE_S * 4)
    assert store.snapshot().num_evicted > 0
    assert store.snapshot().peak_bytes <= 4 * MIB
    verify_all(store)
    store.close()
    again = open_store(tmp_path, disk_bytes=4 * MIB)
    assert again.snapshot().num_records_lost == 0
    verify_all(again)
    again.close()


def _write_often(
    store: Store, names: list[str], taken: dict[str, threading.Lock], seed: str
) -> None:
    draw = random.Random(seed)
    for turn in range(120):
        name = draw.choice(names)
        with taken[name]:
            stored = store.session("app", name, persistent=name < "s5")
            start = draw.randrange(stored.num_tokens + 1) if turn % 5 == 0 else stored.num_tokens
            ids = [*stored.token_ids[:start], *tokens(draw.randint(1, 700), draw.randrange(1000))]
            try:
                write(store, stored.key, ids, start)
                if turn % 7 == 0 and name < "s5":
                    store.set_conversation(stored.key, f"{turn}")
            except (StoreStale, StoreFull):
                continue  # it may be removed at any moment


def _read_often(store: Store, names: list[str], seed: str) -> None:
    draw = random.Random(seed)
    for _ in range(150):
        stored = store.find("app", draw.choice(names))
        if stored is None:
            continue
        with contextlib.suppress(StoreStale):
            verify(store, stored)


def _decide_often(store: Store, names: list[str], seed: str) -> None:
    draw = random.Random(seed)
    for turn in range(400):
        stored = store.session("app", draw.choice(names), persistent=False)
        donor, common = store.match("app", stored.token_ids, but_not=stored.key)
        assert common <= stored.num_tokens
        if turn % 9 == 0:
            store.truncate(stored.key, draw.randrange(stored.num_tokens + 1))
        elif turn % 9 == 1 and donor:
            store.adopt(stored.key, donor, 10_000)
        elif turn % 37 == 0:
            store.remove(stored.key)
        else:
            store.touch(stored.key)
        store.snapshot()
        if turn % 100 == 50:
            store.check_integrity()
