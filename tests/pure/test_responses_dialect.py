"""What happens while an answer is made becomes a response, event by event or whole."""

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from responses_script import (
    ABOUT,
    ANSWERS,
    BODY,
    DIALECT,
    assistant,
    call,
    finished,
    last_response,
    parse,
    payloads,
    stream,
    told,
)

from edgekv.chat.events import (
    CallBegun,
    CallDelta,
    CallEnded,
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
)
from edgekv.chat.values import ChatMessage
from edgekv.server.dialect import Asked
from edgekv.server.fields import Fault
from edgekv.server.responses_items import CustomCallItem, sealed, unsealed
from edgekv.server.responses_tools import Origin

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def whole(asked: Asked, answer: Finished) -> Any:
    """The response that does not stream, as it arrives."""
    return json.loads(json.dumps(DIALECT.whole(asked, ABOUT, [answer])))


@pytest.mark.parametrize("message", ANSWERS)
@pytest.mark.parametrize("reason", ["stop", "length", "cancelled"])
def test_every_event_is_of_a_type_of_the_sdk(message: ChatMessage, reason: str):
    found = payloads(stream(parse(BODY), told(message, reason)))
    for payload in found:
        EVENTS.validate_python(payload, strict=True)
    kinds = [payload["type"] for payload in found]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    end = {"stop": "completed", "length": "incomplete", "cancelled": "failed"}[reason]
    assert kinds[-1] == f"response.{end}"
    check_order(found)


def check_order(found: Sequence[dict[str, Any]]) -> None:
    """Each item is added, grows, and is done before the next one is added."""
    open_id, num_done = None, 0
    for payload in found:
        kind = payload["type"]
        if kind == "response.output_item.added":
            assert open_id is None
            open_id = payload["item"]["id"]
        if "output_index" in payload:
            assert payload["output_index"] == num_done
            assert payload.get("item_id", open_id) == open_id
        if kind == "response.output_item.done":
            assert payload["item"]["id"] == open_id
            open_id, num_done = None, num_done + 1
    assert open_id is None
    assert num_done == len(found[-1]["response"]["output"])


@pytest.mark.parametrize("message", ANSWERS)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_streamed_or_not_the_response_is_the_same(message: ChatMessage, reason: str):
    asked = parse(BODY)
    response = whole(asked, finished(message, reason))
    assert response == last_response(stream(asked, told(message, reason)))
    Response.model_validate(response)
    assert response["usage"] == {
        "input_tokens": 100,
        "input_tokens_details": {"cached_tokens": 40, "cache_write_tokens": 0},
        "output_tokens": 9,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 109,
    }
    assert response["edgekv"]["ttft_ms"] == 12.5
    assert response["edgekv"]["seed"] == 7
    assert "peak_memory_bytes" not in response["edgekv"]  # of the process, and so of other apps
    assert response["metadata"] == {"a": "b"}


@pytest.mark.parametrize("message", ANSWERS)
@pytest.mark.parametrize("are_sealed", [True, False])
def test_an_answer_that_comes_back_is_the_message_that_was_generated(
    message: ChatMessage, are_sealed: bool
):
    body = BODY if are_sealed else {**BODY, "include": None}
    output = last_response(stream(parse(body), told(message)))["output"]
    if are_sealed:
        for item in output:
            item.pop("id")
            if item["type"] == "reasoning":
                item["summary"] = []  # as from a client that keeps what it cannot read
    (back,) = parse({**body, "input": output}).completion.messages
    assert (back.content, back.reasoning) == (message.content, message.reasoning)
    assert len(back.tool_calls) == len(message.tool_calls)
    for said, generated in zip(back.tool_calls, message.tool_calls, strict=True):
        assert (said.call_id, said.name) == (generated.call_id, generated.name)
        assert json.loads(said.arguments) == json.loads(generated.arguments)


def test_calls_go_out_as_the_client_knows_the_tools():
    found = payloads(stream(parse(BODY), told(ANSWERS[2]), beats=False))
    _, _, spawn, patch, weather = found[-1]["response"]["output"]
    assert (spawn["name"], spawn["namespace"]) == ("spawn", "agents")
    assert (weather["name"], "namespace" in weather) == ("get_weather", False)
    assert patch["type"] == "custom_tool_call"
    assert patch["input"] == '*** Begin\n+"é😀"\n'
    deltas = [it["delta"] for it in found if it["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == patch["input"]
    assert len(deltas) > 3  # as it is written


def test_text_and_calls_in_any_order_are_items_of_their_own():
    message = assistant("ab", reasoning="xy", tool_calls=(call("get_weather", "{}"),))
    events: list[Event] = [
        ReasoningDelta(text="x"),
        TextDelta(text="a"),
        CallBegun(index=0, call_id="call_1", name="get_weather"),
        CallDelta(index=0, arguments="{}"),
        CallEnded(index=0),
        ReasoningDelta(text="y"),
        TextDelta(text="b"),
        finished(message),
    ]
    found = payloads(stream(parse(BODY), events))
    check_order(found)
    output = found[-1]["response"]["output"]
    kinds = ["reasoning", "message", "function_call", "reasoning", "message"]
    assert [item["type"] for item in output] == kinds
    assert len({item["id"] for item in output}) == len(output)
    assert parse({**BODY, "input": output}).completion.messages == (message,)


def test_a_cut_call_is_told_as_cut_and_never_as_done():
    cut = assistant("", tool_calls=(call("apply_patch", '{"input": "rm -r '),))
    asked = parse(BODY)
    events: list[Event] = [
        CallBegun(index=0, call_id="call_1", name="apply_patch"),
        CallDelta(index=0, arguments='{"input": "rm -r '),
        finished(cut, "length"),
    ]
    found = payloads(stream(asked, events))
    kinds = [payload["type"] for payload in found]
    assert "response.output_item.done" not in kinds  # clients make the call there
    assert found[-1]["type"] == "response.incomplete"
    response = found[-1]["response"]
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["input"] == "rm -r "
    assert whole(asked, finished(cut, "length")) == response


def test_a_cut_text_is_told_as_cut():
    response = last_response(stream(parse(BODY), told(assistant("Once upon"), "length")))
    assert response["status"] == "incomplete"
    assert response["output"][0]["status"] == "incomplete"


def test_logprobs_where_they_are_asked_for():
    top = (TokenLogprob(token="No", token_bytes=b"No", logprob=float("-inf")),)
    entry = TokenLogprob(token="\ufffd", token_bytes=b"\xf0\x9f", logprob=-0.5, top=top)
    asked = parse({**BODY, "top_logprobs": 1})
    message = assistant("Y")
    events = [TextDelta(text="Y", logprobs=(entry,)), finished(message, logprobs=(entry,))]
    found = payloads(stream(asked, events))
    for payload in found:
        EVENTS.validate_python(payload, strict=True)
    said = found[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert said == [
        {
            "token": "\ufffd",
            "bytes": [0xF0, 0x9F],
            "logprob": -0.5,
            "top_logprobs": [
                {"token": "No", "bytes": [78, 111], "logprob": -9999.0, "top_logprobs": []}
            ],
        }
    ]
    deltas = [it for it in found if it["type"] == "response.output_text.delta"]
    assert deltas[0]["logprobs"] == said
    assert whole(asked, finished(message, logprobs=(entry,))) == found[-1]["response"]


# What fails


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("context", "prompt is too long"), "context_length_exceeded"),
        (Fault("overloaded", "full"), "server_is_overloaded"),
        (Fault("overloaded", "full", retry_after_s=3), "rate_limit_exceeded"),
        (Fault("invalid", "no such schema", param="text.format"), "invalid_prompt"),
        (Fault("unavailable", "stopping"), "server_error"),
        (Fault("internal", "a bug"), "server_error"),
    ],
)
def test_a_stream_that_fails_says_whether_to_come_again(fault: Fault, code: str):
    found = payloads(stream(parse(BODY), [TextDelta(text="So"), fault]))
    last = found[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    error = last["response"]["error"]
    assert error["code"] == code
    assert error["message"].startswith(fault.message)
    assert ("try again in 3s" in error["message"]) == (fault.retry_after_s is not None)
    assert last["response"]["output"][0]["content"][0]["text"] == "So"


def test_a_stream_may_fail_before_anything_was_made():
    response = last_response(stream(parse(BODY), [Fault("context", "prompt is too long")]))
    assert response["output"] == []


# The text in a custom tool's arguments


def raw_input(pieces: Iterable[str]) -> tuple[str, list[str]]:
    item = CustomCallItem("0", 0, "call_1", Origin("apply_patch", is_custom=True))
    said = list(itertools.chain.from_iterable(item.add(piece) for piece in pieces))
    said += item.closing()
    deltas = [fields["delta"] for kind, fields in said if kind.endswith(".delta")]
    assert "".join(deltas) == item.whole("completed")["input"] == said[-1][1]["input"]
    return "".join(deltas), deltas


@pytest.mark.slow
@given(st.text(), st.booleans(), st.integers(1, 7), st.sampled_from([(",", ":"), (" , ", " : ")]))
def test_raw_input_is_what_the_model_wrote(
    text: str, is_ascii: bool, num_chars: int, separators: tuple[str, str]
):
    arguments = json.dumps({"input": text}, ensure_ascii=is_ascii, separators=separators)
    pieces = [arguments[i : i + num_chars] for i in range(0, len(arguments), num_chars)]
    said, deltas = raw_input(pieces)
    assert said == text
    assert all(not "\ud800" <= char <= "\udfff" for delta in deltas for char in delta)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"note": 1, "input": "late"}', "late"),
        ('{"patch": "other"}', '{"patch": "other"}'),
        ("no JSON", "no JSON"),
        ('{"input": "never closed', "never closed"),
        ('{"input": "closed"', "closed"),
        ('{"input": "bad \\x escape"}', 'bad \\x escape"}'),
        ('{"input": "half \\ud83d"}', "half \ud83d"),
        ('{"input": "half \\ud83d\\n"}', "half \ud83d\n"),
        ('{"input": "halves \\ud83d\\ud83d\\ude00"}', "halves \ud83d\U0001f600"),
        ('{"input": 5}', '{"input": 5}'),
        ("", ""),
    ],
)
@pytest.mark.parametrize("num_chars", [1, 100])
def test_arguments_of_another_shape_are_not_lost(arguments: str, expected: str, num_chars: int):
    pieces = [arguments[i : i + num_chars] for i in range(0, len(arguments), num_chars)]
    assert raw_input(pieces)[0] == expected


@pytest.mark.slow
@given(st.text(st.characters()))
def test_reasoning_comes_back_as_it_was(text: str):
    assert unsealed(sealed(text)) == text


@pytest.mark.parametrize("content", ["", "gAAAA", "edgekv.", "edgekv.é", "edgekv.!", "edgekv./w=="])
def test_what_is_not_ours_holds_no_reasoning(content: str):
    assert unsealed(content) == ""
