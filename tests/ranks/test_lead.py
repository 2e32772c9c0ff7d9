"""Rank 0's patience with disks, and what it says of itself, without any other process."""

from unittest.mock import Mock

import pytest

from edgekv.engine import lead as leads
from edgekv.engine.lead import DISK_S, Lead
from edgekv.engine.writes import WriteJob
from edgekv.errors import EngineFailed
from edgekv.ranks.exchange import ORDER_WORDS, Exchange, Report
from edgekv.ranks.orders import Orders
from edgekv.ranks.verdict import IDLE
from edgekv.store.disk_io import IoDone


class OneOther:
    """A group of two, of which rank 1 reports what it is told to."""

    rank, size = 0, 2

    def __init__(self):
        self.reports = []

    def exchange(self, words):
        width, heard = (len(words) - 1 - ORDER_WORDS) // 2, words.copy()
        said = [words[1], len(self.reports), *(word for report in self.reports for word in report)]
        heard[1 + width : 1 + width + len(said)] = said
        self.reports = []
        return heard


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when somebody says so."""
    clock = Mock(now_s=1000.0, monotonic=lambda: clock.now_s)
    monkeypatch.setattr(leads, "time", clock)
    return clock


@pytest.fixture
def notes():
    return []


@pytest.fixture
def lead(clock, notes):
    group = OneOther()
    lead = Lead(Exchange(group, lambda _, phase: notes.append(phase)), Orders())
    lead.other = group
    return lead


def begin(lead, key=0):
    """A job on both ranks; its number."""
    job = WriteJob(key=key, writes=[])
    lead.began(Mock(lookup=lambda _: None), job)
    return job


def wait(lead, clock, num_s):
    for _ in range(num_s):
        clock.now_s += 1.0
        lead.exchange()


def ended_here(lead, job):
    lead.ended(IoDone(kind="write", tag=job, error=None, ran_ms=1.0))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_ends_nothing_is_named_within_its_bound(rank, lead, clock):
    job = begin(lead)
    if rank:
        ended_here(lead, job)
    else:
        lead.other.reports = [Report(job.number, 0, 0, 0)]
    wait(lead, clock, int(DISK_S) - 1)
    with pytest.raises(EngineFailed, match=f"the disk of rank {rank} has not answered for 60 s"):
        wait(lead, clock, 3)


def test_a_disk_that_is_slow_is_waited_for(lead, clock):
    jobs = [begin(lead) for _ in range(6)]
    for job in jobs:
        wait(lead, clock, int(DISK_S) - 2)
        ended_here(lead, job)
        lead.other.reports = [Report(job.number, 0, 0, 0)]
        wait(lead, clock, 1)


def test_a_disk_with_nothing_to_do_is_never_late(lead, clock):
    wait(lead, clock, 5 * int(DISK_S))
    begin(lead)
    wait(lead, clock, int(DISK_S) - 1)


def test_time_in_which_rank_0_was_stopped_is_nobodys(lead, clock):
    begin(lead)
    clock.now_s += 10 * DISK_S
    wait(lead, clock, int(DISK_S) - 4)


def test_rank_0_is_idle_between_two_runtimes(lead, notes):
    lead.close()
    assert notes[-1] == IDLE
