"""Conversations on their way to the store: the newest counts, and none is lost on the way."""

import threading

import pytest
from fake_store import FakeStore, Jobs

from edgekv.errors import ConfigError, RuntimeClosed, StoreFull
from edgekv.runtime.conversation import ChatMessage, Conversation, dump
from edgekv.runtime.keeper import ConversationKeeper


def talk(*contents):
    return Conversation(messages=tuple(ChatMessage(role="user", content=c) for c in contents))


@pytest.fixture
def store():
    return FakeStore()


@pytest.fixture
def jobs():
    return Jobs()


@pytest.fixture
def keeper(store, jobs):
    return ConversationKeeper(store, jobs.submit, vocab_size=100)


def stored(store):
    return {key: row.conversation for key, row in store.rows.items()}


def test_saving_only_queues(store, jobs, keeper):
    begin, kept = keeper.open("mail", "inbox", None)
    assert begin == Conversation()
    kept.save(talk("one"))
    assert store.writes == []
    assert len(keeper._unwritten) == 1
    jobs.run()
    assert store.writes == [(kept.key, dump(talk("one")))]
    assert keeper._unwritten == {}
    assert kept.warning == ""


def test_the_newest_is_written_once(store, jobs, keeper):
    _, a = keeper.open("mail", "a", None)
    _, b = keeper.open("mail", "b", None)
    for number in range(10):
        a.save(talk("a", str(number)))
        b.save(talk("b", str(number)))
    assert len(jobs.waiting) == 2, "one job a session"
    jobs.run()
    assert [key for key, _ in store.writes] == [a.key, b.key]
    assert stored(store) == {a.key: dump(talk("a", "9")), b.key: dump(talk("b", "9"))}


def test_what_is_said_during_a_write_is_written_after_it(store, jobs, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    write = store.set_conversation

    def slow(key, text):
        if not store.writes:
            kept.save(talk("two"))
            assert not jobs.waiting, "the job that runs takes it along"
        write(key, text)

    store.set_conversation = slow
    kept.save(talk("one"))
    jobs.run()
    assert [text for _, text in store.writes] == [dump(talk("one")), dump(talk("two"))]
    assert keeper._unwritten == {}


def test_opened_again_it_has_what_the_store_has_not(jobs, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    kept.save(talk("one"))
    again, _ = keeper.open("mail", "inbox", None)
    assert again == talk("one")
    jobs.run()
    again, _ = keeper.open("mail", "inbox", None)
    assert again == talk("one")
    other, _ = keeper.open("notes", "inbox", None)
    assert other == Conversation()
    assert keeper.knows("mail", "inbox")
    assert not keeper.knows("mail", "outbox")


def test_a_write_that_ends_while_a_session_is_opened_is_not_missed(store, jobs, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    kept.save(talk("one"))
    find = store.session

    def slow(app, name, *, persistent):
        found = find(app, name, persistent=persistent)
        jobs.run()  # after the first look, before the next
        return found

    store.session = slow
    assert keeper.open("mail", "inbox", None)[0] == talk("one")


def test_a_write_that_fails_is_said_and_made_up_for(store, jobs, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    store.is_full = True
    kept.save(talk("one"))
    with pytest.raises(StoreFull):
        jobs.run()
    assert "not kept: the disk budget" in kept.warning
    assert keeper.open("mail", "inbox", None)[0] == talk("one"), "it is still there"
    keeper.flush()
    assert keeper._unwritten == {kept.key: talk("one")}, "still not written, and not lost"
    store.is_full = False
    kept.save(talk("one", "two"))
    jobs.run()
    assert kept.warning == ""
    assert stored(store) == {kept.key: dump(talk("one", "two"))}
    keeper.flush()
    assert keeper._unwritten == {}


@pytest.mark.parametrize("closed", [False, True])
def test_what_could_not_be_queued_is_flushed(store, jobs, closed):
    def submit(job):
        if closed:
            raise RuntimeClosed("the threads have ended")
        return False

    keeper = ConversationKeeper(store, submit, vocab_size=100)
    _, kept = keeper.open("mail", "inbox", None)
    kept.save(talk("one"))
    kept.save(talk("one", "two"))
    assert store.writes == []
    keeper.flush()
    assert keeper._unwritten == {}
    assert stored(store) == {kept.key: dump(talk("one", "two"))}


def test_a_job_that_never_ran_is_made_up_for(store, jobs, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    kept.save(talk("one"))
    jobs.waiting.clear()
    keeper.flush()
    assert keeper._unwritten == {}
    assert stored(store) == {kept.key: dump(talk("one"))}


def test_of_a_removed_session_nothing_more_is_written(store, jobs, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    kept.save(talk("one"))
    assert keeper.remove("mail", "inbox")
    jobs.run()
    keeper.flush()
    assert keeper._unwritten == {}
    assert store.writes == []
    assert store.rows == {}
    assert not keeper.remove("mail", "inbox")


def test_an_apps_sessions_are_listed(store, jobs, keeper):
    for app, name in [("mail", "a"), ("notes", "n"), ("mail", "b"), ("mail", "c")]:
        _, kept = keeper.open(app, name, None)
        if name != "c":
            kept.save(talk("one", "two"))
    store.session("mail", "unnamed", persistent=False)
    jobs.run()
    keeper.open("mail", "a", None)[1].save(talk("one", "two", "three"))
    infos = {info.name: info for info in keeper.sessions("mail")}
    assert set(infos) == {"a", "b", "c"}
    assert (infos["a"].num_messages, infos["a"].is_begun) == (3, True), "not written yet"
    assert (infos["b"].num_messages, infos["b"].is_begun) == (2, True)
    assert (infos["c"].num_messages, infos["c"].is_begun) == (0, False)
    jobs.run()
    assert keeper.sessions("mail")[0].name == "a", "the last one used"
    store.set_conversation(keeper.open("mail", "b", None)[1].key, "{")
    assert {info.name: info.num_messages for info in keeper.sessions("mail")}["b"] is None


def test_damage_is_said(store, jobs, keeper):
    row = store.session("mail", "inbox", persistent=True)
    store.set_conversation(row.key, "{")
    begin, kept = keeper.open("mail", "inbox", "Be brief.")
    assert [m.content for m in begin.messages] == ["Be brief."]
    assert "afresh" in kept.warning
    kept.save(talk("one"))
    jobs.run()
    _, kept = keeper.open("mail", "inbox", None)
    assert kept.warning == ""


def test_another_system_prompt_is_refused(jobs, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    kept.save(talk("one"))
    with pytest.raises(ConfigError, match="inbox"):
        keeper.open("mail", "inbox", "Be brief.")


def test_many_threads(store):
    """Whatever the order of jobs and saves, the last conversation of each session is stored."""
    jobs = Jobs()
    keeper = ConversationKeeper(store, jobs.submit, vocab_size=100)
    kept = [keeper.open("mail", str(number), None)[1] for number in range(4)]
    stop = threading.Event()

    def work():
        while not stop.is_set():
            try:
                job = jobs.waiting.pop(0)
            except IndexError:
                continue
            job()

    def speak(place):
        for number in range(200):
            place.save(talk(str(number)))

    workers = [threading.Thread(target=work) for _ in range(2)]
    speakers = [threading.Thread(target=speak, args=(place,)) for place in kept]
    for thread in workers + speakers:
        thread.start()
    for thread in speakers:
        thread.join()
    stop.set()
    for thread in workers:
        thread.join()
    keeper.flush()
    assert set(stored(store).values()) == {dump(talk("199"))}
    for place in kept:
        written = [text for key, text in store.writes if key == place.key]
        order = [dump(talk(str(number))) for number in range(200)]
        places = [order.index(text) for text in written]
        assert places == sorted(set(places)), "in order, none twice"


def test_a_bug_while_writing_leaves_the_session_able_to_be_saved(store, jobs, keeper, monkeypatch):
    _, kept = keeper.open("mail", "inbox", None)
    kept.save(talk("one"))
    with monkeypatch.context() as patch:
        patch.setattr(store, "set_conversation", lambda key, text: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            jobs.run()
    assert "unexpected" in kept.warning
    kept.save(talk("two"))
    jobs.run()
    assert stored(store) == {kept.key: dump(talk("two"))}
    assert kept.warning == ""
