"""The official `anthropic` client, as people use it, against a daemon over a real socket."""

import asyncio

import anthropic
import pytest
from scripted_model import said_last, scripted
from tiny_runtime import eventually

WEATHER = {
    "name": "get_weather",
    "description": "The weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CALL = '{"name": "get_weather", "arguments": {"city": "Rome"}}'


@pytest.fixture
def client(daemon):
    with anthropic.Anthropic(base_url=daemon.base_url, api_key=daemon.keys["mail"]) as client:
        yield client


def user(text):
    return {"role": "user", "content": text}


def weather(asked):
    return CALL if asked.messages[-1].role == "user" else f"It is {said_last(asked)}."


def ask(client, messages, **options):
    return client.messages.create(model="any", max_tokens=100, messages=messages, **options)


def test_a_message_and_a_stream(client):
    with scripted(lambda _: "Paris, of course."):
        message = ask(client, [user("Capital?")], system="Be brief.")
        with client.messages.stream(
            model="any", max_tokens=100, messages=[user("Capital?")], system="Be brief."
        ) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
    assert message.content[0].text == text == final.content[0].text == "Paris, of course."
    assert message.stop_reason == final.stop_reason == "end_turn"
    assert final.usage.output_tokens == message.usage.output_tokens > 0
    # The same prompt again: all but its last token is there.
    assert final.usage.cache_read_input_tokens > 0
    assert final.usage.input_tokens == 1


def test_a_tool_is_called_and_answered(client):
    messages = [user("Weather in Rome?")]
    with scripted(weather):
        with client.messages.stream(
            model="any", max_tokens=100, messages=messages, tools=[WEATHER]
        ) as stream:
            called = stream.get_final_message()
        assert called.stop_reason == "tool_use"
        (call,) = called.content
        assert (call.name, call.input) == ("get_weather", {"city": "Rome"})
        messages += [
            {"role": "assistant", "content": called.content},
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": call.id,
                        "content": [{"type": "text", "text": "sunny"}],
                        "cache_control": {"type": "ephemeral"},
                    }
                ],
            },
        ]
        message = ask(client, messages, tools=[WEATHER])
    assert message.content[0].text == "It is sunny."
    assert message.usage.cache_read_input_tokens > message.usage.input_tokens


def test_a_tool_that_must_be_called(client):
    message = ask(client, [user("Hello")], tools=[WEATHER], tool_choice={"type": "any"})
    assert message.stop_reason in ("tool_use", "max_tokens")
    assert message.content[0].type == "tool_use"
    assert message.content[0].input["city"] in ("Rome", "Oslo")


def test_a_stop_sequence_and_a_limit(client):
    with scripted(lambda _: "one two three four"):
        stopped = ask(client, [user("x")], stop_sequences=["three"])
        cut = client.messages.create(model="any", max_tokens=2, messages=[user("y")])
    assert stopped.content[0].text == "one two "
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "three")
    assert cut.stop_reason == "max_tokens"


def test_tokens_are_counted_as_they_are_used(client):
    counted = client.messages.count_tokens(model="any", messages=[user("Hello")], tools=[WEATHER])
    message = ask(client, [user("Hello")], tools=[WEATHER])
    used = message.usage.input_tokens + message.usage.cache_read_input_tokens
    assert counted.input_tokens == used


def test_async_and_who_leaves(daemon):
    async def leave():
        async with anthropic.AsyncAnthropic(
            base_url=daemon.base_url, api_key=daemon.keys["mail"]
        ) as client:
            async with client.messages.stream(
                model="any", max_tokens=1000, messages=[user("go")]
            ) as stream:
                async for _ in stream.text_stream:
                    break
            return await client.messages.create(
                model="any", max_tokens=50, messages=[user("again")]
            )

    with scripted(lambda asked: "word " * (400 if said_last(asked) == "go" else 3)):
        message = asyncio.run(leave())
    assert message.content[0].text.split() == ["word"] * 3
    eventually(lambda: not daemon.runtime._engine.inbox.num_unfinished, timeout_s=30)


def test_errors_are_those_of_the_api(daemon, client):
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.post("/v1/messages", body={"model": "x", "messages": [user("x")]}, cast_to=object)
    with (
        anthropic.Anthropic(base_url=daemon.base_url, api_key="ekv_no", max_retries=0) as wrong,
        pytest.raises(anthropic.AuthenticationError),
    ):
        ask(wrong, [user("x")])
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: "):
        ask(client, [user("long " * 20_000)])
