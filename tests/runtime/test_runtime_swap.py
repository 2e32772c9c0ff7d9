"""Sessions that do not fit come and go; nobody can tell by what they say."""

import contextlib
import errno
import random
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import random_ids
from tiny_runtime import answer, assert_same, eventually, sampling
from tiny_store import layers_of

from edgekv.bench.sessions.slow_swap import TWINS
from edgekv.config import RuntimeConfig, StoreOptions, SwapOptions
from edgekv.errors import EngineFailed, SessionBusy, StoreUnusable
from edgekv.runtime import Runtime
from edgekv.store import Store
from edgekv.store.disk_io import Files

TOKEN_BYTES = 2 * 3 * 2 * 16 * 4  # K and V, layers, kv heads, head_dim, f32
GRANULE_BYTES = 128 * TOKEN_BYTES  # the smallest buffers that a session has
MIB = 1 << 20
TIGHT_BYTES = 7 * GRANULE_BYTES  # some sessions of the few hundred tokens that they have here
SYSTEM = random_ids(150, seed=99)


@pytest.fixture
def kv_folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def open_small(tiny_folder, kv_folder):
    """Opens runtimes over one folder, with a pool of a few sessions unless told otherwise."""
    opened = []

    def open_with(mode="reuse", *, disk_bytes=32 * MIB, **config):
        twin = TWINS.get(mode)
        swap = SwapOptions(mode="async", staging_bytes=0) if twin else SwapOptions(mode=mode)
        options = {
            "pool_bytes": TIGHT_BYTES,
            "swap": swap,
            "store": StoreOptions(folder=kv_folder, disk_bytes=disk_bytes, free_reserve_bytes=0),
        }
        whole = RuntimeConfig(**(options | config))
        opened.append(Runtime.open(str(tiny_folder), config=whole, swap_twin=twin))
        return opened[-1]

    yield open_with
    for runtime in opened:
        runtime.close()


def check(runtime):
    """Nothing leaked, no budget was exceeded."""
    runtime.check_integrity()
    pool = runtime.pool_snapshot()
    assert pool.peak_bytes <= pool.budget_bytes
    store = runtime.store_snapshot()
    if store is not None:
        assert store.peak_bytes <= store.budget_bytes
        assert store.num_corrupt == 0


@pytest.mark.parametrize("where", ["write", "read"])
def test_a_bug_in_io_stops_the_engine_with_its_traceback(open_small, monkeypatch, where):
    """It is no cache miss, and nobody's session stays unsaved without a word."""
    runtime = open_small()
    session = runtime.app().session("s")
    session.respond("Hi", sampling=sampling(40))
    if where == "read":
        session.suspend()

    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    def talk():
        for _ in range(40):
            session.respond("And then?", sampling=sampling(4))
            session.suspend()

    with monkeypatch.context() as patch:
        patch.setattr(Store, where, broken)
        with pytest.raises(EngineFailed) as caught:
            talk()
    shown = "".join(traceback.format_exception(caught.value))
    assert "in broken" in shown
    assert "ZeroDivisionError: a bug" in shown
    runtime.close()
    assert open_small().app().session("s").messages[-1].content  # what was said is saved


def folder_bytes(folder):
    num_bytes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # removed while we look
            num_bytes += path.lstat().st_size if path.is_file() and path.parent != folder else 0
    return num_bytes


@pytest.fixture(scope="module")
def talks(shared_runtime):
    """What six users of three apps say in three turns each, and what is answered, undisturbed."""
    told = {}
    for user in range(6):
        draw = random.Random(user)
        history = SYSTEM[: draw.choice([0, 150])]
        turns = []
        with shared_runtime.app(f"talks-{user}").session() as session:
            for turn in range(3):
                prompt = history + random_ids(draw.randrange(5, 90), seed=100 * user + turn)
                params = sampling(draw.randrange(3, 25))
                said = answer(session, prompt, params).token_ids
                turns.append((prompt, params, said))
                history = prompt + list(said)
        told[user] = turns
    return told


def session_of(runtime, user, *, named=True):
    return runtime.app(f"app-{user % 3}").session(f"user-{user}" if named else None)


def hold_talk(runtime, judge, user, turns, *, named=True):
    session = session_of(runtime, user, named=named)
    replies = []
    for prompt, params, expected in turns:
        replies.append(answer(session, prompt, params))
        assert_same(judge, prompt, replies[-1].token_ids, expected)
    return replies


def hold_talks(runtime, judge, talks, *, named=True):
    """All users at once, a thread each; their replies."""
    with ThreadPoolExecutor(len(talks)) as pool:
        held = [
            pool.submit(hold_talk, runtime, judge, user, turns, named=named)
            for user, turns in talks.items()
        ]
        return [reply for one in held for reply in one.result()]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["off", "naive", "groups", "async", "reuse"])
@pytest.mark.parametrize("policy", ["fair", "fcfs"])
def test_many_sessions_in_a_small_pool(open_small, shared_runtime, talks, mode, policy):
    runtime = open_small(mode, policy=policy)
    replies = hold_talks(runtime, shared_runtime, talks, named=policy == "fair")
    check(runtime)
    counters = runtime.counters().swap
    restored = sum(reply.stats.num_restored_tokens for reply in replies)
    assert counters.num_io_errors == 0
    if mode == "off":
        assert restored == counters.num_swap_outs == 0
        assert counters.num_forgotten_tokens > 0
    else:
        assert restored == counters.num_restored_tokens
        assert counters.num_swap_outs > 0  # on a slow machine they may come one after the other
        assert counters.num_forgotten_tokens == 0


class TestStats:
    def test_what_was_read_counts_as_cached(self, open_small):
        runtime = open_small()
        session = runtime.app().session("s")
        prompt = random_ids(200)
        first = answer(session, prompt, sampling(10))
        assert first.stats.num_restored_tokens == first.stats.num_cached_tokens == 0
        assert session.suspend() == 209
        assert runtime.pool_snapshot().used_bytes == 0
        history = prompt + list(first.token_ids)
        second = answer(session, history + random_ids(7, seed=1), sampling(5))
        assert second.stats.num_restored_tokens == second.stats.num_cached_tokens == 209
        assert second.stats.restore_ms > 0
        assert second.stats.num_preemptions == 0

    def test_a_resident_session_restores_nothing(self, open_small):
        session = open_small().app().session("s")
        prompt = random_ids(100)
        answer(session, prompt, sampling(2))
        again = answer(session, [*prompt, 5], sampling(2))
        assert again.stats.num_restored_tokens == 0
        assert again.stats.num_cached_tokens == 100

    @pytest.mark.slow
    def test_preemptions_are_counted_and_answers_go_on(
        self, open_small, shared_runtime, monkeypatch
    ):
        """All fit until their answers grow."""
        monkeypatch.setattr("edgekv.engine.request.ADMISSION_RESERVE_TOKENS", 1)
        runtime = open_small(pool_bytes=6 * GRANULE_BYTES)
        prompts = [random_ids(100, seed=i) for i in range(4)]
        params = sampling(80, temperature=1.0, seed=3)
        sessions = [runtime.app(f"app-{i}").session() for i in range(4)]
        streams = [s.submit_ids(p, params) for s, p in zip(sessions, prompts, strict=True)]
        for stream in streams:
            for _ in stream:
                pass
        replies = [stream.reply for stream in streams]
        for i, reply in enumerate(replies):
            with shared_runtime.app(f"grows-{i}").session() as alone:
                assert reply.token_ids == answer(alone, prompts[i], params).token_ids
        preempted = [r.stats for r in replies if r.stats.num_preemptions]
        assert preempted
        assert all(stats.num_restored_tokens >= 100 for stats in preempted)
        check(runtime)


class TestSuspend:
    def test_without_a_store_it_forgets(self, open_small):
        runtime = open_small("off")
        session = runtime.app().session()
        answer(session, random_ids(50), sampling(2))
        assert session.suspend() == 0
        assert runtime.pool_snapshot().used_bytes == 0
        assert runtime.counters().swap.num_forgotten_tokens == 51

    @pytest.mark.parametrize("mode", ["naive", "groups", "async", "reuse"])
    def test_it_is_on_disk_when_it_returns(self, open_small, mode):
        runtime = open_small(mode)
        session = runtime.app().session()
        reply = answer(session, random_ids(300), sampling(2))
        assert session.suspend() == session.suspend() == 301
        assert runtime.store_snapshot().num_tokens == 301
        again = answer(session, [*random_ids(300), *reply.token_ids, 9], sampling(2))
        assert again.stats.num_restored_tokens == 301

    def test_a_session_that_was_never_asked(self, open_small):
        assert open_small().app().session("s").suspend() == 0

    def test_a_session_that_answers_is_busy(self, open_small):
        session = open_small().app().session("s")
        with session.submit_ids(random_ids(20), sampling(500)) as stream:
            next(iter(stream))
            with pytest.raises(SessionBusy):
                session.suspend()


class TestHistories:
    def test_an_edited_history_keeps_its_prefix(self, open_small, shared_runtime):
        session = open_small().app().session("s")
        prompt = random_ids(300)
        answer(session, prompt, sampling(4))
        session.suspend()
        edited = prompt[:170] + random_ids(40, seed=1)
        reply = answer(session, edited, sampling(12))
        assert reply.stats.num_restored_tokens == reply.stats.num_cached_tokens == 170
        with shared_runtime.app("edited").session() as alone:
            expected = answer(alone, edited, sampling(12)).token_ids
        assert_same(shared_runtime, edited, reply.token_ids, expected)

    def test_so_it_does_after_a_restart(self, open_small):
        prompt = random_ids(300)
        runtime = open_small()
        answer(runtime.app().session("s"), prompt, sampling(4))
        runtime.close()
        edited = prompt[:170] + random_ids(40, seed=1)
        runtime = open_small()
        reply = answer(runtime.app().session("s"), edited, sampling(4))
        assert reply.stats.num_restored_tokens == 170
        runtime.close()
        # And what was edited away is gone: the new history is what is there.
        runtime = open_small()
        history = edited + list(reply.token_ids)
        reply = answer(runtime.app().session("s"), [*history, 7], sampling(1))
        assert reply.stats.num_restored_tokens == 170 + 40 + 3

    @pytest.mark.parametrize("suspended", [True, False])
    def test_a_common_prefix_is_stored_once(self, open_small, suspended):
        runtime = open_small(pool_bytes=1 << 25)
        histories = {}
        for name in ("a", "b", "c"):
            session = runtime.app().session(name)
            prompt = SYSTEM + random_ids(30, seed=ord(name))
            histories[name] = prompt + list(answer(session, prompt, sampling(5)).token_ids)
            if suspended:
                session.suspend()
        runtime.close()
        runtime = open_small(pool_bytes=1 << 25)
        assert runtime.store_snapshot().num_tokens == len(SYSTEM) + 3 * (30 + 4)
        for name, history in histories.items():
            reply = answer(runtime.app().session(name), [*history, 3], sampling(2))
            assert reply.stats.num_restored_tokens == len(SYSTEM) + 34
        # Of another app nobody has anything.
        other = answer(runtime.app("other").session("a"), [*SYSTEM, 3], sampling(2))
        assert other.stats.num_cached_tokens == 0

    def test_a_new_session_begins_with_what_its_app_has_on_disk(self, open_small):
        runtime = open_small()
        answer(runtime.app().session("a"), SYSTEM + random_ids(20), sampling(2))
        runtime.close()
        runtime = open_small()
        reply = answer(runtime.app().session("b"), SYSTEM + random_ids(20, seed=1), sampling(2))
        assert reply.stats.num_restored_tokens == len(SYSTEM)


class TestRestart:
    @pytest.mark.slow
    def test_nothing_is_computed_again(self, open_small, shared_runtime, talks):
        runtime = open_small()
        hold_talks(runtime, shared_runtime, {u: t[:2] for u, t in talks.items()})
        runtime.close()
        runtime = open_small()
        for user, turns in talks.items():
            prompt, _, said = turns[1]
            (reply,) = hold_talk(runtime, shared_runtime, user, turns[2:])
            assert reply.stats.num_restored_tokens == len(prompt) + len(said) - 1
        check(runtime)
        assert runtime.store_snapshot().num_records_lost == 0

    def test_sessions_without_a_name_are_gone(self, open_small):
        runtime = open_small()
        session = runtime.app().session()
        answer(session, random_ids(200), sampling(2))
        session.suspend()
        runtime.close()
        snapshot = open_small().store_snapshot()
        assert snapshot.num_sessions == snapshot.num_records == 0

    def test_only_in_reuse_mode_anything_is_kept(self, open_small):
        runtime = open_small("async")
        session = runtime.app().session("s")
        answer(session, random_ids(100), sampling(2))
        assert not session.kept
        assert session.suspend() == 101
        runtime.close()
        assert open_small().store_snapshot().num_sessions == 0

    def test_opened_again_right_after_it_was_closed(self, open_small):
        runtime = open_small()
        history = random_ids(150)
        for turn in range(4):
            session = runtime.app().session("s")
            reply = answer(session, history, sampling(6))
            assert reply.stats.num_cached_tokens == (0 if turn == 0 else len(history) - 11)
            history += [*reply.token_ids, *random_ids(10, seed=turn)]
            session.close()
        check(runtime)

    def test_a_removed_session_is_gone(self, open_small):
        runtime = open_small()
        answer(runtime.app().session("s"), random_ids(150), sampling(6))
        assert runtime.app().remove("s")
        reply = answer(runtime.app().session("s"), random_ids(160), sampling(6))
        assert reply.stats.num_cached_tokens == 0
        check(runtime)


class TestSecondRuntime:
    def test_it_swaps_in_a_store_of_its_own_and_leaves_nothing(self, open_small, kv_folder, capsys):
        roomy = 256 * MIB  # each of the two preallocates a step
        first = open_small(disk_bytes=roomy)
        history = random_ids(200)
        answer(first.app().session("s"), history, sampling(1))
        second = open_small(disk_bytes=roomy)
        warning = capsys.readouterr().err
        assert "warning:" in warning
        assert "in use by process" in warning
        assert len([p for p in kv_folder.iterdir() if p.is_dir()]) == 2
        session = second.app().session("s")
        assert not session.kept
        reply = answer(session, history, sampling(1))
        assert reply.stats.num_cached_tokens == 0
        assert session.suspend() == 200
        assert answer(session, [*history, 5], sampling(1)).stats.num_restored_tokens == 200
        check(second)
        second.close()
        assert len([p for p in kv_folder.iterdir() if p.is_dir()]) == 1
        first.close()
        third = open_small()
        assert capsys.readouterr().err == ""
        reply = answer(third.app().session("s"), [*history, 5], sampling(1))
        assert reply.stats.num_restored_tokens == 200

    def test_what_a_killed_one_left_is_removed(self, open_small, kv_folder):
        left = kv_folder / ("private" + "0" * 25)
        options = {
            "model": "m",
            "layers": layers_of(64),
            "disk_bytes": MIB,
            "free_reserve_bytes": 0,
        }
        with Store.open(kv_folder, fingerprint=left.name, **options) as store:
            key = store.session("app", "s", persistent=True).key
            store.write(key, 0, [1], [bytes(64)])
        alive = Store.open(kv_folder, fingerprint="private" + "1" * 25, **options)
        open_small()
        assert not left.exists()
        assert alive.folder.exists()
        alive.close()


class TestBudgets:
    @pytest.mark.slow
    def test_disk_and_memory_at_any_moment(self, open_small, shared_runtime, talks, kv_folder):
        disk_bytes = MIB
        runtime = open_small(disk_bytes=disk_bytes)
        ends, seen = threading.Event(), []

        def look():
            while not ends.wait(0.002):
                seen.append((folder_bytes(kv_folder), runtime.pool_snapshot().allocated_bytes))

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            hold_talks(runtime, shared_runtime, talks)
        finally:
            ends.set()
            watcher.join()
        assert max(disk for disk, _ in seen) <= disk_bytes
        assert max(memory for _, memory in seen) <= TIGHT_BYTES
        check(runtime)
        snapshot = runtime.store_snapshot()
        assert snapshot.num_evicted + snapshot.num_full > 0
        runtime.close()
        assert folder_bytes(kv_folder) <= disk_bytes

    def test_staging_is_part_of_the_pool(self, open_small):
        runtime = open_small()
        pool = runtime.pool_snapshot()
        assert 0 < pool.staging_bytes <= pool.budget_bytes // 8
        assert pool.sessions_bytes + pool.staging_bytes == pool.budget_bytes == TIGHT_BYTES

    def test_no_disk_at_all(self, open_small, shared_runtime, talks, kv_folder):
        runtime = open_small(disk_bytes=0)
        assert runtime.store_snapshot() is None
        session = runtime.app().session("s")
        assert not session.kept
        (prompt, params, expected), *_ = talks[0]
        assert_same(shared_runtime, prompt, answer(session, prompt, params).token_ids, expected)
        assert session.suspend() == 0
        assert not kv_folder.exists()

    def test_kv_of_a_process_that_could_move_it_in_one_that_cannot(
        self, open_small, shared_runtime, talks
    ):
        (prompt, params, expected), *_ = talks[0]
        runtime = open_small()
        session = runtime.app().session("s")
        answer(session, prompt, params)
        assert session.suspend() > 0
        runtime.close()
        runtime = open_small(swap=SwapOptions(staging_bytes=0))
        session = runtime.app().session("s")
        again = answer(session, prompt, params)
        assert_same(shared_runtime, prompt, again.token_ids, expected)
        check(runtime)

    def test_a_volume_that_is_full(self, open_small, shared_runtime, talks, kv_folder):
        """All of it is reserved: nothing is written, and everybody is answered."""
        full = StoreOptions(folder=kv_folder, free_reserve_bytes=1 << 60)
        runtime = open_small(store=full)
        session = runtime.app().session("s")
        (prompt, params, expected), *_ = talks[0]
        assert_same(shared_runtime, prompt, answer(session, prompt, params).token_ids, expected)
        assert session.suspend() == 0
        snapshot = runtime.store_snapshot()
        assert snapshot.num_full > 0
        assert snapshot.num_writes == snapshot.used_bytes == 0
        assert runtime.counters().swap.num_forgotten_tokens > 0
        reply = answer(session, prompt, params)
        assert reply.stats.num_cached_tokens == 0
        assert_same(shared_runtime, prompt, reply.token_ids, expected)

    def test_a_pool_that_has_no_room_for_staging(self, open_small):
        """It answers, and keeps what was said, but no KV."""
        runtime = open_small(pool_bytes=GRANULE_BYTES)
        assert runtime.pool_snapshot().staging_bytes == 0
        for name in ("a", "b", "a"):
            session = runtime.app().session(name)
            reply = answer(session, random_ids(60), sampling(3))
            assert len(reply.token_ids) == 3
        assert runtime.counters().swap.num_forgotten_tokens > 0
        said = runtime.app().session("c").respond("hi", sampling=replace(sampling(3), seed=1))
        runtime.close()
        runtime = open_small(pool_bytes=GRANULE_BYTES)
        assert runtime.app().session("c").messages[-1].content == said.text
        assert runtime.store_snapshot().num_records == 0

    def test_a_folder_that_cannot_be_made(self, tiny_folder, tmp_path):
        (tmp_path / "file").write_text("")
        num_threads = threading.active_count()
        store = StoreOptions(folder=tmp_path / "file" / "kv")
        with pytest.raises(StoreUnusable, match="file") as caught:
            Runtime.open(
                str(tiny_folder), config=RuntimeConfig(pool_bytes=TIGHT_BYTES, store=store)
            )
        assert caught.value.hint
        assert threading.active_count() == num_threads

    def test_a_session_without_a_name_writes_nothing_while_there_is_room(self, open_small):
        runtime = open_small(pool_bytes=1 << 25)
        for i in range(3):
            answer(runtime.app().session(), random_ids(300, seed=i), sampling(5))
        assert runtime.store_snapshot().num_writes == 0
        runtime.close()

    @pytest.mark.slow
    @pytest.mark.parametrize("suspends", [True, False])
    def test_kv_is_written_once(self, open_small, suspends):
        """Less than a tenth more than what was computed, headers and all."""
        runtime = open_small(pool_bytes=1 << 25)
        session = runtime.app().session("s")
        history = []
        for turn in range(7):
            prompt = history + random_ids(100, seed=turn)
            history = prompt + list(answer(session, prompt, sampling(30)).token_ids)
            if suspends:
                assert session.suspend() == len(history) - 1
        runtime.close()
        runtime = open_small()
        snapshot = runtime.store_snapshot()
        assert snapshot.num_tokens == len(history) - 1
        new_bytes = (len(history) - 1) * TOKEN_BYTES
        assert new_bytes <= snapshot.total_written_bytes <= 1.1 * new_bytes


class Restless:
    """A user who cancels, closes, opens again and edits, at random moments."""

    def __init__(self, runtime, judge, turns, seed):
        self.runtime, self.judge, self.turns = runtime, judge, turns
        self.draw = random.Random(seed)
        self.user = seed % 100

    def run(self):
        for _ in range(12):
            prompt, params, expected = self.draw.choice(self.turns)
            session = session_of(self.runtime, self.user, named=self.draw.random() < 0.7)
            stream = session.submit_ids(prompt, params)
            num_wanted = self.draw.choice([0, 0, 1, 2, 5, 100])
            said = []
            for delta in stream if num_wanted else ():
                said += delta.token_ids
                if len(said) >= num_wanted:
                    break
            self.leave(session, stream)
            tokens = stream.reply.token_ids
            assert_same(self.judge, prompt, tokens, expected[: len(tokens)])

    def leave(self, session, stream):
        how = self.draw.choice(["cancel", "cancel", "close", "close", "end"])
        if how == "end":
            for _ in stream:
                pass
        elif how == "cancel":
            stream.close()
        session.close() if how == "close" else None
        stream.close()
        if how != "close" and self.draw.random() < 0.5:
            session.suspend()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reuse", "async", "off"])
def test_users_who_change_their_minds(open_small, shared_runtime, talks, mode):
    runtime = open_small(mode)
    users = [Restless(runtime, shared_runtime, turns, seed=u) for u, turns in talks.items()]
    with ThreadPoolExecutor(len(users)) as pool:
        for future in [pool.submit(user.run) for user in users]:
            future.result()
    check(runtime)
    for app in runtime.apps():
        app.close()
    check(runtime)
    eventually(lambda: runtime.pool_snapshot().used_bytes == 0)
    assert runtime.counters().swap.num_io_errors == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reuse", "async", "naive"])
def test_a_disk_that_fails_now_and_then(open_small, shared_runtime, talks, mode, monkeypatch):
    """A tenth of all calls fails, or hands over something else."""
    draw, count = random.Random(4), {"EIO": 0, "flip": 0}

    def failing(name):
        call = getattr(Files, name)

        def maybe(self, fd, buffers, offset):
            luck = draw.random()
            if luck < 0.05:
                count["EIO"] += 1
                raise OSError(errno.EIO, "injected")
            result = call(self, fd, buffers, offset)
            if name == "preadv" and luck > 0.95:
                count["flip"] += 1
                memoryview(buffers[-1]).cast("B")[0] ^= 4
            return result

        monkeypatch.setattr(Files, name, maybe)

    failing("preadv")
    failing("pwritev")
    runtime = open_small(mode)
    hold_talks(runtime, shared_runtime, talks)
    runtime.check_integrity()
    assert sum(count.values()) > 0
    assert runtime.counters().swap.num_io_errors >= count["EIO"]
    if count["flip"] and mode != "naive":
        assert runtime.store_snapshot().num_corrupt > 0


@pytest.mark.slow
@pytest.mark.faults
def test_five_hundred_sessions_in_a_pool_of_five(open_small, shared_runtime):
    runtime = open_small(pool_bytes=6 * GRANULE_BYTES, disk_bytes=128 * MIB)
    assert runtime.pool_snapshot().sessions_bytes // GRANULE_BYTES == 5
    prompts = [random_ids(12 + i % 20, seed=i) for i in range(500)]
    sessions = [runtime.app(f"app-{i % 5}").session() for i in range(500)]
    streams = [s.submit_ids(p, sampling(4)) for s, p in zip(sessions, prompts, strict=True)]
    for stream in streams:
        for _ in stream:
            pass
    runtime.check_integrity()
    pool = runtime.pool_snapshot()
    assert pool.peak_bytes <= pool.budget_bytes
    assert runtime.counters().swap.num_swap_outs >= 490
    num_read = 0
    for i in range(0, 500, 50):
        with shared_runtime.app(f"one-of-{i}").session() as alone:
            expected = answer(alone, prompts[i], sampling(4)).token_ids
        assert_same(shared_runtime, prompts[i], streams[i].reply.token_ids, expected)
        history = prompts[i] + list(streams[i].reply.token_ids)
        again = answer(sessions[i], [*history, 5], sampling(2)).stats
        assert again.num_cached_tokens == len(history) - 1
        assert again.num_restored_tokens in (0, len(history) - 1)
        num_read += again.num_restored_tokens > 0
    assert num_read >= 10 - 5, "one that was preempted may have ended last, and be in memory"
