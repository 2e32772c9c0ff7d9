"""The terminal while a reply runs: Ctrl-C asks politely, and stray keys are not kept."""

import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self


class StopRequest:
    """Turns the first Ctrl-C into a flag, so that nothing is interrupted half-way.

    The flag is polled between tokens. From the second Ctrl-C on the previous handler is back, so
    that a reply that does not end can still be left. Main thread only.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_interrupt(self, _signum: int, _frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)


@contextmanager
def ignore_typing() -> Iterator[None]:
    """Neither echo what is typed or pasted inside the block nor hand it to the next prompt.

    Outside the prompt there is no bracketed paste, so a pasted `/exit` would look typed.
    """
    if not sys.stdin.isatty():
        yield
        return
    fd = sys.stdin.fileno()
    saved = termios.tcgetattr(fd)
    quiet = list(saved)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(fd, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, saved)
