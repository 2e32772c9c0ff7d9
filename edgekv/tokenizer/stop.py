"""Stop strings that may span tokens."""

from collections.abc import Sequence

from edgekv.errors import ConfigError


class StopMatcher:
    """Watches streamed text for stop strings and holds back what may begin one.

    The stop that is complete first wins; of several complete at the same character, the longest,
    which shows the least. So the outcome does not depend on how the text is cut into pieces.
    Each character costs amortised O(number of stops). Owned by whoever streams the answer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ConfigError.of("stop", tuple(stops), "strings of at least one character")
        self._scanners = [_Scanner(stop) for stop in stops]
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text.

        Returns:
            The text that is now safe to show, and the stop string that ended it or None. The stop
            itself and everything behind it is never returned.
        """
        if self._matched is not None:
            return "", self._matched
        if not self._scanners:
            return text, None
        held_before = len(self._held)
        text = self._held + text
        for end in range(held_before, len(text)):
            # A list, not a generator: every scanner has to see every character.
            complete = [s.stop for s in self._scanners if s.step(text[end])]
            if complete:
                self._held = ""
                self._matched = max(complete, key=len)
                return text[: end + 1 - len(self._matched)], self._matched
        safe = len(text) - max(s.num_matched for s in self._scanners)
        self._held = text[safe:]
        return text[:safe], None

    def flush(self) -> str:
        """The text still held back when the answer ends without a stop."""
        held, self._held = self._held, ""
        return held


class _Scanner:
    """One stop string, matched by Knuth, Morris and Pratt's automaton (SIAM J. Comput. 1977)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0  # longest prefix of `stop` that the text so far ends with
        self._borders = _borders(stop)

    def step(self, character: str) -> bool:
        """Take one character; True when the stop is complete, after which nothing may follow."""
        self.num_matched = _extend(self.stop, self._borders, self.num_matched, character)
        return self.num_matched == len(self.stop)


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the longest proper prefix of it that is also its suffix."""
    borders = [0]
    for character in stop[1:]:
        borders.append(_extend(stop, borders, borders[-1], character))
    return borders


def _extend(stop: str, borders: Sequence[int], num_matched: int, character: str) -> int:
    while num_matched and stop[num_matched] != character:
        num_matched = borders[num_matched - 1]
    return num_matched + (stop[num_matched] == character)
