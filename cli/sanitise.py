"""Make text that we did not write safe to show on a terminal.

A model's answer, a file name or a server's message may hold escape sequences that move the cursor,
change the title or write to the clipboard. Whole sequences are dropped, not only their first byte,
so that no `[31m` is left behind. Pipes get the text as it is.
"""

from typing import Literal

_State = Literal["text", "escape", "csi", "string"]

_STRING_OPENERS = "]PX^_"  # OSC, DCS, SOS, PM, APC: these run until BEL or ST
_C1_STRING_OPENERS = "\x90\x98\x9d\x9e\x9f"


class TerminalText:
    """Strips control characters and escape sequences from text that comes in pieces.

    Owned by one caller. Tabs and newlines pass. A newline ends every unfinished sequence, so a
    lone opener cannot swallow the rest of an answer.
    """

    def __init__(self) -> None:
        self._state: _State = "text"

    def feed(self, text: str) -> str:
        """The part of `text` that may be shown; an open sequence continues in the next call."""
        return "".join([char for char in text if self._shows(char)])

    def _shows(self, char: str) -> bool:
        if char == "\n":
            self._state = "text"
            return True
        if char == "\x1b":
            self._state = "escape"
            return False
        if self._state == "text":
            return self._shows_in_text(char)
        self._state = self._next(char)
        return False

    def _shows_in_text(self, char: str) -> bool:
        if char == "\x9b":
            self._state = "csi"
        elif char in _C1_STRING_OPENERS:
            self._state = "string"
        return char == "\t" or not _is_control(char)

    def _next(self, char: str) -> _State:
        """The state after `char` inside a sequence (ECMA-48, section 5.4)."""
        if self._state == "escape":
            if char == "[":
                return "csi"
            if char in _STRING_OPENERS:
                return "string"
            return "escape" if " " <= char <= "/" else "text"
        if self._state == "csi":
            return "csi" if " " <= char <= "?" else "text"
        return "text" if char in "\a\x9c" else "string"


def _is_control(char: str) -> bool:
    return char < " " or "\x7f" <= char <= "\x9f"


def one_line(text: str) -> str:
    """`text` without escape sequences and on one line, for messages."""
    return TerminalText().feed(text.replace("\n", " "))
