"""An answer's tokens to text as they come: no half characters, nothing that may begin a stop."""

import codecs
import copy
from collections.abc import Sequence
from typing import Self

from edgekv.errors import ConfigError
from edgekv.tokenizer.vocabulary import Vocabulary


class IncrementalDetokenizer:
    """Turns the tokens of one answer into text as they come.

    A character's bytes may be spread over tokens; they are held back until it is complete. The
    texts returned by `push` and `flush`, joined, equal `Tokenizer.decode` of the same ids. Each
    token costs time proportional to its own bytes. Owned by whoever streams the answer.

    Of control tokens the `spelled` ones are shown, for somebody who reads calls out of the text.
    """

    def __init__(self, vocabulary: Vocabulary, spelled: frozenset[int] = frozenset()) -> None:
        self._vocabulary = vocabulary
        self._spelled = spelled
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = vocabulary.leading_space

    def fork(self) -> Self:
        """Another that goes on from here, for tokens that may be taken back."""
        other = copy.copy(self)
        other._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        other._decoder.setstate(self._decoder.getstate())
        return other

    def push(self, token_id: int) -> str:
        """Text that this token completes; often "" inside a character."""
        vocabulary = self._vocabulary
        shown = vocabulary.spelled_bytes if token_id in self._spelled else vocabulary.token_bytes
        return self._begin(self._decoder.decode(shown(token_id)))

    def flush(self) -> str:
        """What is left when the answer ends; an unfinished character becomes U+FFFD."""
        return self._begin(self._decoder.decode(b"", True))

    def _begin(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


class StopMatcher:
    """Watches streamed text for stop strings and holds back what may begin one.

    The stop that is complete first wins; of several complete at the same character, the longest,
    which shows the least. So the outcome does not depend on how the text is cut into pieces.
    Owned by whoever streams the answer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ConfigError.of("stop", tuple(stops), "strings of at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self._matched: str | None = None

    def fork(self) -> Self:
        """Another that goes on from here, for text that may be taken back."""
        return copy.copy(self)

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text: what is now safe to show, and the stop string that ended it or None.

        The stop itself and everything behind it is never returned.
        """
        if self._matched is not None:
            return "", self._matched
        text = self._held + text
        places = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            end, start = min(places)
            self._held, self._matched = "", text[start:end]
            return text[:start], self._matched
        safe = len(text) - max((_num_begun(stop, text) for stop in self._stops), default=0)
        self._held = text[safe:]
        return text[:safe], None

    def flush(self) -> str:
        """The text still held back when the answer ends without a stop."""
        held, self._held = self._held, ""
        return held


def _num_begun(stop: str, text: str) -> int:
    """How many characters at the end of `text`, in which `stop` is not, begin it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
