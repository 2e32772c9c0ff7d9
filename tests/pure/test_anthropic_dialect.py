"""Anthropic's Messages API, by the real SDK's own reader over a transport without a socket."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import anthropic
import httpx2
import pytest
from fuzz import fuzz
from hypothesis import strategies as st
from pydantic import BaseModel
from scripted_events import (
    ABOUT,
    AWKWARD,
    JSON,
    answer,
    check_asked_or_refused,
    events_of,
    finished,
    pieces_of,
    spoiled,
    stream_of,
)

from edgekv.chat.events import Finished, TextDelta
from edgekv.chat.values import ChatMessage, Tool, ToolCall
from edgekv.server.anthropic import Messages, count_answer, parse_count
from edgekv.server.dialect import Asked
from edgekv.server.fields import STATUS, Fault, FaultKind, Fields
from edgekv.tokenizer.grammar import Grammar

DIALECT = Messages()
MINIMAL: dict[str, Any] = {
    "model": "m",
    "max_tokens": 9,
    "messages": [{"role": "user", "content": "Hi"}],
}
WEATHER = {
    "name": "get_weather",
    "description": "Today's.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
EVERYTHING = finished(
    answer(
        AWKWARD,
        reasoning="Which city? Paris.",
        calls=[("get_weather", json.dumps({"city": AWKWARD})), ("get_time", '{"zone": [1, 2]}')],
    ),
    "tool_calls",
)
Answering = Callable[[Asked], Finished | Fault]


def parse(**fields: Any) -> Asked:
    return DIALECT.parse(Fields({**MINIMAL, **fields}))


class Served:
    """The SDK's clients over the dialect; `asked` is what arrived."""

    def __init__(self, *answers: Finished | Fault) -> None:
        self.asked: list[Asked] = []
        self._answers = list(answers)
        self._transport = httpx2.MockTransport(self._respond)

    @property
    def client(self) -> anthropic.Anthropic:
        http = anthropic.DefaultHttpxClient(transport=self._transport)
        return anthropic.Anthropic(api_key="k", max_retries=0, http_client=http)

    @property
    def async_client(self) -> anthropic.AsyncAnthropic:
        http = anthropic.DefaultAsyncHttpxClient(transport=self._transport)
        return anthropic.AsyncAnthropic(api_key="k", max_retries=0, http_client=http)

    def _respond(self, request: httpx2.Request) -> httpx2.Response:
        body = Fields(json.loads(request.content))
        try:
            if request.url.path == "/v1/messages/count_tokens":
                return httpx2.Response(200, json=count_answer(len(parse_count(body).messages)))
            assert request.url.path == "/v1/messages"
            asked = DIALECT.parse(body)
        except Fault as fault:
            return httpx2.Response(fault.status, json=DIALECT.error(fault))
        self.asked.append(asked)
        end = self._answers.pop(0)
        if isinstance(end, Fault):
            return httpx2.Response(end.status, json=DIALECT.error(end))
        if not asked.stream:
            return httpx2.Response(200, json=DIALECT.whole(asked, ABOUT, [end]))
        stream = stream_of(DIALECT.writer(asked, ABOUT), end)
        return httpx2.Response(200, content=stream, headers={"content-type": DIALECT.media_type})


def said_of(message: Any) -> list[dict[str, Any]]:
    """Content blocks as the SDK read them, without what it adds."""
    return [
        {name: value for name, value in block.to_dict().items() if value is not None}
        for block in message.content
    ]


CONTENT = [
    {"type": "thinking", "thinking": "Which city? Paris.", "signature": "ZWRnZWt2"},
    {"type": "text", "text": AWKWARD},
    {"type": "tool_use", "id": "call_0", "name": "get_weather", "input": {"city": AWKWARD}},
    {"type": "tool_use", "id": "call_1", "name": "get_time", "input": {"zone": [1, 2]}},
]


def check_everything(message: Any) -> None:
    assert said_of(message) == CONTENT
    assert message.model == "m"
    assert message.id == f"msg_{ABOUT.request_id}"
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (60, 40)
    assert (usage.cache_creation_input_tokens, usage.output_tokens) == (0, 31)
    assert usage.output_tokens_details.thinking_tokens == 4


class TestAnswers:
    def test_whole(self):
        message = Served(EVERYTHING).client.messages.create(**MINIMAL)
        check_everything(message)
        assert message.to_dict()["edgekv"]["num_cached_tokens"] == 40

    def test_streamed_with_heartbeats_anywhere(self):
        with Served(EVERYTHING).client.messages.stream(**MINIMAL) as stream:
            check_everything(stream.get_final_message())

    def test_streamed_to_the_beta_client(self):
        with Served(EVERYTHING).client.beta.messages.stream(**MINIMAL) as stream:
            check_everything(stream.get_final_message())

    def test_streamed_asynchronously(self):
        async def read() -> Any:
            async with Served(EVERYTHING).async_client.messages.stream(**MINIMAL) as stream:
                texts = [text async for text in stream.text_stream]
                return "".join(texts), await stream.get_final_message()

        text, message = asyncio.run(read())
        assert text == AWKWARD
        check_everything(message)

    def test_blocks_are_opened_written_and_closed_in_order(self):
        served = Served(EVERYTHING)
        events = list(served.client.messages.create(**MINIMAL, stream=True))
        beats = [e for e in events if e.type == "message_delta" and e.delta.stop_reason is None]
        assert len(beats) == len(events_of(EVERYTHING)) + 1
        assert all(beat.usage.output_tokens == 0 for beat in beats)
        told = [event for event in events if event not in beats]
        kinds = [(e.type, getattr(e, "index", None)) for e in told]
        assert kinds[0] == ("message_start", None)
        assert kinds[-2:] == [("message_delta", None), ("message_stop", None)]
        blocks = kinds[1:-2]
        for index in range(4):
            mine = [kind for kind, i in blocks if i == index]
            assert mine[0] == "content_block_start"
            assert set(mine[1:-1]) == {"content_block_delta"}
            assert mine[-1] == "content_block_stop"
        assert [index for _, index in blocks] == sorted(index for _, index in blocks)
        assert told[-2].to_dict()["edgekv"]["ttft_ms"] == 320.0

    def test_the_opening_comes_before_anything_is_known(self):
        opening = DIALECT.writer(parse(), ABOUT).begin()
        name, data = opening.splitlines()[:2]
        assert name == "event: message_start"
        message = json.loads(data.removeprefix("data: "))["message"]
        assert message["content"] == []
        assert message["usage"]["input_tokens"] == 0  # clients that add usages up stay right

    def test_what_is_thought_or_said_in_turn_is_a_block_each_time(self):
        end = finished(answer("ab"))
        events = [
            TextDelta(text="a"),
            *events_of(finished(answer(reasoning="r")))[2:-1],
            TextDelta(text="b"),
            end,
        ]
        stream = "".join(pieces_of(DIALECT.writer(parse(stream=True), ABOUT), events))
        datas = [line[6:] for line in stream.splitlines() if line.startswith("data: ")]
        starts = [e for e in map(json.loads, datas) if e["type"] == "content_block_start"]
        assert [e["index"] for e in starts] == [0, 1, 2]
        assert [e["content_block"]["type"] for e in starts] == ["text", "thinking", "text"]

    def test_nothing_said(self):
        for stream in (False, True):
            served = Served(finished(answer()))
            if stream:
                with served.client.messages.stream(**MINIMAL) as streamed:
                    message = streamed.get_final_message()
            else:
                message = served.client.messages.create(**MINIMAL)
            assert (message.content, message.stop_reason) == ([], "end_turn")

    @pytest.mark.parametrize(
        ("end", "reason", "sequence"),
        [
            (finished(answer("a")), "end_turn", None),
            (finished(answer("a"), stop="\n\n"), "stop_sequence", "\n\n"),
            (finished(answer("a"), "length"), "max_tokens", None),
            (finished(answer("a"), "cancelled"), "max_tokens", None),
            (finished(answer(calls=[("f", "{}")]), "tool_calls"), "tool_use", None),
        ],
    )
    def test_why_it_ended(self, end, reason, sequence):
        served = Served(end, end)
        whole = served.client.messages.create(**MINIMAL)
        with served.client.messages.stream(**MINIMAL) as stream:
            streamed = stream.get_final_message()
        for message in (whole, streamed):
            assert (message.stop_reason, message.stop_sequence) == (reason, sequence)

    def test_a_call_that_was_cut(self):
        served = Served(*[finished(answer(calls=[("f", '{"city": "Par')]), "length")] * 2)
        whole = served.client.messages.create(**MINIMAL)
        assert (whole.content[0].input, whole.stop_reason) == ({}, "max_tokens")
        with served.client.messages.stream(**MINIMAL) as stream:
            kinds = [event.type for event in stream]
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1

    def test_figures_tell_nothing_of_others(self):
        body = DIALECT.whole(parse(), ABOUT, [EVERYTHING])
        assert body["edgekv"]["seed"] == 7
        assert "peak_memory_bytes" not in body["edgekv"]

    def test_count_tokens(self):
        body = {name: MINIMAL[name] for name in ("model", "messages")}
        assert Served().client.messages.count_tokens(**body, system="Be brief.").input_tokens == 2


class TestHelpers:
    """What the SDK builds on the API."""

    def test_parsed_output(self):
        class City(BaseModel):
            name: str

        served = Served(*[finished(answer('{"name": "Paris"}'))] * 2)
        assert served.client.messages.parse(**MINIMAL, output_format=City).parsed_output == City(
            name="Paris"
        )
        with served.client.messages.stream(**MINIMAL, output_format=City) as stream:
            assert stream.get_final_message().parsed_output == City(name="Paris")
        for asked in served.asked:
            grammar = asked.completion.grammar
            assert grammar is not None
            assert grammar.kind == "json_schema"
            assert json.loads(grammar.text)["properties"]["name"]["type"] == "string"

    def test_the_tool_loop(self):
        """The SDK would send a `thread` and what is new alone; refused, it sends everything."""

        @anthropic.beta_tool
        def get_weather(city: str) -> str:
            """Today's.

            Args:
                city: Where.
            """
            return f"sunny in {city}"

        served = Served(
            finished(answer("I look.", calls=[("get_weather", '{"city": "Paris"}')]), "tool_calls"),
            finished(answer("It is sunny.")),
        )
        runner = served.client.beta.messages.tool_runner(**MINIMAL, tools=[get_weather])
        assert runner.until_done().content[0].text == "It is sunny."
        assert served.asked[0].completion.tools[0].name == "get_weather"
        call = ToolCall(call_id="call_0", name="get_weather", arguments='{"city":"Paris"}')
        assert served.asked[1].completion.messages == (
            ChatMessage(role="user", content="Hi"),
            ChatMessage(role="assistant", content="I look.", tool_calls=(call,)),
            ChatMessage(
                role="tool", content="sunny in Paris", call_id="call_0", name="get_weather"
            ),
        )


KINDS: list[tuple[FaultKind, type[anthropic.APIStatusError], str]] = [
    ("invalid", anthropic.BadRequestError, "invalid_request_error"),
    ("context", anthropic.BadRequestError, "invalid_request_error"),
    ("unauthorized", anthropic.AuthenticationError, "authentication_error"),
    ("forbidden", anthropic.PermissionDeniedError, "permission_error"),
    ("not_found", anthropic.NotFoundError, "not_found_error"),
    ("too_large", anthropic.APIStatusError, "request_too_large"),
    ("overloaded", anthropic.RateLimitError, "rate_limit_error"),
    ("internal", anthropic.InternalServerError, "api_error"),
    ("unavailable", anthropic.InternalServerError, "api_error"),
]


class TestErrors:
    @pytest.mark.parametrize(("kind", "error", "name"), KINDS)
    def test_each_kind_is_typed(self, kind, error, name):
        with pytest.raises(error) as caught:
            Served(Fault(kind, "so it is")).client.messages.create(**MINIMAL)
        assert caught.value.status_code == STATUS[kind]
        assert caught.value.body == {
            "type": "error",
            "error": {"type": name, "message": "so it is"},
        }

    def test_all_kinds_are_told(self):
        assert {kind for kind, _, _ in KINDS} == set(STATUS)

    @pytest.mark.parametrize("num_events", range(len(events_of(EVERYTHING))))
    def test_in_a_stream(self, num_events):
        """Typed for who reads errors, and ended for who does not."""
        writer = DIALECT.writer(parse(stream=True), ABOUT)
        sent = writer.begin()
        sent += "".join(writer.event(event) for event in events_of(EVERYTHING)[:num_events])
        sent += writer.heartbeat() + writer.fail(Fault("internal", "it broke"))
        transport = httpx2.MockTransport(lambda _: httpx2.Response(200, content=sent.encode()))
        client = anthropic.Anthropic(
            api_key="k", http_client=anthropic.DefaultHttpxClient(transport=transport)
        )
        with (
            pytest.raises(anthropic.APIStatusError, match="it broke") as caught,
            client.messages.stream(**MINIMAL) as stream,
        ):
            stream.until_done()
        assert caught.value.body["error"]["type"] == "api_error"
        names = [line for line in sent.splitlines() if line.startswith("event: ")]
        assert names.count("event: content_block_start") == names.count("event: content_block_stop")
        assert names[-2:] == ["event: message_delta", "event: message_stop"]


class TestAsked:
    def test_the_least(self):
        asked = parse()
        assert (asked.model, asked.stream, asked.num_answers) == ("m", False, 1)
        completion = asked.completion
        assert completion.messages == (ChatMessage(role="user", content="Hi"),)
        assert (completion.tools, completion.tool_choice) == ((), "auto")
        assert (completion.grammar, completion.thinking) == (None, None)
        assert completion.sampling.max_tokens == 9
        assert completion.sampling.temperature is None
        hash(completion)

    def test_sampling(self):
        fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "stop_sequences": ["\n", "END"]}
        params = parse(**fields).completion.sampling
        assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 20)
        assert params.stop == ("\n", "END")
        assert parse(top_p=0).completion.sampling.top_p == 0

    @pytest.mark.parametrize(
        ("thinking", "expected"),
        [
            ({"type": "enabled", "budget_tokens": 2000}, True),
            ({"type": "adaptive"}, True),
            ({"type": "disabled"}, False),
            (None, None),
        ],
    )
    def test_thinking(self, thinking, expected):
        assert parse(thinking=thinking).completion.thinking is expected

    @pytest.mark.parametrize(
        "fields",
        [
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
            {"output_format": {"type": "json_schema", "schema": {"type": "object"}}},
        ],
    )
    def test_schema(self, fields):
        grammar = Grammar(kind="json_schema", text='{"type":"object"}')
        assert parse(**fields).completion.grammar == grammar
        completion = parse(output_config={"effort": "high"}).completion
        assert (completion.grammar, completion.effort) == (None, "high")
        assert completion.thinking is None

    def test_what_the_api_ignores_is_ignored(self):
        assert (
            parse(
                metadata={"user_id": "u"},
                context_management={"edits": []},
                cache_control={"type": "ephemeral"},
                service_tier="auto",
                unheard_of=[1],
            )
            == parse()
        )

    def test_tools(self):
        server_tool = {"type": "web_search_20250305", "name": "web_search"}
        tools = parse(tools=[server_tool, {**WEATHER, "type": "custom"}]).completion.tools
        assert tools == (
            Tool(
                name="get_weather",
                description="Today's.",
                parameters='{"type":"object","properties":{"city":{"type":"string"}}}',
            ),
        )

    @pytest.mark.parametrize(
        ("choice", "expected"),
        [
            ({"type": "auto"}, ("auto", "", True)),
            ({"type": "any"}, ("required", "", True)),
            ({"type": "any", "disable_parallel_tool_use": True}, ("required", "", False)),
            ({"type": "tool", "name": "get_weather"}, ("required", "get_weather", True)),
            ({"type": "none"}, ("none", "", True)),
        ],
    )
    def test_tool_choice(self, choice, expected):
        completion = parse(tools=[WEATHER], tool_choice=choice).completion
        said = (completion.tool_choice, completion.tool_name, completion.parallel_tool_calls)
        assert said == expected

    @pytest.mark.parametrize(
        ("fields", "param", "words"),
        [
            ({"max_tokens": None}, "max_tokens", "max_tokens is missing"),
            ({"max_tokens": 0}, "max_tokens", "from 1 to"),
            ({"model": None}, "model", "missing"),
            ({"messages": []}, "messages", "at least one"),
            ({"messages": "Hi"}, "messages", "a list"),
            ({"messages": [{"role": "tool"}]}, "messages[0].role", "user, assistant"),
            ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "blocks"),
            ({"temperature": "hot"}, "temperature", "number"),
            ({"top_p": -0.5}, "top_p", "from 0 to 1"),
            ({"stop_sequences": [""]}, "", "1 to 1024 characters"),
            ({"thinking": {"type": "deep"}}, "thinking.type", "adaptive"),
            ({"output_config": {"effort": 3}}, "output_config.effort", "string"),
            ({"tools": [{"name": "f"}]}, "tools[0].input_schema", "schema"),
            ({"tools": [WEATHER, WEATHER]}, "tools[1].name", "unlike"),
            ({"tools": [WEATHER], "tool_choice": {"type": "some"}}, "tool_choice.type", "any"),
            (
                {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "g"}},
                "tool_choice.name",
                "one of the tools",
            ),
            ({"tool_choice": {"type": "any"}}, "tool_choice.type", "no tool"),
            (
                {
                    "tools": [{"type": "web_search_20250305", "name": "web_search"}],
                    "tool_choice": {"type": "tool", "name": "web_search"},
                },
                "tool_choice.name",
                "Anthropic's own",
            ),
            (
                {"output_config": {"format": {"type": "grammar"}}},
                "output_config.format.type",
                "json_schema",
            ),
            ({"output_format": {"type": "json_schema"}}, "output_format.schema", "a JSON schema"),
            (
                {"output_format": {"type": "json_schema", "schema": {"const": float("nan")}}},
                "output_format.schema",
                "finite",
            ),
        ],
    )
    def test_what_cannot_be_is_refused_by_name(self, fields, param, words):
        with pytest.raises(Fault, match=words) as caught:
            parse(**fields)
        assert (caught.value.kind, caught.value.param) == ("invalid", param)

    @pytest.mark.parametrize("kind", ["image", "document", "search_result", "container_upload"])
    @pytest.mark.parametrize("inside", [False, True])
    def test_images_and_documents_are_refused(self, kind, inside):
        block: dict[str, Any] = {"type": kind, "source": {"type": "base64", "data": ""}}
        call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
        if inside:
            block = {"type": "tool_result", "tool_use_id": "t", "content": [block]}
        messages = [
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [{"type": "text", "text": "Look:"}, block]},
        ]
        with pytest.raises(Fault, match="no images and no documents") as caught:
            parse(messages=messages)
        assert caught.value.param.startswith("messages[1].content[1]")
        assert kind in caught.value.message

    def test_a_thread_is_refused_as_the_sdk_knows_it(self):
        served = Served(EVERYTHING)
        with pytest.raises(anthropic.BadRequestError) as caught:
            served.client.beta.messages.create(**MINIMAL, thread={"type": "create"})
        details = caught.value.body["error"]["details"]
        assert details == {"error_code": "thread_unsupported_request"}

    def test_a_result_of_no_call(self):
        block = {"type": "tool_result", "tool_use_id": "t", "content": "x"}
        with pytest.raises(Fault, match="tool_use block before it"):
            parse(messages=[{"role": "user", "content": [block]}])


def conversation(*messages: dict[str, Any], **fields: Any) -> tuple[ChatMessage, ...]:
    return parse(messages=list(messages), **fields).completion.messages


def said(role: str, *blocks: dict[str, Any] | str) -> dict[str, Any]:
    content = [{"type": "text", "text": b} if isinstance(b, str) else b for b in blocks]
    return {"role": role, "content": content}


USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": [1, {"b": "é"}]}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "done"}
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "ZWRnZWt2"}


class TestConversation:
    def test_everything_in_its_place(self):
        call = ToolCall(call_id="t1", name="f", arguments='{"a":[1,{"b":"é"}]}')
        assert conversation(
            said("user", "One.", "Two."),
            said("system", "Mind the time."),
            said("assistant", THOUGHT, "I call.", USE),
            said("user", RESULT, "And then?"),
            said("developer", "Be kind."),
            system="Be brief.",
        ) == (
            ChatMessage(role="system", content="Be brief."),
            ChatMessage(role="user", content="One.\nTwo."),
            ChatMessage(role="system", content="Mind the time."),
            ChatMessage(role="assistant", content="I call.", reasoning="Hm.", tool_calls=(call,)),
            ChatMessage(role="tool", content="done", call_id="t1", name="f"),
            ChatMessage(role="user", content="And then?"),
            ChatMessage(role="developer", content="Be kind."),
        )

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ([said("user", "Hi")], [{"role": "user", "content": "Hi"}]),
            (
                [said("user", {"type": "text", "text": "Hi", "cache_control": {"type": "e"}})],
                [said("user", "Hi")],
            ),
            ([said("user", "a", "", "b")], [said("user", "a", "b")]),
            ([said("user", "a", "b")], [said("user", "a"), said("user", "b")]),
            ([said("assistant", "a", USE, "b")], [said("assistant", "ab", USE)]),
            (
                [said("assistant", USE), said("user", RESULT, "")],
                [said("assistant", USE), said("user", RESULT)],
            ),
            (
                [said("assistant", THOUGHT, "a", USE)],
                [said("assistant", THOUGHT), said("assistant", "a"), said("assistant", USE)],
            ),
            (
                [said("assistant", {**THOUGHT, "signature": "other"})],
                [said("assistant", {"type": "thinking", "thinking": "Hm."})],
            ),
            (
                [said("assistant", {"type": "redacted_thinking", "data": "x"}, "a")],
                [said("assistant", "a")],
            ),
            (
                [said("assistant", USE), said("user", RESULT)],
                [
                    said("assistant", {**USE, "cache_control": None, "caller": {"type": "x"}}),
                    said("user", {**RESULT, "content": [{"type": "text", "text": "done"}]}),
                ],
            ),
            (
                [said("assistant", USE), said("user", {**RESULT, "content": None})],
                [said("assistant", USE), said("user", {**RESULT, "content": []})],
            ),
            ([{"role": "user", "content": None}], [{"role": "user", "content": ""}]),
            ([{"role": "user", "content": []}], [{"role": "user", "content": ""}]),
            (
                [said("user", "Hi"), {"role": "system", "content": "x"}],
                [said("user", "Hi"), said("system", "x", "")],
            ),
        ],
    )
    def test_the_same_spelled_otherwise(self, one, other):
        assert conversation(*one) == conversation(*other)

    def test_system_spelled_otherwise(self):
        hi = said("user", "Hi")
        assert conversation(hi, system="a") == conversation(
            hi, system=[{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
        )
        for empty in ("", [], None):
            assert conversation(hi, system=empty) == conversation(hi)

    def test_an_error_of_a_tool_is_told_to_the_model(self):
        failed = {**RESULT, "content": "no such file", "is_error": True}
        assert conversation(said("assistant", USE), said("user", failed))[1].content == (
            "Error: no such file"
        )

    def test_tools_that_were_found(self):
        found = {**RESULT, "content": [{"type": "tool_reference", "tool_name": "get_weather"}]}
        assert conversation(said("assistant", USE), said("user", found))[1].content == "get_weather"

    @pytest.mark.parametrize("end", ["", "\n", "\nBe brief.", "\n\nBe brief."])
    def test_the_billing_line_is_left_out(self, end):
        hi = said("user", "Hi")
        line = "x-anthropic-billing-header: cc_version=2.1.0; cch={};" + end
        alike = {
            conversation(hi, system=[{"type": "text", "text": text}, {"type": "text", "text": "S"}])
            for text in (line.format("a1"), line.format("b2"))
        }
        (messages,) = alike
        assert messages[0].content == ("Be brief.\nS" if end.strip() else "S")
        assert conversation(hi, system=line) == conversation(hi, system=end.strip())

    def test_an_answer_sent_back_is_what_was_said(self):
        message = Served(EVERYTHING).client.messages.create(**MINIMAL)
        back = {"role": "assistant", "content": [block.to_dict() for block in message.content]}
        (read,) = conversation(back)
        wanted = EVERYTHING.message
        assert (read.content, read.reasoning) == (wanted.content, wanted.reasoning)
        for call, original in zip(read.tool_calls, wanted.tool_calls, strict=True):
            assert (call.call_id, call.name) == (original.call_id, original.name)
            assert json.loads(call.arguments) == json.loads(original.arguments)


RICH = {
    **MINIMAL,
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": [
        said("user", "Hi"),
        said("system", "s"),
        said("assistant", THOUGHT, "a", USE),
        said("user", {**RESULT, "is_error": True}, "b"),
    ],
    "tools": [WEATHER, {"type": "web_search_20250305", "name": "web_search"}],
    "tool_choice": {"type": "tool", "name": "get_weather"},
    "thinking": {"type": "adaptive"},
    "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
    "temperature": 1,
    "top_p": 0.5,
    "top_k": 5,
    "stop_sequences": ["x"],
    "stream": True,
}


@fuzz(examples=60, body=st.one_of(JSON, spoiled(RICH)))
def test_any_body_is_asked_or_refused(body):
    for read in (DIALECT.parse, parse_count):
        check_asked_or_refused(DIALECT, read, body)


def test_a_rich_body_is_taken():
    assert parse_count(Fields(RICH)).tool_name == "get_weather"


def test_deep_nesting_is_refused():
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(Fault, match="nested"):
        parse(tools=[{**WEATHER, "input_schema": deep}])
