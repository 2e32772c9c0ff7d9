"""Clients that people build with, where they are installed: each answers and calls a tool.

    pip install -e ".[clients]" && pytest -n 0 -W ignore tests/server/test_other_clients.py

They leave sockets open, which pytest warns of once all have passed.
"""

import json
import os
import subprocess
import sys

import pytest
from scripted_model import said_last, scripted

CALL = '{"name": "get_weather", "arguments": {"city": "Rome"}}'

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs


def weather(asked):
    """Calls the tool if there is one, and says what it said."""
    if asked.tools and asked.messages[-1].role == "user":
        return CALL
    return f"It is {said_last(asked)}."


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def test_litellm(daemon):
    litellm = pytest.importorskip("litellm")
    tool = {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
    for model, base in (
        ("openai/any", f"{daemon.base_url}/v1"),
        ("anthropic/any", daemon.base_url),
    ):
        messages = [{"role": "user", "content": "Weather?"}]
        options = {"model": model, "api_base": base, "api_key": daemon.keys["mail"]}
        options["tools"] = [{"type": "function", "function": tool}]
        with scripted(weather):
            called = litellm.completion(messages=messages, **options).choices[0].message
            (call,) = called.tool_calls
            result = get_weather(**json.loads(call.function.arguments))
            messages += [called, {"role": "tool", "tool_call_id": call.id, "content": result}]
            reply = litellm.completion(messages=messages, **options)
        assert reply.choices[0].message.content == "It is sunny in Rome."


def test_pydantic_ai(daemon):
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{daemon.base_url}/v1", api_key=daemon.keys["mail"])
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        agent = Agent(kind("any", provider=provider), tools=[get_weather])
        with scripted(weather):
            assert agent.run_sync("Weather?").output == "It is sunny in Rome."


def test_langchain(daemon):
    langchain_openai = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    chat = langchain_openai.ChatOpenAI(
        model="any", base_url=f"{daemon.base_url}/v1", api_key=daemon.keys["mail"]
    )
    bound = chat.bind_tools([tool(get_weather)])
    messages = [HumanMessage("Weather?")]
    with scripted(weather):
        called = bound.invoke(messages)
        (call,) = called.tool_calls
        result = ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"])
        reply = bound.invoke([*messages, called, result])
        streamed = "".join(str(part.content) for part in chat.stream("Hello"))
    assert reply.content == "It is sunny in Rome."
    assert streamed == "It is Hello."


def test_llm(daemon, tmp_path):
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: edgekv\n  model_name: any\n  api_base: {daemon.base_url}/v1\n"
        "  api_key_name: edgekv\n  supports_tools: true\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"edgekv": daemon.keys["mail"]}))
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    code = "def get_weather(city: str) -> str:\n    'The weather'\n    return 'sunny in ' + city"
    said = {(): "It is Weather?.", ("--functions", code): "It is sunny in Rome."}
    ask = [sys.executable, "-m", "llm", "-m", "edgekv", "--no-stream", "Weather?"]
    with scripted(weather):
        for more, answer in said.items():
            run = subprocess.run(
                [*ask, *more], env=env, capture_output=True, text=True, timeout=120
            )
            assert run.stdout.strip() == answer, run.stderr
