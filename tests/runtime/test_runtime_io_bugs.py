"""A bug on an I/O thread, or in what follows it, is a failure with its traceback: never a miss.

And whoever waits for an answer is told.
"""

import traceback

import pytest
from tiny_runtime import sampling

from edgekv.config import RuntimeConfig
from edgekv.engine.inbox import Inbox, IoReady
from edgekv.engine.restores import Restores
from edgekv.engine.writes import WriteLanes
from edgekv.errors import EngineFailed
from edgekv.runtime import Runtime
from edgekv.store import Store


class Bug(Exception):
    """Not an error that edgekv raises on purpose."""


def broken(*_, **__):
    raise Bug("in the code")


def broken_post(inbox, message):
    if isinstance(message, IoReady):
        broken()
    post(inbox, message)


post = Inbox.post
ON_THE_WAY_OUT = [(Store, "write"), (WriteLanes, "done")]
ON_THE_WAY_BACK = [(Store, "read"), (Restores, "done")]


@pytest.fixture
def opened(tiny_folder):
    runtime = Runtime.open(str(tiny_folder), config=RuntimeConfig(pool_bytes=1 << 26))
    yield runtime
    runtime.close()
    assert not runtime._engine.thread.is_alive()


def assert_fails(ask):
    with pytest.raises(EngineFailed, match="Bug") as caught:
        ask()
    error, said = caught.value, ""
    while error is not None:
        said += "".join(traceback.format_exception(error))
        error = error.__cause__
    assert "in broken" in said, "the traceback leads to the bug"


def say_and_leave(session):
    """KV goes to disk: when the answer has ended, or here."""
    session.respond("Hi", sampling=sampling(5))
    session.suspend()


@pytest.mark.parametrize(("owner", "name"), ON_THE_WAY_OUT)
def test_while_kv_is_written(opened, monkeypatch, owner, name):
    session = opened.app().session("inbox")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        assert_fails(lambda: say_and_leave(session))
    assert_fails(lambda: session.respond("Again"))


@pytest.mark.parametrize(("owner", "name"), ON_THE_WAY_BACK)
def test_while_kv_is_read(opened, monkeypatch, owner, name):
    session = opened.app().session("inbox")
    session.respond("Hi", sampling=sampling(40))
    assert session.suspend() > 0
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        assert_fails(lambda: session.respond("Again", sampling=sampling(5)))


@pytest.mark.parametrize("way", ["out", "back"])
def test_while_the_engine_is_told_that_some_io_has_ended(opened, monkeypatch, way):
    session = opened.app().session("inbox")
    if way == "back":
        say_and_leave(session)
    with monkeypatch.context() as patch:
        patch.setattr(Inbox, "post", broken_post)
        if way == "back":
            assert_fails(lambda: session.respond("Again", sampling=sampling(5)))
        else:
            # It may be told that KV is on disk a moment before it fails.
            assert_fails(lambda: [say_and_leave(session) for _ in range(50)])


def test_a_bug_as_a_conversation_is_saved_is_raised_to_who_asked_and_nothing_is_lost(
    tiny_folder, monkeypatch
):
    with Runtime.open(str(tiny_folder), config=RuntimeConfig(pool_bytes=1 << 26)) as runtime:
        session = runtime.app().session("inbox")
        with monkeypatch.context() as patch:
            patch.setattr(Store, "set_conversation", broken)
            with pytest.raises(Bug) as caught:
                session.respond("One", sampling=sampling(3))
        assert "in broken" in "".join(traceback.format_exception(caught.value))
        assert session.last_reply.finish_reason == "length"
        assert session.respond("Two", sampling=sampling(3)).finish_reason == "length"
    with Runtime.open(str(tiny_folder)) as runtime:
        messages = runtime.app().session("inbox").messages
    assert [m.content for m in messages][::2] == ["One", "Two"]
