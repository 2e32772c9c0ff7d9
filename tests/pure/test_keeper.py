"""Conversations on their way to the store: the newest counts, and none is lost on the way."""

import itertools
import threading

import pytest
from fake_store import FakeStore

from edgekv.errors import ConfigError, NotKept
from edgekv.runtime.conversation import ChatMessage, Conversation, dump
from edgekv.runtime.keeper import NAMES_MAX, ConversationKeeper


def talk(*contents):
    return Conversation(messages=tuple(ChatMessage(role="user", content=c) for c in contents))


@pytest.fixture
def store():
    return FakeStore()


@pytest.fixture
def keeper(store):
    return ConversationKeeper(store, vocab_size=100)


def say(kept, *contents):
    """The session's next turn."""
    kept.note(talk(*contents), talk(*contents[:-1]))
    kept.save()


def stored(store):
    return {key: row.conversation for key, row in store.rows.items()}


def test_what_was_said_is_stored_when_saving_returns(store, keeper):
    begin, kept = keeper.open("mail", "inbox", None)
    assert begin == Conversation()
    kept.note(talk("one"), begin)
    assert store.writes == []
    kept.save()
    assert store.writes == [(kept.key, dump(talk("one")))]
    assert keeper._unsaved == {}
    assert kept.warning == ""
    kept.save()
    assert len(store.writes) == 1


def test_the_newest_is_written_once(store, keeper):
    _, a = keeper.open("mail", "a", None)
    _, b = keeper.open("mail", "b", None)
    for number in range(10):
        a.note(talk("a", str(number)), talk("a"))
        b.note(talk("b", str(number)), talk("b"))
    for _ in range(10):
        a.save()
    b.save()
    assert [key for key, _ in store.writes] == [a.key, b.key]
    assert stored(store) == {a.key: dump(talk("a", "9")), b.key: dump(talk("b", "9"))}


def test_what_is_said_during_a_write_stays_for_who_said_it(store, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    write = store.set_conversation

    def slow(key, text, *, taken_back):
        if not store.writes:
            kept.note(talk("one", "two"), talk("one"))
        write(key, text, taken_back=taken_back)

    store.set_conversation = slow
    say(kept, "one")
    assert keeper._unsaved == {kept.key: talk("one", "two")}
    kept.save()
    assert [text for _, text in store.writes] == [dump(talk("one")), dump(talk("one", "two"))]
    assert keeper._unsaved == {}


def test_opened_again_it_has_what_the_store_has_not(keeper):
    _, kept = keeper.open("mail", "inbox", None)
    kept.note(talk("one"), talk())
    again, _ = keeper.open("mail", "inbox", None)
    assert again == talk("one")
    kept.save()
    again, _ = keeper.open("mail", "inbox", None)
    assert again == talk("one")
    other, _ = keeper.open("notes", "inbox", None)
    assert other == Conversation()
    assert keeper.knows("mail", "inbox")
    assert not keeper.knows("mail", "outbox")


def test_a_write_that_ends_while_a_session_is_opened_is_not_missed(store, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    kept.note(talk("one"), talk())
    find = store.session

    def slow(app, name, *, persistent):
        found = find(app, name, persistent=persistent)
        kept.save()  # after the first look, before the next
        return found

    store.session = slow
    assert keeper.open("mail", "inbox", None)[0] == talk("one")


# --- what is taken back ---


@pytest.mark.parametrize(
    ("before", "after", "is_taken_back"),
    [
        (talk("one"), talk("one", "two"), False),
        (talk("one"), talk("one"), False),
        (talk("one"), talk(), True),
        (talk("one"), talk("a longer text than that was"), True),
        (talk("one", "two"), talk("one", "three", "four"), True),
    ],
)
def test_the_store_hears_of_what_is_taken_back(store, keeper, before, after, is_taken_back):
    _, kept = keeper.open("mail", "inbox", None)
    kept.note(before, talk())
    kept.save()
    kept.note(after, before)
    kept.save()
    assert store.scrubbed == [kept.key] * is_taken_back
    say(kept, "five")
    assert store.scrubbed == [kept.key] * is_taken_back, "once"


def test_it_hears_of_it_too_where_that_was_not_written_at_once(store, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    say(kept, "one")
    store.is_full = True
    kept.note(talk(), talk("one"))
    kept.save()
    store.is_full = False
    say(kept, "two")
    assert store.scrubbed == [kept.key]


# --- what cannot be written ---


def test_a_write_that_fails_is_said_and_made_up_for(store, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    store.is_full = True
    say(kept, "one")
    assert "not kept: the disk budget" in kept.warning
    assert keeper.open("mail", "inbox", None)[0] == talk("one"), "it is still there"
    with pytest.raises(NotKept, match=r"1 session cannot be kept \('inbox'\): the disk budget"):
        keeper.flush()
    assert keeper._unsaved == {kept.key: talk("one")}, "still not written, and not lost"
    store.is_full = False
    say(kept, "one", "two")
    assert kept.warning == ""
    assert stored(store) == {kept.key: dump(talk("one", "two"))}
    keeper.flush()
    assert keeper._unsaved == {}


def test_what_was_only_noted_is_flushed(store, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    kept.note(talk("one"), talk())
    keeper.flush()
    assert keeper._unsaved == {}
    assert stored(store) == {kept.key: dump(talk("one"))}


def test_a_bug_is_raised_said_and_made_up_for(store, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    store.bug = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        say(kept, "one")
    assert "not kept: an error in edgekv" in kept.warning
    store.bug = None
    say(kept, "one", "two")
    assert stored(store) == {kept.key: dump(talk("one", "two"))}
    assert kept.warning == ""


def test_a_bug_while_one_is_flushed_leaves_none_of_the_others_unsaved(store, keeper):
    kept = [keeper.open("mail", str(number), None)[1] for number in range(5)]
    for place in kept:
        place.note(talk("one"), talk())
    write = store.set_conversation

    def broken(key, text, *, taken_back):
        if key == kept[2].key:
            raise ZeroDivisionError("a bug")
        write(key, text, taken_back=taken_back)

    store.set_conversation = broken
    with pytest.raises(ZeroDivisionError):
        keeper.flush()
    assert {key for key, _ in store.writes} == {place.key for place in kept} - {kept[2].key}
    with pytest.raises(ZeroDivisionError):
        keeper.flush()
    assert keeper._unsaved.keys() == {kept[2].key}


def test_not_all_names_are_said(store, keeper):
    store.is_full = True
    for number in range(2 * NAMES_MAX):
        say(keeper.open("mail", f"name-{number}", None)[1], "one")
    with pytest.raises(NotKept, match=f"of {2 * NAMES_MAX} sessions cannot be kept") as caught:
        keeper.flush()
    assert str(caught.value).count("name-") == NAMES_MAX
    assert caught.value.hint


def test_of_a_removed_session_nothing_more_is_written(store, keeper):
    _, kept = keeper.open("mail", "inbox", None)
    kept.note(talk("one"), talk())
    assert keeper.remove("mail", "inbox")
    kept.save()
    kept.note(talk("one", "two"), talk("one"))  # by whoever did not know of it yet
    kept.save()
    keeper.flush()
    assert keeper._unsaved == {}
    assert store.writes == []
    assert store.rows == {}
    assert not keeper.remove("mail", "inbox")


# --- all of an app's ---


def test_an_apps_sessions_are_listed(store, keeper):
    for app, name in [("mail", "a"), ("notes", "n"), ("mail", "b"), ("mail", "c")]:
        _, kept = keeper.open(app, name, None)
        if name != "c":
            say(kept, "one", "two")
    store.session("mail", "unnamed", persistent=False)
    a = keeper.open("mail", "a", None)[1]
    a.note(talk("one", "two", "three"), talk("one", "two"))
    infos = {info.name: info for info in keeper.sessions("mail")}
    assert set(infos) == {"a", "b", "c"}
    assert (infos["a"].num_messages, infos["a"].is_begun) == (3, True), "not written yet"
    assert (infos["b"].num_messages, infos["b"].is_begun) == (2, True)
    assert (infos["c"].num_messages, infos["c"].is_begun) == (0, False)
    a.save()
    assert keeper.sessions("mail")[0].name == "a", "the last one used"
    store.set_conversation(keeper.open("mail", "b", None)[1].key, "{")
    assert {info.name: info.num_messages for info in keeper.sessions("mail")}["b"] is None


def test_damage_is_said(store, keeper):
    row = store.session("mail", "inbox", persistent=True)
    store.set_conversation(row.key, "{")
    begin, kept = keeper.open("mail", "inbox", "Be brief.")
    assert [m.content for m in begin.messages] == ["Be brief."]
    assert "afresh" in kept.warning
    say(kept, "one")
    _, kept = keeper.open("mail", "inbox", None)
    assert kept.warning == ""


def test_another_system_prompt_is_refused(keeper):
    _, kept = keeper.open("mail", "inbox", None)
    say(kept, "one")
    with pytest.raises(ConfigError, match="inbox"):
        keeper.open("mail", "inbox", "Be brief.")


def test_many_threads(store, keeper):
    """What is saved is stored from then on, or something newer is; none is written twice."""
    kept = [keeper.open("mail", str(number), None)[1] for number in range(4)]
    numbers = {place.key: itertools.count() for place in kept}
    order = {dump(talk(str(number))): number for number in range(2000)}
    locks = {place.key: threading.Lock() for place in kept}
    wrong = []

    def speak(place):
        for _ in range(200):
            with locks[place.key]:  # as the session's is held
                number = next(numbers[place.key])
                place.note(talk(str(number)), talk())
            place.save()
            if order[store.rows[place.key].conversation] < number:
                wrong.append(number)

    speakers = [threading.Thread(target=speak, args=(place,)) for place in kept for _ in range(2)]
    for thread in speakers:
        thread.start()
    for thread in speakers:
        thread.join()
    assert wrong == []
    assert set(stored(store).values()) == {dump(talk("399"))}
    for place in kept:
        places = [order[text] for key, text in store.writes if key == place.key]
        assert places == sorted(set(places)), "in order, none twice"
