"""Named sessions: what was said in them is kept, and found again by its name."""

import pytest
from tiny_models import random_ids
from tiny_runtime import answer, eventually, sampling

from edgekv.config import StoreOptions
from edgekv.errors import ConfigError, RuntimeClosed, StoreUnusable
from edgekv.runtime import ChatMessage
from edgekv.runtime.conversation import stored_messages

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
    session = app.session("inbox")
    assert session.system == "Be long."
    assert app.session("inbox", system="Be long.").messages == session.messages
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


@pytest.mark.parametrize("length", [1, 3])
def test_the_kv_of_an_answer_that_a_stop_string_ended_is_on_disk(restart, length):
    """With the first token, too: then no other step of it runs."""
    app, ids = restart(), random_ids(40)
    said = answer(app.session(), ids, sampling(10)).text
    session = app.session("inbox")
    reply = answer(session, ids, sampling(10, stop=(said[:length],)))
    assert reply.finish_reason == "stop"
    kv = session._talk.kv.kv
    eventually(lambda: kv.stored == kv.num_tokens >= len(ids), timeout_s=60.0)


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
