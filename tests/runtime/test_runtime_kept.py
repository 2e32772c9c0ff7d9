"""Named sessions: what was said is kept, found again, and damaged only as far as it must be."""

import asyncio
import json
import shutil
import threading
from contextlib import closing

import pytest
from tiny_runtime import sampling

from edgekv.config import RuntimeConfig, StoreOptions
from edgekv.errors import ConfigError, NotKept, RuntimeClosed, StoreFull, StoreUnusable
from edgekv.runtime import ChatMessage, Runtime, loading
from edgekv.runtime import runtime as runtime_module
from edgekv.runtime.conversation import stored_messages
from edgekv.store import Store
from edgekv.store.disk import Disk


@pytest.fixture
def restart(tiny_folder):
    """Opens a runtime once the one before is closed; returns an app of it."""
    runtimes = []

    def close():
        for runtime in runtimes:
            if not runtime._closed:
                runtime.check_integrity()
                runtime.close()
        runtimes.clear()

    def open_again():
        close()
        runtimes.append(Runtime.open(str(tiny_folder), config=RuntimeConfig(pool_bytes=1 << 26)))
        return runtimes[0].app("mail")

    open_again.close = close
    yield open_again
    close()


@pytest.fixture
def kv_folder(_own_kv):
    return _own_kv


@pytest.fixture
def stored(kv_folder):
    """Sessions on disk, by name; a runtime may have them open."""
    return lambda: {
        session.name: session
        for view in Store.open_readonly(kv_folder)
        for session in view.sessions
    }


# --- there and back ---


def test_a_named_session_goes_on_where_it_was(restart):
    undisturbed = restart().session()
    for text in ("One", "Two", "Three"):
        expected = undisturbed.respond(text, sampling=sampling(6))

    app = restart()
    first = app.session("inbox")
    assert first.kept
    assert app._runtime.keeps_sessions
    first.respond("One", sampling=sampling(6))
    first.respond("Two", sampling=sampling(6))
    again = restart().session("inbox")
    assert again.messages == first.messages
    reply = again.respond("Three", sampling=sampling(6))
    assert reply.token_ids == expected.token_ids
    assert reply.stats.num_prompt_tokens == expected.stats.num_prompt_tokens
    assert reply.stats.num_cached_tokens == expected.stats.num_cached_tokens
    assert reply.stats.num_restored_tokens == reply.stats.num_cached_tokens > 0
    assert again.warning == ""


def test_the_tokens_that_were_spoken_are_kept(restart):
    """They may differ from what the text encodes to, and the KV belongs to them."""
    first = restart().session("inbox")
    first.respond("One", sampling=sampling(6))
    again = restart().session("inbox")
    assert again._talk.conversation == first._talk.conversation
    assert again._talk.conversation.spoken is not None


def test_an_unnamed_session_is_not_kept(restart, stored):
    session = restart().session()
    session.respond("One", sampling=sampling(3))
    assert not session.kept
    restart()
    assert stored() == {}


def test_an_unnamed_session_never_meets_a_stored_one(restart):
    app = restart()
    number = int(app.session().name.removeprefix("session-"))
    names = [f"session-{number + i}" for i in range(1, 6)]
    for name in names:
        app.session(name).respond("One", sampling=sampling(2))
    app = restart()
    assert all(app.session().name not in names for _ in range(8))


def test_a_session_that_is_given_an_unnamed_ones_name_is_kept_and_no_part_of_that(restart):
    app = restart()
    unnamed = app.session()
    unnamed.respond("One", sampling=sampling(2))
    named = app.session(unnamed.name)
    assert named.kept
    assert named.messages == []
    named.respond("Two", sampling=sampling(2))
    unnamed.close()
    assert named.respond("Three", sampling=sampling(2)).finish_reason == "length"
    assert len(restart().session(unnamed.name).messages) == 4


def test_a_cleared_conversation_is_stored_so(restart):
    first = restart().session("inbox", system="Be brief.")
    first.respond("One", sampling=sampling(3))
    first.clear()
    assert restart().session("inbox").messages == [ChatMessage(role="system", content="Be brief.")]


def test_what_there_was_of_a_cancelled_answer_is_kept(restart):
    session = restart().session("inbox")
    session.respond("One", sampling=sampling(3))
    with session.stream("Two", sampling=sampling(500)) as stream:
        next(stream)
    again = restart().session("inbox")
    assert again.messages == session.messages
    assert len(again.messages) == 4


def test_it_is_on_disk_while_the_runtime_is_open(restart, stored):
    session = restart().session("inbox")
    session.respond("One", sampling=sampling(3))
    assert stored_messages(stored()["inbox"].conversation) == tuple(session.messages)


def test_closed_and_opened_again_at_once(restart):
    app = restart()
    for number in range(10):
        with app.session("inbox") as session:
            assert len(session.messages) == 2 * number
            session.respond("One", sampling=sampling(3))


def test_what_a_session_was_saying_when_it_was_closed_is_kept_and_nothing_later(restart):
    app = restart()
    old = app.session("inbox")
    stream = old.stream("One", sampling=sampling(500))
    next(stream)
    old.close()
    assert list(stream) == []
    said = stream.reply.text
    app.session("inbox").respond("Two", sampling=sampling(3))
    messages = restart().session("inbox").messages
    assert [m.content for m in messages][:3] == ["One", said, "Two"]
    assert len(messages) == 4


def test_another_runtime_keeps_nothing_and_disturbs_nothing(restart, open_runtime, capsys):
    session = restart().session("inbox")
    session.respond("One", sampling=sampling(3))
    second = open_runtime()
    assert "in use by process" in capsys.readouterr().err
    assert not second.keeps_sessions
    other = second.app("mail").session("inbox")
    assert (other.kept, other.messages) == (False, [])
    other.respond("Two", sampling=sampling(3))
    assert restart().session("inbox").messages == session.messages


# --- system prompts ---


def test_clearing_may_change_the_system_prompt(restart):
    session = restart().session("inbox", system="Be brief.")
    session.respond("One", sampling=sampling(3))
    session.clear(system="Be long.")
    assert session.system == "Be long."
    app = restart()
    assert app.session("inbox").system == "Be long."
    assert app.session("inbox", system="Be long.").messages == app.session("inbox").messages
    with pytest.raises(ConfigError):
        app.session("inbox", system="Be brief.")


def test_another_system_prompt_is_refused_after_a_restart_too(restart):
    restart().session("inbox", system="Be brief.").respond("One", sampling=sampling(3))
    app = restart()
    with pytest.raises(ConfigError, match="another system prompt") as caught:
        app.session("inbox", system="Be long.")
    assert caught.value.hint
    session = app.session("inbox", system="Be brief.")
    assert [m.role for m in session.messages] == ["system", "user", "assistant"]


def test_where_nothing_was_said_the_system_prompt_may_change(restart):
    restart().session("inbox", system="Be brief.")
    assert restart().session("inbox", system="Be long.").system == "Be long."


# --- damage ---


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda text: "{", 0),
        (lambda text: text[:-5], 0),
        (lambda text: text.replace('"user"', '"root"'), 0),
        (lambda text: text.replace('"version":1', '"version":99'), 2),
        (lambda text: json.dumps(json.loads(text) | {"spoken": {"text": "", "ids": [7]}}), 2),
    ],
)
def test_damage_costs_no_more_than_it_must(restart, kv_folder, change, left):
    app = restart()
    app.session("inbox").respond("One", sampling=sampling(3))
    restart.close()
    (view,) = Store.open_readonly(kv_folder)
    with closing(Store.reopen(view)) as store:
        store.set_conversation(view.sessions[0].key, change(view.sessions[0].conversation))
    app = restart()
    session = app.session("inbox")
    assert "session 'inbox'" in session.warning
    assert len(session.messages) == left
    assert session.respond("Two", sampling=sampling(3)).token_ids
    assert restart().session("inbox").warning == "", "what was saved since is whole"


def test_a_full_disk_stops_no_conversation(restart, monkeypatch):
    app = restart()
    session = app.session("inbox")
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "commit_text", full)
        session.respond("One", sampling=sampling(3))
        assert "not kept: the disk budget" in session.warning
        assert app._runtime.store_snapshot().num_unsaved == 1
    session.respond("Two", sampling=sampling(3))
    assert session.warning == ""
    assert app._runtime.store_snapshot().num_unsaved == 0
    assert len(restart().session("inbox").messages) == 4


def full(*_, **__):
    raise StoreFull("the disk budget of 1 MiB is reached")


def test_what_failed_is_written_when_the_runtime_closes(restart, monkeypatch):
    app = restart()
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "commit_text", full)
        app.session("inbox").respond("One", sampling=sampling(3))
    assert len(restart().session("inbox").messages) == 2


def test_text_is_kept_where_the_volume_has_no_room_for_kv(open_runtime):
    options = StoreOptions(free_reserve_bytes=1 << 60)
    runtime = open_runtime(store=options)
    session = runtime.app().session("inbox")
    session.respond("One", sampling=sampling(40))
    assert (session.suspend(), session.warning) == (0, "")
    assert runtime.store_snapshot().num_full > 0
    runtime.close()
    assert len(open_runtime(store=options).app().session("inbox").messages) == 2


def test_closing_says_what_could_not_be_saved_and_ends_all_the_same(restart, monkeypatch):
    app = restart()
    runtime = app._runtime
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "commit_text", full)
        app.session("inbox").respond("One", sampling=sampling(3))
        app.session("other").respond("One", sampling=sampling(3))
        with pytest.raises(NotKept, match=r"2 sessions are not kept .*'inbox'.* disk budget"):
            runtime.close()
    assert not runtime._engine.thread.is_alive()
    runtime.close()
    assert restart().session("inbox").messages == [], "and others can have the store"


def test_an_error_in_the_block_is_the_one_that_is_raised(tiny_folder, monkeypatch):
    monkeypatch.setattr(Disk, "commit_text", full)

    def talk_and_fail():
        with Runtime.open(str(tiny_folder), config=RuntimeConfig(pool_bytes=1 << 26)) as runtime:
            runtime.app().session("inbox").respond("One", sampling=sampling(3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        talk_and_fail()
    assert "not kept" in "".join(caught.value.__notes__)


# --- what a kill leaves ---


def left(kv_folder, tmp_path):
    """What was said, as it stands once the process is gone: nothing is flushed for it."""
    copy = tmp_path / "killed"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(kv_folder, copy)
    (view,) = Store.open_readonly(copy)
    return {one.name: stored_messages(one.conversation) for one in view.sessions}


def test_a_reply_is_returned_after_its_turn_is_on_disk(restart, kv_folder, tmp_path):
    session = restart().session("inbox")
    for number in range(3):
        session.respond("One", sampling=sampling(3))
        assert left(kv_folder, tmp_path)["inbox"] == tuple(session.messages)
        assert len(session.messages) == 2 * number + 2
    for _ in session.stream("Two", sampling=sampling(3)):
        pass
    assert len(left(kv_folder, tmp_path)["inbox"]) == 8


def test_so_is_an_asynchronous_one_and_the_loop_does_not_wait(
    restart, kv_folder, tmp_path, monkeypatch
):
    session = restart().session("inbox")
    commit, threads = Disk.commit_text, []

    def seen(*args, **options):
        threads.append(threading.current_thread())
        commit(*args, **options)

    monkeypatch.setattr(Disk, "commit_text", seen)

    async def ask():
        await session.arespond("One", sampling=sampling(3))
        assert len(left(kv_folder, tmp_path)["inbox"]) == 2
        async for _ in await session.astream("Two", sampling=sampling(3)):
            pass
        assert len(left(kv_folder, tmp_path)["inbox"]) == 4

    asyncio.run(ask())
    assert len(threads) == 2
    assert threading.current_thread() not in threads


def test_a_task_that_is_cancelled_while_its_turn_is_saved(restart, monkeypatch):
    session = restart().session("inbox")
    commit, saving, go_on = Disk.commit_text, threading.Event(), threading.Event()

    def slow(*args, **options):
        saving.set()
        assert go_on.wait(60)
        commit(*args, **options)

    monkeypatch.setattr(Disk, "commit_text", slow)

    async def ask():
        task = asyncio.ensure_future(session.arespond("One", sampling=sampling(3)))
        await asyncio.to_thread(saving.wait)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(session.messages) == 2
        await session.arespond("Two", sampling=sampling(3))

    asyncio.run(ask())
    assert len(restart().session("inbox").messages) == 4


def test_what_is_cleared_is_not_there_again(restart, kv_folder, tmp_path):
    session = restart().session("inbox")
    session.respond("One is a secret", sampling=sampling(3))
    session.clear(system="A system prompt that is longer than all that was said before it.")
    assert [m.role for m in left(kv_folder, tmp_path)["inbox"]] == ["system"]
    assert not any(b"a secret" in p.read_bytes() for p in kv_folder.rglob("*") if p.is_file())


def test_a_bug_while_a_turn_is_saved_is_raised_and_nobody_hangs(restart, monkeypatch):
    app = restart()
    session = app.session("inbox")
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "commit_text", lambda *_, **__: 1 / 0)
        for ask in (
            lambda: session.respond("One", sampling=sampling(3)),
            lambda: asyncio.run(session.arespond("Two", sampling=sampling(3))),
        ):
            with pytest.raises(ZeroDivisionError):
                ask()
        assert "an error in edgekv" in session.warning
    assert len(session.messages) == 4
    session.respond("Three", sampling=sampling(3))
    assert session.warning == ""
    assert len(restart().session("inbox").messages) == 6


# --- a folder that vanishes ---


def test_a_folder_that_vanishes_is_said_and_noticed_when_it_comes_back(restart, kv_folder):
    app = restart()
    session = app.session("inbox")
    session.respond("One", sampling=sampling(3))
    away = kv_folder.with_name("away")
    kv_folder.rename(away)
    session.respond("Two", sampling=sampling(3))
    assert "not kept" in session.warning
    assert "No such file" in session.warning
    assert app._runtime.store_snapshot().num_unsaved == 1
    away.rename(kv_folder)
    session.respond("Three", sampling=sampling(3))
    assert session.warning == ""
    assert len(restart().session("inbox").messages) == 6


def test_a_folder_that_was_removed_takes_nothing_and_says_so(restart, kv_folder):
    """SQLite would go on writing into files that no one can open any more."""
    app = restart()
    session = app.session("inbox")
    session.respond("One", sampling=sampling(3))
    shutil.rmtree(kv_folder)
    session.respond("Two", sampling=sampling(3))
    assert "No such file" in session.warning
    with pytest.raises(NotKept, match="1 session are not kept"):
        app._runtime.close()


def test_another_folder_in_its_place_is_not_taken_for_it(restart, kv_folder):
    app = restart()
    session = app.session("inbox")
    session.respond("One", sampling=sampling(3))
    copy = kv_folder.with_name("copy")
    shutil.copytree(kv_folder, copy)
    shutil.rmtree(kv_folder)
    copy.rename(kv_folder)
    session.respond("Two", sampling=sampling(3))
    assert "another file" in session.warning
    with pytest.raises(NotKept):
        app._runtime.close()
    assert len(restart().session("inbox").messages) == 2


def test_a_folder_that_becomes_read_only_is_said_and_noticed_when_it_is_not_any_more(restart):
    app = restart()
    session = app.session("inbox")
    writer = app._runtime._store._disk.index._writer
    writer.execute("PRAGMA query_only=ON")  # as on a volume that was mounted again so
    session.respond("One", sampling=sampling(3))
    assert "readonly" in session.warning
    writer.execute("PRAGMA query_only=OFF")
    session.respond("Two", sampling=sampling(3))
    assert session.warning == ""
    assert len(restart().session("inbox").messages) == 4


# --- another fingerprint ---


def opened_as(monkeypatch, name):
    """From now on the model's fingerprint is this."""
    monkeypatch.setattr(loading, "kv_fingerprint", lambda *_, **__: name)


OLD, NEW, NEWER = "a" * 32, "b" * 32 + "w2", "c" * 32 + "w2"


def test_what_was_said_under_an_earlier_fingerprint_is_carried_over(
    restart, stored, kv_folder, monkeypatch
):
    opened_as(monkeypatch, OLD)
    app = restart()
    for name in ("inbox", "outbox"):
        app.session(name, system="Be brief.").respond(f"In {name}", sampling=sampling(3))
    said = {name: app.session(name).messages for name in ("inbox", "outbox")}
    restart.close()
    before = stored()
    opened_as(monkeypatch, NEW)
    app = restart()
    assert [info.name for info in app.sessions()] == ["outbox", "inbox"]
    for name, messages in said.items():
        session = app.session(name)
        assert (session.messages, session.warning) == (messages, "")
        spoken = session._talk.conversation.spoken
        assert spoken is None, "another tokenizer may have made its tokens"
    reply = app.session("inbox").respond("More", sampling=sampling(3))
    assert reply.stats.num_cached_tokens < 30, "of its KV nothing"
    restart.close()
    assert stored()["outbox"].created_s == before["outbox"].created_s
    assert [len(view.sessions) for view in Store.open_readonly(kv_folder)] == [0, 2]


def test_a_namesake_stays_where_it_is(restart, kv_folder, monkeypatch):
    opened_as(monkeypatch, NEW)
    restart().session("inbox").respond("New", sampling=sampling(3))
    restart.close()
    opened_as(monkeypatch, OLD)
    restart().session("inbox").respond("Old", sampling=sampling(3))
    restart.close()
    opened_as(monkeypatch, NEW)
    assert restart().session("inbox").messages[0].content == "New"
    assert [len(view.sessions) for view in Store.open_readonly(kv_folder)] == [1, 1]


def test_who_is_killed_while_it_is_carried_over_leaves_it_once(
    restart, stored, kv_folder, monkeypatch
):
    opened_as(monkeypatch, OLD)
    restart().session("inbox").respond("One", sampling=sampling(3))
    restart.close()
    opened_as(monkeypatch, NEW)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "forget", lambda store, key: None)
        restart()
        restart.close()
    assert [len(view.sessions) for view in Store.open_readonly(kv_folder)] == [1, 1]
    assert len(restart().session("inbox").messages) == 2
    assert [len(view.sessions) for view in Store.open_readonly(kv_folder)] == [0, 1]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), StoreFull("no room")])
def test_what_cannot_be_carried_over_waits_for_the_next_time(restart, monkeypatch, error):
    opened_as(monkeypatch, OLD)
    restart().session("inbox").respond("One", sampling=sampling(3))
    restart.close()
    opened_as(monkeypatch, NEW)

    def refuse(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "commit_text", refuse)
        assert restart().session().respond("Hi", sampling=sampling(3)).text is not None
        restart.close()
    assert len(restart().session("inbox").messages) == 2


def test_of_a_path_only_what_an_earlier_release_kept_is_carried_over(restart, monkeypatch):
    """In another folder the same path may be another model; a name is the same everywhere."""
    opened_as(monkeypatch, NEW)
    restart().session("inbox").respond("One", sampling=sampling(3))
    restart.close()
    opened_as(monkeypatch, NEWER)
    assert restart().session("inbox").messages == []
    restart.close()
    opened_as(monkeypatch, "d" * 32 + "w2")
    carry = runtime_module.carry_over
    monkeypatch.setattr(
        runtime_module, "carry_over", lambda store, is_place: carry(store, is_place=False)
    )
    assert len(restart().session("inbox").messages) == 2


def test_a_store_that_cannot_be_read_opens_no_session(restart, monkeypatch):
    app = restart()

    def broken(*args, **options):
        raise StoreUnusable("the index is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(app._runtime._store, "session", broken)
        with pytest.raises(StoreUnusable):
            app.session("inbox")
    assert app.session("inbox").respond("One", sampling=sampling(3)).token_ids


@pytest.mark.parametrize("name", ["\udcff", "a\ud83d", "\0", "\x001"])
def test_a_name_that_no_file_can_hold(restart, name):
    with pytest.raises(ConfigError, match="session name is") as caught:
        restart().session(name)
    assert "surrogates" in caught.value.hint


# --- all of an app's ---


def test_an_app_knows_its_sessions(restart):
    app = restart()
    app.session("inbox").respond("One", sampling=sampling(3))
    app.session("outbox").respond("One", sampling=sampling(3))
    app.session().respond("One", sampling=sampling(3))
    app._runtime.app("notes").session("other").respond("One", sampling=sampling(3))
    assert [info.name for info in app.sessions()] == ["outbox", "inbox"]
    app.session("inbox").respond("Two", sampling=sampling(3))
    inbox, outbox = restart().sessions()
    assert (inbox.name, inbox.num_messages, inbox.is_begun) == ("inbox", 4, True)
    assert (outbox.name, outbox.num_messages, outbox.is_begun) == ("outbox", 2, True)
    assert inbox.num_tokens > outbox.num_tokens > 0
    assert inbox.used_s > outbox.used_s


def test_a_removed_session_is_gone(restart, stored):
    app = restart()
    session = app.session("inbox")
    session.respond("One", sampling=sampling(3))
    assert app.remove("inbox")
    assert not app.remove("inbox")
    with pytest.raises(RuntimeClosed):
        session.respond("Two")
    app = restart()
    assert stored() == {}
    assert app.session("inbox").messages == []


def test_a_session_is_removed_while_it_answers(restart, stored):
    app = restart()
    stream = app.session("inbox").stream("One", sampling=sampling(500))
    next(stream)
    assert app.remove("inbox")
    list(stream)
    assert app.session("inbox").messages == []
    restart()
    assert all(session.conversation is None for session in stored().values())


def test_without_a_store_no_session_is_kept(open_runtime):
    app = open_runtime(store=StoreOptions(disk_bytes=0)).app("mail")
    session = app.session("inbox")
    assert not session.kept
    assert session.warning == ""
    assert app.sessions() == []
    assert app.remove("inbox")
    assert not app.remove("inbox")
