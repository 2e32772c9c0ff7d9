"""Hostile apps beside two that only talk: nobody is refused, nothing they are told differs."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from tiny_models import random_ids
from tiny_runtime import answer, assert_same, sampling

from edgekv.config import SwapOptions
from edgekv.engine.loop import Loop
from edgekv.engine.runner import Step
from edgekv.errors import CapacityError, EdgeKVError, QueueFull, SessionBusy, TooManySessions
from edgekv.runtime import ReplyStream, Runtime, Session

GRANULE_BYTES = 128 * 768  # of the tiny model
TURNS = 5
TOKENS = 24
REFUSALS = (CapacityError, SessionBusy)


def prompt(seed: int, num_tokens: int = 60) -> list[int]:
    return random_ids(num_tokens, seed)


class Hostile:
    """What one app does to all others, again and again; refusals are counted by kind."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.refused: Counter[type] = Counter()
        self.messages: list[str] = []
        self.rounds: Counter[str] = Counter()
        self._streams: list[ReplyStream] = []
        self._sessions: list[Session] = []
        self._resting = [runtime.app("resting").session(f"r{i}") for i in range(3)]

    def flood(self) -> None:
        """Requests until they are refused; then half of them are taken back."""
        app = self.runtime.app("flood")
        try:
            while True:
                session = app.session()
                self._sessions.append(session)
                ids = prompt(len(self._sessions), 30)
                self._streams.append(session.submit_ids(ids, sampling(3)))
        except REFUSALS:
            for session in self._sessions[::2]:
                session.close()
            self._sessions = self._sessions[1::2]
            raise

    def sessions(self) -> None:
        """Sessions until they are refused."""
        app, opened = self.runtime.app("opener"), []
        try:
            while True:
                opened.append(app.session())
        finally:
            for session in opened:
                session.close()

    def names(self) -> None:
        """Names that nobody uses, with and without terms of their own."""
        for number in range(200):
            self.runtime.app(f"name {self.rounds['names']} {number}")
        weight = 1.0 + self.rounds["names"] % 5
        self.runtime.app(f"name {self.rounds['names']}", weight=weight, pinned_bytes=1)

    def regrets(self) -> None:
        """A large prompt, taken back at once."""
        with self.runtime.app("regrets").session() as session:
            length = self.runtime.context_max - 40
            with session.submit_ids(prompt(self.rounds["regrets"], length), sampling(30)):
                pass

    def suspends(self) -> None:
        """Conversations that leave memory, and are asked again at once."""
        session = self._resting[self.rounds["suspends"] % len(self._resting)]
        answer(session, prompt(self.rounds["suspends"], 100), sampling(1))
        session.suspend()

    def logits(self) -> None:
        """Texts of which all logits are wanted."""
        self.runtime.logits(prompt(1, 200))

    def figures(self) -> None:
        """Questions to the engine itself."""
        self.runtime.counters()
        self.runtime.check_integrity()

    def close(self) -> None:
        """End what is left of it."""
        for session in (*self._sessions, *self._resting):
            session.close()

    def repeat(self, what: str, over: threading.Event, errors: list[Exception]) -> None:
        """The outermost loop of a thread."""
        action: Callable[[], None] = getattr(self, what)
        try:
            while not over.is_set():
                try:
                    action()
                except REFUSALS as refusal:
                    self.refused[type(refusal)] += 1
                    self.messages.append(f"{refusal}; {refusal.hint}")
                self.rounds[what] += 1
                over.wait(1e-3)
        except (EdgeKVError, AssertionError, RuntimeError) as error:
            errors.append(error)


KINDS = ("flood", "sessions", "names", "regrets", "suspends", "logits", "figures")


def talk(runtime: Runtime, name: str) -> list[list[int]]:
    """A conversation by token ids: each turn goes on from all that was said."""
    said: list[int] = []
    answers = []
    with runtime.app(name).session() as session:
        for turn in range(TURNS):
            said += prompt(1000 * len(name) + turn, 20)
            reply = answer(session, said, sampling(TOKENS))
            answers.append(list(reply.token_ids))
            said += reply.token_ids
    return answers


def assert_as_alone(runtime: Runtime, name: str, alone, beside) -> None:
    said: list[int] = []
    for turn, (expected, told) in enumerate(zip(alone, beside, strict=True)):
        said += prompt(1000 * len(name) + turn, 20)
        assert_same(runtime, said, told, expected)
        if told != expected:
            return  # a tie: from here on another conversation
        said += expected


VICTIMS = ("calm", "quiet one")


@dataclass
class Prepared:
    """A step, as it was when it was prepared, and what became of it."""

    apps: set[str]  # in it
    owed: set[str]  # those who only talk, and decode in front
    thrown: bool = False
    held: bool = False  # when it could have been submitted


@pytest.fixture
def steps(monkeypatch):
    """All that were prepared."""
    seen: list[Prepared] = []
    compute, holds = Loop._compute, Step.holds.fget

    def spy(self, plan):
        ledger = self.ledger
        before = ledger.counted.num_steps_thrown
        work = [ledger.requests[segment.request_id] for segment in plan.segments]
        owed = {
            r.session.app
            for r in ledger.requests.values()
            if r.session.app in VICTIMS and r.runs and not r.exhausted(ledger.tokens_max)
            if r.state().decoding
        }
        seen.append(Prepared({r.session.app for r in work}, owed))
        compute(self, plan)
        seen[-1].thrown = ledger.counted.num_steps_thrown > before

    def held(self):
        seen[-1].held = holds(self)
        return seen[-1].held

    monkeypatch.setattr(Loop, "_compute", spy)
    monkeypatch.setattr(Step, "holds", property(held))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("num_granules", [9, 40])
def test_those_who_only_talk_notice_no_refusal_and_no_other_word(open_runtime, steps, num_granules):
    play(open_runtime, steps, num_granules, num_talks=1)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("num_granules", [8, 9, 12, 20, 80])
def test_nor_in_a_long_play(open_runtime, steps, num_granules):
    play(open_runtime, steps, num_granules, num_talks=10)


def play(open_runtime, steps: list[Prepared], num_granules: int, *, num_talks: int) -> None:
    runtime = open_runtime(
        pool_bytes=num_granules * GRANULE_BYTES + (1 << 20),
        swap=SwapOptions(group_bytes=1 << 14, staging_bytes=1 << 20),
        num_waiting_max=40,
        num_sessions_max=80,
        context_max=512,
    )
    alone = {name: talk(runtime, name) for name in VICTIMS}
    hostile, over, errors = Hostile(runtime), threading.Event(), []
    threads = [threading.Thread(target=hostile.repeat, args=(k, over, errors)) for k in KINDS]
    beside: dict[str, list[list[list[int]]]] = {name: [] for name in VICTIMS}
    failed: list[Exception] = []

    def victim(name: str) -> None:
        try:
            for _ in range(num_talks):
                beside[name].append(talk(runtime, name))
        except EdgeKVError as error:
            failed.append(error)

    talkers = [threading.Thread(target=victim, args=(name,)) for name in VICTIMS]
    steps.clear()
    for thread in (*threads, *talkers):
        thread.start()
    for thread in talkers:
        thread.join()
    over.set()
    for thread in threads:
        thread.join()
    assert (errors, failed) == ([], [])
    seen = list(steps)
    for name in VICTIMS:
        assert len(beside[name]) == num_talks
        for told in beside[name]:
            assert_as_alone(runtime, name, alone[name], told)
    assert all(hostile.rounds[kind] for kind in KINDS)
    # A flood is refused, by its own name, and told what to do about it.
    assert hostile.refused[QueueFull] > 0
    assert hostile.refused[TooManySessions] > 0
    assert any("app 'flood'" in message for message in hostile.messages)
    assert any("app 'opener'" in message for message in hostile.messages)
    assert all(message.startswith("app '") for message in hostile.messages), "never all are"
    # Whoever decodes in front is in every step, whatever else is.
    assert all(step.owed <= step.apps for step in seen)
    # For the sake of somebody who came no two steps in a row were thrown away.
    pairs = itertools.pairwise(seen)
    assert not any(one.thrown and two.thrown and two.held for one, two in pairs)
    hostile.close()
    runtime.check_integrity()
