"""The official `ollama` client, as people use it, against a daemon over a real socket."""

import asyncio
import json

import ollama
import pytest
from scripted_model import said_last, scripted
from tiny_runtime import eventually

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
SCHEMA = {
    "type": "object",
    "properties": {"big": {"type": "boolean"}},
    "required": ["big"],
    "additionalProperties": False,
}


def headers(daemon):
    return {"authorization": f"Bearer {daemon.keys['mail']}"}


@pytest.fixture
def client(daemon):
    client = ollama.Client(host=daemon.base_url, headers=headers(daemon))
    yield client
    client._client.close()


def user(text):
    return {"role": "user", "content": text}


def test_a_chat_and_a_stream(client):
    with scripted(lambda _: "Paris, of course."):
        reply = client.chat(model="any", messages=[user("Capital?")])
        parts = list(client.chat(model="any", messages=[user("Capital?")], stream=True))
    assert reply.message.content == "Paris, of course."
    assert "".join(part.message.content for part in parts) == "Paris, of course."
    assert reply.done_reason == parts[-1].done_reason == "stop"
    assert parts[-1].eval_count == reply.eval_count > 0


def test_a_text_and_its_form(client):
    with scripted(lambda _: "upon a time"):
        parts = list(client.generate(model="any", prompt="Once", stream=True))
    assert "".join(part.response for part in parts) == "upon a time"
    reply = client.chat(model="any", messages=[user("?")], format=SCHEMA, options={"seed": 1})
    assert json.loads(reply.message.content)["big"] in (True, False)


def test_a_tool_is_called_and_answered(client):
    def weather(asked):
        return CALL if asked.messages[-1].role == "user" else f"It is {said_last(asked)}."

    messages = [user("Weather in Rome?")]
    with scripted(weather):
        called = client.chat(model="any", messages=messages, tools=[WEATHER])
        (call,) = called.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Rome"})
        messages += [
            called.message,
            {"role": "tool", "tool_name": "get_weather", "content": "sunny"},
        ]
        reply = client.chat(model="any", messages=messages, tools=[WEATHER])
    assert reply.message.content == "It is sunny."


def test_what_there_is(client):
    assert [model.model for model in client.list().models] == ["tiny"]
    assert [model.model for model in client.ps().models] == ["tiny"]
    assert "completion" in client.show("tiny").capabilities
    assert client.generate(model="tiny", prompt="").done_reason == "load"
    with pytest.raises(ollama.ResponseError, match="embeddings"):
        client.embed(model="tiny", input="x")


def test_async_and_who_leaves(daemon):
    async def leave():
        client = ollama.AsyncClient(host=daemon.base_url, headers=headers(daemon))
        stream = await client.chat(model="any", messages=[user("go")], stream=True)
        async for part in stream:
            if part.message.content:
                break
        await stream.aclose()
        await client._client.aclose()

    with scripted(lambda _: "word " * 400):
        asyncio.run(leave())
        eventually(lambda: not daemon.runtime._engine.inbox.num_unfinished, timeout_s=30)
    daemon.runtime.check_integrity()
