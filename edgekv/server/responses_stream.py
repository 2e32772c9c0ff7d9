"""A response as it is made, event by event, and whole."""

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeVar

from edgekv.chat.events import (
    CallBegun,
    CallDelta,
    CallEnded,
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
)
from edgekv.server.dialect import About, Asked, Writer, sse
from edgekv.server.fields import Fault, FaultKind
from edgekv.server.openai_errors import openai_error
from edgekv.server.responses_items import (
    CallItem,
    CustomCallItem,
    FunctionCallItem,
    Item,
    MessageItem,
    ReasoningItem,
    Status,
    Told,
)
from edgekv.server.spelling import figures

# Codex asks again five times, unless one of these says that it is in vain.
_FAILED_CODES: dict[FaultKind, str] = {
    "context": "context_length_exceeded",
    "overloaded": "server_is_overloaded",
    "internal": "server_error",
    "unavailable": "server_error",
}


_Kind = TypeVar("_Kind", bound=Item)


class Maker:
    """Makes the items of one answer, and the response around them."""

    def __init__(self, asked: Asked, about: About) -> None:
        self._asked, self._about = asked, about
        self._indices = itertools.count()

    def message(self) -> MessageItem:
        """What the model says begins."""
        return MessageItem(self._about.request_id, next(self._indices))

    def reasoning(self) -> ReasoningItem:
        """What it thinks begins."""
        index, is_sealed = next(self._indices), self._asked.terms.seals_reasoning
        return ReasoningItem(self._about.request_id, index, is_sealed=is_sealed)

    def call(self, call_id: str, flat: str) -> CallItem:
        """A call begins, of a tool by the name that the model knows."""
        origin = self._asked.terms.toolbox.origin(flat)
        kind = CustomCallItem if origin.is_custom else FunctionCallItem
        return kind(self._about.request_id, next(self._indices), call_id, origin)

    def items(self, finished: Finished) -> list[dict[str, Any]]:
        """An answer that did not stream; the last item was cut if the answer was."""
        answer, made = finished.message, list[Item]()
        if answer.reasoning:
            made.append(self.reasoning())
            made[-1].add(answer.reasoning)
        if answer.content or not (answer.reasoning or answer.tool_calls):
            message = self.message()
            message.add(answer.content, finished.logprobs)
            made.append(message)
        for call in answer.tool_calls:
            made.append(self.call(call.call_id, call.name))
            made[-1].add(call.arguments)
        is_cut = was_cut(finished) and not (
            answer.tool_calls and _is_json(answer.tool_calls[-1].arguments)
        )
        for item in made[:-1] if is_cut else made:
            item.closing()
        last = made[-1].whole("incomplete" if is_cut else "completed")
        return [*(item.whole("completed") for item in made[:-1]), last]

    def response(self, status: str, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The object around the items.

        Neither tools nor instructions are said back: heartbeats hold the whole of it, and those of
        an agent are tens of kilobytes.
        """
        return {
            "id": f"resp_{self._about.request_id}",
            "object": "response",
            "created_at": self._about.created_s,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "model": self._asked.model,
            "output": output,
            "tools": [],
            "store": False,
            "previous_response_id": None,
            "usage": None,
            **self._asked.terms.said_back,
            **more,
        }

    def closed(self, finished: Finished, output: list[dict[str, Any]]) -> dict[str, Any]:
        """The object at its end."""
        more = {"usage": _usage(finished), "edgekv": figures(finished.stats)}
        if finished.reason == "length":
            details = {"reason": "max_output_tokens"}
            return self.response("incomplete", output, incomplete_details=details, **more)
        if finished.reason == "cancelled":
            error = {"code": "server_error", "message": "the request was cancelled"}
            return self.response("failed", output, error=error, **more)
        return self.response("completed", output, **more)


class ResponsesWriter(Writer):
    """One stream. At most one item is open at a time.

    A call that was cut gets no output_item.done: at that event clients make the call.
    """

    def __init__(self, asked: Asked, about: About) -> None:
        self._maker = Maker(asked, about)
        self._numbers = itertools.count()
        self._output: list[dict[str, Any]] = []
        self._open: Item | None = None
        self._finished: Finished | None = None

    def begin(self) -> str:
        """It was created, and is in progress."""
        created = self._say("response.created", response=self._maker.response("in_progress", []))
        return created + self.heartbeat()

    def heartbeat(self) -> str:
        """The whole response again; Codex holds on any event that it can parse."""
        return self._say("response.in_progress", response=self._maker.response("in_progress", []))

    def event(self, event: Event, choice: int = 0) -> str:  # noqa: ARG002 - one answer
        """What happened."""
        match event:
            case ReasoningDelta() if event.text:
                thought, begun = self._going_on(ReasoningItem, self._maker.reasoning)
                return begun + self._tell(thought, thought.add(event.text))
            case TextDelta() if event.text or event.logprobs:
                message, begun = self._going_on(MessageItem, self._maker.message)
                return begun + self._tell(message, message.add(event.text, event.logprobs))
            case CallBegun():
                return self._close() + self._begin(self._maker.call(event.call_id, event.name))
            case CallDelta():
                assert isinstance(self._open, CallItem)
                return self._tell(self._open, self._open.add(event.arguments))
            case CallEnded():
                return self._close()
            case Finished():
                return self._finish(event)
        return ""

    def end(self) -> str:
        """Completed, or cut by a limit."""
        assert self._finished is not None  # the last event
        response = self._maker.closed(self._finished, self._output)
        return self._say(f"response.{response['status']}", response=response)

    def fail(self, fault: Fault) -> str:
        """Failed, with what was there."""
        output = [*self._output, self._open.whole("incomplete")] if self._open else self._output
        response = self._maker.response("failed", output, error=_failed_error(fault))
        return self._say("response.failed", response=response)

    def _going_on(self, kind: type[_Kind], make: Callable[[], _Kind]) -> tuple[_Kind, str]:
        """The open item if it is of this kind; else a new one, and what is said of that."""
        if isinstance(self._open, kind):
            return self._open, ""
        closed, item = self._close(), make()
        return item, closed + self._begin(item)

    def _begin(self, item: Item) -> str:
        self._open = item
        added = self._at_item("response.output_item.added", item=item.whole("in_progress"))
        return added + self._tell(item, item.opening())

    def _close(self, status: Status = "completed") -> str:
        item, self._open = self._open, None
        if item is None:
            return ""
        closing, whole = self._tell(item, item.closing()), item.whole(status)
        done = self._at_item("response.output_item.done", item=whole)
        self._output.append(whole)
        return closing + done

    def _finish(self, finished: Finished) -> str:
        self._finished = finished
        if isinstance(self._open, CallItem):
            self._output.append(self._open.whole("incomplete"))
            self._open = None
            return ""
        begun = "" if self._open or self._output else self._begin(self._maker.message())
        return begun + self._close("incomplete" if was_cut(finished) else "completed")

    def _tell(self, item: Item, told: Told) -> str:
        return "".join(self._at_item(kind, item_id=item.item_id, **said) for kind, said in told)

    def _at_item(self, kind: str, **said: Any) -> str:
        return self._say(kind, output_index=len(self._output), **said)

    def _say(self, kind: str, **said: Any) -> str:
        payload = {"type": kind, "sequence_number": next(self._numbers), **said}
        return sse(json.dumps(payload, separators=(",", ":")), kind)


def was_cut(finished: Finished) -> bool:
    """Whether the answer did not come to its own end."""
    return finished.reason in ("length", "cancelled")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _failed_error(fault: Fault) -> dict[str, Any]:
    error: dict[str, Any] = openai_error(fault)["error"]
    error["code"] = _FAILED_CODES.get(fault.kind, "invalid_prompt")
    if fault.kind == "overloaded" and fault.retry_after_s is not None:
        # Codex waits for as long as it reads here.
        error["code"] = "rate_limit_exceeded"
        error["message"] += f" (please try again in {fault.retry_after_s}s)"
    return error


def _usage(finished: Finished) -> dict[str, Any]:
    usage = finished.usage
    return {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached, "cache_write_tokens": 0},
        "output_tokens": usage.num_output,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning},
        "total_tokens": usage.num_prompt + usage.num_output,
    }
