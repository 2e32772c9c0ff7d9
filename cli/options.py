"""What several commands share: option texts, values that hold several things, a download's bar."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from edgekv.cli.progress import DownloadProgress, StatusLine
from edgekv.errors import ConfigError

# As in edgekv.models.default_model, whose import would cost `--help` a tenth of its time.
DEFAULT_MODEL = "smollm2-135m"
MODEL_HELP = "A model's name, a Hugging Face repo id, a folder, or a GGUF file."
JSON_HELP = "Print one JSON object on stdout."


@contextmanager
def fetching() -> Iterator[DownloadProgress]:
    """The `progress` callback for a block that may download; its bar is gone after the block."""
    with StatusLine(sys.stderr) as line:
        yield DownloadProgress(line)


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers separated by commas.

    Raises:
        ConfigError: It is something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError.of(option, text, "whole numbers separated by commas") from None


def parts(option: str, text: str) -> tuple[float, ...]:
    """Numbers separated by commas, each once.

    Raises:
        ConfigError: It is something else.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found):
        raise ConfigError.of(option, text, "numbers separated by commas, each once")
    return found


def span(option: str, text: str) -> tuple[int, int]:
    """LOW:HIGH.

    Raises:
        ConfigError: It is something else.
    """
    low, _, high = text.partition(":")
    try:
        return int(low), int(high)
    except ValueError:
        raise ConfigError.of(option, text, "LOW:HIGH, for example 64:1024") from None


def names(option: str, text: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Some of `choices`, each once, separated by commas.

    Raises:
        ConfigError: It is something else.
    """
    parts = tuple(part.strip() for part in text.split(","))
    if len(set(parts)) < len(parts) or not set(parts) <= set(choices):
        raise ConfigError.of(option, text, f"some of {','.join(choices)}, separated by commas")
    return parts
