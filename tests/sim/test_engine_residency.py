"""KV in motion, and what happens meanwhile: cancelled, closed, opened again, edited, refused."""

import random
from dataclasses import replace

import pytest
from sim_model import LAYOUT
from sim_world import GROUP_TOKENS, Options, World

from edgekv.engine.inbox import Cancel
from edgekv.errors import StoreFull
from edgekv.kv.residency import Residency

SYSTEM = tuple(range(100, 180))


def ids(num_tokens, seed=0):
    draw = random.Random(seed)
    return tuple(draw.randrange(250) for _ in range(num_tokens))


@pytest.fixture
def make(world_folder):
    worlds = []

    def world(**options):
        options = {"io_share": 0.0, "tails": False} | options
        made = World(world_folder, options=Options(**options))
        worlds.append(made)
        return made

    yield world
    for made in worlds:
        made.let_go()
        made.close_all()
        made.close()


def say(world, session, prompt, num_tokens=4):
    """Ask, until all is done; what the next turn begins with."""
    asked = world.ask(session, prompt, num_tokens)
    world.settle()
    return (*prompt, *asked.expected), asked.request


def full(*_, **__):
    raise StoreFull("no place")


def swapped(world, session, prompt, num_tokens=4):
    """A session whose KV is on disk alone, and its history."""
    history, _ = say(world, session, prompt, num_tokens)
    world.suspend_all()
    world.settle()
    assert session.engine.kv.residency is Residency.SWAPPED
    return history


def leaving(world, session, prompt):
    """A session whose last KV is on its way to disk, and stays so; its history."""
    history, _ = say(world, session, prompt)
    world.io.held.add("write")
    world.loop.ledger.swap_out(session.engine)
    assert session.engine.kv.residency is Residency.LEAVING
    return history


def arriving(world, session, history):
    """A request whose KV is on its way back, and stays so."""
    world.io.held.add("restore")
    asked = world.ask(session, history + ids(5, seed=9), 6)
    while world.turn():
        pass
    assert session.engine.kv.residency is Residency.ARRIVING
    return asked


class TestComingBack:
    def test_a_turn_reads_what_is_on_disk_and_computes_the_rest(self, make):
        world = make()
        session = world.session("app", "s")
        history = swapped(world, session, ids(100))
        rows = world.runner.num_rows
        _, request = say(world, session, history + ids(10, seed=1), 3)
        assert (request.num_restored, request.num_cached) == (103, 103)
        assert world.runner.num_rows - rows == 1 + 10 + 2

    def test_an_edited_history_keeps_its_prefix_and_no_more(self, make):
        world = make()
        session = world.session("app", "s")
        history = swapped(world, session, ids(100))
        _, request = say(world, session, history[:50] + ids(10, seed=1))
        assert request.num_restored == 50
        world.suspend_all()
        world.restart()
        edited = (*history[:50], *ids(10, seed=1))
        _, request = say(world, world.session("app", "s"), (*edited, 1, 2))
        assert request.num_restored >= 50 + 10

    def test_what_was_edited_away_is_still_there_until_it_is_written_over(self, make):
        world = make()
        session = world.session("app", "s")
        history = swapped(world, session, ids(100))
        asked = world.ask(session, history[:50] + ids(10, seed=1), 20)
        world.cancel(asked)
        world.settle()
        _, request = say(world, session, (*history, 5))
        assert request.num_restored == 103

    def test_a_session_that_diverges_from_the_first_token_begins_anew(self, make):
        world = make()
        session = world.session("app", "s")
        swapped(world, session, ids(100))
        history, request = say(world, session, ids(90, seed=5))
        assert request.num_restored == 0
        world.suspend_all()
        world.restart()
        _, request = say(world, world.session("app", "s"), (*history, 1))
        assert request.num_restored == 93

    def test_cancelled_while_it_arrives_it_arrives_all_the_same(self, make):
        world = make()
        session = world.session("app", "s")
        history = swapped(world, session, ids(100))
        asked = arriving(world, session, history)
        world.cancel(asked)
        world.turns(1)
        assert asked.request.finish_reason == "cancelled"
        assert session.engine.kv.residency is Residency.ARRIVING
        world.let_go()
        assert session.engine.kv.resident
        rows = world.runner.num_rows
        say(world, session, (*history, 7), 1)
        assert world.runner.num_rows - rows == 2

    def test_asked_again_while_it_arrives_for_nobody_it_is_no_victim(self, make):
        """There is no room for both, and it cannot be taken from who is being read back."""
        world = make(pool_tokens=256)
        session, other = world.session("app", "s"), world.session("other", "o")
        history = swapped(world, session, ids(100))
        world.cancel(arriving(world, session, history))
        world.turns(1)
        first = world.ask(other, ids(180, seed=2), 8)
        second = world.ask(session, (*history, 1, 2), 8)
        world.turns(20)
        assert first.request.finish_reason is second.request.finish_reason is None
        world.let_go()
        assert second.request.num_restored == 103

    def test_edited_while_it_arrives(self, make):
        world = make()
        session = world.session("app", "s")
        history = swapped(world, session, ids(100))
        world.cancel(arriving(world, session, history))
        world.turns(1)
        asked = world.ask(session, history[:40] + ids(30, seed=3), 8)
        world.let_go()
        assert asked.request.num_restored == 40

    @pytest.mark.parametrize("name", ["s", None])
    def test_closed_while_it_arrives(self, make, name):
        world = make()
        session = world.session("app", name)
        history = swapped(world, session, ids(100))
        arriving(world, session, history)
        world.close_session(session)
        world.turns(1)
        world.let_go()
        assert world.pool.snapshot().used_bytes == 0
        assert len(world.store.sessions()) == (name is not None)

    def test_closed_and_opened_again_while_it_arrives(self, make):
        world = make()
        session = world.session("app", "s")
        history = swapped(world, session, ids(100))
        arriving(world, session, history)
        world.close_session(session)
        again = world.session("app", "s")
        asked = world.ask(again, (*history, 3), 5)
        world.turns(3)
        world.let_go()
        assert asked.request.num_restored == 103
        assert world.totals["num_reads"] == 0

    def test_a_restore_that_was_refused_a_place_in_the_queue(self, make):
        world = make(queue_max=1, pool_tokens=1024)
        sessions = [world.session("app", f"s{i}") for i in range(4)]
        histories = [swapped(world, s, ids(100, seed=i)) for i, s in enumerate(sessions)]
        world.io.held.add("restore")
        asked = [world.ask(s, (*h, 1), 3) for s, h in zip(sessions, histories, strict=True)]
        world.turns(30)
        assert world.io.num_refused > 0
        world.let_go()
        assert all(a.request.num_restored == 103 for a in asked)


class TestLeaving:
    def test_its_memory_is_free_at_once(self, make):
        world = make()
        leaving(world, world.session("app", "s"), ids(100))
        assert world.pool.snapshot().used_bytes == 0

    def test_asked_while_it_leaves_it_waits_and_computes_nothing_twice(self, make):
        world = make()
        session = world.session("app", "s")
        history = leaving(world, session, ids(100))
        asked = world.ask(session, (*history, 8), 4)
        world.turns(10)
        assert asked.request.finish_reason is None
        world.let_go()
        assert asked.request.num_restored == 103

    def test_edited_while_it_leaves(self, make):
        world = make()
        session = world.session("app", "s")
        history = leaving(world, session, ids(100))
        asked = world.ask(session, history[:50] + ids(20, seed=1), 4)
        world.turns(10)
        world.let_go()
        assert asked.request.num_restored == 50
        assert world.swap.counters.num_io_errors == 0

    @pytest.mark.parametrize("name", ["s", None])
    def test_closed_while_it_leaves(self, make, name):
        world = make()
        session = world.session("app", name)
        leaving(world, session, ids(100))
        world.close_session(session)
        world.turns(1)
        world.let_go()
        stored = world.store.sessions()
        assert [s.num_tokens for s in stored] == ([103] if name else [])

    def test_closed_and_opened_again_while_it_leaves(self, make):
        """It goes on with what is on its way, not with what was there when it was opened."""
        world = make()
        session = world.session("app", "s")
        history, _ = say(world, session, ids(100))
        world.io.held.add("write")
        world.close_session(session)
        world.turns(1)
        assert session.engine.kv.residency is Residency.LEAVING
        again = world.session("app", "s")
        asked = world.ask(again, (*history, 3), 5)
        world.turns(5)
        world.let_go()
        assert asked.request.num_restored == 103

    def test_opened_again_and_again(self, make):
        world = make()
        history = ids(60)
        for turn in range(5):
            session = world.session("app", "s")
            asked = world.ask(session, history + ids(10, seed=turn), 4)
            world.until_ended(asked)
            history = history + ids(10, seed=turn) + asked.expected
            world.close_session(session)
            if turn:
                assert asked.request.num_cached >= len(history) - 16
        world.settle()
        written = world.store.snapshot()
        assert written.kv_written_bytes <= (len(history) + 5) * LAYOUT.token_bytes

    def test_who_lacks_staging_waits_for_it(self, make):
        world = make(num_staging=2)
        session = world.session("app", "s")
        say(world, session, ids(4 * GROUP_TOKENS))
        world.suspend_all()
        world.settle()
        assert session.engine.kv.stored == 4 * GROUP_TOKENS + 3
        assert world.swap.counters.num_io_errors == 0

    def test_lanes_that_were_refused_a_place_in_the_queue(self, make):
        world = make(queue_max=1, num_staging=8, pool_tokens=1024)
        for i in range(4):
            say(world, world.session("app", f"s{i}"), ids(50, seed=i))
        world.io.held.add("write")
        for session in world.sessions.values():
            world.loop.ledger.swap_out(session.engine)
        assert world.io.num_refused > 0
        world.let_go()
        assert all(s.engine.kv.stored == 53 for s in world.sessions.values())

    @pytest.mark.parametrize("name", ["s", None])
    def test_a_refused_lane_that_is_not_wanted_any_more(self, make, name):
        world = make(queue_max=1, num_staging=8, pool_tokens=1024)
        session = world.session("app", name)
        say(world, session, ids(20))
        world.io.held.add("write")
        assert world.io.submit("write", lambda: None, None)
        world.loop.ledger.swap_out(session.engine)
        assert world.io.num_refused == 1
        if name is None:
            world.close_session(session)
        else:
            world.ask(session, ids(50, seed=1), 3)
        world.turns(3)
        world.let_go()
        assert name or world.store.sessions() == []

    def test_the_queue_was_full_of_what_others_write(self, make):
        """Conversations take the same way."""
        world = make(queue_max=1, pool_tokens=1024)
        session = world.session("app", "s")
        say(world, session, ids(50))
        world.io.held.add("write")
        assert world.io.submit("write", lambda: None, None)
        world.loop.ledger.swap_out(session.engine)
        assert world.io.num_refused == 1
        world.let_go()
        assert session.engine.kv.stored == 53


class TestWriting:
    def test_kv_is_written_behind_the_decode(self, make):
        world = make(num_staging=8)
        session = world.session("app", "s")
        say(world, session, ids(3 * GROUP_TOKENS), GROUP_TOKENS)
        assert session.engine.kv.resident
        assert session.engine.kv.stored >= 3 * GROUP_TOKENS
        written = world.store.snapshot().num_writes
        world.suspend_all()
        world.settle()
        assert world.store.snapshot().num_writes == written + 1

    def test_what_is_left_when_an_answer_has_ended_is_written(self, make):
        """Once: the next turn writes what is new, and a kill leaves all of it."""
        world = make(tails=True)
        session = world.session("app", "s")
        history = ids(60)
        for turn in range(3):
            history, _ = say(world, session, history + ids(10, seed=turn))
            assert session.engine.kv.resident
            assert session.engine.kv.stored == len(history) - 1
        written = world.store.snapshot()
        assert written.kv_written_bytes == (len(history) - 1) * LAYOUT.token_bytes
        unnamed = world.session("app")
        say(world, unnamed, ids(60, seed=7))
        assert world.store.snapshot().kv_written_bytes == written.kv_written_bytes

    @pytest.mark.parametrize("between", [False, True])
    def test_it_is_written_too_when_an_answer_is_taken_back(self, make, between):
        """While a step of it runs, or between two of them."""
        world = make(tails=True)
        session = world.session("app", "s")
        asked = world.ask(session, ids(40), 100)
        world.turns(6)
        if between:
            end_running = world.loop.end_running

            def cancel_behind():
                end_running()
                world.cancel(asked)

            world.loop.end_running = cancel_behind
        else:
            world.cancel(asked)
        world.settle()
        assert session.engine.kv.num_tokens > 40
        assert session.engine.kv.stored == session.engine.kv.num_tokens

    def test_it_waits_for_staging_and_for_a_disk_that_refuses(self, make, monkeypatch):
        world = make(tails=True, num_staging=1)
        sessions = [world.session("app", f"s{i}") for i in range(3)]
        world.io.held.add("write")
        asked = [world.ask(session, ids(30, seed=i), 4) for i, session in enumerate(sessions)]
        for one in asked:
            world.until_ended(one)
        assert [s.engine.kv.stored for s in sessions] == [0, 0, 0]
        write, world.store.write = world.store.write, full
        world.turns(3)
        world.let_go()
        assert [s.engine.kv.stored for s in sessions] == [0, 0, 0]
        world.store.write = write
        for session in sessions:
            session.engine.write_again_ms = 0.0
        say(world, world.session("app", "other"), ids(30, seed=8))
        assert [s.engine.kv.stored for s in sessions] == [33, 33, 33]

    def test_many_that_wait_for_staging_are_not_looked_at_each_time(self, make, monkeypatch):
        world = make(tails=True, num_staging=1, pool_tokens=4096)
        sessions = [world.session("app", f"s{i}") for i in range(20)]
        link, looks = world.swap._link, []
        monkeypatch.setattr(world.swap, "_link", lambda s: looks.append(s) or link(s))
        world.io.held.add("write")
        for i, session in enumerate(sessions):
            world.until_ended(world.ask(session, ids(20, seed=i), 4))
        assert len(looks) == 1
        world.let_go()
        assert [s.engine.kv.stored for s in sessions] == [23] * 20
        assert len(looks) == 20

    def test_a_session_that_dies_with_the_process_is_not_written_while_there_is_room(self, make):
        world = make(pool_tokens=1024)
        for i in range(3):
            say(world, world.session("app"), ids(100, seed=i), 20)
        assert world.store.snapshot().num_writes == 0
        assert world.store.sessions() == []

    def test_but_it_is_once_there_is_not(self, make):
        world = make(pool_tokens=256)
        sessions = [world.session("app") for _ in range(4)]
        histories = [say(world, s, ids(100, seed=i))[0] for i, s in enumerate(sessions)]
        assert world.store.snapshot().num_writes > 0
        _, request = say(world, sessions[0], (*histories[0], 1))
        assert request.num_restored == 103
        world.close()
        world.open()
        assert world.store.sessions() == []

    def test_the_disk_has_no_place_for_it(self, make):
        world = make(disk_bytes=400 << 10)
        session = world.session("app", "s")
        history = say(world, session, ids(200))[0]
        world.suspend_all()
        world.settle()
        kept = session.engine.kv.num_tokens
        assert 0 < kept < 203
        counters = world.swap.counters
        assert counters.num_forgotten_tokens == 203 - kept
        assert world.store.snapshot().num_full > 0
        _, request = say(world, session, (*history, 1))
        assert request.num_restored == kept

    def test_what_was_evicted_is_written_again_with_the_rest(self, make):
        """Of a session that is in memory, so that nothing need be computed again."""
        world = make()
        session = world.session("app", "s")
        history = swapped(world, session, ids(100))
        say(world, session, (*history, 1))
        world.store.truncate(session.engine.key, 64)
        world.suspend_all()
        world.settle()
        assert session.engine.kv.stored == 108
        assert world.swap.counters.num_io_errors == world.store.snapshot().num_stale == 0

    def test_what_was_evicted_while_it_was_away_is_computed_again(self, make):
        world = make()
        session = world.session("app", "s")
        history = swapped(world, session, ids(100))
        world.store.truncate(session.engine.key, 64)
        _, request = say(world, session, (*history, 1))
        assert request.num_restored == 64
        assert world.swap.counters.num_forgotten_tokens == 103 - 64

    def test_after_a_failure_it_is_not_tried_at_every_step(self, make, monkeypatch):
        world = make(num_staging=8)
        tried = []

        def write(key, *args, **kwargs):
            tried.append(key)
            raise StoreFull("no place")

        monkeypatch.setattr(world.store, "write", write)
        session = world.session("app", "s")
        say(world, session, ids(4 * GROUP_TOKENS), 60)
        assert 1 <= len(tried) <= 4
        assert world.swap.counters.num_io_errors == len(tried)

    @pytest.mark.parametrize(("name", "num_tokens"), [("s", GROUP_TOKENS - 5), (None, 100)])
    def test_predicted_kv_is_never_written(self, make, name, num_tokens):
        world = make(pool_tokens=256, num_staging=8)
        session = world.session("app", name)
        history = say(world, session, ids(num_tokens))[0]
        kv = session.engine.kv
        assert kv.stored == 0
        kv.provenance.mark(20, num_tokens, "predicted")
        world.swap.write_behind(session.engine)
        assert kv.handed == 0
        world.suspend_all()
        world.settle()
        assert (kv.num_tokens, kv.stored) == (20, 20)
        stored = world.store.lookup(session.engine.key)
        assert list(stored.token_ids) == list(history[:20])
        _, request = say(world, session, (*history, 1))
        assert request.num_restored == 20

    def test_kv_behind_predicted_kv_waits_for_its_repair(self, make):
        world = make(pool_tokens=256, num_staging=8)
        session = world.session("app", "s")
        say(world, session, ids(GROUP_TOKENS - 5))
        kv = session.engine.kv
        kv.provenance.mark(5, 9, "predicted")
        world.swap.write_behind(session.engine)
        kv.provenance.mark(5, 9, "exact")
        world.suspend_all()
        world.settle()
        assert kv.stored == GROUP_TOKENS - 2


class TestSharing:
    def shared(self, world):
        snapshot = world.store.snapshot()
        tokens = sum(session.num_tokens for session in world.store.sessions())
        return tokens - snapshot.num_tokens

    @pytest.mark.parametrize("when", ["at once", "suspended", "closed"])
    def test_a_common_prefix_is_written_once(self, make, when):
        world = make(num_staging=8)
        sessions = [world.session("app", name) for name in "ab"]
        for i, session in enumerate(sessions):
            world.ask(session, SYSTEM + ids(20, seed=i), 4)
            if when != "at once":
                world.settle()
        world.settle()
        if when == "closed":
            world.restart()
        else:
            world.suspend_all()
            world.settle()
        assert self.shared(world) >= len(SYSTEM)
        world.restart()
        assert self.shared(world) >= len(SYSTEM)
        for i, name in enumerate("ab"):
            _, request = say(world, world.session("app", name), SYSTEM + ids(21, seed=i))
            assert request.num_restored >= len(SYSTEM) + 20

    def test_a_new_session_begins_with_what_is_on_disk(self, make):
        world = make()
        swapped(world, world.session("app", "a"), SYSTEM + ids(20))
        rows = world.runner.num_rows
        history, request = say(world, world.session("app", "b"), SYSTEM + ids(20, seed=1))
        assert request.num_restored == len(SYSTEM)
        assert world.runner.num_rows - rows == 20 + 3
        world.suspend_all()
        world.settle()
        assert self.shared(world) == len(SYSTEM)
        _, request = say(world, world.session("app", "b"), (*history, 1))
        assert request.num_restored == len(history) - 1

    def test_so_does_one_that_threw_its_own_history_away(self, make):
        """What it has on disk itself is longer, and of no use."""
        world = make()
        swapped(world, world.session("app", "a"), SYSTEM + ids(20))
        other = world.session("app", "b")
        swapped(world, other, ids(150, seed=5))
        _, request = say(world, other, SYSTEM + ids(20, seed=1))
        assert request.num_restored == len(SYSTEM)

    def test_no_other_app_does(self, make):
        world = make()
        swapped(world, world.session("app", "a"), SYSTEM + ids(20))
        _, request = say(world, world.session("other", "b"), SYSTEM + ids(20, seed=1))
        assert request.num_cached == request.num_restored == 0
        world.suspend_all()
        world.settle()
        assert self.shared(world) == 0

    def test_one_that_was_read_back_and_copies_more_keeps_what_is_on_disk(self, make):
        world = make(pool_tokens=1024)
        session = world.session("app", "a")
        swapped(world, session, SYSTEM + ids(10))
        say(world, world.session("app", "b"), SYSTEM + ids(60))
        before = world.store.snapshot().kv_written_bytes
        _, request = say(world, session, SYSTEM + ids(60) + ids(5, seed=1))
        assert request.num_cached >= len(SYSTEM) + 60
        world.loop.ledger.swap_out(session.engine)
        world.settle()
        written = world.store.snapshot().kv_written_bytes - before
        assert written <= 80 * LAYOUT.token_bytes

    def test_closing_one_leaves_the_other(self, make):
        world = make()
        first = world.session("app")
        swapped(world, first, SYSTEM + ids(20))
        second = world.session("app")
        history = swapped(world, second, SYSTEM + ids(20, seed=1))
        world.close_session(first)
        world.settle()
        _, request = say(world, second, (*history, 1))
        assert request.num_restored == len(history) - 1

    def test_who_is_read_while_its_donor_goes(self, make):
        world = make()
        first, second = world.session("app"), world.session("app")
        swapped(world, first, SYSTEM + ids(20))
        history = swapped(world, second, SYSTEM + ids(20, seed=1))
        asked = arriving(world, second, history)
        world.close_session(first)
        world.turns(2)
        world.let_go()
        assert asked.request.num_restored == len(history) - 1


def test_nobody_waits_while_a_session_finds_no_room_in_staging(make):
    """It keeps its buffers, which the planner counts on: nobody else gives way for nothing."""
    world = make(pool_tokens=640, num_staging=2)
    large, small, other = (world.session("app-0", name) for name in ("large", "small", "other"))
    history, _ = say(world, large, ids(380, 1))
    kept, _ = say(world, small, ids(40, 2))
    world.io.held.add("write")
    asked = world.ask(other, ids(300, 3), 4)  # needs what the large one has
    world.turns(20)
    assert large.engine.kv.residency is Residency.LEAVING
    assert large.engine.kv.buffers is not None
    assert list(world.swap.leaving) == [large.engine]
    assert asked.request.finish_reason is None
    beside = world.ask(small, (*kept, 7), 30)
    world.until_ended(beside)
    assert beside.request.finish_reason == "length"
    assert asked.request.finish_reason is None
    assert small.engine.kv.resident  # it was asked for nothing
    world.let_go()
    again = world.ask(large, (*history, 9), 2)
    world.settle()
    assert again.request.num_restored > 0


def test_what_cannot_be_written_frees_the_memory_of_who_leaves(make, monkeypatch):
    world = make(pool_tokens=640, num_staging=2)
    large, other = (world.session("app-0", name) for name in ("large", "other"))
    say(world, large, ids(380, 1))

    def refuse(*_, **__):
        raise StoreFull("no place")

    monkeypatch.setattr(world.store, "write", refuse)
    asked = world.ask(other, ids(300, 3), 4)
    world.until_ended(asked)
    assert asked.request.finish_reason == "length"
    assert large.engine.kv.capacity == 0
    world.settle()


class TestRolling:
    """One layer has a window of 16 tokens and room for 128."""

    def test_what_leaves_memory_is_written_though_nobody_asked(self, make):
        world = make(model="windows")
        session = world.session("app", None)
        say(world, session, ids(100), 1)
        assert session.engine.kv.stored == 0
        history, _ = say(world, session, ids(240), 4)
        kv = session.engine.kv
        assert kv.buffers.base > 0
        assert kv.stored >= kv.buffers.base
        _, request = say(world, session, (*history[:60], 5))
        assert request.num_restored == request.num_cached == 60

    def test_who_needs_staging_waits_for_it_and_others_go_on(self, make):
        world = make(model="windows", num_staging=2)
        session, other = world.session("app", "s"), world.session("other", "o")
        world.io.held.add("write")
        asked = world.ask(session, ids(240), 4)
        quick = world.ask(other, ids(20, seed=1), 4)
        for _ in range(200):
            world.turn()
        assert quick.request.finish_reason == "length"
        assert asked.request.num_generated == 0
        world.let_go()
        assert asked.request.finish_reason == "length"
        assert session.engine.kv.stored >= session.engine.kv.buffers.base > 0

    def test_it_may_be_cancelled_while_it_waits(self, make):
        world = make(model="windows", num_staging=2)
        session = world.session("app", "s")
        world.io.held.add("write")
        asked = world.ask(session, ids(240), 4)
        for _ in range(50):
            world.turn()
        world.cancel(asked)
        world.turns(1)
        assert asked.request.finish_reason == "cancelled"
        world.let_go()
        say(world, session, ids(240), 4)

    def test_what_a_full_disk_did_not_take_is_computed_again(self, make):
        world = make(model="windows")
        session = world.session("app", "s")
        write, world.store.write = world.store.write, full
        history, _ = say(world, session, ids(240), 4)
        kv, num_forgotten = session.engine.kv, world.swap.counters.num_forgotten_tokens
        assert kv.lost_rows
        # In memory it goes on as if nothing was.
        history, request = say(world, session, (*history, 7), 4)
        assert request.num_cached == len(history) - 6
        world.store.write = write
        world.suspend_all()
        world.settle()
        assert world.swap.counters.num_forgotten_tokens - num_forgotten == len(history) - 1
        _, request = say(world, session, (*history, 7))
        assert request.num_cached == 0

    @pytest.mark.parametrize(("left", "cached"), [(240, 243), (100, 100), (0, 0)])
    def test_what_was_evicted_meanwhile_is_not_written_again(self, make, left, cached):
        """Unless all layers have it still."""
        world = make(model="windows")
        session = world.session("app", "s")
        history, _ = say(world, session, ids(240), 4)
        world.store.truncate(session.engine.key, left)
        world.suspend_all()
        world.settle()
        _, request = say(world, session, (*history, 7))
        assert request.num_cached == cached

    def test_a_copy_leaves_when_what_it_lacks_is_on_disk(self, make):
        world = make(model="windows", num_staging=12, pool_tokens=1024)
        first, second = world.session("app", "a"), world.session("app", "b")
        world.io.held.add("write")
        world.ask(first, ids(240), 4)
        for _ in range(100):
            world.turn()
        assert first.engine.kv.buffers.base > 0
        world.ask(second, (*ids(240), 1, 2), 4)
        for _ in range(100):
            world.turn()
        kv = second.engine.kv
        assert kv.lost_rows
        world.loop.ledger.swap_out(second.engine)
        assert kv.residency is Residency.LEAVING
        world.let_go()
        assert (kv.residency, kv.num_tokens) == (Residency.SWAPPED, 245)
        _, request = say(world, second, (*kv.tokens, 3))
        assert request.num_restored == 245

    @pytest.mark.parametrize("left", [0, 100, 200])
    def test_what_was_evicted_meanwhile_is_not_missed_when_more_leaves(self, make, left):
        world = make(model="windows")
        session = world.session("app", "s")
        history, _ = say(world, session, ids(240), 4)
        world.store.truncate(session.engine.key, left)
        say(world, session, (*history, *ids(100, seed=3)), 4)

    @pytest.mark.parametrize("more", [9, 60])
    @pytest.mark.parametrize("name", ["s", None])
    def test_what_was_copied_in_memory_outlives_whom_it_is_from(self, make, name, more):
        world = make(model="windows", pool_tokens=1000)
        first, second = world.session("app", name), world.session("app", "t")
        history, _ = say(world, first, ids(240), 4)
        prompt = (*history, *ids(more, seed=5))
        later, request = say(world, second, prompt)
        assert request.num_cached == len(history) - 1
        assert request.num_restored == 0
        world.store.truncate(first.engine.key, 0)
        world.suspend_all()
        world.settle()
        _, request = say(world, second, (*later, 7))
        assert request.num_cached == len(later) - 1

    def test_who_ends_is_told_while_another_waits_for_staging(self, make):
        world = make(model="windows", num_staging=2)
        world.io.held.add("write")
        world.ask(world.session("app", "s"), ids(240), 4)
        other = world.ask(world.session("app", "t"), ids(240, seed=1), 4).request
        world.turns(100)
        told = []
        other.outbox.put = told.append
        world.inbox.post(Cancel(other.request_id))
        world.turns(5)
        assert len(told) == 1
        world.asked.pop()

    def test_a_prompt_is_computed_while_another_waits_for_staging(self, make):
        """Though the other, which came first, could fill all steps."""
        world = make(model="windows", num_staging=2, pool_tokens=1000)
        world.loop._config = replace(world.loop._config, prefill_rows_max=48)
        world.io.held.add("write")
        asked = world.ask(world.session("app", "s"), ids(300), 4)
        world.turns(100)
        assert asked.request.session.kv.num_tokens < 300
        other = world.ask(world.session("app", "t"), ids(60, seed=1), 4)
        world.turns(100)
        assert other.request.finish_reason == "length"

    @pytest.mark.parametrize("moving", ["leaving", "arriving"])
    def test_it_is_cut_while_it_moves(self, make, moving):
        world = make(model="windows", num_staging=1)
        session, other = world.session("app", "s"), world.session("app", "t")
        if moving == "arriving":
            history = swapped(world, session, ids(240))
            world.cancel(arriving(world, session, history))
        else:
            history, _ = say(world, session, ids(240))
            say(world, other, ids(100, seed=4))
            world.io.held.add("write")
            world.loop.ledger.swap_out(other.engine)
            world.loop.ledger.swap_out(session.engine)
        assert session.engine.kv.buffers.base > 40
        world.ask(session, (*history[:40], 3, 4, 5), 2)
        for _ in range(5):
            world.turn()
            world.loop.check_integrity()
