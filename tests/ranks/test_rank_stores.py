"""A rank's store: what is damaged is forgotten by all that share it, who is gone by the rank."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from tiny_store import open_store, write

from edgekv.config import SwapOptions
from edgekv.engine.follower import Follower, _Reading
from edgekv.engine.lead import IO, Lead
from edgekv.engine.request import EngineSession
from edgekv.engine.restores import ReadJob
from edgekv.engine.swap import SwapManager
from edgekv.engine.writes import Lane, Staging, WriteJob
from edgekv.errors import RecordCorrupt
from edgekv.ranks.exchange import Exchange
from edgekv.ranks.orders import Orders, from_text
from edgekv.store.disk_io import IoDone

TOKENS = list(range(64))


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path)
    yield store
    store.close()


@pytest.fixture
def shared(store):
    """Two sessions with the same two records; how these are called, and the records."""
    one, other = (store.session("app", name, persistent=True).key for name in ("one", "other"))
    refs = [write(store, one, TOKENS), write(store, one, [*TOKENS, *TOKENS], 64)]
    store.adopt(other, one, 128)
    assert store.stored_end(other) == 128
    return one, other, refs


def damaged(tag):
    """That a job ended at a damaged record."""
    return IoDone(kind="restore", tag=tag, error=RecordCorrupt(Path("x"), "data"), ran_ms=1.0)


@pytest.mark.parametrize(("theirs", "left"), [(None, 64), (0, 0)])
def test_rank_0_lets_go_of_it(theirs, left, store, shared):
    one, other, refs = shared
    lead = Lead(Exchange(SimpleNamespace(rank=0, size=2), Mock()), Orders())
    session = SimpleNamespace(kv=SimpleNamespace(buffers=SimpleNamespace(number=1)))
    job = ReadJob(restore=SimpleNamespace(key=other, session=session), num_good=1)
    job.parts = [(ref, []) for ref in refs]
    lead.began(store, job)
    lead.ended(damaged(job))
    error, num_done = (0, 2) if theirs is None else (IO, theirs)
    report = SimpleNamespace(error=error, num_done=num_done, stored_end=128)
    lead._jobs[job.number].reports[1] = report
    assert lead.settled(store) is not None
    assert store.stored_end(other) == left
    assert store.stored_end(one) == 64
    assert store.snapshot().num_corrupt == 1


@pytest.mark.parametrize(("size", "known"), [(1, 128), (2, 64)])
def test_only_what_all_disks_have_is_shared(size, known, store, shared):
    """Another rank may be behind with what this one has written."""
    one, other, _ = shared
    store.forget(other)
    group = SimpleNamespace(rank=0, size=size)
    swap = SwapManager(
        store,
        Mock(),
        Mock(),
        Mock(layout=SimpleNamespace(state_bytes=0, token_bytes=store.token_bytes)),
        Staging(num_buffers=2, buffer_bytes=1 << 16),
        Mock(),
        behind=True,
        lead=Lead(Exchange(group, Mock()), Orders()),
    )
    swap._writes.lanes[one] = Lane(job=WriteJob(key=one, writes=[SimpleNamespace(start=64)]))
    session = EngineSession(app="app")
    assert swap._on_disk(session, [*TOKENS, *TOKENS]) == (known, one)
    swap._writes.lanes.clear()
    assert swap._on_disk(session, [*TOKENS, *TOKENS]) == (128, one)


@pytest.fixture
def follower(store):
    follower = Follower(Mock(store=store, prefill=Mock(spec=[])), SwapOptions())
    yield follower
    follower.close()


def test_another_rank_lets_go_of_it(store, shared, follower):
    one, other, refs = shared
    reading = _Reading(job=3, key=other, number=1, num_asked=2, num_good=1)
    reading.parts = [(ref, []) for ref in refs]
    report = follower._report(damaged(reading))
    assert (report.num_done, report.error, report.stored_end) == (1, IO, 64)
    assert store.stored_end(one) == 64
    assert store.snapshot().num_corrupt == 1


def test_sessions_that_come_and_go_leave_nothing(store, follower):
    for number in range(3):
        names = [*from_text("app"), *from_text(f"unnamed {number}")]
        follower._session([number, 0, *names])
        assert store.snapshot().num_sessions == 1
        follower._store_forget(names)
    assert follower._keys == {}
    assert store.snapshot().num_sessions == 0
