"""What an interrupted fit or training goes on from: a file beside its output."""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from edgekv.errors import ConfigError
from edgekv.predict.tensor_file import load_safetensors, write_safetensors

SAVE_EVERY_S = 120.0
_FORMAT = "3"  # begins every key: another version's arrays have other names


def load_partial(path: Path, key: str) -> dict[str, mx.array] | None:
    """What an interrupted call left, or None if there is nothing whole.

    Raises:
        ConfigError: It is of another `key`: hours of work, perhaps, that somebody may want.
    """
    try:
        arrays, metadata = load_safetensors(path)
    except (RuntimeError, OSError):
        return None
    if metadata.get("key") != f"{_FORMAT} {key}":
        raise ConfigError(
            f"{path} is what a call with other options, texts, models or another version of edgekv "
            "left unfinished",
            hint="go on with those, or remove it to begin anew",
        )
    return arrays


def save_partial(path: Path, key: str, arrays: Mapping[str, mx.array | int]) -> None:
    """What the next call with the same `key` goes on from.

    Raises:
        OSError: It cannot be written.
    """
    # An array as it is: a copy of sums may be all that memory does not hold.
    whole = {k: v if isinstance(v, mx.array) else mx.array(v) for k, v in arrays.items()}
    write_safetensors(path, whole, {"key": f"{_FORMAT} {key}"})


def with_prefix(prefix: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Those arrays whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def remove_partial(path: Path, key: str) -> None:
    """Remove what was saved under this `key`, or is damaged; what is of another call stays."""
    with contextlib.suppress(ConfigError):
        load_partial(path, key)
        path.unlink(missing_ok=True)


class Autosave:
    """Saves every two minutes, and when who watches ends the work."""

    def __init__(self, save: Callable[[], None]) -> None:
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
