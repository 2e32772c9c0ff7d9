"""`edgekv launch -- serve`: one daemon, on two ranks.

All of this folder runs on two as well: `python tests/support/rank_pytest.py 2 tests/server`.
"""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Literal

import httpx2
import openai
import pydantic
import pytest
from daemon_process import DaemonProcess
from tiny_runtime import eventually

PROMPT = [{"role": "user", "content": "Remember these words: " + "tree house river " * 40}]
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}

pytestmark = pytest.mark.slow


class City(pydantic.BaseModel):
    name: Literal["Rome", "Oslo"]  # a random model would not end a string
    big: bool


def is_alive(pid):
    return Path(f"/proc/{pid}").exists()


def ask_until_written(daemon):
    """What a killed rank had not written by then is computed again."""
    daemon.ask("mail", PROMPT)

    def is_written():
        with daemon.http() as http:
            page = http.get("/metrics").text
        return float(re.search(r'^edgekv_disk_bytes{kind="used_bytes"} (\S+)$', page, re.M)[1]) > 0

    eventually(is_written, timeout_s=60)


def ask_all(client):
    """One of each kind; what the first answer was."""
    said = client.chat.completions.create(model="any", messages=PROMPT, max_tokens=8)
    assert said.usage.completion_tokens == 8
    stream = client.chat.completions.create(model="any", messages=PROMPT, max_tokens=8, stream=True)
    parts = [part.choices[0].delta.content or "" for part in stream if part.choices]
    assert "".join(parts) == said.choices[0].message.content
    called = client.chat.completions.create(
        model="any", messages=HELLO, tools=[WEATHER], tool_choice="required", max_tokens=200
    )
    arguments = called.choices[0].message.tool_calls[0].function.arguments
    assert json.loads(arguments)["city"] in ("Rome", "Oslo")
    typed = client.chat.completions.parse(
        model="any", messages=HELLO, response_format=City, max_tokens=300, temperature=1.0
    )
    assert isinstance(typed.choices[0].message.parsed, City)
    return said


@pytest.fixture
def two(tiny_folder, tmp_path):
    with DaemonProcess(tiny_folder, tmp_path, num_ranks=2) as daemon:
        yield daemon


@pytest.fixture
def client(two):
    transport = httpx2.HTTPTransport(uds=str(two.uds))
    with openai.OpenAI(
        base_url="http://localhost/v1",
        api_key="none",
        default_headers={"x-edgekv-app": "mail"},
        http_client=openai.DefaultHttpxClient(transport=transport),
    ) as client:
        yield client


def test_clients_are_answered_and_sigterm_ends_all_ranks(two, client):
    reply = ask_all(client)
    ranks = two.children()
    assert len(ranks) == 2
    assert two.end(signal.SIGTERM) == 143
    assert not any(map(is_alive, ranks))
    two.start()
    said = {"role": "assistant", "content": reply.choices[0].message.content}
    usage = two.ask("mail", [*PROMPT, said, {"role": "user", "content": "Which words?"}])["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= reply.usage.prompt_tokens - 1


@pytest.mark.faults
def test_ctrl_c_ends_all_ranks(two):
    two.ask("mail", PROMPT)
    ranks = two.children()
    os.killpg(two.process.pid, signal.SIGINT)  # as a terminal does
    assert two.wait() == 130
    assert not any(map(is_alive, ranks))
    two.start()
    usage = two.ask("mail", PROMPT)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


@pytest.mark.faults
def test_a_daemon_that_loses_a_rank_says_so_and_goes_on_after_a_restart(two):
    ask_until_written(two)
    rank_0, rank_1 = two.children()
    os.kill(rank_1, signal.SIGKILL)
    with two.http() as http:
        reply = http.post("/v1/chat/completions", json={"messages": PROMPT, "max_tokens": 8})
    assert reply.status_code >= 500
    assert "rank 1 (127.0.0.1) ended" in reply.text
    assert two.wait() == 1  # the launcher ends it, and nobody asked for that
    assert not is_alive(rank_0)
    two.start()
    usage = two.ask("mail", PROMPT)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.faults
def test_a_daemon_whose_first_rank_is_killed_goes_on_after_a_restart(two):
    ask_until_written(two)
    rank_0, rank_1 = two.children()
    os.kill(rank_0, signal.SIGKILL)
    begin_s = time.monotonic()
    assert two.wait() == 137
    assert time.monotonic() - begin_s < 10
    assert not is_alive(rank_1)
    two.start()
    usage = two.ask("mail", PROMPT)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0
