"""What an interrupted fit or training goes on from: a file beside its output."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from edgekv.errors import ConfigError
from edgekv.predict.tensor_file import load_safetensors, write_safetensors

SAVE_EVERY_S = 120.0
_V = TypeVar("_V")


class _Whole(dict[str, _V]):
    """Raises ConfigError for what a checkpoint lacks."""

    def __init__(self, path: Path, found: dict[str, _V]) -> None:
        super().__init__(found)
        self._path = path

    def __missing__(self, name: str) -> _V:
        raise ConfigError(
            f"{self._path} is damaged: {name} is missing", hint="remove it to begin anew"
        )


def load_partial(path: Path, key: str) -> tuple[dict[str, mx.array], dict[str, str]] | None:
    """What an interrupted call left, or None if there is nothing whole.

    Raises:
        ConfigError: It is of another `key`: hours of work, perhaps, that somebody may want. Or, of
            what is returned, when something is asked for that is missing.
    """
    try:
        tensors, metadata = load_safetensors(path)
    except (RuntimeError, OSError):
        return None
    if metadata.get("key") != key:
        raise ConfigError(
            f"{path} is what a call with other options, texts or models left unfinished",
            hint="go on with those, or remove it to begin anew",
        )
    return _Whole(path, tensors), _Whole(path, metadata)


def save_partial(path: Path, key: str, tensors: dict[str, mx.array], **metadata: int) -> None:
    """What the next call with the same `key` goes on from.

    Raises:
        OSError: It cannot be written.
    """
    values = {name: str(value) for name, value in metadata.items()}
    write_safetensors(path, tensors, {"key": key, **values})


def remove_partial(path: Path, key: str) -> None:
    """Remove what was saved under this `key`, or is damaged; what is of another call stays."""
    try:
        load_partial(path, key)
    except ConfigError:
        return
    path.unlink(missing_ok=True)


class Autosave:
    """Saves every two minutes, and when who watches ends the work."""

    def __init__(self, save: Callable[[], None]) -> None:
        """Nothing is saved yet."""
        self._save = save
        self._saved_s = time.monotonic()

    def note(self, watch: Callable[[], object]) -> None:
        """A piece is done, and the next has not begun: tell who watches, save if it is time.

        Raises:
            OSError: It cannot be written.
        """
        try:
            watch()
        except BaseException:  # Ctrl-C, most likely
            self._save()
            raise
        if time.monotonic() - self._saved_s > SAVE_EVERY_S:
            self._save()
            self._saved_s = time.monotonic()
