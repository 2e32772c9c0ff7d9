"""Conversations as text and back, whatever became of the text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.errors import ConfigError
from edgekv.runtime.conversation import (
    ROLES,
    ChatMessage,
    Conversation,
    Prompt,
    dump,
    load,
    opening,
    stored_messages,
)

VOCAB = 1000

messages = st.builds(ChatMessage, role=st.sampled_from(ROLES), content=st.text(max_size=40))
prompts = st.builds(
    Prompt, text=st.text(max_size=40), ids=st.lists(st.integers(0, VOCAB - 1)).map(tuple)
)
conversations = st.builds(
    Conversation,
    messages=st.lists(messages, max_size=6).map(tuple),
    spoken=st.none() | prompts,
)

TALK = Conversation(
    messages=(
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Grüß 😀\x00\x1b[31m"),
        ChatMessage(role="assistant", content='"hello"\n'),
    ),
    spoken=Prompt(text="<|im_start|>…", ids=(1, 999, 0)),
)
SILENT = Conversation(messages=TALK.messages)


def changed(**fields):
    """The text of TALK with other fields."""
    return json.dumps(json.loads(dump(TALK)) | fields)


# --- there and back ---


@settings(derandomize=True)
@given(conversations)
def test_what_is_dumped_is_loaded(conversation):
    text = dump(conversation)
    assert text.isascii()
    loaded, damage = load(text, vocab_size=VOCAB)
    assert loaded == conversation
    assert damage == ""
    assert stored_messages(text) == conversation.messages


def test_lone_surrogates_pass():
    odd = Conversation(messages=(ChatMessage(role="user", content="\udcff\ud83d"),))
    assert load(dump(odd).encode().decode(), vocab_size=VOCAB)[0] == odd


def test_the_text_says_what_it_is():
    fields = json.loads(dump(TALK))
    assert fields["version"] == 1
    assert fields["messages"][0] == {"role": "system", "content": "Be brief."}
    assert fields["spoken"]["ids"] == [1, 999, 0]
    assert stored_messages(None) == ()


# --- what cannot be read ---


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"text"',
        "[" * 100_000,
        "1" * 10_000,
        dump(TALK)[:-1],
        "{}",
        changed(messages=None),
        changed(messages={}),
        changed(messages=["hello"]),
        changed(messages=[{"role": "user"}]),
        changed(messages=[{"role": "user", "content": None}]),
        changed(messages=[{"role": "nobody", "content": "x"}]),
        changed(messages=[{"role": ["user"], "content": "x"}]),
    ],
)
def test_without_messages_it_starts_afresh(text):
    loaded, damage = load(text, vocab_size=VOCAB)
    assert loaded == Conversation()
    assert "afresh" in damage
    assert stored_messages(text) is None


@pytest.mark.parametrize(
    "text",
    [
        changed(version=2),
        changed(version=None),
        changed(digest="0" * 16),
        changed(digest=None),
        changed(spoken="text"),
        changed(spoken={"text": "x"}),
        changed(spoken={"text": "<|im_start|>…", "ids": [1, 998, 0]}),  # a flipped bit
        changed(messages=[m | {"more": 1} for m in json.loads(dump(TALK))["messages"]]),
    ],
)
def test_the_messages_survive_what_became_of_the_tokens(text):
    loaded, damage = load(text, vocab_size=VOCAB)
    assert loaded == SILENT
    assert "tokens" in damage


@pytest.mark.parametrize("key", ["version", "digest", "spoken"])
def test_a_field_that_is_missing(key):
    fields = json.loads(dump(TALK))
    del fields[key]
    loaded, damage = load(json.dumps(fields), vocab_size=VOCAB)
    assert loaded == SILENT
    assert damage


def test_no_tokens_and_no_word_of_them():
    """As where one bit of the field's name is another: the digest is of its value alone."""
    text = dump(SILENT).replace('"spoken"', '"spokEn"')
    assert load(text, vocab_size=VOCAB) == (SILENT, "")


@pytest.mark.parametrize("token", [VOCAB, -1, True, 1.0, "1", None])
def test_tokens_of_another_model_are_not_taken(token):
    text = dump(Conversation(messages=SILENT.messages, spoken=Prompt(text="x", ids=(1, token))))
    loaded, damage = load(text, vocab_size=VOCAB)
    assert loaded == SILENT
    assert damage


@given(st.data())
def test_no_damage_is_an_error(data):
    text = dump(TALK)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 5)))
    damaged = text[:start] + data.draw(st.text(max_size=5)) + text[end:]
    loaded, damage = load(damaged, vocab_size=VOCAB)
    assert loaded == TALK or damage


# --- system prompts ---


def test_a_stored_conversation_goes_on():
    assert opening("a", None, TALK) is TALK
    assert opening("a", "Be brief.", TALK) is TALK
    assert TALK.system == "Be brief."
    assert Conversation().system is None


def test_another_system_prompt_is_refused():
    with pytest.raises(ConfigError, match="session 'a' was begun with another system") as caught:
        opening("a", "Be long.", TALK)
    assert caught.value.hint
    without = Conversation(messages=TALK.messages[1:])
    with pytest.raises(ConfigError):
        opening("a", "Be brief.", without)
    assert opening("a", None, without) is without


def test_where_nothing_was_said_any_system_prompt_is_welcome():
    for stored in (Conversation(), Conversation.begin("Be brief.")):
        assert opening("a", None, stored) == stored
        assert opening("a", "Be long.", stored) == Conversation.begin("Be long.")
