"""What no client should send: it is told so by its API's own error, and nothing breaks."""

import json

import httpx2
import pytest

from edgekv.errors import ConfigError
from edgekv.server.daemon import DaemonOptions

USER = [{"role": "user", "content": "hi"}]
CHAT = {"messages": USER, "max_tokens": 2}
RESPONSES = {"model": "m", "input": "hi", "max_output_tokens": 2}
GENERATING = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/responses": RESPONSES,
    "/v1/messages": CHAT,
    "/api/chat": {"messages": USER, "stream": False, "options": {"num_predict": 2}},
    "/api/generate": {"prompt": "hi", "stream": False, "options": {"num_predict": 2}},
}


@pytest.fixture
def client(daemon):
    headers = {"authorization": f"Bearer {daemon.keys['mail']}"}
    with httpx2.Client(base_url=daemon.base_url, headers=headers, timeout=60) as client:
        yield client


@pytest.mark.parametrize("path", GENERATING)
def test_half_a_character_that_is_said_again_is_a_question_mark(client, path):
    answer = client.post(path, content=json.dumps({**GENERATING[path], "model": "a\ud800"}))
    assert answer.status_code == 200
    assert answer.json()["model"] == "a?"


def test_half_a_character_in_what_is_only_handed_through(client):
    body = {**RESPONSES, "metadata": {"\ud800": "\ud800"}}
    answer = client.post("/v1/responses", content=json.dumps(body))
    assert answer.status_code == 200
    assert answer.json()["metadata"] == {"?": "?"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(client, number):
    body = json.dumps({**RESPONSES, "metadata": {"a": 0}}).replace("0}", number + "}")
    answer = client.post("/v1/responses", content=body)
    assert answer.status_code == 400
    assert number in answer.json()["error"]["message"]


@pytest.mark.parametrize("field", ["name", "system"])
@pytest.mark.parametrize("value", [[], {}, ["a"], 1])
def test_a_session_whose_name_is_no_text(client, field, value):
    answer = client.put("/edgekv/session/open", json={"name": "a", field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "ConfigError"
    assert field in answer.json()["error"]["message"]


@pytest.mark.parametrize("seconds", [-5, float("nan"), float("inf")])
def test_a_model_cannot_be_kept_for_a_time_that_is_none(seconds):
    with pytest.raises(ConfigError, match="keep_alive"):
        DaemonOptions(keep_alive_s=seconds)


def test_an_image_is_refused_by_where_it_stands(client):
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    messages = [*USER, {"role": "user", "content": [{"type": "text", "text": "See"}, image]}]
    answer = client.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[1].content[1].type"


def test_a_bad_schema_of_a_tool_that_must_be_called_is_said_to_be_that_tools(client):
    bad = {"name": "look", "parameters": {"type": "frog"}}
    asked = {"messages": [{"role": "user", "content": "Hi"}], "tool_choice": "required"}
    asked["tools"] = [{"type": "function", "function": bad}]
    reply = client.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 400
    assert "tools[0] (look)" in reply.json()["error"]["message"]


def test_what_is_far_too_long_is_not_cut_into_tokens(client):
    asked = {"messages": [{"role": "user", "content": "long words " * 700_000}]}
    reply = client.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_who_names_no_model_is_told_which(client):
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=asked).json()["model"] == "tiny"


@pytest.mark.parametrize(("field", "good"), [("priority", "background"), ("prefill", "exact")])
@pytest.mark.parametrize("path", GENERATING)
def test_what_is_said_aside_is_checked_wherever_it_stands(client, path, field, good):
    asked, header = GENERATING[path] | {"model": "m"}, {f"x-edgekv-{field}": good}
    body = client.post(path, json={**asked, "edgekv": {field: "much"}}, headers=header)
    assert body.status_code == 400
    assert f"edgekv.{field}" in body.text
    head = client.post(path, json={"model": "m"}, headers={f"x-edgekv-{field}": "much"})
    assert head.status_code == 400
    assert f"x-edgekv-{field}" in head.text


def test_who_asks_in_a_wrong_way_is_told_the_right_one(client):
    answer = client.get("/v1/chat/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert answer.json()["error"]["type"] == "invalid_request_error"
