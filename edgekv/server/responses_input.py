"""The items of a Responses request as messages.

What one turn of the assistant gave, reasoning, text and calls, comes back as items of its own, with
other ids and spellings; they become the one message that was generated.
"""

import json
from collections.abc import Callable

from edgekv.chat.values import ChatMessage, Role, ToolCall
from edgekv.server.fields import Fault, Fields, invalid
from edgekv.server.responses_items import unsealed
from edgekv.server.responses_tools import Toolbox

ROLES: dict[str, Role] = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
}
# What tools of OpenAI's servers did in a conversation that began there.
LEFT_OUT = {
    "additional_tools",
    "code_interpreter_call",
    "file_search_call",
    "image_generation_call",
    "local_shell_call",
    "local_shell_call_output",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "mcp_list_tools",
    "tool_search_call",
    "tool_search_output",
    "web_search_call",
}
TEXTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "summary_text": "text",
    "reasoning_text": "text",
    "refusal": "refusal",
}


def read_input(body: Fields, toolbox: Toolbox) -> tuple[ChatMessage, ...]:
    """`instructions` and `input` as messages. Raises Fault."""
    value = body.raw("input")
    if isinstance(value, str):
        messages = [ChatMessage(role="user", content=value)]
    elif isinstance(value, list) and value:
        history = _History(toolbox)
        for item in body.objects("input"):
            history.read(item)
        messages = history.end()
    else:
        raise invalid("input", "a string or a list of items, and not empty")
    if body.has("instructions"):
        messages.insert(0, ChatMessage(role="system", content=body.text("instructions")))
    return tuple(messages)


class _History:
    """Reads items, one after another, and gathers what is of one turn of the assistant."""

    def __init__(self, toolbox: Toolbox) -> None:
        self._toolbox = toolbox
        self._messages: list[ChatMessage] = []
        self._reasoning = ""
        self._content: str | None = None
        self._calls: list[ToolCall] = []
        self._called: dict[str, str] = {}  # call id → name
        self._readers: dict[str, Callable[[Fields], None]] = {
            "message": self._message,
            "agent_message": self._agent_message,
            "reasoning": self._reason,
            "function_call": self._function_call,
            "custom_tool_call": self._custom_call,
            "function_call_output": self._output,
            "custom_tool_call_output": self._output,
        }

    def read(self, item: Fields) -> None:
        """The next item. Raises Fault."""
        kind = item.text("type", "message")
        if kind in self._readers:
            self._readers[kind](item)
        elif kind == "item_reference":
            raise keeps_nothing(item.path("type"))
        elif kind not in LEFT_OUT:
            raise invalid(item.path("type"), f"one of {', '.join(self._readers)}")

    def end(self) -> list[ChatMessage]:
        """The messages."""
        self._end_turn()
        return self._messages

    def _end_turn(self) -> None:
        if self._reasoning or self._content is not None or self._calls:
            message = ChatMessage(
                role="assistant",
                content=self._content or "",
                reasoning=self._reasoning,
                tool_calls=tuple(self._calls),
            )
            self._messages.append(message)
        self._reasoning, self._content, self._calls = "", None, []

    def _add(self, message: ChatMessage) -> None:
        self._end_turn()
        self._messages.append(message)

    def _message(self, item: Fields) -> None:
        role = ROLES.get(item.text("role"))
        if role is None:
            raise invalid(item.path("role"), f"one of {', '.join(ROLES)}")
        if role == "assistant":
            self._content = (self._content or "") + _text(item, "content", between="")
        else:
            self._add(ChatMessage(role=role, content=_text(item, "content")))

    def _agent_message(self, item: Fields) -> None:
        """What another agent of the client says to this one."""
        self._add(ChatMessage(role="user", content=_text(item, "content")))

    def _reason(self, item: Fields) -> None:
        said = [
            unsealed(item.text("encrypted_content", "")),
            _text(item, "content", between=""),
            _text(item, "summary"),
        ]
        self._reasoning += next(filter(None, said), "")

    def _function_call(self, item: Fields) -> None:
        self._call(item, item.text("arguments", "") or "{}")

    def _custom_call(self, item: Fields) -> None:
        self._call(item, json.dumps({"input": item.text("input")}, ensure_ascii=False))

    def _call(self, item: Fields, arguments: str) -> None:
        call_id, name = item.text("call_id"), self._toolbox.flat(item)
        self._called[call_id] = name
        self._calls.append(ToolCall(call_id=call_id, name=name, arguments=arguments))

    def _output(self, item: Fields) -> None:
        call_id = item.text("call_id")
        name = self._called.get(call_id, "")
        text = _text(item, "output")
        self._add(ChatMessage(role="tool", content=text, call_id=call_id, name=name))


def keeps_nothing(param: str) -> Fault:
    """What only a server that keeps responses could do."""
    return Fault(
        "invalid",
        f"{param}: this server keeps no responses; send the whole input",
        param=param,
        code="unsupported_parameter",
    )


def _text(of: Fields, name: str, *, between: str = "\n") -> str:
    """A text, or parts of one. What the assistant said has nothing between its parts."""
    value = of.raw(name)
    if isinstance(value, str):
        return value
    if not isinstance(value, list | None):
        raise invalid(of.path(name), "a string or a list of parts")
    return between.join(_part(part) for part in of.objects(name))


def _part(part: Fields) -> str:
    kind = part.text("type")
    if kind not in TEXTS:
        raise invalid(part.path("type"), "that of a text: images, files and audio are not read")
    return part.text(TEXTS[kind])
