"""Sessions and apps by name: several of one name share a conversation, and ends end nothing new."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_runtime import eventually, sampling

from edgekv.errors import ConfigError, RuntimeClosed, SessionBusy

ENDLESS = sampling(900)


def busy_or(ask):
    """Ask until the session is free."""
    while True:
        try:
            return ask()
        except SessionBusy:
            threading.Event().wait(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inbox", None])
def test_threads_that_open_ask_and_close_one_name_all_get_whole_replies(app, name):
    def user(number):
        replies = []
        for _ in range(15):
            with app.session("inbox" if name else f"inbox-{number}") as session:
                replies.append(busy_or(lambda: session.respond("Hi", sampling=sampling(2))))
        return replies

    with ThreadPoolExecutor(3) as pool:
        replies = [reply for users in pool.map(user, range(3)) for reply in users]
    assert [(r.finish_reason, len(r.token_ids)) for r in replies] == [("length", 2)] * 45
    turns = [len(app.session("inbox" if name else f"inbox-{i}").messages) for i in range(3)]
    assert turns == ([90] * 3 if name else [30] * 3), "and every turn is in a conversation"


def test_the_close_of_one_ends_nothing_that_another_of_its_name_asks(app):
    first, second = app.session("inbox"), app.session("inbox")
    with second.stream("One", sampling=sampling(30)) as stream:
        next(stream)
        first.close()
        assert first.closed
        assert not second.closed
        list(stream)
    assert stream.reply.finish_reason == "length"
    with pytest.raises(RuntimeClosed, match="'inbox' was closed"):
        first.respond("Two")
    assert second.messages[1].content == stream.reply.text


def test_a_stream_keeps_its_session_open_though_nobody_refers_to_that(app):
    stream = app.session("inbox").stream("One", sampling=sampling(30))
    with app.session("inbox") as session:
        assert not session.closed
    list(stream)
    assert stream.reply.finish_reason == "length"


def test_kv_leaves_memory_when_the_last_of_a_name_is_closed_or_was_dropped(runtime, app):
    sessions = [app.session("inbox") for _ in range(3)]
    sessions[0].respond("One", sampling=sampling(3))
    sessions.pop()  # dropped
    sessions[0].close()
    assert runtime.pool_snapshot().used_bytes > 0
    sessions[1].close()
    sessions[1].close()
    eventually(lambda: runtime.pool_snapshot().used_bytes == 0)
    assert not list(runtime._talks)


@pytest.mark.parametrize("close", ["a namesake", "the app"])
def test_what_was_dropped_in_the_middle_of_an_answer_is_said_when_others_close(runtime, close):
    app = runtime.app(f"dropped, then {close} is closed")

    def leave_in_the_middle():
        for _ in app.session("inbox").stream("Hi", sampling=ENDLESS):
            break

    leave_in_the_middle()
    gc.collect()
    (app if close == "the app" else app.session("inbox")).close()
    messages = runtime.app(app.name).session("inbox").messages
    assert [message.role for message in messages] == ["user", "assistant"]
    assert messages[1].content


def test_who_opens_a_name_while_it_is_closed_gets_a_whole_reply(app, monkeypatch):
    old, replies = app.session("inbox"), []
    old.respond("One", sampling=sampling(2))
    engine = app._runtime._engine
    close = engine.close_session

    def live():
        with app.session("inbox") as session:
            replies.append(session.respond("Hi", sampling=sampling(20)))

    thread = threading.Thread(target=live)

    def close_beside_another(kv):
        if thread.ident is None:
            thread.start()
            thread.join(0.05)  # it cannot ask before the engine hears of this end
            assert replies == []
        close(kv)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "close_session", close_beside_another)
        old.close()
    thread.join()
    assert [len(reply.token_ids) for reply in replies] == [20]


def test_a_removed_session_has_a_successor_with_a_place_of_its_own(app, monkeypatch):
    app.session("inbox").respond("One", sampling=sampling(2))
    keeper, opened = app._runtime._keeper, []
    remove = keeper.remove

    def meanwhile(*names):
        thread = threading.Thread(target=lambda: opened.append(app.session("inbox")))
        thread.start()
        thread.join(0.05)
        assert opened == [], "who opens it waits until the old one is gone"
        return remove(*names)

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "remove", meanwhile)
        assert app.remove("inbox")
    eventually(lambda: opened)
    assert opened[0].respond("Two", sampling=sampling(2)).finish_reason == "length"
    assert opened[0].warning == ""
    assert [m.content for m in opened[0].messages][::2] == ["Two"]


# --- apps ---


def test_apps_can_be_looked_up_changed_and_closed(runtime):
    app = runtime.app("mail", weight=2)
    app.update(priority="background", pinned_bytes=1 << 20, num_waiting_max=5)
    assert (app.weight, app.priority, app.pinned_bytes) == (2.0, "background", 1 << 20)
    assert app in runtime.apps()
    session = app.session("inbox")
    stream = session.stream("One", sampling=ENDLESS)
    next(stream)
    app.close()
    app.close()
    assert app.closed
    assert session.closed
    assert stream.reply.finish_reason == "cancelled"
    assert app not in runtime.apps()
    for call in (app.session, app.sessions, app.forget, app.update, lambda: app.remove("inbox")):
        with pytest.raises(RuntimeClosed, match="app 'mail' was closed") as caught:
            call()
        assert caught.value.hint
    again = runtime.app("mail")
    assert again is not app
    assert (again.weight, again.priority, again.pinned_bytes) == (1.0, "interactive", 0)
    assert again.session("inbox").messages[1].content == stream.reply.text, "what was said stays"


def test_an_app_is_there_while_somebody_refers_to_it_gave_it_terms_or_has_it_open(runtime):
    def names():
        gc.collect()
        return {app.name for app in runtime.apps()} - before

    before = {app.name for app in runtime.apps()}
    for number in range(1000):
        runtime.app(f"looked up {number}")
    assert names() == set()
    runtime.app("heavy", weight=3)
    runtime.app("predicting").prefill = "exact"
    session = runtime.app("talking").session()
    assert names() == {"heavy", "predicting", "talking"}
    assert runtime.app("heavy").weight == 3.0
    assert runtime.app("predicting").prefill == "exact"
    runtime.app("heavy").update(weight=1)
    runtime.app("predicting").prefill = None
    session.close()
    del session
    assert names() == set()


def test_an_apps_prefill_is_checked_when_it_is_set(app):
    with pytest.raises(ConfigError, match="prefill is 'fast'"):
        app.prefill = "fast"
    assert app.prefill is None


def test_what_is_not_allowed_changes_nothing_of_an_app(runtime):
    app = runtime.app("mail", weight=2)
    with pytest.raises(ConfigError, match="priority"):
        app.update(weight=3, priority="urgent")
    assert app.weight == 2.0
    with pytest.raises(TypeError, match="wieght"):
        app.update(wieght=3)
    with pytest.raises(TypeError, match="wieght"):
        runtime.app("mail", wieght=3)


@pytest.mark.slow
def test_a_closed_app_leaves_nothing_in_the_engine(runtime):
    for number in range(50):
        app = runtime.app(f"passing-{number}", weight=2, pinned_bytes=16)
        app.session().respond("Hi", sampling=sampling(1))
        app.close()

    def passing(names):
        return [name for name in names if name.startswith("passing")]

    accounts, inbox = runtime._engine.loop.ledger.accounts, runtime._engine.inbox
    runtime.check_integrity()
    assert passing(accounts.pins) == passing(inbox._apps) == passing(inbox._asked) == []
    assert passing(app.name for app in runtime.apps()) == passing(runtime.counters().service_ms)
    # Its account ends when others have had a quantum more: till then it is what it owes them.
    other = runtime.app("other")
    for _ in range(50):
        if passing(accounts.apps):
            other.session().respond("Hi", sampling=sampling(500))
    assert passing(accounts.apps) == []


def test_an_app_that_is_closed_ends_no_session_of_the_next_of_its_name(runtime, monkeypatch):
    old = runtime.app("mail-again")
    old.session("inbox").respond("One", sampling=sampling(2))
    first = old.session("inbox")
    leave, opened = runtime._leave_talk, []

    def meanwhile(session):
        if not opened:
            opened.append(runtime.app("mail-again").session("inbox"))
        leave(session)

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_leave_talk", meanwhile)
        old.close()
    assert first.closed
    [session] = opened
    assert session.app is runtime.app("mail-again") is not old
    assert session.respond("Two", sampling=sampling(2)).finish_reason == "length"
    assert [m.content for m in session.messages][::2] == ["One", "Two"]


def test_a_forgotten_app_has_nothing_stored(runtime):
    app, other = runtime.app("mail-forgotten"), runtime.app("notes")
    for name in ("inbox", "outbox"):
        app.session(name).respond("One", sampling=sampling(2))
    other.session("inbox").respond("One", sampling=sampling(2))
    app.forget()
    assert app.closed
    assert runtime.app("mail-forgotten").sessions() == []
    assert runtime.app("mail-forgotten").session("inbox").messages == []
    assert [info.name for info in other.sessions()] == ["inbox"]
    other.forget()
