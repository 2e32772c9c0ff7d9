"""One reply, from the stream to stdout; progress and remarks to stderr."""

import sys
from typing import TYPE_CHECKING, Self, TextIO

from edgekv.cli.progress import PrefillBar, StatusLine, say, stop_request
from edgekv.cli.render import TerminalText, length_note, one_line
from edgekv.config import SamplingParams
from edgekv.errors import RequestError

if TYPE_CHECKING:
    from edgekv.runtime import Reply, Session

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
    with _Printer(sys.stdout if show else None) as printer, stop_request() as stop:
        with (
            StatusLine(sys.stderr) as line,
            session.stream(text, sampling=sampling, confirmed=True) as stream,
        ):
            bar: PrefillBar | None = PrefillBar(line)
            while not stop.is_set():
                delta = stream.wait(_POLL_S)
                if delta is not None:
                    bar = None
                    line.clear()
                    printer.write(delta.text)
                elif stream.done:
                    break
                elif bar:
                    bar.update(*stream.prefill_progress)
            if stop.is_set() and bar:
                line.draw("stopping …")  # a chunk of prefill is ended, not broken off
        if stream.reply is None:
            stream.wait()  # raises what the request failed with while it was stopped
        assert stream.reply is not None
        printer.write(stream.reply.text[printer.num_chars :])  # what came while it was stopped
    return stream.reply


def remark(reply: "Reply", sampling: SamplingParams) -> None:
    """Say on stderr why a reply ended, unless the model ended it."""
    if reply.finish_reason == "cancelled":
        say("(stopped)")
    elif reply.finish_reason == "length":
        say(length_note(reply.stats, sampling))


class _Printer:
    """Writes deltas to `out`, made safe if that is a terminal, and ends the last line.

    A request that fails before its first token has no line to end.
    """

    def __init__(self, out: TextIO | None) -> None:
        self._out = out
        self._safe = TerminalText() if out and out.isatty() else None
        self._last = ""
        self.num_chars = 0  # of the answer, shown or not

    def write(self, text: str) -> None:
        self.num_chars += len(text)
        shown = self._safe.feed(text) if self._safe else text
        if self._out and shown:
            self._out.write(shown)
            self._out.flush()
            self._last = shown[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._last != "\n" and (self._last or kind is None):
            self.write("\n")
