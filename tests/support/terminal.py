"""A program on a pseudo-terminal, as a person has it."""

import os
import pty
import select
import termios
import time
from collections.abc import Sequence

PATIENCE_S = 120
PROMPT = ">>>"
PROMPT_LEFT = "\x1b[?2004l"  # the line editor ends bracketed paste


class Terminal:
    """The keyboard and the screen of a program that has a terminal to itself."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(arguments[0], arguments)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str) -> str:
        """Read up to `text`; returns what came before it."""
        give_up = time.monotonic() + PATIENCE_S
        while text not in self._seen:
            ready, _, _ = select.select([self._fd], [], [], give_up - time.monotonic())
            assert ready, f"{text!r} did not come after {self._seen!r}"
            self._seen += os.read(self._fd, 4096).decode(errors="replace")
        before, _, self._seen = self._seen.partition(text)
        return before

    def modes(self) -> list[int]:
        """Input, output, control and local modes, as `termios` has them."""
        return termios.tcgetattr(self._fd)[:4]

    def exit_code(self) -> int:
        """Once it has ended, of itself."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """The window is closed; a second time is nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
