"""Named sessions: what was said is kept, found again, and damaged only as far as it must be."""

import json

import pytest
from fake_store import FakeStore, Jobs
from tiny_runtime import sampling

from edgekv.config import StoreOptions
from edgekv.errors import ConfigError, RuntimeClosed, StoreFull, StoreUnusable
from edgekv.runtime import ChatMessage
from edgekv.runtime.keeper import ConversationKeeper


@pytest.fixture
def store():
    return FakeStore()


@pytest.fixture
def jobs():
    return Jobs()


@pytest.fixture
def restart(open_runtime, store, jobs):
    """Opens a runtime on the store, as the one before left it."""

    def open_again():
        jobs.run()
        runtime = open_runtime()
        runtime._keeper = ConversationKeeper(
            store, jobs.submit, vocab_size=runtime.tokenizer.vocab_size
        )
        return runtime.app("mail")

    return open_again


def test_a_named_session_goes_on_where_it_was(restart):
    undisturbed = restart().session("other")
    for text in ("One", "Two", "Three"):
        expected = undisturbed.respond(text, sampling=sampling(6))

    first = restart().session("inbox")
    assert first.kept
    first.respond("One", sampling=sampling(6))
    first.respond("Two", sampling=sampling(6))
    again = restart().session("inbox")
    assert again.messages == first.messages
    reply = again.respond("Three", sampling=sampling(6))
    assert reply.token_ids == expected.token_ids
    assert reply.stats.num_prompt_tokens == expected.stats.num_prompt_tokens
    assert again.warning == ""


def test_the_tokens_that_were_spoken_are_kept(restart):
    """They may differ from what the text encodes to, and the KV belongs to them."""
    first = restart().session("inbox")
    first.respond("One", sampling=sampling(6))
    again = restart().session("inbox")
    assert again._conversation == first._conversation
    assert again._conversation.spoken is not None


def test_an_unnamed_session_is_not_kept(restart, store):
    app = restart()
    session = app.session()
    session.respond("One", sampling=sampling(3))
    assert not session.kept
    assert store.rows == {}


def test_an_unnamed_session_never_meets_a_stored_one(restart, store):
    number = int(restart().session().name.removeprefix("session-"))
    stored = [f"session-{number + i}" for i in range(5)]
    for name in stored:
        store.session("mail", name, persistent=True)
    assert restart().session().name not in stored


def test_a_cleared_conversation_is_stored_so(restart):
    first = restart().session("inbox", system="Be brief.")
    first.respond("One", sampling=sampling(3))
    first.clear()
    assert restart().session("inbox").messages == [ChatMessage(role="system", content="Be brief.")]


def test_clearing_may_change_the_system_prompt(restart):
    session = restart().session("inbox", system="Be brief.")
    session.respond("One", sampling=sampling(3))
    session.clear(system="Be long.")
    assert session.system == "Be long."
    app = restart()
    assert app.session("inbox").system == "Be long."
    assert app.session("inbox", system="Be long.") is app.session("inbox")
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


def test_what_there_was_of_a_cancelled_answer_is_kept(restart):
    session = restart().session("inbox")
    session.respond("One", sampling=sampling(3))
    with session.stream("Two", sampling=sampling(500)) as stream:
        next(stream)
    again = restart().session("inbox")
    assert again.messages == session.messages
    assert len(again.messages) == 4


def test_closed_and_opened_again_at_once(restart, jobs):
    app = restart()
    with app.session("inbox") as session:
        session.respond("One", sampling=sampling(3))
    assert jobs.waiting, "not written yet"
    assert app.session("inbox").messages == session.messages


def test_a_closed_session_does_not_speak_for_its_successor(restart, store, jobs):
    app = restart()
    old = app.session("inbox")
    stream = old.stream("One", sampling=sampling(500))
    next(stream)
    old.close()
    app.session("inbox").respond("Two", sampling=sampling(3))
    list(stream)
    assert [m.content for m in restart().session("inbox").messages if m.role == "user"] == ["Two"]


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
def test_damage_costs_no_more_than_it_must(restart, store, jobs, change, left):
    restart().session("inbox").respond("One", sampling=sampling(3))
    jobs.run()
    (row,) = store.rows.values()
    store.set_conversation(row.key, change(row.conversation))
    session = restart().session("inbox")
    assert "session 'inbox'" in session.warning
    assert len(session.messages) == left
    assert session.respond("Two", sampling=sampling(3)).token_ids
    assert restart().session("inbox").warning == "", "what was saved since is whole"


def test_a_full_disk_stops_no_conversation(restart, store, jobs):
    session = restart().session("inbox")
    store.is_full = True
    session.respond("One", sampling=sampling(3))
    with pytest.raises(StoreFull):
        jobs.run()
    assert "not kept" in session.warning
    session.respond("Two", sampling=sampling(3))
    store.is_full = False
    jobs.run()
    assert session.warning == ""
    assert len(restart().session("inbox").messages) == 4


def test_a_store_that_cannot_be_read_opens_no_session(restart, store):
    app = restart()

    def broken(*args, **options):
        raise StoreUnusable("the index is damaged")

    store.session = broken
    with pytest.raises(StoreUnusable):
        app.session("inbox")
    assert app.session().respond("One", sampling=sampling(3)).token_ids


@pytest.mark.parametrize("name", ["\udcff", "a\ud83d", "\0", "\x001"])
def test_a_name_that_no_file_can_hold(restart, name):
    with pytest.raises(ConfigError, match="session name is") as caught:
        restart().session(name)
    assert "surrogates" in caught.value.hint


# --- all of an app's ---


def test_an_app_knows_its_sessions(restart, jobs):
    app = restart()
    app.session("inbox").respond("One", sampling=sampling(3))
    app.session("outbox")
    app.session().respond("One", sampling=sampling(3))
    (inbox, outbox) = sorted(restart().sessions(), key=lambda info: info.name)
    assert (inbox.name, inbox.num_messages, inbox.is_begun) == ("inbox", 2, True)
    assert (outbox.name, outbox.num_messages, outbox.is_begun) == ("outbox", 0, False)


def test_a_removed_session_is_gone(restart, store, jobs):
    app = restart()
    session = app.session("inbox")
    session.respond("One", sampling=sampling(3))
    assert app.remove("inbox")
    assert not app.remove("inbox")
    jobs.run()
    assert store.rows == {}
    with pytest.raises(RuntimeClosed):
        session.respond("Two")
    assert app.session("inbox").messages == []


def test_without_a_store_no_session_is_kept(open_runtime):
    app = open_runtime(store=StoreOptions(disk_bytes=0)).app("storeless")
    session = app.session("inbox")
    assert not session.kept
    assert session.warning == ""
    assert app.sessions() == []
    assert app.remove("inbox")
    assert not app.remove("inbox")
