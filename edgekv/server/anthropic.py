"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens.

Of the API's tools edgekv offers those that a client defines itself. Those that Anthropic defines or
runs (web_search, bash_20250124, …) are left out, and refused where one is forced.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from edgekv.chat.events import (
    CallBegun,
    CallDelta,
    CallEnded,
    EndReason,
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    Usage,
)
from edgekv.chat.values import (
    ROLES,
    ChatMessage,
    Completion,
    Role,
    Tool,
    ToolCall,
    ToolChoice,
)
from edgekv.server.dialect import About, Asked, Dialect, Writer, sse
from edgekv.server.fields import Fault, FaultKind, Fields, invalid
from edgekv.server.spelling import call_arguments, figures, json_schema, json_text, sampling
from edgekv.tokenizer.grammar import Grammar

# Clients send a thinking block back with its signature; whatever it is, it is taken.
SIGNATURE = "ZWRnZWt2"
# Claude Code's first line of its system prompt. It differs between conversations that otherwise
# begin alike, which would share no KV.
_BILLING = "x-anthropic-billing-header:"

# At which the SDK's tool loop, which would send what is new alone, sends whole conversations.
_UNTHREADED = "thread_unsupported_request"

_CHOICES: dict[str, ToolChoice] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}
_THINKS = {"enabled": True, "adaptive": True, "disabled": False}
_REASONS: dict[EndReason, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "cancelled": "max_tokens",  # the API has no word for it; this one says that more was to come
}
ERRORS: dict[FaultKind, str] = {
    "invalid": "invalid_request_error",
    "context": "invalid_request_error",
    "unauthorized": "authentication_error",
    "forbidden": "permission_error",
    "not_found": "not_found_error",
    "too_large": "request_too_large",
    "overloaded": "rate_limit_error",
    "internal": "api_error",
    "unavailable": "api_error",
}


class Messages(Dialect):
    """POST /v1/messages."""

    def parse(self, body: Fields) -> Asked:
        """What a request's body asks. Raises Fault."""
        model = body.text("model")
        if body.has("thread"):
            message = "edgekv keeps no threads: send the whole conversation without `thread`"
            raise Fault("invalid", message, param="thread", code=_UNTHREADED)
        max_tokens = body.integer("max_tokens", 1, 1 << 30)
        if max_tokens is None:
            raise Fault("invalid", "max_tokens is missing", param="max_tokens")
        params = sampling(
            max_tokens=max_tokens,
            temperature=body.number("temperature", 0, 100),
            top_p=body.number("top_p", 0, 1),
            top_k=body.integer("top_k", 0, 1 << 30),
            stop=body.texts("stop_sequences"),
        )
        completion = replace(parse_count(body), sampling=params)
        return Asked(completion=completion, model=model, stream=body.flag("stream"))

    def writer(self, asked: Asked, about: About) -> Writer:
        """Of one stream."""
        return _MessagesWriter(asked, about)

    def whole(self, asked: Asked, about: About, answers: Sequence[Finished]) -> dict[str, Any]:
        """The answer that does not stream."""
        (finished,) = answers
        return {
            **_opening(asked, about),
            "content": _content(finished.message),
            **_ending(finished),
            "usage": _usage(finished.usage),
            "edgekv": figures(finished.stats),
        }

    def error(self, fault: Fault) -> dict[str, Any]:
        """Why there is no answer."""
        error: dict[str, Any] = {"type": ERRORS[fault.kind], "message": fault.message}
        if fault.code:
            error["details"] = {"error_code": fault.code}
        return {"type": "error", "error": error}


def parse_count(body: Fields) -> Completion:
    """The prompt that /v1/messages/count_tokens asks about. Raises Fault."""
    tools, others = _tools(body)
    return Completion(
        messages=_conversation(body),
        tools=tools,
        grammar=_grammar(body),
        **_thought(body),
        **_tool_choice(body, tools, others),
    )


def count_answer(num_prompt: int) -> dict[str, Any]:
    """The answer of /v1/messages/count_tokens."""
    return {"input_tokens": num_prompt}


class _MessagesWriter(Writer):
    """Content blocks one after the other, each opened, written and closed."""

    def __init__(self, asked: Asked, about: About) -> None:
        self._asked, self._about = asked, about
        self._num_blocks = 0
        self._open: Literal["text", "thinking", "tool_use"] | None = None  # the last block's kind
        self._finished: Finished | None = None

    def begin(self) -> str:
        """`message_start`; the usage is in the end, whole."""
        return _sse("message_start", message=_opening(self._asked, self._about))

    def event(self, event: Event, choice: int = 0) -> str:
        """What is said, thought or called."""
        assert choice == 0, "one answer a request"
        match event:
            case TextDelta(text=text) if text:
                return self._enter("text", text="") + self._delta("text_delta", text=text)
            case ReasoningDelta(text=text) if text:
                opened = self._enter("thinking", thinking="", signature="")
                return opened + self._delta("thinking_delta", thinking=text)
            case CallBegun(call_id=call_id, name=name):
                return self._close() + self._enter("tool_use", id=call_id, name=name, input={})
            case CallDelta(arguments=arguments) if arguments:
                return self._delta("input_json_delta", partial_json=arguments)
            case CallEnded():
                return self._close()
            case Finished():
                self._finished = event
                return self._close()
        return ""

    def heartbeat(self) -> str:
        """Pings would not do: Claude Code gives up after 300 s of them, but not of these."""
        return _message_delta({"stop_reason": None, "stop_sequence": None}, {"output_tokens": 0})

    def end(self) -> str:
        """Why it ended, the whole usage, and `message_stop`."""
        assert self._finished is not None, "ends after Finished"
        usage, stats = _usage(self._finished.usage), figures(self._finished.stats)
        last = _message_delta(_ending(self._finished), usage, edgekv=stats)
        return last + _sse("message_stop")

    def fail(self, fault: Fault) -> str:
        """An `error` event, and an end for those who do not read it: without one they ask again."""
        ending = {"stop_reason": _REASONS["cancelled"], "stop_sequence": None}
        return (
            sse(json.dumps(Messages().error(fault)), "error")
            + self._close()
            + _message_delta(ending, {"output_tokens": 0})
            + _sse("message_stop")
        )

    def _enter(self, kind: Literal["text", "thinking", "tool_use"], **fields: Any) -> str:
        if self._open == kind:
            return ""
        closed = self._close()
        self._open = kind
        self._num_blocks += 1
        block = {"type": kind, **fields}
        return closed + _sse("content_block_start", index=self._num_blocks - 1, content_block=block)

    def _delta(self, kind: str, **fields: Any) -> str:
        delta = {"type": kind, **fields}
        return _sse("content_block_delta", index=self._num_blocks - 1, delta=delta)

    def _close(self) -> str:
        if self._open is None:
            return ""
        thought = self._open == "thinking"
        signed = self._delta("signature_delta", signature=SIGNATURE) if thought else ""
        self._open = None
        return signed + _sse("content_block_stop", index=self._num_blocks - 1)


def _sse(kind: str, **fields: Any) -> str:
    return sse(json.dumps({"type": kind, **fields}), kind)


def _message_delta(delta: dict[str, Any], usage: dict[str, Any], **fields: Any) -> str:
    return _sse("message_delta", delta=delta, usage=usage, **fields)


def _opening(asked: Asked, about: About) -> dict[str, Any]:
    return {
        "id": f"msg_{about.request_id}",
        "type": "message",
        "role": "assistant",
        "model": asked.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(Usage(num_prompt=0)),
    }


def _content(message: ChatMessage) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if message.reasoning:
        thought = {"type": "thinking", "thinking": message.reasoning, "signature": SIGNATURE}
        blocks.append(thought)
    if message.content:
        blocks.append({"type": "text", "text": message.content})
    for call in message.tool_calls:
        arguments = call_arguments(call.arguments) or {}
        block = {"type": "tool_use", "id": call.call_id, "name": call.name, "input": arguments}
        blocks.append(block)
    return blocks


def _ending(finished: Finished) -> dict[str, Any]:
    reason = "stop_sequence" if finished.stop is not None else _REASONS[finished.reason]
    return {"stop_reason": reason, "stop_sequence": finished.stop}


def _usage(usage: Usage) -> dict[str, Any]:
    """Of the API: its `input_tokens` are those that were not cached."""
    tokens: dict[str, Any] = {
        "input_tokens": usage.num_prompt - usage.num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached,
        "output_tokens": usage.num_output,
    }
    if usage.num_reasoning:
        tokens["output_tokens_details"] = {"thinking_tokens": usage.num_reasoning}
    return tokens


def _conversation(body: Fields) -> tuple[ChatMessage, ...]:
    messages = body.objects("messages")
    if not messages:
        raise invalid("messages", "a list of at least one message")
    conversation = _Conversation()
    if body.has("system"):
        conversation.add(_system(body, "system", "system"))
    for message in messages:
        role = message.text("role")
        if role not in ROLES or role == "tool":
            raise invalid(message.path("role"), "user, assistant, system or developer")
        if role in ("system", "developer"):
            conversation.add(_system(message, "content", role))
        else:
            for block in _blocks(message, "content"):
                conversation.read(role, block)
    return tuple(conversation.messages)


class _Conversation:
    """Messages as they are read, block by block; what of one role follows itself is one message.

    So says the API, and clients spell the same conversation now as one message, now as several.
    """

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self._called: dict[str, str] = {}  # by call id, the tool's name

    def add(self, message: ChatMessage) -> None:
        """The next message, or more of the last one; nothing if it instructs to nothing."""
        if message.role in ("system", "developer") and not message.content:
            return
        last = self.messages[-1] if self.messages else None
        if last is None or last.role != message.role or last.role not in ("user", "assistant"):
            self.messages.append(message)
            return
        # A user's blocks are texts of their own, an assistant's are pieces of one.
        between = "\n" if last.role == "user" else ""
        self.messages[-1] = replace(
            last,
            content=between.join(text for text in (last.content, message.content) if text),
            reasoning=last.reasoning + message.reasoning,
            tool_calls=last.tool_calls + message.tool_calls,
        )

    def read(self, role: Role, block: Fields) -> None:
        """One content block of a user's or an assistant's message. Raises Fault."""
        kind = block.text("type")
        match role, kind:
            case _, "text":
                self.add(ChatMessage(role=role, content=block.text("text")))
            case "assistant", "thinking":
                self.add(ChatMessage(role=role, reasoning=block.text("thinking")))
            case "assistant", "redacted_thinking":
                self.add(ChatMessage(role=role))
            case "assistant", "tool_use":
                self.add(ChatMessage(role=role, tool_calls=(self._call(block),)))
            case "user", "tool_result":
                self.add(self._result(block))
            case _:
                raise _refused(block, kind)

    def _call(self, block: Fields) -> ToolCall:
        call_id, name = block.text("id"), block.text("name")
        self._called[call_id] = name
        block.mapping("input")
        arguments = json_text(block.raw("input") or {}, block.path("input"))
        return ToolCall(call_id=call_id, name=name, arguments=arguments)

    def _result(self, block: Fields) -> ChatMessage:
        call_id = block.text("tool_use_id")
        name = self._called.get(call_id)
        if name is None:
            raise invalid(block.path("tool_use_id"), "the id of a tool_use block before it")
        text = "\n".join(_text(part) for part in _blocks(block, "content"))
        if block.flag("is_error"):
            text = f"Error: {text}"
        return ChatMessage(role="tool", content=text, call_id=call_id, name=name)


def _blocks(fields: Fields, name: str) -> list[Fields]:
    """Content blocks, without empty texts beside others; a string is short for one of text."""
    value = fields.raw(name)
    if value is None or isinstance(value, str):
        return [Fields({"type": "text", "text": value or ""}, fields.path(name))]
    if not isinstance(value, list):
        raise invalid(fields.path(name), "a string or a list of content blocks")
    blocks = fields.objects(name)
    empty = Fields({"type": "text", "text": ""}, fields.path(name))
    return [block for block in blocks if not _is_empty(block)] or [empty]


def _is_empty(block: Fields) -> bool:
    return (block.raw("type"), block.raw("text")) == ("text", "")


def _text(block: Fields) -> str:
    """Of a block in a system prompt or in a tool's result."""
    kind = block.text("type")
    if kind == "tool_reference":  # a tool that was searched for and found; all are offered anyway
        return block.text("tool_name")
    if kind != "text":
        raise _refused(block, kind)
    return block.text("text")


def _refused(block: Fields, kind: str) -> Fault:
    path = block.path("type")
    message = f"{path} is {kind[:40]!r}: edgekv takes text there, no images and no documents"
    return Fault("invalid", message, param=path)


def _system(fields: Fields, name: str, role: Role) -> ChatMessage:
    texts = [_without_billing(_text(block)) for block in _blocks(fields, name)]
    return ChatMessage(role=role, content="\n".join(text for text in texts if text))


def _without_billing(text: str) -> str:
    while text.startswith(_BILLING):
        text = text.partition("\n")[2].lstrip("\n")
    return text


def _tools(body: Fields) -> tuple[tuple[Tool, ...], set[str]]:
    """The tools that the client defines, and the names of others."""
    tools: dict[str, Tool] = {}
    others: set[str] = set()
    for fields in body.objects("tools"):
        if fields.text("type", "custom") != "custom":
            others.add(fields.text("name", ""))
            continue
        tool = _tool(fields)
        if tools.setdefault(tool.name, tool) is not tool:
            raise invalid(fields.path("name"), "unlike those of the tools before it")
    return tuple(tools.values()), others


def _tool(fields: Fields) -> Tool:
    path = fields.path("input_schema")
    if fields.mapping("input_schema") is None:
        raise invalid(path, "a JSON schema")
    return Tool(
        name=fields.text("name"),
        description=fields.text("description", ""),
        parameters=json_text(fields.raw("input_schema"), path),
    )


def _tool_choice(body: Fields, tools: tuple[Tool, ...], others: set[str]) -> dict[str, Any]:
    """The completion's fields about it."""
    choice = body.mapping("tool_choice")
    if choice is None:
        return {}
    kind = choice.text("type")
    if kind not in _CHOICES:
        raise invalid(choice.path("type"), "auto, any, tool or none")
    name = choice.text("name") if kind == "tool" else ""
    if name in others:
        message = f"the tool {name[:80]!r} is Anthropic's own, which edgekv does not have"
        raise Fault("invalid", message, param=choice.path("name"))
    if kind == "tool" and name not in {tool.name for tool in tools}:
        raise invalid(choice.path("name"), "the name of one of the tools")
    if kind == "any" and not tools:
        raise invalid(choice.path("type"), "auto or none where edgekv has no tool to offer")
    return {
        "tool_choice": _CHOICES[kind],
        "tool_name": name,
        "parallel_tool_calls": not choice.flag("disable_parallel_tool_use"),
    }


def _thought(body: Fields) -> dict[str, Any]:
    """Whether it is to think, and how much."""
    config, thinking = body.mapping("output_config"), body.mapping("thinking")
    effort = "" if config is None else config.text("effort", "")
    if thinking is None:
        return {"effort": effort}
    kind = thinking.text("type")
    if kind not in _THINKS:
        raise invalid(thinking.path("type"), "enabled, adaptive or disabled")
    return {"thinking": _THINKS[kind], "effort": effort}


def _grammar(body: Fields) -> Grammar | None:
    """Of `output_config.format`, or of `output_format` as older clients say it."""
    config = body.mapping("output_config") or Fields({})
    said = [config.mapping("format"), body.mapping("output_format")]
    grammars = [_output(output) for output in said if output is not None]
    return grammars[0] if grammars else None


def _output(output: Fields) -> Grammar:
    if output.text("type") != "json_schema":
        raise invalid(output.path("type"), "json_schema")
    return json_schema(output, "schema")
