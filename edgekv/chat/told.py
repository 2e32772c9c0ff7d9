"""What was told of an answer: its events until they are fetched, and its message."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from edgekv.chat.events import (
    CallBegun,
    CallDelta,
    CallEnded,
    Event,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
)
from edgekv.chat.values import ChatMessage, ToolCall

Channel = Literal["text", "reasoning", "arguments"]


def new_call_id() -> str:
    """As OpenAI's look: nobody guesses one, no two are equal."""
    return f"call_{secrets.token_hex(12)}"


@dataclass
class _Call:
    call_id: str
    name: str
    arguments: list[str] = field(default_factory=list)


class Told:
    """What the reader of an answer has told. Owned by an `AnswerParser`.

    White space is held back until it is known what follows it: that next to a tag belongs to the
    tag, unless it parts two texts.
    """

    def __init__(self, call_id: Callable[[], str]) -> None:
        self.logprobs: list[TokenLogprob] = []  # of no text yet
        self._call_id = call_id
        self._events: list[Event] = []
        self._channel: Channel = "text"
        self._parts: list[str] = []  # of the delta that grows
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[_Call] = []
        self._space = ""
        self._at_tag = False  # nothing but space since a tag
        self._gap = ""  # before the next text or thought, if there was one

    @property
    def message(self) -> ChatMessage:
        """All of it; a call that was cut too."""
        return ChatMessage(
            role="assistant",
            content="".join(self._texts),
            reasoning="".join(self._thoughts),
            tool_calls=tuple(
                ToolCall(call_id=call.call_id, name=call.name, arguments="".join(call.arguments))
                for call in self._calls
            ),
        )

    @property
    def owes(self) -> bool:
        """Whether white space is held back that may be text."""
        return bool(self._space) and (not self._at_tag or bool(self._texts))

    @property
    def after_tag(self) -> bool:
        """Whether nothing but space was told since a tag or the beginning."""
        return self._at_tag or not self._texts

    def say(self, text: str) -> None:
        """More text."""
        if text.isspace():
            self._space += text
            return
        if self._texts or not self._at_tag:
            text = (self._gap if self._texts else "") + self._space + text
        self._space, self._gap, self._at_tag = "", "", False
        self._tell("text", text, self._texts)

    def think(self, text: str) -> None:
        """More reasoning."""
        if text.isspace():
            self._space += "" if self._at_tag else text
            return
        text = (self._gap if self._thoughts else "") + self._space + text
        self._space, self._gap, self._at_tag = "", "", False
        self._tell("reasoning", text, self._thoughts)

    def tag(self) -> None:
        """A tag: the space before it is its own."""
        self._space, self._at_tag = "", True

    def part(self) -> None:
        """A tag, and what follows it is a part of its own."""
        self.tag()
        self._gap = "\n\n"

    def call(self, name: str) -> None:
        """A call begins."""
        self.tag()
        self._flush()
        self._calls.append(_Call(self._call_id(), name))
        index, call = len(self._calls) - 1, self._calls[-1]
        self._events.append(CallBegun(index=index, call_id=call.call_id, name=name))

    def arguments(self, text: str) -> None:
        """More of its arguments."""
        self._tell("arguments", text, self._calls[-1].arguments)

    def call_ended(self) -> None:
        """It is whole."""
        self._flush()
        self._events.append(CallEnded(index=len(self._calls) - 1))

    def end(self, *, thinking: bool) -> None:
        """The answer's end: space that is held back comes out, if it is no tag's."""
        if self._space and not self._at_tag:
            channel: Channel = "reasoning" if thinking else "text"
            self._tell(channel, self._space, self._thoughts if thinking else self._texts)
        self._space = ""

    def take(self) -> list[Event]:
        """The events since the last time."""
        self._flush()
        events, self._events = self._events, []
        return events

    def _tell(self, channel: Channel, text: str, whole: list[str]) -> None:
        if channel != self._channel:
            self._flush()
            self._channel = channel
        self._parts.append(text)
        whole.append(text)

    def _flush(self) -> None:
        text = "".join(self._parts)
        self._parts.clear()
        if not text:
            return
        match self._channel:
            case "text":
                self._events.append(TextDelta(text=text, logprobs=tuple(self.logprobs)))
                self.logprobs.clear()
            case "reasoning":
                self._events.append(ReasoningDelta(text=text))
            case "arguments":
                delta = CallDelta(index=len(self._calls) - 1, arguments=text)
                self._events.append(delta)
