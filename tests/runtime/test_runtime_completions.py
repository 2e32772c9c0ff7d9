"""Conversations that their callers have: which session goes on, and what is computed anew."""

import threading

import pytest
from scripted_model import said_last, scripted

from edgekv.chat.values import ChatMessage, Completion
from edgekv.config import SamplingParams
from edgekv.engine.request import FORCED_MAX
from edgekv.runtime import branches


def user(text):
    return ChatMessage(role="user", content=text)


def completion(*messages, **options):
    return Completion(messages=messages, **options)


def ask(app, *messages, **options):
    """The answer, and how many of the prompt's tokens had KV."""
    end = app.complete(completion(*messages, **options))
    return end.message, end.usage


@pytest.fixture(autouse=True)
def answers():
    with scripted(lambda asked: f"I heard {said_last(asked)}."):
        yield


def num_sessions(app):
    return sum(name.startswith(branches.PREFIX) for _, name in app._runtime._talks._open)


def test_a_conversation_goes_on_in_its_session(app):
    first, usage = ask(app, user("one"))
    assert usage.num_cached == 0
    # The script is forced: nothing had to be sampled over its last tokens, which have no KV yet.
    known = usage.num_prompt + max(0, usage.num_output - 1 - FORCED_MAX)
    _, usage = ask(app, user("one"), first, user("two"))
    assert usage.num_cached >= known
    assert num_sessions(app) == 1


def test_the_last_question_is_answered_again_in_the_same_session(app):
    ask(app, user("one"))
    _, usage = ask(app, user("one"))
    assert usage.num_cached == usage.num_prompt - 1
    assert num_sessions(app) == 1


def test_what_branches_off_leaves_the_other_branch_alone(app):
    first, _ = ask(app, user("one"))
    ask(app, user("one"), first, user("two"))
    _, usage = ask(app, user("one"), first, user("other"))
    assert usage.num_cached > 0  # in common
    assert num_sessions(app) == 2
    second = ChatMessage(role="assistant", content="I heard two.")
    before = (user("one"), first, user("two"), second)
    _, usage = ask(app, *before, user("three"))
    assert usage.num_cached > 0.5 * usage.num_prompt
    assert num_sessions(app) == 2


def test_the_same_at_once_is_answered_at_once(app):
    texts = []
    threads = [
        threading.Thread(target=lambda: texts.append(ask(app, user("one"))[0].content))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert texts == ["I heard one."] * 4


def test_an_app_that_may_have_few_sessions_has_any_number_of_conversations(app):
    app.update(num_sessions_max=2)
    for number in range(5):
        message, _ = ask(app, user(f"question {number}"))
        assert message.content == f"I heard question {number}."
    assert num_sessions(app) <= 2
    first = ChatMessage(role="assistant", content="I heard question 0.")
    message, _ = ask(app, user("question 0"), first, user("more"))  # it was closed, and is stored
    assert message.content == "I heard more."


def test_conversations_make_room_when_an_app_may_have_fewer_than_it_has(app):
    for number in range(5):
        ask(app, user(f"question {number}"))
    app.update(num_sessions_max=2)
    message, _ = ask(app, user("question 5"))
    assert message.content == "I heard question 5."
    assert num_sessions(app) <= 2


def test_of_many_apps_those_that_ask_no_more_let_go(runtime, monkeypatch):
    monkeypatch.setattr("edgekv.runtime.completions.APPS_MAX", 2)
    apps = [runtime.app(f"app {number}") for number in range(4)]
    for app in apps:
        ask(app, user("one"))
    left = {app_name for app_name, _ in runtime._talks._open}
    assert {"app 0", "app 1"}.isdisjoint(left)
    assert {"app 2", "app 3"} <= left
    _, usage = ask(apps[0], user("one"))
    assert usage.num_prompt > 0


def test_a_key_parts_conversations_that_begin_alike(app):
    ask(app, user("one"), session_key="a")
    ask(app, user("one"), session_key="b")
    assert num_sessions(app) == 2


def test_a_prompt_without_messages_is_continued(app):
    end = app.complete(
        Completion(prompt="Once upon", sampling=SamplingParams(max_tokens=3, ignore_eos=True))
    )
    assert end.usage.num_output == 3
