"""One reply, from the stream to stdout; progress and remarks to stderr."""

import copy
import os
import sys
from typing import TYPE_CHECKING, Self, TextIO

from edgekv.cli.progress import PrefillBar, StatusLine, say, stop_request
from edgekv.cli.render import TerminalText, length_note, moved, one_line
from edgekv.config import SamplingParams
from edgekv.errors import RequestError

if TYPE_CHECKING:
    from edgekv.engine.outbox import Delta
    from edgekv.runtime import Reply, Session

_DIM, _NOT_DIM = "\x1b[2m", "\x1b[22m"
_POLL_S = 0.1  # how late a Ctrl-C or the prefill bar may be


def warn(session: "Session") -> None:
    """Say what could not be read or kept of a session's conversation, if that is so."""
    if session.warning:
        say(f"warning: {one_line(session.warning)}")


def check_text(field: str, text: str) -> str:
    """Return `text` if it can be written as UTF-8.

    Python smuggles undecodable bytes of arguments and keystrokes as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{field} is not valid UTF-8 at character {error.start}",
            hint="set a UTF-8 locale, or convert the text with iconv -t utf-8",
        ) from None
    return text


def stream_reply(
    session: "Session", text: str, sampling: SamplingParams, *, show: bool = True
) -> "Reply":
    """Answer `text`, printing tokens as they come until the end or Ctrl-C.

    What is shown goes to stdout and ends with a newline. After Ctrl-C the reply is the part that
    was produced, with finish_reason "cancelled".
    """
    out = sys.stdout if show else None
    confirmed = not _can_take_back(out)
    with _Printer(out) as printer, stop_request() as stop:
        with (
            StatusLine(sys.stderr) as line,
            session.stream(text, sampling=sampling, confirmed=confirmed) as stream,
        ):
            bar: PrefillBar | None = PrefillBar(line)
            while not stop.is_set():
                delta = stream.wait(_POLL_S)
                if delta is not None:
                    bar = None
                    line.clear()
                    printer.write(delta)
                elif stream.done:
                    break
                elif bar:
                    bar.update(*stream.prefill_progress)
            if stop.is_set() and bar:
                line.draw("stopping …")  # a chunk of prefill is ended, not broken off
        if stream.reply is None:
            stream.wait()  # raises what the request failed with while it was stopped
        assert stream.reply is not None
        printer.settle(stream.reply.text)  # what came while it was stopped
    return stream.reply


def remark(reply: "Reply", sampling: SamplingParams) -> None:
    """Say on stderr why a reply ended, unless the model ended it."""
    if reply.finish_reason == "cancelled":
        say("(stopped)")
    elif reply.finish_reason == "length":
        say(length_note(reply.stats, sampling))


class _Printer:
    """Writes deltas to `out`, made safe if that is a terminal, and ends the last line.

    Provisional text is dim, and written again when it is certain: as it was, or corrected. A
    request that fails before its first token has no line to end.
    """

    def __init__(self, out: TextIO | None) -> None:
        self._out = out
        self._safe = TerminalText() if out and out.isatty() else None
        self._last = ""
        self._column = 0  # behind what is certain
        self._below = False  # a row was full, and the cursor is in the next one already
        self._width = self._rows_max = 0  # of the terminal, when the tail was begun
        self._tail = ""  # provisional
        self._drawn = ""  # of it
        self.text = ""  # of the answer, shown or not, what is certain of it

    def write(self, delta: "Delta") -> None:
        """Show what a delta changes."""
        if delta.provisional:
            self._tail += delta.text
            self._draw_tail()
        elif delta.text or delta.retract:
            kept = self._tail[: len(self._tail) - delta.retract]
            self.settle(self.text + kept + delta.text)

    def settle(self, text: str) -> None:
        """So much of the answer is certain; what is shown beyond it goes."""
        assert text.startswith(self.text)
        self._erase_tail()
        added, self.text = text[len(self.text) :], text
        shown = self._safe.feed(added) if self._safe else added
        self._last = shown[-1:] or self._last
        if shown and self._below:
            shown, self._below = shown.removeprefix("\n"), False
        if self._safe:
            self._column = moved(self._column, shown, self._terminal_size()[0])[1]
        self._put(shown)

    def _draw_tail(self) -> None:
        if self._out is None or self._safe is None:
            return
        if not self._drawn:
            self._width, self._rows_max = self._terminal_size()
        shown = copy.copy(self._safe).feed(self._tail)
        if moved(self._column, shown, self._width)[0] < self._rows_max and shown != self._drawn:
            self._put(f"{_DIM}{shown.removeprefix(self._drawn)}{_NOT_DIM}")
            self._drawn = shown

    def _erase_tail(self) -> None:
        if self._drawn:
            rows = moved(self._column, self._drawn, self._width)[0]
            if self._column == self._width:  # nothing brings the cursor to where it was
                rows, self._column, self._below = rows - 1, 0, True
            up = f"\x1b[{rows}A" if rows > 0 else ""
            self._put(f"{up}\x1b[{self._column + 1}G\x1b[J")
        self._tail = self._drawn = ""

    def _terminal_size(self) -> tuple[int, int]:
        """Columns, and how many rows a text may go down that is to be written again."""
        assert self._out is not None
        try:
            columns, rows = os.get_terminal_size(self._out.fileno())
        except (OSError, ValueError):
            columns, rows = 80, 24
        return columns or 80, max(1, (rows or 24) // 2)

    def _put(self, text: str) -> None:
        if self._out and text:
            self._out.write(text)
            self._out.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._erase_tail()
        if self._last != "\n" and not self._below and (self._last or kind is None):
            self._put("\n")


def _can_take_back(out: TextIO | None) -> bool:
    """Whether text that was written can be written anew."""
    return out is not None and out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
