"""Answers of the Responses dialect, scripted: what was asked, what happens, what is said."""

import json
from collections.abc import Iterable
from typing import Any

from edgekv.chat.events import (
    Begun,
    CallBegun,
    CallDelta,
    CallEnded,
    Event,
    Finished,
    Progress,
    ReasoningDelta,
    TextDelta,
    Usage,
)
from edgekv.chat.values import ChatMessage, ToolCall
from edgekv.config import Sampling
from edgekv.metrics import Stats
from edgekv.server.dialect import About, Asked
from edgekv.server.fields import Fault, Fields
from edgekv.server.responses import Responses

DIALECT = Responses()
ABOUT = About(request_id="0123456789abcdef" * 2, created_s=1_800_000_000)
STATS = Stats(
    ttft_ms=12.5,
    ttft_confirmed_ms=12.5,
    queue_ms=1.0,
    prefill_ms=11.5,
    prefill_mode="exact",
    num_prompt_tokens=100,
    num_cached_tokens=40,
    num_restored_tokens=0,
    restore_ms=0.0,
    num_preemptions=0,
    num_output_tokens=9,
    decode_tokens_per_s=50.0,
    tbt_p50_ms=20.0,
    tbt_max_ms=25.0,
    num_predicted_tokens=0,
    num_repaired_tokens=0,
    repair_agreement=None,
    num_confirmed_tokens=0,
    num_retracted_tokens=0,
    num_forced_tokens=0,
    num_rows_cut=0,
    kv_bytes=1 << 20,
    peak_memory_bytes=1 << 30,
    sampling=Sampling(seed=7),
)
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "patch" /.+/'},
}
AGENTS = {
    "type": "namespace",
    "name": "agents",
    "description": "Other agents",
    "tools": [
        {"type": "function", "name": "spawn", "parameters": {"type": "object", "properties": {}}},
        {"type": "function", "name": "wait", "parameters": None},
    ],
}


def parse(body: object) -> Asked:
    return DIALECT.parse(Fields(body))


def finished(message: ChatMessage, reason: str = "stop", **fields: Any) -> Finished:
    if message.tool_calls and reason == "stop":
        reason = "tool_calls"
    usage = Usage(num_prompt=100, num_cached=40, num_output=9, num_reasoning=3)
    return Finished(reason=reason, message=message, usage=usage, stats=STATS, **fields)  # type: ignore[arg-type]


def assistant(content: str = "", **fields: Any) -> ChatMessage:
    return ChatMessage(role="assistant", content=content, **fields)


def call(name: str, arguments: str, call_id: str = "call_1") -> ToolCall:
    return ToolCall(call_id=call_id, name=name, arguments=arguments)


def told(message: ChatMessage, reason: str = "stop", num_chars: int = 4) -> list[Event]:
    """A message as the events that make it, in pieces."""

    def pieces(text: str) -> list[str]:
        return [text[i : i + num_chars] for i in range(0, len(text), num_chars)]

    events: list[Event] = [Begun(num_prompt=100), Progress(num_done=40, num_prompt=100)]
    events += [ReasoningDelta(text=text) for text in pieces(message.reasoning)]
    events += [TextDelta(text=text) for text in pieces(message.content)]
    for i, it in enumerate(message.tool_calls):
        events.append(CallBegun(index=i, call_id=it.call_id, name=it.name))
        events += [CallDelta(index=i, arguments=text) for text in pieces(it.arguments)]
        events.append(CallEnded(index=i))
    return [*events, finished(message, reason)]


def stream(asked: Asked, events: Iterable[Event | Fault], *, beats: bool = True) -> str:
    """A stream's bytes, with a heartbeat between any two events."""
    writer = DIALECT.writer(asked, ABOUT)
    text = writer.begin()
    for event in events:
        text += writer.heartbeat() if beats else ""
        if isinstance(event, Fault):
            return text + writer.fail(event)
        text += writer.event(event)
    return text + (writer.heartbeat() if beats else "") + writer.end()


def payloads(text: str) -> list[dict[str, Any]]:
    """The payloads of a stream, each under its own type, numbered from 0 on."""
    found = []
    for number, block in enumerate(text.removesuffix("\n\n").split("\n\n")):
        kind, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
        assert found[-1]["sequence_number"] == number
    return found


def last_response(text: str) -> dict[str, Any]:
    return payloads(text)[-1]["response"]


CALLS = (
    call("agents__spawn", '{"task": "look"}', "call_1"),
    call("apply_patch", '{"input": "*** Begin\\n+\\"\\u00e9\\ud83d\\ude00\\"\\n"}', "call_2"),
    call("get_weather", '{"city": "Paris"}', "call_3"),
)
ANSWERS = [
    assistant("Hello from here."),
    assistant("Because.", reasoning="Why is that?"),
    assistant("I call.", reasoning="Hm", tool_calls=CALLS),
    assistant("", tool_calls=CALLS[:1]),
    assistant(""),
    assistant("", reasoning="Only thought"),
]
BODY = {
    "model": "edgekv",
    "input": "Hello",
    "stream": True,
    "tools": [WEATHER, PATCH, AGENTS],
    "include": ["reasoning.encrypted_content"],
    "metadata": {"a": "b"},
}
