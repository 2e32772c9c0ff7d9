"""What the document at /openapi.json says of fields is what the dialects keep."""

import pytest

from edgekv.server.anthropic import Messages
from edgekv.server.fields import Fault, Fields
from edgekv.server.ollama import OllamaChat, OllamaGenerate
from edgekv.server.openai_chat import ChatCompletions
from edgekv.server.openai_text import TextCompletions
from edgekv.server.openapi import document
from edgekv.server.responses import Responses

HI = [{"role": "user", "content": "Hi"}]
ASKED = {
    "/v1/chat/completions": (ChatCompletions(), {"messages": HI, "logprobs": True}),
    "/v1/completions": (TextCompletions(), {"prompt": "Hi"}),
    "/v1/responses": (Responses(), {"input": "Hi"}),
    "/v1/messages": (Messages(), {"model": "m", "max_tokens": 1, "messages": HI}),
    "/api/chat": (OllamaChat(), {"model": "m", "messages": HI}),
    "/api/generate": (OllamaGenerate(), {"model": "m", "prompt": "Hi"}),
}


def bounded(schema, within=()):
    """Fields that are numbers with bounds, by where they stand."""
    for name, field in schema.get("properties", {}).items():
        if "maximum" in field:
            yield (*within, name), field
        yield from bounded(field, (*within, name))


def all_bounded():
    for path, item in document()["paths"].items():
        if path in ASKED:
            body = item["post"]["requestBody"]["content"]["application/json"]["schema"]
            for place, field in bounded(body.get("anyOf", [body])[0]):
                yield pytest.param(path, place, field, id=f"{path} {'.'.join(place)}")


def with_value(body, place, value):
    name, *inner = place
    return {**body, name: with_value({}, inner, value) if inner else value}


@pytest.mark.parametrize(("path", "place", "field"), [*all_bounded()])
def test_a_number_may_be_as_large_as_its_bounds_and_no_larger(path, place, field):
    dialect, body = ASKED[path]
    for value in (field.get("minimum"), field["maximum"]):
        if value is not None:
            dialect.parse(Fields(with_value(body, place, value)))
    low = field.get("exclusiveMinimum", field.get("minimum", 0) - 1)
    for value in (low, field["maximum"] + 1, True, "1"):
        with pytest.raises(Fault, match=place[-1]):
            dialect.parse(Fields(with_value(body, place, value)))


def test_all_that_generates_is_asked_here():
    generating = {
        path for path, item in document()["paths"].items() if "parameters" in item.get("post", {})
    }
    assert generating == set(ASKED)


SAID = [{"type": "summary_text", "text": "So."}]
THOUGHT = {"type": "reasoning", "summary": SAID}
TOOL = {"role": "tool", "tool_name": "look", "name": 1}
FORMAT = {"type": "json_schema", "schema": {}}
OVERRULED = [
    ("/v1/chat/completions", {"max_completion_tokens": 1, "max_tokens": 0}, "max_tokens"),
    ("/v1/chat/completions", {"logprobs": False, "top_logprobs": 21}, "top_logprobs"),
    ("/v1/chat/completions", {"reasoning_effort": 1}, "reasoning_effort"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "name": 1}]}, "messages[0].name"),
    ("/v1/chat/completions", {"tool_choice": "required"}, "tool_choice"),
    ("/v1/responses", {"input": [{**THOUGHT, "content": SAID, "summary": 1}]}, "input[0].summary"),
    ("/v1/responses", {"tools": [{"type": "namespace"}]}, "tools[0].name"),
    ("/v1/responses", {"metadata": []}, "metadata"),
    ("/v1/messages", {"output_config": {"format": FORMAT}, "output_format": {}}, "output_format"),
    (
        "/v1/messages",
        {"messages": [{"role": "user", "content": [{"type": "image", "text": ""}]}]},
        "messages[0].content[0].type",
    ),
    ("/api/chat", {"messages": [*HI, TOOL]}, "messages[1].name"),
    ("/api/generate", {"raw": True, "system": 1}, "system"),
]


@pytest.mark.parametrize(("path", "said", "param"), OVERRULED)
def test_a_field_is_checked_also_where_another_one_decides(path, said, param):
    dialect, body = ASKED[path]
    with pytest.raises(Fault) as refused:
        dialect.parse(Fields({**body, **said}))
    assert refused.value.param.startswith(param)
