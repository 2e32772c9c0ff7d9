"""I/O threads: what goes first, what is refused, what is reported, how they end."""

import gc
import queue
import threading
import time
import weakref
from pathlib import Path

import pytest

from edgekv.clock import ManualClock
from edgekv.errors import EngineFailed, RecordCorrupt, RuntimeClosed
from edgekv.store.io_threads import IoDone, IoThreads

WAIT_S = 20  # for what must happen; a test that passes does not wait this long


class Rig:
    """I/O threads, what they reported, and jobs that wait at a gate."""

    def __init__(self, *, num_readers=1, num_writers=1, queue_max=8):
        self.reports: queue.SimpleQueue[IoDone] = queue.SimpleQueue()
        self.gate = threading.Event()
        self.started = threading.Semaphore(0)
        self.ran: list[object] = []
        self.clock = ManualClock()
        self.threads = IoThreads(
            num_readers=num_readers,
            num_writers=num_writers,
            queue_max=queue_max,
            done=self.reports.put,
            clock=self.clock,
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
        made.threads.close(drain=False)


def test_results_come_back_with_their_tags_and_times(rig):
    rig = rig()

    def job() -> str:
        rig.clock.advance(7)
        return f"on {threading.current_thread().name}"

    for kind, name in (("restore", "reader"), ("write", "writer"), ("evict", "writer")):
        assert rig.run(job, kind) == IoDone(
            kind=kind, tag="tag", result=f"on edgekv-{name}", error=None, queued_ms=0, ran_ms=7
        )


def test_waiting_counts(rig):
    rig = rig()
    rig.block("write")
    rig.submit("write", "second")
    rig.clock.advance(5)
    rig.gate.set()
    assert [(d.tag, d.queued_ms, d.ran_ms) for d in (rig.next(), rig.next())] == [
        ("gate", 0, 5),
        ("second", 5, 0),
    ]


def test_writes_go_before_evictions_in_their_own_order(rig):
    rig = rig()
    rig.block("evict")
    for kind, tag in (("evict", 1), ("write", 2), ("evict", 3), ("write", 4)):
        rig.submit(kind, tag)
    rig.gate.set()
    rig.threads.close(drain=True)
    assert rig.ran == [2, 4, 1, 3]


def test_restores_never_wait_behind_writes(rig):
    rig = rig(num_writers=2)
    rig.block("write")
    rig.block("evict")
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


def test_without_readers_the_writers_restore_first(rig):
    rig = rig(num_readers=0)
    rig.block("write")
    for kind in ("evict", "write", "restore"):
        rig.submit(kind, kind)
    rig.gate.set()
    rig.threads.close(drain=True)
    assert rig.ran == ["restore", "write", "evict"]


def test_all_threads_of_a_kind_work(rig):
    rig = rig(num_readers=3, num_writers=2)
    for kind in ("restore",) * 3 + ("write", "evict"):
        rig.block(kind)  # each must start while the others still wait
    assert rig.threads.num_pending == 5


def test_a_full_queue_refuses_and_never_waits(rig):
    rig = rig(queue_max=2)
    rig.block("write")
    assert rig.submit("write", 1)
    assert rig.submit("write", 2)
    assert not rig.submit("write", 3)
    assert rig.submit("evict", 4)  # each kind has its own limit
    assert rig.submit("restore", 5)
    assert rig.next().tag == 5
    rig.gate.set()
    assert [rig.next().tag for _ in range(4)] == ["gate", 1, 2, 4]
    assert rig.submit("write", 3)
    assert rig.next().tag == 3


@pytest.mark.parametrize("error", [OSError(5, "disk"), RecordCorrupt(Path("file"), 0, "all")])
def test_the_world_s_errors_are_reported_as_they_are(rig, error):
    rig = rig()

    def job():
        raise error

    done = rig.run(job)
    assert done.error is error
    assert done.result is None
    assert rig.run(lambda: "goes on").result == "goes on"


@pytest.mark.parametrize("bug", [ZeroDivisionError(), AssertionError("no"), SystemExit(3)])
def test_our_bugs_are_reported_and_kill_no_thread(rig, bug):
    rig = rig()

    def job():
        raise bug

    done = rig.run(job)
    assert isinstance(done.error, EngineFailed)
    assert done.error.__cause__ is bug
    assert rig.run(lambda: "goes on").result == "goes on"


def settle(threads: IoThreads) -> None:
    while threads.num_pending:
        time.sleep(0.001)


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
                raise RecordCorrupt(Path("file"), 0, str(data)) from cause

    report = rig.run(job)
    assert (report.error is not None) == fails
    del data, job
    settle(rig.threads)
    gc.collect()
    assert gone() is None


def test_pending_counts_until_it_was_reported():
    reported, gate = threading.Event(), threading.Event()

    def done(_: IoDone) -> None:
        reported.set()
        assert gate.wait(WAIT_S)

    threads = IoThreads(num_readers=1, num_writers=1, queue_max=1, done=done)
    assert threads.submit("restore", lambda: None, None)
    assert reported.wait(WAIT_S)
    assert threads.num_pending == 1
    gate.set()
    threads.close(drain=True)
    assert threads.num_pending == 0


def test_closing_runs_what_is_queued_if_asked(rig):
    rig = rig(num_readers=2, num_writers=2, queue_max=100)
    jobs = [(kind, n) for n in range(30) for kind in ("restore", "write", "evict")]
    assert all(rig.submit(kind, (kind, n)) for kind, n in jobs)
    rig.threads.close(drain=True)
    assert sorted(rig.ran) == sorted(jobs)
    assert rig.reports.qsize() == len(jobs)
    assert rig.threads.num_pending == 0


def test_closing_reports_what_it_drops(rig):
    rig = rig()
    rig.block("restore")
    rig.block("write")
    for kind in ("restore", "write", "evict"):
        rig.submit(kind, kind)
    rig.clock.advance(3)
    threading.Timer(0.02, rig.gate.set).start()
    rig.threads.close(drain=False)
    assert rig.ran == []
    reports = [rig.next() for _ in range(5)]
    assert [d.tag for d in reports if d.error is None] == ["gate", "gate"]
    dropped = [d for d in reports if isinstance(d.error, RuntimeClosed)]
    assert [d.tag for d in dropped] == ["restore", "write", "evict"]
    assert {(d.queued_ms, d.ran_ms) for d in dropped} == {(3, 0)}
    assert rig.threads.num_pending == 0


def test_after_closing_nothing_is_taken(rig):
    rig = rig()
    rig.threads.close(drain=True)
    rig.threads.close(drain=False)
    with pytest.raises(RuntimeClosed):
        rig.submit("write", 1)
    assert not [t for t in threading.enumerate() if t in rig.threads._threads]


def test_a_thread_cannot_close_itself(rig):
    rig = rig()
    done = rig.run(lambda: rig.threads.close(drain=True))
    assert isinstance(done.error, EngineFailed)
    assert isinstance(done.error.__cause__, AssertionError)
    assert rig.run(lambda: "goes on").result == "goes on"


def test_a_report_that_fails_is_raised_to_the_owner():
    bug, met = ZeroDivisionError(), threading.Event()

    def done(_: IoDone) -> None:
        met.set()
        raise bug

    threads = IoThreads(num_readers=1, num_writers=1, queue_max=1, done=done)
    assert threads.submit("restore", lambda: None, None)
    assert met.wait(WAIT_S)
    settle(threads)
    with pytest.raises(EngineFailed) as caught:
        threads.submit("write", lambda: None, None)
    assert caught.value.__cause__ is bug
    with pytest.raises(EngineFailed):
        threads.close(drain=True)
    assert not [t for t in threading.enumerate() if t in threads._threads]
