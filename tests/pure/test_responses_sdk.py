"""The real OpenAI SDK against the Responses dialect, without a socket."""

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from responses_script import (
    ABOUT,
    AGENTS,
    ANSWERS,
    BODY,
    CALLS,
    DIALECT,
    PATCH,
    WEATHER,
    assistant,
    call,
    finished,
    parse,
    stream,
    told,
)

from edgekv.chat.values import ChatMessage
from edgekv.server.dialect import Asked
from edgekv.server.fields import Fault
from edgekv.server.openai_errors import openai_error

try:
    import httpx2 as httpx  # what newer SDKs are made of
except ImportError:
    import httpx


class Server:
    """Answers the SDK's requests with a scripted message, through the dialect and no socket."""

    def __init__(self, message: ChatMessage, reason: str = "stop") -> None:
        self.message, self.reason = message, reason
        self.asked: list[Asked] = []

    def answer(self, request: Any) -> Any:
        asked = parse(json.loads(request.content))
        self.asked.append(asked)
        if asked.stream:
            text = stream(asked, told(self.message, self.reason))
            return httpx.Response(200, text=text, headers={"content-type": DIALECT.media_type})
        answers = [finished(self.message, self.reason)]
        return httpx.Response(200, json=DIALECT.whole(asked, ABOUT, answers))

    async def answer_async(self, request: Any) -> Any:
        return self.answer(request)

    def client(self) -> openai.OpenAI:
        transport = httpx.MockTransport(self.answer)
        http = httpx.Client(transport=transport)
        return openai.OpenAI(base_url="http://edgekv/v1", api_key="-", http_client=http)

    def async_client(self) -> openai.AsyncOpenAI:
        http = httpx.AsyncClient(transport=httpx.MockTransport(self.answer_async))
        return openai.AsyncOpenAI(base_url="http://edgekv/v1", api_key="-", http_client=http)


class City(BaseModel):
    city: str
    n: int


def test_the_sdk_reads_a_response():
    server = Server(ANSWERS[1])
    with server.client() as client:
        response = client.responses.create(model="edgekv", input="Hello")
    assert response.output_text == "Because."
    assert response.status == "completed"
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 40
    assert response.edgekv["num_cached_tokens"] == 40  # type: ignore[attr-defined]


def test_the_sdk_reads_a_stream():
    with Server(ANSWERS[0]).client() as client:
        events = list(client.responses.create(model="edgekv", input="Hello", stream=True))
    text = "".join(it.delta for it in events if it.type == "response.output_text.delta")
    assert text == "Hello from here."
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == text


def test_the_sdk_accumulates_a_stream_with_calls():
    server = Server(ANSWERS[2])
    tools: Any = [WEATHER, PATCH, AGENTS]
    with (
        server.client() as client,
        client.responses.stream(model="edgekv", input="Hi", tools=tools) as events,
    ):
        arguments = [it for it in events if it.type == "response.function_call_arguments.done"]
        response = events.get_final_response()
    assert [it.arguments for it in arguments] == [CALLS[0].arguments, CALLS[2].arguments]
    assert response.output_text == "I call."
    weather = response.output[-1]
    assert weather.type == "function_call"
    assert weather.parsed_arguments == {"city": "Paris"}


def test_the_sdk_parses_a_model():
    server = Server(assistant('{"city": "Paris", "n": 3}', reasoning="Easy"))
    with server.client() as client:
        whole = client.responses.parse(model="edgekv", input="Where?", text_format=City)
        with client.responses.stream(model="edgekv", input="Where?", text_format=City) as events:
            streamed = events.get_final_response()
    assert whole.output_parsed == streamed.output_parsed == City(city="Paris", n=3)
    for asked in server.asked:
        assert asked.completion.grammar is not None
        assert json.loads(asked.completion.grammar.text)["required"] == ["city", "n"]


def test_the_sdk_parses_a_call_of_a_model():
    server = Server(assistant(tool_calls=(call("City", '{"city": "Paris", "n": 3}'),)))
    with server.client() as client:
        tool = openai.pydantic_function_tool(City)["function"]
        tools: Any = [{"type": "function", **tool}]
        response = client.responses.parse(model="edgekv", input="Where?", tools=tools)
    (item,) = response.output
    assert item.type == "function_call"
    assert City.model_validate(item.parsed_arguments) == City(city="Paris", n=3)


def test_the_async_sdk_reads_both():
    async def play() -> tuple[str, list[str]]:
        async with Server(ANSWERS[0]).async_client() as client:
            whole = await client.responses.create(model="edgekv", input="Hello")
            events = await client.responses.create(model="edgekv", input="Hello", stream=True)
            return whole.output_text, [event.type async for event in events]

    text, kinds = asyncio.run(play())
    assert text == "Hello from here."
    assert kinds[-1] == "response.completed"


def test_a_tool_loop_of_the_sdk_comes_back_as_it_was():
    server = Server(ANSWERS[2])
    with server.client() as client:
        first = client.responses.create(model="edgekv", input="Hi", tools=BODY["tools"])
        items: Any = [{"role": "user", "content": "Hi"}, *first.output]
        for item in first.output:
            if item.type in ("function_call", "custom_tool_call"):
                kind = f"{item.type}_output"
                items.append({"type": kind, "call_id": item.call_id, "output": "done"})
        client.responses.create(model="edgekv", input=items, tools=BODY["tools"])
    user, answer, *results = server.asked[1].completion.messages
    assert user == server.asked[0].completion.messages[0]
    assert (answer.content, answer.reasoning) == ("I call.", "Hm")
    assert [it.name for it in answer.tool_calls] == [it.name for it in CALLS]
    assert [(it.name, it.content) for it in results] == [(it.name, "done") for it in CALLS]


@pytest.mark.parametrize(
    ("fault", "error", "kind"),
    [
        (
            Fault("context", "prompt is too long: 9 tokens > 8 maximum", param="input"),
            openai.BadRequestError,
            ("invalid_request_error", "input", "context_length_exceeded"),
        ),
        (
            Fault("not_found", "no such model", code="model_not_found"),
            openai.NotFoundError,
            ("invalid_request_error", None, "model_not_found"),
        ),
        (
            Fault("unauthorized", "no key"),
            openai.AuthenticationError,
            ("invalid_request_error", None, "invalid_api_key"),
        ),
        (
            Fault("overloaded", "full"),
            openai.RateLimitError,
            ("rate_limit_exceeded", None, "rate_limit_exceeded"),
        ),
        (Fault("internal", "a bug"), openai.InternalServerError, ("server_error", None, None)),
    ],
)
def test_errors_before_a_stream_are_typed_by_the_sdk(
    fault: Fault, error: type[openai.APIStatusError], kind: tuple[str | None, ...]
):
    def answer(request: Any) -> Any:
        return httpx.Response(fault.status, json=DIALECT.error(fault))

    assert DIALECT.error(fault) == openai_error(fault)
    http = httpx.Client(transport=httpx.MockTransport(answer))
    with (
        openai.OpenAI(
            base_url="http://e/v1", api_key="-", http_client=http, max_retries=0
        ) as client,
        pytest.raises(error) as caught,
    ):
        client.responses.create(model="edgekv", input="Hello")
    assert (caught.value.type, caught.value.param, caught.value.code) == kind
    assert fault.message in caught.value.message
