"""What was said is on disk once a reply is returned; what damage, a full disk or a kill costs."""

import asyncio
import json
import shutil
import threading
from contextlib import closing

import pytest
from tiny_runtime import sampling

from edgekv.config import RuntimeConfig, StoreOptions
from edgekv.errors import NotKept, StoreError, StoreFull
from edgekv.runtime import Runtime
from edgekv.runtime.conversation import stored_messages
from edgekv.store import Store
from edgekv.store.disk import Disk


@pytest.fixture
def begun(restart):
    """A session in which something was said."""
    session = restart().session("inbox")
    session.respond("One", sampling=sampling(3))
    return session


def num_kept_after_another_turn(session, restart):
    """Messages that are there after a restart; what could not be saved goes along with a turn."""
    session.respond("More", sampling=sampling(3))
    assert session.warning == ""
    assert session._runtime.store_snapshot().num_unsaved == 0
    return len(restart().session("inbox").messages)


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
    assert num_kept_after_another_turn(session, restart) == 4


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
        with pytest.raises(NotKept, match=r"2 sessions cannot be kept .*'inbox'.* disk budget"):
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
    assert "cannot be kept" in "".join(caught.value.__notes__)


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
    assert num_kept_after_another_turn(session, restart) == 6


# --- a folder that vanishes ---


def test_a_folder_that_vanishes_is_said_and_noticed_when_it_comes_back(begun, restart, kv_folder):
    away = kv_folder.with_name("away")
    kv_folder.rename(away)
    begun.respond("Two", sampling=sampling(3))
    assert "not kept" in begun.warning
    assert "No such file" in begun.warning
    assert begun._runtime.store_snapshot().num_unsaved == 1
    away.rename(kv_folder)
    assert num_kept_after_another_turn(begun, restart) == 6


def test_a_folder_that_was_removed_takes_nothing_and_says_so(begun, kv_folder):
    """SQLite would go on writing into files that no one can open any more."""
    shutil.rmtree(kv_folder)
    begun.respond("Two", sampling=sampling(3))
    assert "No such file" in begun.warning
    with pytest.raises(NotKept, match="1 session cannot be kept"):
        begun._runtime.close()


def test_of_a_folder_that_was_removed_nothing_is_claimed_kept(restart, kv_folder):
    """What was kept before goes with it, in sessions that say nothing more, too."""
    app = restart()
    said, silent = app.session("said"), app.session("silent")
    for session in (said, silent):
        session.respond("One", sampling=sampling(3))
        assert session.kept
    shutil.rmtree(kv_folder)
    for session in (said, silent):
        assert not session.kept
        assert "is not kept" in session.warning
        assert "No such file" in session.warning
    with pytest.raises(StoreError, match="No such file") as caught:
        app.sessions()
    assert "put the folder back" in caught.value.hint
    reply = said.respond("Two", sampling=sampling(3))
    assert reply.finish_reason == "length"
    assert len(said.messages) == 4, "what memory has goes on"
    with pytest.raises(NotKept, match=r"in 2 sessions cannot be kept \('said', 'silent'\)"):
        app._runtime.close()
    assert not list(kv_folder.rglob("*")), "nothing is written to where it was"
    again = restart()
    assert again.sessions() == []
    assert again.session("said").messages == []


def test_a_folder_of_kv_that_was_removed_is_made_anew(restart, kv_folder):
    """To have room, most likely; what was said is in the index."""
    app = restart()
    session = app.session("inbox")
    session.respond("One", sampling=sampling(3))
    assert session.suspend() > 0
    [folder] = kv_folder.rglob("kv")
    shutil.rmtree(folder)
    reply = session.respond("Two", sampling=sampling(3))
    assert reply.stats.num_restored_tokens == 0
    assert session.suspend() > 0
    assert session.kept
    reply = restart().session("inbox").respond("Three", sampling=sampling(3))
    assert reply.stats.num_restored_tokens > 0


def test_another_folder_in_its_place_is_not_taken_for_it(begun, restart, kv_folder):
    copy = kv_folder.with_name("copy")
    shutil.copytree(kv_folder, copy)
    shutil.rmtree(kv_folder)
    copy.rename(kv_folder)
    begun.respond("Two", sampling=sampling(3))
    assert "another file" in begun.warning
    with pytest.raises(NotKept):
        begun._runtime.close()
    assert len(restart().session("inbox").messages) == 2


def test_a_folder_that_becomes_read_only_is_said_and_noticed_when_it_is_not_any_more(restart):
    app = restart()
    session = app.session("inbox")
    writer = app._runtime._store._disk.index._writer
    writer.execute("PRAGMA query_only=ON")  # as on a volume that was mounted again so
    session.respond("One", sampling=sampling(3))
    assert "readonly" in session.warning
    writer.execute("PRAGMA query_only=OFF")
    assert num_kept_after_another_turn(session, restart) == 4
