"""The official `openai` client, as people use it, against a daemon over a real socket."""

import asyncio
import json
import os
import threading
import time
from functools import partial
from typing import Literal

import httpx2
import openai
import pydantic
import pytest
from scripted_model import said_last, scripted
from tiny_runtime import eventually

from edgekv.engine.loop import Loop

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
# How many of its answers differ, and how much of a reply that a grammar spells was computed.
OF_THE_TINY_MODEL = pytest.mark.skipif(
    "EDGEKV_TEST_MODEL" in os.environ, reason="about what the tiny model says"
)
CALL = '{"name": "get_weather", "arguments": {"city": "Rome"}}'


class City(pydantic.BaseModel):
    name: Literal["Rome", "Oslo"]  # a random model would not end a string
    big: bool


@pytest.fixture
def client(daemon):
    with openai.OpenAI(base_url=f"{daemon.base_url}/v1", api_key=daemon.keys["mail"]) as client:
        yield client


def user(text):
    return {"role": "user", "content": text}


def weather(asked):
    """Calls the tool, and says what it said."""
    return CALL if asked.messages[-1].role == "user" else f"It is {said_last(asked)}."


# --- chat completions ---


def test_an_answer(client):
    with scripted(lambda _: "Paris, of course."):
        reply = client.chat.completions.create(model="any", messages=[user("Capital?")])
    assert reply.choices[0].message.content == "Paris, of course."
    assert reply.choices[0].finish_reason == "stop"
    usage = reply.usage
    assert usage.prompt_tokens > 0
    assert usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert reply.edgekv["prefill_mode"] == "exact"


def test_a_stream_says_the_same_in_pieces(client):
    options = {"include_usage": True}
    with scripted(lambda _: "Grüße, 🙂 и всё."):
        chunks = list(
            client.chat.completions.create(
                model="any", messages=[user("Hi")], stream=True, stream_options=options
            )
        )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "Grüße, 🙂 и всё."
    assert len([text for text in texts if text]) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 3


@OF_THE_TINY_MODEL
def test_turns_reuse_what_was_computed(client):
    with scripted(lambda asked: f"You said {len(asked.messages)} things."):
        messages = [{"role": "system", "content": "Count. " * 10}, user("One")]
        first = client.chat.completions.create(model="any", messages=messages)
        said = first.choices[0].message.content
        # As clients send it back: in parts, trimmed, with fields of their own.
        parts = [{"type": "text", "text": f" {said}\n"}]
        messages += [{"role": "assistant", "content": parts, "refusal": None}, user("Two")]
        second = client.chat.completions.create(model="any", messages=messages)
    known = first.usage.prompt_tokens + first.usage.completion_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= known - 1


def test_a_tool_is_called_and_answered(client):
    messages = [user("Weather in Rome?")]
    with scripted(weather):
        calls: dict[int, dict[str, str]] = {}
        reason = None
        for chunk in client.chat.completions.create(
            model="any", messages=messages, tools=[WEATHER], stream=True
        ):
            choice = chunk.choices[0]
            reason = choice.finish_reason or reason
            for part in choice.delta.tool_calls or ():
                call = calls.setdefault(part.index, {"id": part.id, "name": "", "arguments": ""})
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
        assert reason == "tool_calls"
        (call,) = calls.values()
        assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Rome"})
        function = {"name": call["name"], "arguments": '{"city":"Rome"}'}
        messages += [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": call["id"], "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": call["id"], "content": "sunny"},
        ]
        reply = client.chat.completions.create(model="any", messages=messages, tools=[WEATHER])
    assert reply.choices[0].message.content == "It is sunny."
    assert reply.usage.prompt_tokens_details.cached_tokens > 0.5 * reply.usage.prompt_tokens


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_tool_that_must_be_called_is_called_by_any_model(client, choice):
    reply = client.chat.completions.create(
        model="any",
        messages=[user("Hello")],
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=1.0,
        max_tokens=200,
    )
    assert reply.choices[0].finish_reason == "tool_calls"
    (call,) = reply.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")


def test_a_typed_answer(client):
    parsed = client.chat.completions.parse(
        model="any",
        messages=[user("A city")],
        response_format=City,
        max_tokens=300,
        temperature=1.0,
        seed=3,
    )
    assert isinstance(parsed.choices[0].message.parsed, City)


@OF_THE_TINY_MODEL
def test_several_answers_with_their_log_probabilities(client):
    reply = client.chat.completions.create(
        model="any",
        messages=[user("Hi")],
        n=3,
        temperature=1.0,
        seed=5,
        max_tokens=8,
        logprobs=True,
        top_logprobs=2,
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in reply.choices}) == 3
    for choice in reply.choices:
        rows = choice.logprobs.content
        assert 1 <= len(rows) <= 8
        assert all(row.logprob <= 0 and len(row.top_logprobs) == 2 for row in rows)
    again = client.chat.completions.create(
        model="any", messages=[user("Hi")], temperature=1.0, seed=5, max_tokens=8
    )
    assert again.choices[0].message.content == reply.choices[0].message.content


def test_a_top_p_of_nothing_leaves_the_likeliest_token(client):
    ask = partial(client.completions.create, model="any", prompt="Hi", max_tokens=20)
    narrow, greedy = ask(temperature=2.0, top_p=0), ask(temperature=0)
    assert narrow.choices[0].text == greedy.choices[0].text


@OF_THE_TINY_MODEL
def test_what_was_said_can_be_made_less_likely(client):
    ask = partial(client.completions.create, model="any", prompt="Hi", max_tokens=60)
    plain = ask(temperature=0.0)
    varied = ask(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0)
    assert len(set(varied.choices[0].text)) > len(set(plain.choices[0].text))
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        ask(presence_penalty=3)


def test_a_stop_string_and_a_limit(client):
    with scripted(lambda _: "one two three four"):
        stopped = client.chat.completions.create(model="any", messages=[user("x")], stop=["three"])
        cut = client.chat.completions.create(model="any", messages=[user("y")], max_tokens=2)
    assert stopped.choices[0].message.content == "one two "
    assert stopped.choices[0].finish_reason == "stop"
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 2


def test_completions_continue_a_text(client):
    with scripted(lambda _: "unused"):
        pass
    reply = client.completions.create(model="any", prompt="Once upon", max_tokens=5, seed=1)
    streamed = client.completions.create(
        model="any", prompt="Once upon", max_tokens=5, seed=1, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == reply.choices[0].text
    assert reply.usage.completion_tokens == 5


# --- responses ---


def test_responses(client):
    with scripted(lambda _: "Hello there."):
        reply = client.responses.create(model="any", input="Hi")
        with client.responses.stream(model="any", input="Hi") as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
    assert reply.output_text == final.output_text == "Hello there."
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


def test_responses_parse_and_call(client):
    parsed = client.responses.parse(
        model="any", input="A city", text_format=City, max_output_tokens=300, temperature=1.0
    )
    assert isinstance(parsed.output_parsed, City)
    tool = {"type": "function", **WEATHER["function"], "strict": False}
    with scripted(weather):
        called = client.responses.create(model="any", input="Weather?", tools=[tool])
        (call,) = called.output
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        reply = client.responses.create(
            model="any", input=[user("Weather?"), call, result], tools=[tool]
        )
    assert reply.output_text == "It is rain."
    assert reply.usage.input_tokens_details.cached_tokens > 0


# --- async, and who leaves ---


def test_async_and_many_at_once(daemon):
    async def ask():
        async with openai.AsyncOpenAI(
            base_url=f"{daemon.base_url}/v1", api_key=daemon.keys["mail"]
        ) as client:
            texts = [f"question {number}" for number in range(8)]
            replies = await asyncio.gather(
                *(client.chat.completions.create(model="any", messages=[user(t)]) for t in texts)
            )
            return texts, [reply.choices[0].message.content for reply in replies]

    with scripted(lambda asked: f"answer to {said_last(asked)}"):
        texts, answers = asyncio.run(ask())
    assert answers == [f"answer to {text}" for text in texts]


def test_who_leaves_a_stream_ends_its_request(daemon, client):
    with scripted(lambda _: "word " * 400):
        stream = client.chat.completions.create(model="any", messages=[user("go")], stream=True)
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                break
        stream.close()
        eventually(lambda: not daemon.runtime._engine.inbox.num_unfinished, timeout_s=30)
    daemon.runtime.check_integrity()


def test_who_leaves_without_a_stream_ends_its_request(daemon, monkeypatch):
    compute = Loop._compute

    def compute_slowly(self, plan):
        compute(self, plan)
        time.sleep(0.02)  # a fast machine would say it all before somebody leaves

    monkeypatch.setattr(Loop, "_compute", compute_slowly)
    with scripted(lambda _: "word " * 400):
        hurried = openai.OpenAI(
            base_url=f"{daemon.base_url}/v1",
            api_key=daemon.keys["mail"],
            timeout=0.5,
            max_retries=0,
        )
        with pytest.raises(openai.APITimeoutError):
            hurried.chat.completions.create(model="any", messages=[user("go")])
        eventually(lambda: not daemon.runtime._engine.inbox.num_unfinished, timeout_s=30)


# --- what goes wrong ---


def test_errors_are_those_of_the_api(daemon, client):
    ask = client.chat.completions.create
    wrong = openai.OpenAI(base_url=f"{daemon.base_url}/v1", api_key="ekv_wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-none")
    with pytest.raises(openai.BadRequestError, match="messages") as error:
        ask(model="any", messages=[])
    assert error.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(model="any", messages=[user("x")], temperature=-1)
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(openai.BadRequestError, match="image_url"):
        ask(model="any", messages=[{"role": "user", "content": image}])
    with pytest.raises(openai.BadRequestError, match="a string or a list"):
        ask(model="any", messages=[{"role": "user", "content": 5}])
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        ask(model="any", messages=[user("x")], logit_bias={"5": -100})
    assert ask(model="any", messages=[user("x")], logit_bias={}, max_tokens=2).choices
    schema = {"name": "x", "schema": {"type": "nonsense"}}
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        ask(
            model="any",
            messages=[user("x")],
            response_format={"type": "json_schema", "json_schema": schema},
        )


def test_a_prompt_that_is_too_long_says_so_as_clients_look_for_it(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="any", messages=[user("long " * 20_000)])
    assert error.value.code == "context_length_exceeded"
    message = error.value.body["message"]
    assert message.startswith("prompt is too long: ")
    assert "maximum context length is" in message


def test_a_full_queue_is_waited_for(daemon):
    """429 with Retry-After, which the client obeys."""
    daemon.runtime.app("mail", num_waiting_max=1)
    client = openai.OpenAI(base_url=f"{daemon.base_url}/v1", api_key=daemon.keys["mail"])
    answers: list[str] = []

    def ask(number: int) -> None:
        reply = client.chat.completions.create(model="any", messages=[user(f"q{number}")])
        answers.append(reply.choices[0].message.content)

    with scripted(lambda asked: f"{said_last(asked)} answered"):
        threads = [threading.Thread(target=ask, args=[number]) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(answers) == ["q0 answered", "q1 answered"]


def test_a_retry_of_a_named_conversation_replaces_what_runs(daemon):
    """Whether it streams or not: the body without `stream` is the same."""
    headers = {"x-edgekv-session": "agent"}
    client = openai.OpenAI(
        base_url=f"{daemon.base_url}/v1", api_key=daemon.keys["mail"], default_headers=headers
    )
    with scripted(lambda _: "word " * 60):
        stream = client.chat.completions.create(model="any", messages=[user("go")], stream=True)
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                break
        reply = client.chat.completions.create(model="any", messages=[user("go")])
    assert reply.choices[0].message.content.split() == ["word"] * 60
    with pytest.raises(openai.APIError, match="cancelled"):
        list(stream)
    assert reply.usage.prompt_tokens_details.cached_tokens >= reply.usage.prompt_tokens - 1


def test_the_unix_socket_asks_for_no_key(daemon):
    transport = httpx2.HTTPTransport(uds=str(daemon.uds))
    with openai.OpenAI(
        base_url="http://localhost/v1",
        api_key="none",
        default_headers={"x-edgekv-app": "notes"},
        http_client=openai.DefaultHttpxClient(transport=transport),
    ) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
