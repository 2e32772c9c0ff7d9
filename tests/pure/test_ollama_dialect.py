"""Ollama's API, by its own Python client over a transport without a socket."""

import asyncio
import json
from typing import Any

import httpx
import ollama
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
    spoiled,
    stream_of,
)

from edgekv.chat.events import Finished, TextDelta, TokenLogprob
from edgekv.chat.values import ChatMessage, Completion, Tool, ToolCall
from edgekv.server.dialect import Asked
from edgekv.server.fields import STATUS, Fault, Fields
from edgekv.server.ollama import (
    ModelCard,
    OllamaChat,
    OllamaGenerate,
    no_embeddings,
    ps,
    show,
    show_name,
    tags,
    version,
)
from edgekv.tokenizer.grammar import Grammar

CHAT, GENERATE = OllamaChat(), OllamaGenerate()
HI = [{"role": "user", "content": "Hi"}]
EVERYTHING = finished(
    answer(
        AWKWARD,
        reasoning="Which city? Paris.",
        calls=[("get_weather", json.dumps({"city": AWKWARD})), ("get_time", '{"zone": [1, 2]}')],
    ),
    "tool_calls",
)
CARD = ModelCard(
    **{"name": "qwen", "family": "qwen2", "context_max": 32768, "num_parameters": 494_000_000},
    **{"quantization": "4-bit", "size_bytes": 300_000_000, "digest": "ab12", "can_think": True},
    modified_s=1_700_000_000,
)


class Served:
    """Ollama's clients over the dialects; `asked` is what arrived."""

    def __init__(self, *answers: Finished | Fault) -> None:
        self.asked: list[Asked] = []
        self._answers = list(answers)
        self._transport = httpx.MockTransport(self._respond)

    @property
    def client(self) -> ollama.Client:
        return ollama.Client("http://edgekv", transport=self._transport)

    @property
    def async_client(self) -> ollama.AsyncClient:
        return ollama.AsyncClient("http://edgekv", transport=self._transport)

    def _respond(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        asking = {"/api/tags": lambda: tags([CARD]), "/api/ps": lambda: ps([CARD])}
        if path in asking:
            return httpx.Response(200, json=asking[path]())
        body = Fields(json.loads(request.content))
        try:
            if path == "/api/show":
                assert show_name(body) == CARD.name
                return httpx.Response(200, json=show(CARD))
            if path == "/api/embed":
                raise no_embeddings()
            return self._answer({"/api/chat": CHAT, "/api/generate": GENERATE}[path], body)
        except Fault as fault:
            return httpx.Response(fault.status, json=CHAT.error(fault))

    def _answer(self, dialect: OllamaChat | OllamaGenerate, body: Fields) -> httpx.Response:
        if (loaded := dialect.loaded(body, ABOUT)) is not None:
            return httpx.Response(200, json=loaded)
        asked = dialect.parse(body)
        self.asked.append(asked)
        end = self._answers.pop(0)
        if isinstance(end, Fault):
            raise end
        if not asked.stream:
            return httpx.Response(200, json=dialect.whole(asked, ABOUT, [end]))
        stream = stream_of(dialect.writer(asked, ABOUT), end)
        return httpx.Response(200, content=stream, headers={"content-type": dialect.media_type})


def check_end(response: Any, reason: str = "stop") -> None:
    assert (response.done, response.done_reason, response.model) == (True, reason, "m")
    assert response.created_at == "2023-11-14T22:13:20Z"
    assert (response.prompt_eval_count, response.eval_count) == (100, 31)
    assert (response.prompt_eval_duration, response.eval_duration) == (300_000_000, 300_000_000)
    assert response.total_duration == 620_000_000


CALLS = [("get_weather", {"city": AWKWARD}), ("get_time", {"zone": [1, 2]})]


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]


class TestChatAnswers:
    def test_whole(self):
        response = Served(EVERYTHING).client.chat("m", HI)
        assert response.message.content == AWKWARD
        assert response.message.thinking == "Which city? Paris."
        assert calls_of(response.message) == CALLS
        check_end(response)

    def test_streamed_with_heartbeats_anywhere(self):
        served = Served(EVERYTHING)
        parts = list(served.client.chat("m", HI, stream=True))
        assert "".join(part.message.content for part in parts) == AWKWARD
        assert "".join(part.message.thinking or "" for part in parts) == "Which city? Paris."
        assert [call for part in parts for call in calls_of(part.message)] == CALLS
        assert not any(part.done for part in parts[:-1])
        check_end(parts[-1])

    def test_streamed_asynchronously(self):
        async def read() -> list[Any]:
            stream = await Served(EVERYTHING).async_client.chat("m", HI, stream=True)
            return [part async for part in stream]

        parts = asyncio.run(read())
        assert "".join(part.message.content for part in parts) == AWKWARD
        check_end(parts[-1])

    def test_each_line_is_an_object(self):
        stream = stream_of(CHAT.writer(CHAT.parse(Fields(chat())), ABOUT), EVERYTHING)
        assert stream.endswith(b"\n")
        lines = stream.decode().splitlines()  # as httpx does, at U+2028 too
        assert all({"model", "created_at", "message", "done"} <= set(json.loads(x)) for x in lines)
        assert json.loads(lines[-1])["edgekv"]["num_cached_tokens"] == 40
        assert sum("edgekv" in line for line in lines) == 1

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_call_that_was_cut_is_not_made(self, stream):
        end = finished(answer(calls=[("f", "{}"), ("g", '{"city": "Par')]), "length")
        response = Served(end).client.chat("m", HI, stream=stream)
        parts = list(response) if stream else [response]
        assert [call for part in parts for call in calls_of(part.message)] == [("f", {})]
        check_end(parts[-1], "length")

    @pytest.mark.parametrize("stream", [False, True])
    def test_logprobs(self, stream):
        likely = TokenLogprob(token="b", token_bytes=b"b", logprob=-2.0)
        token = TokenLogprob(token="a", token_bytes=b"a", logprob=-0.5, top=(likely,))
        end = finished(answer("a"), logprobs=(token,))
        asked = CHAT.parse(Fields(chat(logprobs=True, top_logprobs=1)))
        assert asked.completion.sampling.logprobs == 1
        if stream:
            line = CHAT.writer(asked, ABOUT).event(TextDelta(text="a", logprobs=(token,)))
            body = json.loads(line)
        else:
            body = CHAT.whole(asked, ABOUT, [end])
        (read,) = ollama.ChatResponse(**body).logprobs
        assert (read.token, read.logprob) == ("a", -0.5)
        assert [(top.token, top.logprob) for top in read.top_logprobs] == [("b", -2.0)]

    def test_nothing_asked_is_a_model_loaded(self):
        served = Served()
        response = served.client.chat("m", [])
        assert (response.done, response.done_reason) == (True, "load")
        assert response.message.content == ""
        (part,) = served.client.chat("m", [], stream=True)
        assert part.done_reason == "load"
        assert served.asked == []


class TestGenerateAnswers:
    @pytest.mark.parametrize("stream", [False, True])
    def test_answer(self, stream):
        end = finished(answer(AWKWARD, reasoning="Hm."))
        served = Served(end)
        response = served.client.generate("m", "Hi", system="Be brief.", stream=stream)
        parts = list(response) if stream else [response]
        assert "".join(part.response for part in parts) == AWKWARD
        assert "".join(part.thinking or "" for part in parts) == "Hm."
        check_end(parts[-1])
        assert served.asked[0].completion.messages == (
            ChatMessage(role="system", content="Be brief."),
            ChatMessage(role="user", content="Hi"),
        )

    def test_raw(self):
        served = Served(finished(answer("b")))
        served.client.generate("m", "a", raw=True, template="{{ .Prompt }}", context=[1, 2])
        assert served.asked[0].completion == Completion(prompt="a")

    def test_nothing_asked_is_a_model_loaded(self):
        response = Served().client.generate("m", keep_alive=300)
        assert (response.done, response.done_reason, response.response) == (True, "load", "")

    def test_images_and_suffix_are_refused(self):
        with pytest.raises(ollama.ResponseError, match="no images") as caught:
            Served().client.generate("m", "Look", images=[b"abc"])
        assert caught.value.status_code == 400
        with pytest.raises(ollama.ResponseError, match="suffix"):
            Served().client.generate("m", "a", suffix="b")


class TestHelpers:
    def test_schema(self):
        class City(BaseModel):
            name: str

        served = Served(finished(answer('{"name": "Paris"}')))
        response = served.client.chat("m", HI, format=City.model_json_schema())
        assert City.model_validate_json(response.message.content).name == "Paris"
        grammar = served.asked[0].completion.grammar
        assert grammar is not None
        assert grammar.kind == "json_schema"
        assert json.loads(grammar.text) == City.model_json_schema()

    def test_a_python_function_as_a_tool(self):
        def get_weather(city: str) -> str:
            """Today's.

            Args:
                city: Where.
            """
            return city

        served = Served(
            finished(answer(calls=[("get_weather", '{"city": "Paris"}')]), "tool_calls"),
            finished(answer("Sunny.")),
        )
        messages: list[Any] = list(HI)
        response = served.client.chat("m", messages, tools=[get_weather])
        (call,) = response.message.tool_calls
        assert get_weather(**call.function.arguments) == "Paris"
        messages += [
            response.message,
            {"role": "tool", "content": "sunny", "tool_name": "get_weather"},
        ]
        assert served.client.chat("m", messages).message.content == "Sunny."
        first, second = (asked.completion for asked in served.asked)
        assert (first.tools[0].name, first.tools[0].description) == ("get_weather", "Today's.")
        assert first.tools[0].schema()["properties"]["city"]["type"] == "string"
        called = ToolCall(call_id="call_0", name="get_weather", arguments='{"city":"Paris"}')
        assert second.messages[1:] == (
            ChatMessage(role="assistant", tool_calls=(called,)),
            ChatMessage(role="tool", content="sunny", call_id="call_0", name="get_weather"),
        )

    def test_models(self):
        client = Served().client
        (model,) = client.list().models
        assert (model.model, model.size, model.details.family) == ("qwen", 300_000_000, "qwen2")
        assert model.modified_at is not None
        (running,) = client.ps().models
        assert (running.model, running.context_length) == ("qwen", 32768)
        assert running.expires_at is not None
        shown = client.show("qwen")
        assert shown.modelinfo is not None
        assert shown.modelinfo["qwen2.context_length"] == 32768
        assert shown.capabilities == ["completion", "tools", "thinking"]
        assert shown.details is not None
        assert shown.details.parameter_size == "0.5B"

    def test_show_by_either_name(self):
        assert show_name(Fields({"name": "a"})) == show_name(Fields({"model": "a"})) == "a"
        with pytest.raises(Fault, match="missing"):
            show_name(Fields({}))

    def test_version_is_new_enough_for_codex(self):
        assert tuple(map(int, version()["version"].split("."))) >= (0, 13, 4)

    def test_embeddings_are_refused(self):
        with pytest.raises(ollama.ResponseError, match="embeddings") as caught:
            Served().client.embed("m", "text")
        assert caught.value.status_code == 400


class TestErrors:
    @pytest.mark.parametrize("kind", list(STATUS))
    @pytest.mark.parametrize("stream", [False, True])
    def test_each_kind(self, kind, stream):
        with pytest.raises(ollama.ResponseError) as caught:
            list(Served(Fault(kind, "so it is")).client.chat("m", HI, stream=stream))
        assert (caught.value.error, caught.value.status_code) == ("so it is", STATUS[kind])

    @pytest.mark.parametrize("num_events", range(len(events_of(EVERYTHING))))
    def test_in_a_stream(self, num_events):
        writer = CHAT.writer(CHAT.parse(Fields(chat())), ABOUT)
        sent = writer.begin()
        sent += "".join(writer.event(event) for event in events_of(EVERYTHING)[:num_events])
        sent += writer.heartbeat() + writer.fail(Fault("internal", "it broke"))
        transport = httpx.MockTransport(lambda _: httpx.Response(200, content=sent.encode()))
        client = ollama.Client("http://edgekv", transport=transport)
        with pytest.raises(ollama.ResponseError, match="it broke"):
            list(client.chat("m", HI, stream=True))


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HI, **fields}


def asked(**fields: Any) -> Completion:
    return CHAT.parse(Fields(chat(**fields))).completion


class TestAsked:
    def test_the_least(self):
        least = CHAT.parse(Fields(chat()))
        assert (least.model, least.stream) == ("m", True)  # as Ollama's does
        assert least.completion == Completion(messages=(ChatMessage(role="user", content="Hi"),))
        assert not CHAT.parse(Fields(chat(stream=False))).stream

    def test_options(self):
        params = asked(
            options={
                **{"num_predict": 5, "temperature": 0.5, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
                **{
                    "repeat_penalty": 1.1,
                    "seed": 7,
                    "stop": ["\n"],
                    "num_ctx": 4096,
                    "mirostat": 1,
                    "presence_penalty": 0.5,
                    "frequency_penalty": -0.25,
                },
            }
        ).sampling
        assert (params.max_tokens, params.temperature, params.top_k) == (5, 0.5, 20)
        assert (params.top_p, params.min_p, params.repetition_penalty) == (0.9, 0.1, 1.1)
        assert (params.presence_penalty, params.frequency_penalty) == (0.5, -0.25)
        assert (params.seed, params.stop) == (7, ("\n",))
        assert asked(options={"top_p": 0}).sampling.top_p == 0

    @pytest.mark.parametrize("num_predict", [-2, -1, 0])
    def test_no_limits(self, num_predict):
        params = asked(options={"num_predict": num_predict, "top_k": -1, "seed": -1}).sampling
        assert (params.max_tokens, params.top_k, params.seed) == (None, 0, None)

    @pytest.mark.parametrize(
        ("think", "expected"), [(True, True), (False, False), ("low", True), (None, None)]
    )
    def test_thinking(self, think, expected):
        assert asked(think=think).thinking is expected
        assert asked(think=think).effort == ("low" if think == "low" else "")

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("", None),
            (None, None),
            ("json", Grammar(kind="json_object")),
            ({"type": "object"}, Grammar(kind="json_schema", text='{"type":"object"}')),
        ],
    )
    def test_format(self, value, expected):
        assert asked(format=value).grammar == expected

    def test_what_ollama_ignores_is_ignored(self):
        assert asked(keep_alive="5m", truncate=True, unheard_of=1) == asked()

    def test_tools(self):
        function = {"name": "f", "parameters": {"type": "object"}}
        tools = [{"type": "function", "function": function}, {"function": {"name": "g"}}]
        assert asked(tools=tools).tools == (
            Tool(name="f", parameters='{"type":"object"}'),
            Tool(name="g"),
        )

    def test_results_find_their_calls(self):
        """By name where it is said, else in order; clients keep no ids."""
        calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g", "f")]
        messages = asked(
            messages=[
                {"role": "assistant", "content": None, "thinking": "Hm.", "tool_calls": calls},
                {"role": "tool", "content": "1", "tool_name": "g"},
                {"role": "tool", "content": "2", "name": "f"},
                {"role": "tool", "content": "3"},
                {"role": "tool", "content": "4", "tool_name": "h"},
            ]
        ).messages
        assert messages[0].reasoning == "Hm."
        assert [(m.call_id, m.name) for m in messages[1:]] == [
            ("call_1", "g"),
            ("call_0", "f"),
            ("call_2", "f"),
            ("", "h"),
        ]

    @pytest.mark.parametrize("role", ["system", "developer"])
    def test_instructions_anywhere(self, role):
        messages = [*HI, {"role": role, "content": "Be kind."}]
        assert asked(messages=messages).messages[1] == ChatMessage(role=role, content="Be kind.")

    @pytest.mark.parametrize(
        ("fields", "param", "words"),
        [
            ({"model": None}, "model", "missing"),
            ({"messages": []}, "messages", "at least one"),
            ({"messages": [{"role": "function"}]}, "messages[0].role", "one of"),
            (
                {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]},
                "messages[0].images",
                "no images",
            ),
            ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "string"),
            ({"options": {"temperature": "hot"}}, "options.temperature", "number"),
            ({"options": {"top_p": 1.5}}, "options.top_p", "from 0 to 1"),
            ({"think": "deeply"}, "think", "low"),
            ({"format": "yaml"}, "format", "JSON schema"),
            ({"tools": [{"type": "function"}]}, "tools[0].function", "name"),
            (
                {
                    "messages": [
                        {
                            "role": "assistant",
                            "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                        }
                    ]
                },
                "messages[0].tool_calls[0].function.arguments",
                "object",
            ),
        ],
    )
    def test_what_cannot_be_is_refused_by_name(self, fields, param, words):
        with pytest.raises(Fault, match=words) as caught:
            asked(**fields)
        assert (caught.value.kind, caught.value.param) == ("invalid", param)


RICH_CHAT = chat(
    messages=[
        {"role": "system", "content": "s"},
        *HI,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "x", "tool_name": "f"},
    ],
    tools=[{"function": {"name": "f", "parameters": {"type": "object"}}}],
    options={"temperature": 1, "top_k": 5, "num_predict": 5, "seed": 1, "stop": ["x"]},
    format={"type": "object"},
    think=True,
)
RICH_GENERATE = {
    **{"model": "m", "prompt": "a", "system": "b", "raw": False, "suffix": "", "images": []},
    **{"options": {"top_p": 0.5}, "format": "json", "stream": False, "logprobs": True},
}


@fuzz(examples=60, body=st.one_of(JSON, spoiled(RICH_CHAT)))
def test_any_body_is_asked_or_refused_by_chat(body):
    check_asked_or_refused(CHAT, CHAT.parse, body)


@fuzz(examples=40, body=st.one_of(JSON, spoiled(RICH_GENERATE)))
def test_any_body_is_asked_or_refused_by_generate(body):
    check_asked_or_refused(GENERATE, GENERATE.parse, body)


def test_rich_bodies_are_taken():
    assert CHAT.parse(Fields(RICH_CHAT)).completion.thinking
    assert GENERATE.parse(Fields(RICH_GENERATE)).completion.sampling.logprobs == 0
