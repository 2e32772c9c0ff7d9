"""The text of an answer, in any pieces, to events: reasoning, text, and calls as they are written.

Nothing of an answer is lost: what is not read as a tag or a call is text. Nothing depends on how
it is cut into pieces, for it is read character by character; text is held back only as long as it
may begin a tag or a call.
"""

from collections.abc import Callable, Mapping, Sequence

from edgekv.chat.call_code import braces_calls, python_calls
from edgekv.chat.call_json import argument_calls, json_calls, named_calls
from edgekv.chat.call_xml import keyed_calls, xml_calls
from edgekv.chat.characters import Characters, Reading, Unread
from edgekv.chat.events import Event, TokenLogprob
from edgekv.chat.span import Body, Marks, Span
from edgekv.chat.told import Told, new_call_id
from edgekv.chat.values import ChatMessage, Tool

Thought = tuple[str, str]  # what opens reasoning, and what closes it

_READERS: Mapping[Body, Callable[[Span], Reading[None]]] = {
    "json": json_calls,
    "named": named_calls,
    "xml": xml_calls,
    "keyed": keyed_calls,
    "braces": braces_calls,
    "python": python_calls,
    "arguments": argument_calls,
}
# What may stand between a call and the tag that closes it: small models write a bracket too many.
JUNK = frozenset(" \t\r\n}]),;`")


class AnswerParser:
    """Reads one answer. Owned by whoever pushes."""

    def __init__(
        self,
        *,
        thoughts: Sequence[Thought],
        calls: Sequence[Marks],
        tools: Sequence[Tool],
        opened: str = "",
        call_id: Callable[[], str] = new_call_id,
    ) -> None:
        """Without tools nothing is a call. `opened`: see `opened_thought`."""
        self.cut = False
        self._thoughts = dict(thoughts)
        self._marks = {marks.opener: marks for marks in calls} if tools else {}
        self._firsts = {tag[0] for tag in self._tags()}
        self._tools = {tool.name: tool for tool in tools}
        self._told = Told(call_id)
        self._chars = Characters()
        self._awaited = ""  # what closes the calls that were read
        self._line_begins = True
        self._held = ""  # what may begin a tag
        self._span: Span | None = None  # what may be a call, or is one
        self._opened = opened_thought(thoughts, opened)  # what closes it
        self._thinking = bool(self._opened)
        self._reading = self._answer()
        next(self._reading)

    def push(self, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> list[Event]:
        """More of the answer; what it tells."""
        self._told.logprobs.extend(logprobs)
        for char in text:
            self._reading.send(char)
        events = self._told.take()
        tried = self._span is not None and not self._span.call.begun
        if not (tried or self._held or self._told.owes):
            self._told.logprobs.clear()  # they are of a tag, of reasoning or of a call
        return events

    def end(self) -> list[Event]:
        """It is over: what was held back comes out."""
        try:
            self._reading.send("")
        except StopIteration:
            return self._told.take()
        raise AssertionError("a reader reads beyond the end")

    @property
    def message(self) -> ChatMessage:
        """What was told; a call that was cut too, as far as it goes."""
        return self._told.message

    def _answer(self) -> Reading[None]:
        if self._opened:
            yield from self._thought(self._opened)
        while opener := (yield from self._text()):
            if opener in self._thoughts:
                yield from self._thought(self._thoughts[opener])
            elif opener == self._awaited:
                self._tag()
                self._awaited = ""
            else:
                yield from self._calls(self._marks[opener])
        self._told.end(thinking=self._thinking)

    def _text(self) -> Reading[str]:
        """Text up to a tag, which is returned; "" at the end."""
        while True:
            char = yield from self._chars.next()
            self._held += char
            while self._held and not (char and self._may_open(self._held)):
                self._say(self._held[0])
                self._held = self._held[1:]
            if not char or (self._held and self._held in self._openers()):
                opener, self._held = self._held, ""
                return opener

    def _say(self, char: str) -> None:
        self._told.say(char)
        self._line_begins = char == "\n" or (self._line_begins and char.isspace())

    def _tag(self) -> None:
        self._told.tag()
        self._line_begins = True

    def _may_open(self, held: str) -> bool:
        if held[0] not in self._firsts and not self._awaited:
            return False
        return any(opener.startswith(held) for opener in self._openers())

    def _tags(self) -> Sequence[str]:
        """What may be a tag anywhere."""
        return (*self._thoughts, *self._marks)

    def _openers(self) -> Sequence[str]:
        """What would be a tag here."""
        openers = [
            opener for opener, marks in self._marks.items() if self._line_begins or not marks.loose
        ]
        # Elsewhere the word is spoken of. Where a thought has ended, or a call, another may begin.
        if self._told.after_tag:
            openers += self._thoughts
        return [*openers, self._awaited] if self._awaited else openers

    def _thought(self, closer: str) -> Reading[None]:
        self._thinking = True
        self._told.tag()
        if (yield from self._chars.until((closer,), self._told.think)):
            self._tag()
            self._thinking = False

    def _calls(self, marks: Marks) -> Reading[None]:
        """Calls and the tag behind them; or text, if they cannot be read."""
        chars = self._chars
        if marks.inner:
            chars.back(marks.opener)
        chars.mark()
        span = Span(marks=marks, chars=chars, told=self._told, tools=self._tools)
        self._span = span
        try:
            yield from _READERS[marks.body](span)
        except Unread:
            self._unread(span)
        else:
            self._line_begins = True
        chars.unmark()
        self._span = None
        if span.num_calls and marks.closer:
            yield from self._closer(marks)

    def _unread(self, span: Span) -> None:
        """What was not told comes out as text."""
        call, marks = span.call, span.marks
        if call.begun and not call.whole:
            self.cut = self._chars.ended
            if not self.cut:
                call.end()
            return
        self.cut = self._chars.ended and not marks.loose and not call.whole
        opener = "" if span.num_calls or marks.inner else marks.opener
        for char in opener + self._chars.since_mark:
            self._say(char)

    def _closer(self, marks: Marks) -> Reading[None]:
        chars, closer = self._chars, marks.closer
        junk = yield from chars.run(lambda char: char in JUNK and char != closer[0])
        if (yield from chars.any_of(closer)) or not (yield from chars.peek()):
            self._tag()
            return
        chars.back(junk)
        self._awaited = "" if marks.loose else closer


def opened_thought(thoughts: Sequence[Thought], opened: str) -> str:
    """What closes the reasoning that a prompt's end has opened; "" if it has opened none."""
    opened = opened.rstrip()
    return next((closer for opener, closer in thoughts if opened.endswith(opener)), "")
