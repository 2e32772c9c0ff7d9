"""What several commands share: options, values that hold several things, a download's bar."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from edgekv.cli.progress import DownloadProgress, StatusLine
from edgekv.errors import FETCH_AGAIN, ConfigError, ModelError

# As in edgekv.models.default_model, whose import would cost `--help` a tenth of its time.
DEFAULT_MODEL = "smollm2-135m"
MODEL_HELP = "A model's name, a Hugging Face repo id, a folder, or a GGUF file."

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Predictor = Annotated[
    str | None, typer.Option(help="A KV predictor's file, or the name of one of edgekv's.")
]
Aux = Annotated[str | None, typer.Option(help="The auxiliary model of a predictor that needs one.")]

_Part = TypeVar("_Part")


@contextmanager
def fetching(model: str | None = None) -> Iterator[DownloadProgress]:
    """The `progress` callback for a block that may download; its bar is gone after the block.

    Errors of the block name the command that fetches `model` again, if it is about that one alone.
    """
    try:
        with _progress() as progress:
            yield progress
    except ModelError as error:
        if model is not None:
            error.hint = named(error.hint, model)
        raise


def named(hint: str, model: str) -> str:
    """A hint that fetches `model` again, or copies it, where it speaks of any."""
    own = Path(model).exists()
    again = "copy it anew" if own else FETCH_AGAIN.replace("MODEL", shlex.quote(model))
    return hint.replace(FETCH_AGAIN, again)


@contextmanager
def _progress() -> Iterator[DownloadProgress]:
    with StatusLine(sys.stderr) as line:
        progress = DownloadProgress(line)
        with progress.interruptible():
            yield progress


def given_options(command: typer.Context) -> dict[str, str]:
    """Parameters that the command line names, and how: `{"as_json": "--json"}`."""
    return {
        str(parameter.name): parameter.opts[0]
        for parameter in command.command.params
        if getattr(command.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
    }


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers separated by commas; all four refuse what is something else."""
    return _parsed(option, text, int, "whole numbers separated by commas")


def parts(option: str, text: str) -> tuple[float, ...]:
    """Numbers separated by commas, each once."""
    return tuple(_parsed(option, text, float, "numbers separated by commas, each once", once=True))


def names(option: str, text: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Some of `choices`, each once, separated by commas."""
    allowed = f"some of {','.join(choices)}, separated by commas"
    return tuple(
        _parsed(option, text, lambda name: choices[choices.index(name)], allowed, once=True)
    )


def span(option: str, text: str) -> tuple[int, int]:
    """LOW:HIGH."""
    low, _, high = text.partition(":")
    try:
        return int(low), int(high)
    except ValueError:
        raise ConfigError.of(option, text, "LOW:HIGH, for example 64:1024") from None


def _parsed(
    option: str, text: str, read: Callable[[str], _Part], allowed: str, *, once: bool = False
) -> list[_Part]:
    try:
        found = [read(part.strip()) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or (once and len(set(found)) < len(found)):
        raise ConfigError.of(option, text, allowed)
    return found
