"""When a message that came back is the one that was sent or generated."""

import json
import time
from dataclasses import replace

import pytest

from edgekv.chat.normal import canonical_json, normalised, same_message
from edgekv.chat.values import ChatMessage, ToolCall


def calling(arguments, *, call_id="call_1", name="f", content=""):
    call = ToolCall(call_id=call_id, name=name, arguments=arguments)
    return ChatMessage(role="assistant", content=content, tool_calls=(call,))


GENERATED = calling('{"path": "a/b.py", "lines": [1, 2.0], "café": true}', content="\n\nLook.")


@pytest.mark.parametrize(
    "back",
    [
        GENERATED,
        replace(GENERATED, content="Look."),
        replace(GENERATED, reasoning="Hm."),
        calling('{"path":"a/b.py","lines":[1,2],"café":true}', content="Look. "),
        calling('{"lines":[1,2],"caf\\u00e9":true,"path":"a\\/b.py"}', content="Look."),
        calling(GENERATED.tool_calls[0].arguments, call_id="mine", content="Look."),
    ],
)
def test_what_clients_respell_is_the_same(back):
    assert same_message(GENERATED, back)
    assert same_message(back, GENERATED)
    assert hash(normalised(GENERATED)) == hash(normalised(back))


@pytest.mark.parametrize(
    "other",
    [
        replace(GENERATED, role="user"),
        replace(GENERATED, content="Lo ok."),
        replace(GENERATED, tool_calls=()),
        replace(GENERATED, tool_calls=GENERATED.tool_calls * 2),
        calling('{"path": "a/b.py", "lines": [2, 1], "café": true}', content="Look."),
        calling('{"path": "a/b.py", "lines": [1, 2], "café": 1}', content="Look."),
        calling('{"path": "a/b.py", "lines": ["1", 2], "café": true}', content="Look."),
        calling(GENERATED.tool_calls[0].arguments, name="g", content="Look."),
    ],
)
def test_what_means_something_else_is_not(other):
    assert not same_message(GENERATED, other)


def test_results_are_told_apart_by_their_calls():
    result = ChatMessage(role="tool", content="ok\n", call_id="a")
    assert same_message(result, replace(result, content="ok"))
    assert not same_message(result, replace(result, call_id="b"))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", "{}"),
        (' { "b" : 1.50 , "a" : 1e3 } ', '{"a":1000,"b":1.5}'),
        ("[-0.0, 12345678901234567890]", "[0,1.2345678901234567e+19]"),
        ('{"a": "é\\u00e9"}', '{"a":"\\u00e9\\u00e9"}'),
        (' {"cut": ', '{"cut":'),
        ("[" * 100_000, "[" * 100_000),
        ("9" * 5000, "Infinity"),
    ],
)
def test_canonical_json(text, canonical):
    assert canonical_json(text) == canonical
    assert canonical_json(canonical) == canonical


def test_a_normal_message_is_itself():
    plain = ChatMessage(role="user", content="Hello")
    assert normalised(plain) is plain
    once = normalised(GENERATED)
    assert normalised(once) is once


def test_ten_thousand_messages_take_milliseconds():
    arguments = json.dumps({"path": "a" * 50, "content": "b" * 200})
    messages = [
        replace(calling(arguments), content=str(i)) if i % 4 == 0
        else ChatMessage(role="user", content=f"{i} ")
        for i in range(10_000)
    ]  # fmt: skip
    seconds = []
    for _ in range(3):
        begun = time.process_time()
        forms = [normalised(message) for message in messages]
        seconds.append(time.process_time() - begun)
    assert len(set(forms)) == 10_000
    assert min(seconds) < 0.5  # 0.1 on one core
