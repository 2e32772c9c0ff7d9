"""The items of a response's output, each as it grows, as its events, and whole."""

import base64
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from edgekv.chat.events import TokenLogprob
from edgekv.server.responses_tools import Origin

Status = Literal["in_progress", "completed", "incomplete"]
Told = list[tuple[str, dict[str, Any]]]  # types of events, and what each says beside its item's id

_SEAL = "edgekv."
_LOGPROB_MIN = -9999.0  # JSON has no infinity
_STRING_BEGINS = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_STRING_SO_FAR = re.compile(
    r"""(?: [^"\\] | \\["\\/bfnrt]
      | \\u(?![dD][89abAB])[0-9a-fA-F]{4}
      | \\u[dD][89abAB][0-9a-fA-F]{2}           # half of a character waits for the other half
        (?: \\u[dD][c-fC-F][0-9a-fA-F]{2} | (?= [^\\] | \\(?: [^u] | u(?: [^dD] | [dD][^c-fC-F]))))
    )*""",
    re.VERBOSE,
)


class Item(ABC):
    """One item; `add` takes more of it in and says so."""

    prefix = ""

    def __init__(self, request_id: str, index: int) -> None:
        self.item_id = f"{self.prefix}_{request_id}_{index}"

    def opening(self) -> Told:
        """What follows output_item.added."""
        return []

    @abstractmethod
    def add(self, text: str) -> Told:
        """More of it."""

    @abstractmethod
    def closing(self) -> Told:
        """What precedes output_item.done."""

    @abstractmethod
    def whole(self, status: Status) -> dict[str, Any]:
        """All of it, as far as it is there."""


class MessageItem(Item):
    """What the model says."""

    prefix = "msg"

    def __init__(self, request_id: str, index: int) -> None:
        super().__init__(request_id, index)
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []

    def opening(self) -> Told:
        """Its one part begins."""
        return [("response.content_part.added", {"content_index": 0, "part": self._part()})]

    def add(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Told:
        """More text."""
        more = [_logprob(entry) for entry in logprobs]
        self._text += text
        self._logprobs += more
        delta = {"content_index": 0, "delta": text, "logprobs": more}
        return [("response.output_text.delta", delta)]

    def closing(self) -> Told:
        """The whole text, and its part."""
        text = {"content_index": 0, "text": self._text, "logprobs": self._logprobs}
        part = {"content_index": 0, "part": self._part()}
        return [("response.output_text.done", text), ("response.content_part.done", part)]

    def whole(self, status: Status) -> dict[str, Any]:
        """A message."""
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if status == "in_progress" else [self._part()],
        }

    def _part(self) -> dict[str, Any]:
        part = {"type": "output_text", "text": self._text, "annotations": []}
        return {**part, "logprobs": list(self._logprobs)}


class ReasoningItem(Item):
    """What the model thinks: all of it as the summary, which is what clients show and send back.

    Codex sends back neither `content` of a reasoning item nor shows it unless told to.
    """

    prefix = "rs"

    def __init__(self, request_id: str, index: int, *, is_sealed: bool) -> None:
        super().__init__(request_id, index)
        self._text = ""
        self._is_sealed = is_sealed

    def opening(self) -> Told:
        """Its one part begins."""
        return [
            ("response.reasoning_summary_part.added", {"summary_index": 0, "part": self._part()})
        ]

    def add(self, text: str) -> Told:
        """More thought."""
        self._text += text
        return [("response.reasoning_summary_text.delta", {"summary_index": 0, "delta": text})]

    def closing(self) -> Told:
        """The whole thought, and its part."""
        return [
            ("response.reasoning_summary_text.done", {"summary_index": 0, "text": self._text}),
            ("response.reasoning_summary_part.done", {"summary_index": 0, "part": self._part()}),
        ]

    def whole(self, status: Status) -> dict[str, Any]:
        """A reasoning item."""
        is_begun = status == "in_progress"
        item = {
            "id": self.item_id,
            "type": "reasoning",
            "status": status,
            "summary": [] if is_begun else [self._part()],
        }
        if self._is_sealed:
            item["encrypted_content"] = "" if is_begun else sealed(self._text)
        return item

    def _part(self) -> dict[str, Any]:
        return {"type": "summary_text", "text": self._text}


class CallItem(Item):
    """A call of a tool."""

    def __init__(self, request_id: str, index: int, call_id: str, origin: Origin) -> None:
        super().__init__(request_id, index)
        self.call_id = call_id
        self._origin = origin

    def _call(self, status: Status) -> dict[str, Any]:
        call = {"id": self.item_id, "call_id": self.call_id, "name": self._origin.name}
        if self._origin.namespace:
            call["namespace"] = self._origin.namespace
        return {**call, "status": status}


class FunctionCallItem(CallItem):
    """A call of a function."""

    prefix = "fc"

    def __init__(self, request_id: str, index: int, call_id: str, origin: Origin) -> None:
        super().__init__(request_id, index, call_id, origin)
        self._arguments = ""

    def add(self, text: str) -> Told:
        """More of its arguments."""
        self._arguments += text
        return [("response.function_call_arguments.delta", {"delta": text})]

    def closing(self) -> Told:
        """All of its arguments."""
        said = {"arguments": self._arguments, "name": self._origin.name}
        return [("response.function_call_arguments.done", said)]

    def whole(self, status: Status) -> dict[str, Any]:
        """A function call."""
        return {"type": "function_call", **self._call(status), "arguments": self._arguments}


class CustomCallItem(CallItem):
    """A call of a custom tool: out of the JSON that the model writes comes the text in it.

    Arguments that are not `{"input": "..."}` come out as they are, never lost.
    """

    prefix = "ctc"

    def __init__(self, request_id: str, index: int, call_id: str, origin: Origin) -> None:
        super().__init__(request_id, index, call_id, origin)
        self._arguments = ""
        self._offset = 0  # of what is not decoded yet; 0 before the string begins
        self._input = ""

    def add(self, text: str) -> Told:
        """More of its arguments."""
        self._arguments += text
        if not self._offset:
            begins = _STRING_BEGINS.match(self._arguments)
            if begins is None:
                return []
            self._offset = begins.end()
        so_far = _STRING_SO_FAR.match(self._arguments, self._offset)
        assert so_far is not None  # it matches nothing at least
        self._offset = so_far.end()
        return self._say(json.loads(f'"{so_far.group()}"', strict=False))

    def closing(self) -> Told:
        """What is left of its input, and all of it."""
        told = self._say(self._rest())
        return [*told, ("response.custom_tool_call_input.done", {"input": self._input})]

    def whole(self, status: Status) -> dict[str, Any]:
        """A custom tool's call."""
        return {"type": "custom_tool_call", **self._call(status), "input": self._input}

    def _say(self, more: str) -> Told:
        self._input += more
        return [("response.custom_tool_call_input.delta", {"delta": more})] if more else []

    def _rest(self) -> str:
        rest = self._arguments[self._offset :]
        if self._offset:
            return "" if rest.startswith('"') else rest
        try:
            arguments = json.loads(self._arguments)
        except (ValueError, RecursionError):
            return rest
        text = arguments.get("input") if isinstance(arguments, dict) else None
        return text if isinstance(text, str) else rest


def sealed(reasoning: str) -> str:
    """Reasoning as `encrypted_content`, which clients send back as it is. It hides nothing."""
    return _SEAL + base64.b64encode(reasoning.encode("utf-8", "surrogatepass")).decode()


def unsealed(content: str) -> str:
    """The reasoning in it; "" if it is not of this server."""
    if not content.startswith(_SEAL):
        return ""
    try:
        return base64.b64decode(content[len(_SEAL) :], validate=True).decode(
            "utf-8", "surrogatepass"
        )
    except ValueError:
        return ""


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    said = {
        "token": entry.token,
        "bytes": list(entry.token_bytes),
        "logprob": max(entry.logprob, _LOGPROB_MIN),
    }
    return {**said, "top_logprobs": [_logprob(other) for other in entry.top]}
