"""What was typed at the prompt, kept for the next time in a file that only its owner can read."""

import contextlib
import os
from pathlib import Path

import platformdirs
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

_BYTES_MAX = 4 << 20


class PrivateHistory(FileHistory):
    """A history file that cannot end the conversation."""

    def store_string(self, string: str) -> None:
        """Append to the file; where that fails (disk full) the line stays in memory."""
        with contextlib.suppress(OSError):
            super().store_string(string)


def open_history(path: Path | None = None) -> tuple[History, str]:
    """The history at `path` (default: the user's state folder), and a warning or "".

    A file that cannot be opened gives a history that lives in memory only.
    """
    path = path or Path(platformdirs.user_state_dir("edgekv")) / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.fchmod(fd, 0o600)  # it may be older than this rule
        finally:
            os.close(fd)
        _trim(path)
    except OSError as error:
        return InMemoryHistory(), f"warning: history is not kept: {error}"
    return PrivateHistory(path), ""


def _trim(path: Path) -> None:
    """Drop the oldest entries of a file over the limit, down to half of it."""
    if path.stat().st_size <= _BYTES_MAX:
        return
    tail = path.read_bytes()[-_BYTES_MAX // 2 :]
    start = tail.find(b"\n# ")  # entries begin with a line that holds their time
    with path.open("r+b") as file:
        file.write(tail[start:] if start >= 0 else b"")
        file.truncate()
