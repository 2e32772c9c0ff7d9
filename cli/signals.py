"""What ends a command from outside: a logout or a service manager (SIGTERM), a window (SIGHUP).

It ends as an exception does, so that what is open is closed: a conversation's KV is written, the
terminal is as it was, scratch folders are gone.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def ended_by_signals() -> Iterator[list[int]]:
    """A block in which the first of these signals raises SystemExit; yields those that came.

    A second SIGTERM ends the process at once. A second SIGHUP is nothing: of a window that is
    closed both the kernel and the shell tell. What was ignored (nohup) stays ignored. Only the
    main thread can have this; elsewhere nothing changes.
    """
    came: list[int] = []
    on_main_thread = threading.current_thread() is threading.main_thread()
    ours = [n for n in ENDING if on_main_thread and signal.getsignal(n) is signal.SIG_DFL]

    def end(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        for other in ours:
            if other == signal.SIGHUP:
                signal.signal(other, signal.SIG_IGN)
            elif number == signal.SIGTERM:
                signal.signal(other, signal.SIG_DFL)
        sys.exit(exit_code(number))

    for number in ours:
        signal.signal(number, end)
    try:
        yield came
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def exit_code(number: int) -> int:
    """Of a process that a signal ended, as shells report it."""
    return 128 + number
