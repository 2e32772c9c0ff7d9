"""I/O threads: what goes first, what is refused, what is reported, how they end."""

import gc
import queue
import threading
import traceback
import weakref
from pathlib import Path

import pytest
from manual_clock import ManualClock

from edgekv.errors import EngineFailed, RecordCorrupt, RuntimeClosed
from edgekv.store import disk_io
from edgekv.store.disk_io import IoDone, IoThreads

WAIT_S = 20  # for what must happen; a test that passes does not wait this long


class Rig:
    """I/O threads, what they reported, and jobs that wait at a gate."""

    def __init__(self, *, num_readers=1, num_writers=1, queue_max=8):
        self.reports: queue.SimpleQueue[IoDone] = queue.SimpleQueue()
        self.gate = threading.Event()
        self.started = threading.Semaphore(0)
        self.ran: list[object] = []
        self.threads = IoThreads(
            num_readers=num_readers,
            num_writers=num_writers,
            queue_max=queue_max,
            done=self.reports.put,
        )

    def block(self, kind, tag="gate") -> None:
        """Occupy one thread until the gate opens."""

        def wait() -> None:
            self.started.release()
            assert self.gate.wait(WAIT_S)

        assert self.threads.submit(kind, wait, tag)
        assert self.started.acquire(timeout=WAIT_S)

    def submit(self, kind, tag) -> bool:
        return self.threads.submit(kind, lambda: self.ran.append(tag), tag)

    def next(self) -> IoDone:
        return self.reports.get(timeout=WAIT_S)

    def run(self, job, kind="restore") -> IoDone:
        assert self.threads.submit(kind, job, "tag")
        return self.next()


@pytest.fixture
def rig():
    rigs = []

    def make(**options) -> Rig:
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make
    for made in rigs:
        made.gate.set()
        made.threads.close()


def test_jobs_are_reported_with_their_tags_and_times(rig, monkeypatch):
    clock = ManualClock()
    monkeypatch.setattr(disk_io, "MonotonicClock", lambda: clock)
    rig = rig()

    def job() -> None:
        clock.advance(7)
        rig.ran.append(threading.current_thread().name)

    for kind, name in (("restore", "reader"), ("write", "writer")):
        assert rig.run(job, kind) == IoDone(kind=kind, tag="tag", error=None, ran_ms=7)
        assert rig.ran.pop() == f"edgekv-{name}"


def test_jobs_of_a_kind_start_in_their_order(rig):
    rig = rig()
    rig.block("write")
    for tag in range(5):
        rig.submit("write", tag)
    rig.gate.set()
    rig.threads.close()
    assert rig.ran == [0, 1, 2, 3, 4]


def test_restores_never_wait_behind_writes(rig):
    rig = rig(num_writers=2)
    rig.block("write")
    rig.block("write")
    rig.submit("write", "later")
    rig.submit("restore", "at once")
    assert rig.next().tag == "at once"
    assert rig.ran == ["at once"]


def test_readers_leave_writes_alone(rig):
    rig = rig(num_readers=3)
    rig.block("write")
    rig.submit("write", "later")
    for tag in range(6):
        rig.submit("restore", tag)
    assert sorted(rig.next().tag for _ in range(6)) == list(range(6))
    assert "later" not in rig.ran


def test_all_threads_of_a_kind_work(rig):
    rig = rig(num_readers=3, num_writers=2)
    for kind in ("restore",) * 3 + ("write",) * 2:
        rig.block(kind)  # each must start while the others still wait
    assert rig.reports.qsize() == 0


def test_a_full_queue_refuses_and_never_waits(rig):
    rig = rig(queue_max=2)
    rig.block("write")
    assert rig.submit("write", 1)
    assert rig.submit("write", 2)
    assert not rig.submit("write", 3)
    assert rig.submit("restore", 5)  # each kind has its own limit
    assert rig.next().tag == 5
    rig.gate.set()
    assert [rig.next().tag for _ in range(3)] == ["gate", 1, 2]
    assert rig.submit("write", 3)
    assert rig.next().tag == 3


@pytest.mark.parametrize("error", [OSError(5, "disk"), RecordCorrupt(Path("file"), "all")])
def test_the_world_s_errors_are_reported_as_they_are(rig, error):
    rig = rig()

    def job():
        raise error

    done = rig.run(job)
    assert done.error is error
    assert rig.run(lambda: None).error is None


@pytest.mark.parametrize("bug", [ZeroDivisionError(), AssertionError("no"), SystemExit(3)])
def test_our_bugs_are_reported_and_kill_no_thread(rig, bug):
    rig = rig()

    def job():
        raise bug

    done = rig.run(job)
    assert isinstance(done.error, EngineFailed)
    assert done.error.__cause__ is bug
    assert "in job" in "".join(traceback.format_exception(done.error))
    assert rig.run(lambda: None).error is None


def alive(threads: IoThreads) -> list[threading.Thread]:
    return [thread for _, thread in threads._threads if thread.is_alive()]


class Data:
    """Something that can be weakly referred to."""


@pytest.mark.parametrize("fails", [False, True])
def test_an_idle_thread_keeps_nothing_of_its_last_job(rig, fails):
    rig, data = rig(), Data()
    gone = weakref.ref(data)

    def job(data=data):
        if fails:
            try:
                raise FileNotFoundError(str(data))
            except FileNotFoundError as cause:
                raise RecordCorrupt(Path("file"), str(data)) from cause

    report = rig.run(job)
    assert (report.error is not None) == fails
    del data, job
    rig.block("restore")  # the only reader has another job by now
    gc.collect()
    assert gone() is None


def test_closing_runs_what_is_queued(rig):
    rig = rig(num_readers=2, num_writers=2, queue_max=100)
    jobs = [(kind, n) for n in range(30) for kind in ("restore", "write")]
    assert all(rig.submit(kind, (kind, n)) for kind, n in jobs)
    rig.threads.close()
    assert sorted(rig.ran) == sorted(jobs)
    assert rig.reports.qsize() == len(jobs)


def test_after_closing_nothing_is_taken(rig):
    rig = rig()
    rig.threads.close()
    rig.threads.close()
    with pytest.raises(RuntimeClosed):
        rig.submit("write", 1)
    assert not alive(rig.threads)


def test_a_report_that_fails_is_raised_to_the_owner():
    bug, met = ZeroDivisionError(), threading.Event()

    def done(_: IoDone) -> None:
        met.set()
        raise bug

    threads = IoThreads(num_readers=1, num_writers=1, queue_max=1, done=done)
    assert threads.submit("restore", lambda: None, None)
    assert met.wait(WAIT_S)
    with pytest.raises(EngineFailed) as caught:
        threads.close()
    assert caught.value.__cause__ is bug
    with pytest.raises(EngineFailed):
        threads.submit("write", lambda: None, None)
    assert not alive(threads)
