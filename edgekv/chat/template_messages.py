"""A conversation as a chat template reads it, and as a template reads it that does not take all.

Whatever a template refuses is written in a way that it takes. How each message is written depends
on the template and on the messages before it, never on later ones: so a conversation that goes on
is rendered as it was, with more behind it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from edgekv.chat.values import ChatMessage, ToolCall

_SYSTEM = ("system", "developer")
_OTHER = {"user": "assistant", "assistant": "user"}
_THOUGHT = "reasoning_content"  # until it is known where it stands


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a chat template takes; `edgekv/chat/render.py` finds it out.

    Attributes:
        blocks: Content is a list of blocks, not a text.
        alternates: User and assistant must take turns, calls and results apart. Then messages of
            one are joined, and an empty one of the other stands where that is not possible.
        developer: It knows this role; else it is the system's.
        system: Where system messages may stand. The first ones are otherwise part of the first
            user message, later ones user text where they stand.
        tools: It tells the model which tools there are.
        calls: A call's arguments are a JSON object, or its text; or calls and results must be
            plain text.
        silent: Content of a message that calls and says nothing.
        short_ids: Call ids are nine letters and digits.
        any_arguments: It takes arguments that are no JSON object; else such a call is plain text.
        several: Several calls stand together in a message, apart in one each, or are plain text.
        beside: Text and calls stand in one message, the text before in one of its own, or all of
            it is plain text.
        results: Where calls are plain text, results are messages of their own all the same.
        responses: Results are a part of the message that calls.
        thoughts: The key of reasoning; "blocks" has it in content, as a block of its own.
    """

    blocks: bool = False
    alternates: bool = False
    developer: bool = True
    system: Literal["anywhere", "first", "none"] = "anywhere"
    tools: bool = True
    calls: Literal["object", "text", "plain"] = "object"
    silent: str | None = ""
    short_ids: bool = False
    any_arguments: bool = True
    several: Literal["together", "apart", "plain"] = "together"
    beside: Literal["beside", "before", "plain"] = "beside"
    results: bool = False
    responses: bool = False
    thoughts: Literal["reasoning_content", "thinking", "reasoning", "blocks"] = "reasoning_content"

    def plainest(self) -> "Traits":
        """As a template that takes nothing but user and assistant in turn, and perhaps tools."""
        return replace(self, alternates=True, developer=False, system="none", calls="plain")


EVERYTHING = Traits()


def conversation_messages(
    messages: Sequence[ChatMessage], traits: Traits = EVERYTHING
) -> list[dict[str, Any]]:
    """The messages as the mappings that a template with these traits reads."""
    written = list(_written(_with_systems_placed(messages, traits), traits))
    if traits.alternates:
        written = _alternating(written)
    if traits.responses:
        written = _with_responses(written)
    return [_with_parts(message, traits) for message in written]


def _with_responses(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results in the messages that called them; behind another one they are plain text."""
    whole: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] != "tool":
            whole.append(message)
            continue
        if "tool_calls" not in whole[-1]:
            whole.append(_plain_result(message["content"], message.get("name", "")))
            continue
        response = {"name": message.get("name", ""), "response": message["content"]}
        responses = (*whole[-1].get("tool_responses", ()), response)
        whole[-1] = {**whole[-1], "tool_responses": responses}
    return whole


def _with_parts(message: dict[str, Any], traits: Traits) -> dict[str, Any]:
    """Content and reasoning where the template looks for them."""
    thought = message.pop(_THOUGHT, "")
    content = message["content"]
    blocks = [{"type": "text", "text": content or ""}] if traits.blocks or content else []
    if thought and traits.thoughts == "blocks":
        return {**message, "content": [{"type": "thinking", "thinking": thought}, *blocks]}
    written = {**message, "content": blocks} if traits.blocks else message
    return {**written, traits.thoughts: thought} if thought else written


# --- system messages ---


def _with_systems_placed(messages: Sequence[ChatMessage], traits: Traits) -> list[ChatMessage]:
    placed = [
        replace(m, role="system") if m.role == "developer" and not traits.developer else m
        for m in messages
    ]
    if traits.system == "anywhere":
        return placed
    num_first = next((i for i, m in enumerate(placed) if m.role not in _SYSTEM), len(placed))
    first, rest = placed[:num_first], placed[num_first:]
    rest = [_as_user(m, f"System: {m.content}") if m.role in _SYSTEM else m for m in rest]
    if not first:
        return rest
    prompt = replace(first[0], content=_joined(*[m.content for m in first]))
    if traits.system == "first" and rest:  # alone it would be no question
        return [prompt, *rest]
    if rest and rest[0].role == "user":
        return [replace(rest[0], content=_joined(prompt.content, rest[0].content)), *rest[1:]]
    return [_as_user(prompt, prompt.content), *rest]


def _as_user(message: ChatMessage, content: str) -> ChatMessage:
    return replace(message, role="user", content=content)


def _joined(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))


# --- calls and results ---


def _written(messages: Sequence[ChatMessage], traits: Traits) -> Iterator[dict[str, Any]]:
    names: dict[str, str] = {}  # of all calls, by id
    waiting: dict[str, str] = {}  # of those of the last message, as far as they have no result
    for message in messages:
        if message.role == "tool":
            call_id = message.call_id or next(iter(waiting), "")
            name = message.name or names.get(call_id, "")
            if waiting.pop(call_id, None) is None:
                yield _plain_result(message.content, name or call_id)
            else:
                yield _result(message, call_id, name, traits)
            continue
        is_native = bool(message.tool_calls) and _is_native(message, traits)
        called = {call.call_id: call.name for call in message.tool_calls}
        names |= called
        waiting = called if is_native or traits.results else {}
        if is_native:
            yield from _calling(message, traits)
        else:
            yield _said(message, _joined(message.content, plain_calls(message.tool_calls)))


def _said(message: ChatMessage, content: str | None) -> dict[str, Any]:
    said = {"role": message.role, "content": content}
    return {**said, _THOUGHT: message.reasoning} if message.reasoning else said


def _plain_result(content: str, of: str) -> dict[str, Any]:
    return {"role": "user", "content": f"Result of {of or 'a call'}:\n{content}"}


def _result(message: ChatMessage, call_id: str, name: str, traits: Traits) -> dict[str, Any]:
    call_id = _short(call_id) if traits.short_ids else call_id
    result = {"role": "tool", "content": message.content, "tool_call_id": call_id}
    return {**result, "name": name} if name else result


def _is_native(message: ChatMessage, traits: Traits) -> bool:
    """Whether a message's calls can be written as the template writes calls."""
    if traits.calls == "plain" or (message.content and traits.beside == "plain"):
        return False
    if len(message.tool_calls) > 1 and traits.several == "plain":
        return False
    return traits.any_arguments or all(
        isinstance(arguments_value(call.arguments), dict) for call in message.tool_calls
    )


def _calling(message: ChatMessage, traits: Traits) -> Iterator[dict[str, Any]]:
    silent = {"role": message.role, "content": traits.silent}
    said = _said(message, message.content or traits.silent)
    if message.content and traits.beside == "before":
        yield {"role": message.role, "content": message.content}
        said = _said(message, traits.silent)
    calls = [_call(call, traits) for call in message.tool_calls]
    if traits.several == "together":
        yield {**said, "tool_calls": calls}
        return
    for call in calls:
        yield {**said, "tool_calls": [call]}
        said = silent


def _call(call: ToolCall, traits: Traits) -> dict[str, Any]:
    is_text = traits.calls == "text"
    arguments = call.arguments or "{}" if is_text else arguments_value(call.arguments)
    return {
        "type": "function",
        "id": _short(call.call_id) if traits.short_ids else call.call_id,
        "function": {"name": call.name, "arguments": arguments},
    }


def _short(call_id: str) -> str:
    """Nine letters and digits for a call id; itself if it is that."""
    if len(call_id) == 9 and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.blake2b(call_id.encode(), digest_size=8).hexdigest()[:9]


def plain_calls(calls: Sequence[ToolCall]) -> str:
    """Calls as plain text: a JSON object a line."""
    plain = [{"name": call.name, "arguments": arguments_value(call.arguments)} for call in calls]
    return "\n".join(json.dumps(call, ensure_ascii=False) for call in plain)


def arguments_value(arguments: str) -> dict[str, Any] | str:
    """A call's arguments as the JSON object that they are; the text itself if they are none."""
    try:
        value = json.loads(arguments or "{}")
        # Half of an emoji, written as an escape, is text here but no Unicode there.
        if "\\ud" in arguments.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


# --- turns ---


def _alternating(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """User and assistant in turn; between two of one there may be calls and their results."""
    turns: list[dict[str, Any]] = []
    last = -1  # of `turns`, the last that is somebody's turn
    for message in messages:
        role = message["role"]
        if role not in _OTHER or "tool_calls" in message:
            turns.append(message)
            continue
        before = turns[last]["role"] if last >= 0 else "assistant"
        if before == role and 0 <= last == len(turns) - 1:
            content = _joined(turns[last]["content"], message["content"])
            turns[last] = {**turns[last], **message, "content": content}
            continue
        if before == role:
            turns.append({"role": _OTHER[role], "content": ""})
        last = len(turns)
        turns.append(message)
    return turns
