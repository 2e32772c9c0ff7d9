"""The process's own streams, made safe at the door: closed, full, not blocking, gone.

A stream that was closed is None in Python, and whatever file is opened next gets its number: a
model's, whose descriptor 0 some libraries take for a failure, or a store's, into which what a
library says on stderr would be written.
"""

import contextlib
import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Of a stream that was closed: nothing to read, nobody who takes data, nobody who listens.
_STAND_INS = ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY))


class _Data(io.FileIO):
    """A descriptor to write to as if it blocked, though another program made it not to."""

    def write(self, data: "ReadableBuffer", /) -> int:
        while (written := super().write(data)) is None:
            select.select([], [self], [])
        return written


class _Talk(_Data):
    """stderr: who cannot be told goes on all the same."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def secure_streams() -> None:
    """Put something in place of streams that were closed, and make the others hard to fail.

    Reading a closed stdin is an end of file. Writing to a closed stdout is an error, as to a full
    disk; to a closed stderr it is nothing. Streams that somebody has replaced stay.
    """
    for fd, mode in _STAND_INS:
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # takes the lowest that is free
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - a descriptor
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(_Data(1, "w", closefd=False), sys.stdout, "replace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Talk(2, "w", closefd=False), sys.stderr, "backslashreplace")


def _text(raw: io.FileIO, before: TextIO | None, errors: str) -> TextIO:
    """A stream of text, in the locale's encoding; an odd one costs characters, not the answer."""
    encoding = "utf-8" if before is None else before.encoding
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors, line_buffering=raw.isatty() or raw.fileno() == 2
    )


def stdout_is_closed() -> bool:
    """Whether nobody will take what is written; not known of a disk that is full."""
    try:
        os.write(sys.stdout.fileno(), b"")
    except io.UnsupportedOperation:  # no descriptor, but somebody's own stream
        return False
    except OSError:
        return True
    return False


def lost_output() -> str | None:
    """Why stdout does not take what was written to it; None if it does. What is lost is lost."""
    try:
        sys.stdout.flush()
    except OSError as error:
        drop_stdout()
        return error.strerror or str(error)
    return None


def drop_stdout() -> None:
    """Nobody takes what stdout still holds: let the flush at exit succeed."""
    with contextlib.suppress(OSError):  # a stdout without a descriptor has nothing to lose
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_stdin(num_bytes_max: int) -> bytes:
    """What comes on stdin until it ends, at most so many bytes and one more. Raises OSError."""
    data = bytearray()
    while len(data) <= num_bytes_max:
        piece = sys.stdin.buffer.read(num_bytes_max + 1 - len(data))
        if piece is None:  # it does not block, and there is nothing yet
            select.select([sys.stdin], [], [])
        elif not piece:
            break
        else:
            data += piece
    return bytes(data)
