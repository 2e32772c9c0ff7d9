"""Answers in channels, as gpt-oss writes them (OpenAI's harmony format).

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…

The prompt ends with `<|start|>assistant`; a header follows, and the message that it announces, one
after another. What the channel "analysis" holds is reasoning, any other's is text. A header that
names a recipient, in the channel's place or in front of it, calls that tool: in any channel, for
the models do not keep to "commentary", nor to the prefix "functions.".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from edgekv.chat.answer import JUNK, AnswerParser
from edgekv.chat.characters import Reading
from edgekv.chat.span import Marks
from edgekv.tokenizer.answer_text import IncrementalDetokenizer
from edgekv.tokenizer.vocabulary import Vocabulary

_START, _CHANNEL, _MESSAGE = "<|start|>assistant", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
# A message that was not ended is, where the header of the next one begins.
_HEADERS = tuple(f"{_CHANNEL}{name}" for name in ("analysis", "commentary", "final"))
_STOPS = (*_ENDS, _START, *_HEADERS)
# What a header begins with.
_PARTS = (_CHANNEL, _MESSAGE, "to=")
_HEADER_CHARS_MAX = 512
_TAGS = re.compile(r"<\|(?:channel|constrain)\|>")
_WORD = re.compile(r"to=\S+|[\w./+-]+")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_NAMESPACE = "functions."
# Control tokens that the parser must see.
CONTROL = frozenset({"<|start|>", "<|constrain|>", _CHANNEL, _MESSAGE, *_ENDS})


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What announces a message: as it is written, and what of it counts."""

    written: str
    channel: str
    recipient: str

    @classmethod
    def of(cls, written: str) -> "_Header":
        """Of channels and recipients the last one named counts."""
        channels = [said.split() for said in written.removesuffix(_MESSAGE).split(_CHANNEL)[1:]]
        recipients = [name for name in _RECIPIENT.findall(written) if name != "assistant"]
        return cls(
            written=written,
            channel=channels[-1][0] if channels and channels[-1] else "",
            recipient=recipients[-1] if recipients else "",
        )


class ChannelParser(AnswerParser):
    """Reads one answer. Owned by whoever pushes."""

    def _tags(self) -> tuple[str, ...]:
        return _STOPS

    def _openers(self) -> Sequence[str]:
        return _STOPS

    def _answer(self) -> Reading[None]:
        stop = _START  # the prompt ends with it
        while stop:
            if stop in _ENDS:
                self._tag()
                stop = yield from self._text()
            else:
                stop = yield from self._message("" if stop == _START else stop)
        self._told.end(thinking=self._thinking)

    def _message(self, begun: str) -> Reading[str]:
        """A message whose header begins so; what ends it, "" at the end."""
        header = _Header.of((yield from self._header(begun)))
        if header.recipient:
            self._told.part()
            yield from self._called(header)
        elif header.channel == "analysis":
            return (yield from self._analysis())
        elif header.written:
            self._told.part()
        return (yield from self._text())

    def _header(self, begun: str) -> Reading[str]:
        """What comes up to its end; "" if it is none, and then it is text."""
        chars, written = self._chars, begun
        while _may_go_on(written) and (char := (yield from chars.next())):
            written += char
            self._held = written
        self._held = ""
        if written.endswith(_MESSAGE) and _is_header(written):
            return written
        if not written.lstrip().startswith(_PARTS):
            chars.back(written)
            return ""
        # It was cut, or ends in something else.
        after = next((end for end in (*_ENDS, _START) if written.endswith(end)), "")
        chars.back(after)
        written = written.removesuffix(after)
        self.cut = chars.ended and _RECIPIENT.search(written) is not None
        if not any(header.startswith(written) for header in _HEADERS):
            for char in written:
                self._say(char)
        return ""

    def _analysis(self) -> Reading[str]:
        self._thinking = True
        self._told.part()
        stop = yield from self._chars.until(_STOPS, self._told.think)
        if stop:
            self._tag()
            self._thinking = False
        return stop

    def _called(self, header: _Header) -> Reading[None]:
        """The call of a tool; one of something else, such as "python", is text."""
        name = header.recipient.removeprefix(_NAMESPACE)
        if not self._tools or (name == header.recipient and name not in self._tools):
            for char in header.written:
                self._say(char)
            return
        yield from self._calls(Marks(opener=header.written, body="arguments", name=name))
        junk = yield from self._chars.run(JUNK.__contains__)
        if (yield from self._chars.peek()) not in ("", "<"):
            self._chars.back(junk)


def _is_header(written: str) -> bool:
    """Whether nothing stands in it that stands in none."""
    words = _TAGS.sub(" ", written.removesuffix(_MESSAGE)).split()
    return all(map(_WORD.fullmatch, words))


def _may_go_on(written: str) -> bool:
    """Whether this may be the beginning of a header."""
    text = written.lstrip()
    return (
        len(written) < _HEADER_CHARS_MAX
        and any(part.startswith(text) or text.startswith(part) for part in _PARTS)
        and "\n" not in text
        and not text.endswith((_MESSAGE, *_ENDS, _START))
    )


class ChannelText(IncrementalDetokenizer):
    """An answer for those who read text and no events: what was thought stands in think tags.

    Headers are control tokens and what is between them; where a vocabulary has none, they are text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        hidden = vocabulary.hidden_tokens
        self._control = {hidden[text]: text for text in CONTROL if text in hidden}
        self._header: str | None = None  # what there is of one
        self._thinking = False
        self._said = False  # something, since anything was thought

    def push(self, token_id: int) -> str:
        """Text that this token completes; often "" inside a character, and in headers."""
        control = self._control.get(token_id, "")
        if not control:
            return self._within(super().push(token_id))
        closed = "\n</think>\n\n" if self._thinking else ""
        self._said &= not closed
        self._thinking = False
        if control == _MESSAGE:
            return closed + self._opened(_Header.of(f"{self._header or ''}{_MESSAGE}"))
        if control not in _ENDS:
            self._header = f"{self._header or ''}{control}"
        return closed

    def flush(self) -> str:
        """What is left when the answer ends; an unfinished character becomes U+FFFD."""
        return self._within(super().flush())

    def _within(self, text: str) -> str:
        if self._header is None:
            self._said |= bool(text)
            return text
        self._header += text
        return ""

    def _opened(self, header: _Header) -> str:
        gap = "\n\n" if self._said else ""
        self._header = None
        self._thinking = header.channel == "analysis" and not header.recipient
        return f"{gap}<think>\n" if self._thinking else gap
