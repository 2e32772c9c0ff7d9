"""Messages as they are compared: a client's history with what it sent before and was answered.

Clients do not send back what they got letter by letter. They trim texts, write arguments of calls
anew (without spaces, and JavaScript has its own numbers and order of keys), leave reasoning out,
and some make ids of their own. Normal forms of messages that mean the same are equal, and hashable.
They are for comparing, not for rendering.
"""

import json
from dataclasses import replace

from edgekv.chat.values import ChatMessage, ToolCall

# Beyond it JavaScript's numbers are no longer exact.
_EXACT_MAX = 1 << 53


def normalised(message: ChatMessage) -> ChatMessage:
    """The normal form of a message; itself if it has that form.

    Content is trimmed, reasoning left out, and of calls the ids; arguments are canonical JSON. A
    result keeps the id of its call, which tells it from other results.
    """
    content = message.content.strip()
    calls = tuple(map(_normal_call, message.tool_calls))
    if content == message.content and calls == message.tool_calls and not message.reasoning:
        return message
    return replace(message, content=content, reasoning="", tool_calls=calls)


def same_message(one: ChatMessage, other: ChatMessage) -> bool:
    """Whether two messages mean the same, such as an answer and what the client made of it."""
    return one == other or normalised(one) == normalised(other)


def _normal_call(call: ToolCall) -> ToolCall:
    return ToolCall(call_id="", name=call.name, arguments=canonical_json(call.arguments))


def canonical_json(text: str) -> str:
    """JSON with sorted keys, no spaces, and numbers as JavaScript has them; "" is an empty object.

    What is no JSON is only trimmed.
    """
    try:
        return _ENCODER.encode(_DECODER.decode(text or "{}"))
    except (ValueError, RecursionError):
        return text.strip()


def _number(digits: str) -> int | float:
    value = float(digits)
    return int(value) if value.is_integer() and abs(value) <= _EXACT_MAX else value


# Made once: `json.loads` and `json.dumps` with options make one each time.
_DECODER = json.JSONDecoder(parse_int=_number, parse_float=_number)
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
