"""The terminal while something runs: progress that leaves no trace, Ctrl-C that asks politely.

By hand, because the line also says what nothing counts, makes room for an answer that is streamed,
and may cost `--help` nothing.
"""

import io
import logging
import os
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from types import FrameType
from typing import Any, Self, TextIO

from edgekv.cli.render import bar, duration, one_line, size
from edgekv.cli.signals import ENDING
from edgekv.clock import Clock, MonotonicClock

PREFILL_DELAY_MS = 300  # shorter waits need no explanation
REDRAW_MS = 100
SAY_MS = 60_000  # between plain lines off a terminal


def say(text: str = "") -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


class SayWarnings(logging.Handler):
    """What the library warns of, said as commands say it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, if it is a warning at least."""
        if record.levelno >= logging.WARNING:
            say(f"warning: {one_line(record.getMessage())}")


class StatusLine:
    """The last line of a terminal, redrawn in place; draws nothing on anything else.

    Carriage return and spaces only, so that dumb terminals show it as well. What is written on
    stderr inside the block gets lines of its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._width = 0
        self._others = ExitStack()
        self.on_terminal = stream.isatty()
        self.in_use = False  # by somebody else's words, whose line is not at its end

    def draw(self, text: str) -> None:
        """Replace what the line shows."""
        if not self.on_terminal or self.in_use:
            return
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            columns = 80
        text = text[: columns - 1]
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)

    def clear(self) -> None:
        """Show nothing, with the cursor at the line's start."""
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0

    def __enter__(self) -> Self:
        if self.on_terminal:
            self._others.enter_context(redirect_stderr(_Beside(self, self._stream)))
        return self

    def __exit__(self, *error: object) -> None:
        self._others.close()
        self.clear()


class _Beside(io.TextIOBase):
    """stderr while a status line is drawn on it: what is said there takes its place."""

    def __init__(self, line: StatusLine, stream: TextIO) -> None:
        self._line, self._stream = line, stream

    def write(self, text: str, /) -> int:
        self._line.clear()
        self._line.in_use = not text.endswith("\n")
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()


# Before so much is done there is no pace: of a predicted prompt the first four tokens are exact at
# once, and made a prefill of 10 s one of 20 min.
_PACE_MIN = 0.02


class Eta:
    """Time left, from the pace since the first observation (what was cached costs nothing)."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def left(self, done: int, total: int, now_ms: float) -> str:
        """` · 3 s left`, or nothing before there is a pace."""
        if self._first is None:
            self._first = (done, now_ms)
        first_done, first_ms = self._first
        if done - first_done < max(1, _PACE_MIN * (total - first_done)) or done >= total:
            return ""
        seconds = (total - done) * (now_ms - first_ms) / (done - first_done) / 1e3
        return f" · {duration(seconds)} left"


class PrefillBar:
    """Prefill progress of one request, shown when the first token lets itself be waited for."""

    def __init__(self, line: StatusLine, clock: Clock | None = None) -> None:
        self._line = line
        self._clock = clock or MonotonicClock()
        self._start_ms = self._clock.now_ms()
        self._eta = Eta()

    def update(self, done: int, total: int) -> None:
        """Take the tokens that are done, of how many; draw if it is time to."""
        now_ms = self._clock.now_ms()
        left = self._eta.left(done, total, now_ms)
        if now_ms - self._start_ms >= PREFILL_DELAY_MS and total > 0:
            self._line.draw(f"prefill {bar(done, total)} {done}/{total} tokens{left}")


class DownloadProgress:
    """The `progress` callback of a model's download; may be called from any thread.

    A bar on a terminal; elsewhere one plain line for each thing that is fetched.
    """

    def __init__(self, line: StatusLine, clock: Clock | None = None):
        self._line = line
        self._clock = clock or MonotonicClock()
        self._lock = threading.Lock()
        self._what = ""
        self._eta = Eta()
        self._drawn_ms = float("-inf")
        self._said_ms = self._clock.now_ms()
        self._interrupted = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block whose Ctrl-C, or end, ends workers too, at their next report; main thread only.

        Who waits for them would else wait until all is downloaded.
        """
        previous = {number: signal.getsignal(number) for number in ENDING}
        if (of_ctrl_c := signal.getsignal(signal.SIGINT)) is signal.default_int_handler:
            previous[signal.SIGINT] = of_ctrl_c
        ours = {number: handler for number, handler in previous.items() if callable(handler)}

        def interrupt(signum: int, frame: FrameType | None) -> None:
            self._interrupted = True
            ours[signal.Signals(signum)](signum, frame)

        for number in ours:  # the others are ignored, or somebody else's
            signal.signal(number, interrupt)
        try:
            yield
        finally:
            for number, handler in ours.items():
                if signal.getsignal(number) is interrupt:  # a first one may have changed it
                    signal.signal(number, handler)

    def announce(self, text: str, *, at_once: bool = False) -> None:
        """Show what is going on while there are no reports; off a terminal once a minute.

        What takes so long that people leave it alone begins `at_once`, there too.
        """
        now_ms = self._clock.now_ms()
        with self._lock:
            self._line.draw(text)
            if not self._line.on_terminal and (at_once or now_ms - self._said_ms >= SAY_MS):
                self._said_ms = now_ms
                say(text)

    def watch(
        self, what: str, done: int, total: int, left: str = "", *, at_once: bool = False
    ) -> None:
        """Show how much of something is done that is not a download."""
        self.announce(f"{what} {bar(done, total)} {done}/{total}{left}", at_once=at_once)

    def __call__(self, what: str, done_bytes: int, total_bytes: int | None, /) -> None:
        """Take one report; reports that come too fast for the eye are not drawn."""
        if self._interrupted:
            raise KeyboardInterrupt
        now_ms = self._clock.now_ms()
        text = f"downloading {one_line(what)}"
        with self._lock:
            if text != self._what:
                self._what, self._eta, self._drawn_ms = text, Eta(), float("-inf")
                if not self._line.on_terminal:
                    say(text if total_bytes is None else f"{text} ({size(total_bytes)})")
            if now_ms - self._drawn_ms < REDRAW_MS:
                return
            self._drawn_ms = now_ms
            if total_bytes is not None:
                left = self._eta.left(done_bytes, total_bytes, now_ms)
                amount = f"{size(done_bytes)} of {size(total_bytes)}{left}"
                text += f" {bar(done_bytes, total_bytes)} {amount}"
            elif done_bytes:
                text += f" {size(done_bytes)}"
            self._line.draw(text)


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that nothing is interrupted half-way.

    It is polled between tokens. From the second Ctrl-C on the previous handler is back, so that a
    reply that does not end can still be left. Main thread only.
    """
    stop = threading.Event()

    def request(_signum: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def ignore_typing() -> Iterator[None]:
    """Neither echo what is typed or pasted inside the block nor hand it to the next prompt.

    Outside the prompt there is no bracketed paste, so a pasted `/exit` would look typed.
    """
    if not sys.stdin.isatty():
        yield
        return
    fd = sys.stdin.fileno()
    saved: list[Any] = []
    with suppress(termios.error):  # it may be gone by now, as it may be at the end
        saved = termios.tcgetattr(fd)
        quiet = list(saved)
        quiet[3] &= ~termios.ECHO
        termios.tcsetattr(fd, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        if saved:
            with suppress(termios.error):
                termios.tcsetattr(fd, termios.TCSAFLUSH, saved)
