"""A part of an answer that may hold calls: how it is marked, and the call that is being read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from edgekv.chat.characters import Characters, Unread
from edgekv.chat.told import Told
from edgekv.chat.values import Tool

Body = Literal["json", "named", "xml", "keyed", "braces", "python", "arguments"]
_NAME_PREFIX = "functions."  # of which some models make a part of the name


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What begins calls and what ends them.

    Attributes:
        opener: The tag before them.
        closer: The tag behind them; "" if there is none. It may be missing.
        body: How the calls are written.
        loose: No tag that tells calls from text: only at the beginning of a line, and a call only
            if there is a tool of its name.
        inner: The opener is part of the body.
        name: The tool's, where the opener says it.
    """

    opener: str
    closer: str = ""
    body: Body = "json"
    loose: bool = False
    inner: bool = False
    name: str = ""


class Call:
    """A call that is being read: told as soon as it has a name and the beginning of arguments."""

    def __init__(self, span: "Span") -> None:
        self.name = ""
        self.begun = False
        self.whole = False
        self._span = span
        self._held: list[str] = []

    def named(self, name: str) -> None:
        """Its name; a second one is nothing. Raises Unread: it is no call."""
        if self.name:
            return
        tools = self._span.tools
        if name not in tools and name.removeprefix(_NAME_PREFIX) in tools:
            name = name.removeprefix(_NAME_PREFIX)
        if not name or (self._span.marks.loose and name not in tools):
            raise Unread
        self.name = name
        self._tell()

    def more(self, arguments: str) -> None:
        """More of its arguments, JSON."""
        self._held.append(arguments)
        self._tell()

    def end(self) -> None:
        """Its arguments are whole."""
        self.whole = True
        self._tell()

    def _tell(self) -> None:
        if not self.name or not (self.begun or self._held):
            return
        told, chars = self._span.told, self._span.chars
        if not self.begun:
            self.begun = True
            self._span.num_calls += 1
            chars.unmark()
            told.call(self.name)
        if self._held:
            told.arguments("".join(self._held))
            self._held.clear()
        if self.whole:
            told.call_ended()
            chars.mark()


@dataclass
class Span:
    """What the readers of calls read and tell. `call` is the last one, perhaps not yet told."""

    marks: Marks
    chars: Characters
    told: Told
    tools: Mapping[str, Tool]
    num_calls: int = 0
    call: Call = field(init=False)

    def __post_init__(self) -> None:
        self.new_call()

    def new_call(self) -> Call:
        """Another call is read."""
        self.call = Call(self)
        return self.call
