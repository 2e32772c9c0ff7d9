"""Characters of a text that is not all there yet, for readers written as if it were.

A reader is a generator that takes one character at each bare `yield`, and "" at the end. What it
does can depend on the characters alone, never on the pieces in which they came.
"""

from collections.abc import Callable, Collection, Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, str, T]


class Unread(Exception):
    """What comes is not what this reader reads; `Characters` say whether the text has ended."""


class Characters:
    """What comes, with what was given back before it. Owned by the generator that reads it."""

    def __init__(self) -> None:
        self.ended = False
        self._given_back: list[str] = []  # the next one last
        self._since_mark: list[str] | None = None

    def mark(self) -> None:
        """What is read from here on can be had again."""
        self._since_mark = []

    def unmark(self) -> None:
        """Nobody wants it again."""
        self._since_mark = None

    @property
    def since_mark(self) -> str:
        """What was read since; "" without a mark."""
        return "".join(self._since_mark or ())

    def next(self) -> Reading[str]:
        """The next one, "" at the end."""
        if self._given_back:
            char = self._given_back.pop()
        elif self.ended:
            return ""
        else:
            char = yield
            self.ended = not char
        if char and self._since_mark is not None:
            self._since_mark.append(char)
        return char

    def back(self, text: str) -> None:
        """Give back what was read last; it comes again."""
        self._given_back.extend(reversed(text))
        if self._since_mark is not None:
            del self._since_mark[len(self._since_mark) - len(text) :]

    def peek(self) -> Reading[str]:
        """The next one, which stays."""
        char = yield from self.next()
        self.back(char)
        return char

    def run(self, wanted: Callable[[str], bool]) -> Reading[str]:
        """All that is `wanted`, which "" never is."""
        taken = []
        while (char := (yield from self.next())) and wanted(char):
            taken.append(char)
        self.back(char)
        return "".join(taken)

    def space(self) -> Reading[str]:
        """White space."""
        return (yield from self.run(str.isspace))

    def any_of(self, *texts: str) -> Reading[str]:
        """Whichever comes; "" if none does, and nothing is taken."""
        taken = ""
        while taken not in texts and any(text.startswith(taken) for text in texts):
            if not (char := (yield from self.next())):
                break
            taken += char
        if taken in texts:
            return taken
        self.back(taken)
        return ""

    def expect(self, *texts: str) -> Reading[str]:
        """Whichever comes. Raises Unread: none does."""
        found = yield from self.any_of(*texts)
        if not found:
            raise Unread
        return found

    def until(self, stops: Collection[str], out: Callable[[str], None]) -> Reading[str]:
        """Tell `out` what is before the first of `stops`, as soon as it is sure; returns which."""
        held = ""
        while held not in stops:
            if not (char := (yield from self.next())):
                if held:
                    out(held)
                return ""
            held += char
            while held and not any(stop.startswith(held) for stop in stops):
                out(held[0])
                held = held[1:]
        return held
