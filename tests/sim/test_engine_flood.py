"""One app with a thousand requests, or ten thousand names: what that costs the engine."""

import itertools
import random
import threading
from collections import Counter

import pytest
from sim_model import LAYOUT, VOCAB_SIZE
from sim_world import Options, World

from edgekv.engine.inbox import (
    MESSAGES_MAX,
    AppTerms,
    Cancel,
    CloseSession,
    ForgetApp,
    Inbox,
    Submit,
)
from edgekv.engine.ledger import EVALUATION, Ledger
from edgekv.engine.request import Request
from edgekv.errors import QueueFull
from edgekv.kv.session_kv import SessionKV
from edgekv.sched.demand import HEADS_MAX
from edgekv.sched.fairness import Accounts
from edgekv.sched.policy import FairPolicy


@pytest.fixture
def open_world(world_folder):
    worlds = []

    def open_with(**options) -> World:
        worlds.append(World(world_folder / str(len(worlds)), options=Options(**options)))
        return worlds[-1]

    yield open_with
    for world in worlds:
        world.loop.check_integrity()
        world.close()


def prompt(seed: int, num_tokens: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCAB_SIZE) for _ in range(num_tokens)]


def flood(world: World, num_requests: int, *, app: str = "flood", num_apps: int = 1) -> None:
    for number in range(num_requests):
        name = app if num_apps == 1 else f"{app} {number % num_apps}"
        world.ask(world.session(name), prompt(number, 20 + number % 60), 2)


class Looked:
    """How often a turn looks at a request or an account."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        spied = {"states": (Request, "state"), "urgencies": (FairPolicy, "urgency")}
        spied |= {"places": (FairPolicy, "place"), "accounts": (Accounts, "app")}
        spied["prefixes"] = (SessionKV, "reusable_prefix")
        for name, (kind, method) in spied.items():
            monkeypatch.setattr(kind, method, self._spy(name, getattr(kind, method)))

    def _spy(self, name, method):
        def spy(*args):
            self.counts[name] += 1
            return method(*args)

        return spy


class TestATurn:
    def most(self, open_world, monkeypatch, num_requests: int, num_apps: int) -> Counter[str]:
        """Of the turns beside a flood, what the one looked at that looked at most."""
        world = open_world(mode="off", pool_tokens=1024)
        world.terms("victim", pinned_bytes=LAYOUT.capacity_bytes(512))  # it never gives way
        victim = world.ask(world.session("victim"), prompt(-1, 30), 400)
        world.turns(10)
        flood(world, num_requests, num_apps=num_apps)
        world.turns(20)  # all have come
        most: Counter[str] = Counter()
        num_before = victim.request.num_generated
        with monkeypatch.context() as patched:
            looked = Looked(patched)
            for _ in range(40):
                looked.counts.clear()
                world.turns(1)
                most |= looked.counts
        assert victim.request.num_generated > num_before + 10
        assert len(world.loop.ledger.requests) > 0.4 * num_requests
        return most

    @pytest.mark.parametrize("num_apps", [1, 90])
    def test_looks_at_no_more_when_more_wait(self, open_world, monkeypatch, num_apps):
        few = self.most(open_world, monkeypatch, 150, num_apps)
        many = self.most(open_world, monkeypatch, 1000, num_apps)
        assert many["states"] <= 3 * (HEADS_MAX + 16)
        assert many["states"] <= 1.3 * few["states"]
        assert many["prefixes"] <= few["prefixes"] + 16, (few, many)
        assert many["urgencies"] <= HEADS_MAX + 32
        # One place an app: of their own requests the apps' number is the limit.
        assert many["places"] <= 4 * (num_apps + 2)

    def test_nor_when_many_rest_in_memory(self, open_world, monkeypatch):
        """Sessions without a request: none is looked at while nobody needs their memory."""
        world = open_world(mode="off", pool_tokens=64 * 210)
        sessions = [world.session("resting") for _ in range(200)]
        for number, session in enumerate(sessions):
            world.ask(session, prompt(number, 20), 2)
        world.settle()
        world.ask(world.session("victim"), prompt(-1, 30), 100)
        world.turns(10)
        assert len(world.loop.ledger._idle) == 200
        notes = []
        note = Ledger._note_idle
        monkeypatch.setattr(Ledger, "_note_idle", lambda *args: notes.append(note(*args)))
        before = world.loop.ledger.counted.num_steps
        world.turns(40)
        assert world.loop.ledger.counted.num_steps > before + 20
        assert notes == []

    def test_those_who_wait_hold_no_memory_against_others(self, open_world):
        """Far back in line, with KV of their last turn; who is in front gets that room."""
        world = open_world(mode="off", pool_tokens=64 * 40, background=True)
        sessions = [world.session("app-1") for _ in range(36)]
        for number, session in enumerate(sessions):
            world.ask(session, prompt(number, 40), 2)
        world.settle()
        for number, session in enumerate(sessions):
            world.ask(session, prompt(number, 40) + prompt(99, 10 + number), 2)
        world.turns(3)
        victim = world.ask(world.session("victim"), prompt(-1, 400), 20)
        world.until_ended(victim)
        assert world.loop.ledger.requests, "the flood is not over"
        world.settle()

    def test_who_comes_behind_a_crowd_costs_no_step(self, open_world, monkeypatch):
        world = open_world(mode="off", pool_tokens=64 * 20)
        world.terms("victim", pinned_bytes=LAYOUT.capacity_bytes(512))
        world.ask(world.session("victim"), prompt(-1, 30), 450)
        for number in range(60):
            world.ask(world.session("flood"), prompt(number, 20), 300)
        world.turns(80)
        counted = world.loop.ledger.counted
        num_steps, num_thrown = counted.num_steps, counted.num_steps_thrown
        prepare, numbers = world.runner.prepare, itertools.count(60)

        def another_comes(*args):
            step = prepare(*args)
            world.ask(world.session("flood"), prompt(next(numbers), 20), 300)
            return step

        monkeypatch.setattr(world.runner, "prepare", another_comes)
        world.turns(100)
        monkeypatch.undo()
        assert counted.num_steps > num_steps + 50
        assert next(numbers) > 60 + 50
        assert counted.num_steps_thrown <= num_thrown + 4
        for session in list(world.loop.ledger.sessions.values()):
            world.inbox.post(CloseSession(session))
        world.asked.clear()
        world.settle()

    def test_everybody_of_a_flood_is_answered(self, open_world):
        world = open_world(pool_tokens=640)
        flood(world, 150, num_apps=5)
        flood(world, 100, app="crowd", num_apps=100)
        world.settle()  # checks every answer


class TestNames:
    def test_ten_thousand_that_are_looked_up_leave_nothing(self, open_world):
        world = open_world(mode="off")
        world.turns(1)
        for number in range(10_000):
            world.terms(f"name {number}")
        assert world.inbox._messages.qsize() == 1
        assert len(world.inbox._apps) == len(world.inbox._asked) == 0
        world.turns(2)
        assert {*world.loop.ledger.accounts.apps} == {EVALUATION}

    def test_terms_of_their_own_cost_no_step_anything(self, open_world, monkeypatch):
        world = open_world(mode="off")
        for number in range(10_000):
            world.terms(f"name {number}", weight=2.0, pinned_bytes=1)
        assert world.inbox._messages.qsize() == 1
        world.ask(world.session("victim"), prompt(1, 30), 100)
        for _ in range(30):
            world.turns(1)
        assert len(world.loop.ledger.accounts.apps) == 10_002
        looked = Looked(monkeypatch)
        world.turns(10)
        assert 0 < looked.counts["accounts"] < 200

    def test_apps_that_are_closed_are_forgotten(self, open_world):
        world = open_world(mode="off")
        for number in range(300):
            name = f"name {number}"
            world.terms(name, weight=2.0, pinned_bytes=64)
            session = world.session(name)
            world.ask(session, prompt(number, 20), 1)
            world.settle()
            world.close_session(session)
            world.inbox.post(ForgetApp(name))
            world.inbox.post(ForgetApp(f"{name}, never heard of"))
        world.settle()
        ledger = world.loop.ledger
        assert ledger.accounts.pins == {}
        assert not any(name.startswith("name") for name in ledger.counted.service_ms)
        assert len(world.inbox._apps) == len(world.inbox._asked) == 0
        assert not ledger.sessions
        # What they owe is forgotten when others had as much; here nobody else ever asked.
        others = world.session("others")
        for number in range(40):
            world.ask(others, prompt(number, 200), 20)
            world.settle()
        assert {*ledger.accounts.apps} <= {EVALUATION, "others"} | {
            name for name in ledger.accounts.apps if ledger.accounts.app(name).virtual_ms > 0
        }

    def test_a_request_is_taken_by_the_terms_that_were_given_before(self, open_world):
        world = open_world(mode="off")
        for number in range(5000):
            world.terms(f"name {number}", weight=2.0)
        world.terms("late", weight=7.0)
        world.ask(world.session("late"), prompt(1, 20), 1)
        world.turns(1)
        assert world.loop.ledger.accounts.app("late").weight == 7.0
        world.settle()


class TestTheDoor:
    """What callers' threads meet before the engine hears of anything."""

    def inbox_with(self, open_world, num_max: int) -> tuple[World, Inbox]:
        world = open_world(mode="off")
        world.turns(1)
        return world, Inbox(num_max)

    def request(self, world: World, app: str) -> Request:
        asked = world.ask(world.session(app), prompt(1, 5), 1)
        return asked.request

    def test_a_flood_is_refused_by_name_and_others_are_not(self, open_world):
        world, inbox = self.inbox_with(open_world, 16)
        requests = [self.request(world, "flood") for _ in range(12)]
        for request in requests[:9]:
            inbox.submit(request)
        with pytest.raises(QueueFull, match="app 'flood': 9 requests") as caught:
            inbox.submit(requests[9])
        assert "num_waiting_max" in caught.value.hint
        other = self.request(world, "other")
        inbox.submit(other)
        inbox.finished(requests[0].request_id)
        inbox.finished(requests[0].request_id)
        inbox.finished(requests[1].request_id)
        inbox.submit(requests[9])
        inbox.post(AppTerms("flood", num_waiting_max=9))
        inbox.submit(requests[10])
        with pytest.raises(QueueFull, match="as many as its num_waiting_max allows"):
            inbox.submit(requests[11])
        world.settle()

    def test_a_crowd_is_taken_in_parts(self, open_world):
        world, inbox = self.inbox_with(open_world, 1000)
        for number in range(400):
            inbox.submit(self.request(world, f"app {number}"))
        assert len(list(inbox.take(block=False))) == MESSAGES_MAX
        assert len(list(inbox.take(block=False))) == 400 - MESSAGES_MAX
        world.settle()

    def test_what_changes_nothing_is_no_message(self, open_world):
        world, inbox = self.inbox_with(open_world, 10)
        request = self.request(world, "app")
        inbox.post(Cancel(request.request_id))
        assert inbox._messages.empty()
        inbox.submit(request)
        for _ in range(100):
            inbox.post(Cancel(request.request_id))
            inbox.post(AppTerms("app"))
            inbox.post(ForgetApp("unheard of"))
        taken = list(inbox.take(block=False))
        assert [type(message) for message in taken] == [Submit, Cancel, AppTerms]
        inbox.finished(request.request_id)
        inbox.post(Cancel(request.request_id))
        assert inbox._messages.empty()
        assert not inbox._taken_back
        world.settle()

    def test_a_stream_may_be_dropped_at_any_moment(self, open_world):
        """By the garbage collector, while its own thread is in here."""
        world, inbox = self.inbox_with(open_world, 10)
        request = self.request(world, "app")

        def drop():
            with inbox._lock:
                inbox.submit(request)
                inbox.post(Cancel(request.request_id))

        thread = threading.Thread(target=drop, daemon=True)
        thread.start()
        thread.join(60.0)
        assert [type(message) for message in inbox.take(block=False)] == [Submit, Cancel]
        world.settle()

    def test_of_an_app_the_last_that_was_said_holds(self, open_world):
        _, inbox = self.inbox_with(open_world, 10)
        inbox.post(AppTerms("app", weight=2.0))
        inbox.post(ForgetApp("app"))
        assert list(inbox.take(block=False)) == [ForgetApp("app")]
        inbox.post(AppTerms("app", weight=3.0))
        inbox.post(AppTerms("app"))
        inbox.post(AppTerms("app", weight=4.0))
        assert list(inbox.take(block=False)) == [AppTerms("app", weight=4.0)]
        inbox.post(AppTerms("app"))
        assert list(inbox.take(block=False)) == [AppTerms("app")]
        assert (inbox._apps, inbox._news) == ({}, {})

    def test_a_session_that_was_asked_nothing_ends_without_the_engine(self, open_world):
        world, _ = self.inbox_with(open_world, 10)
        session, asked = world.session("app"), world.session("app")
        world.ask(asked, prompt(1, 5), 1)
        engine = world._kept
        engine.close_session(session.engine)
        assert engine.inbox._messages.empty()
        engine.close_session(asked.engine)
        assert [type(m) for m in engine.inbox.take(block=False)] == [CloseSession]
        world.settle()
