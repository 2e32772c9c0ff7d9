"""What a benchmark says: progress, rows as JSON and as tables, and where it was measured."""

import importlib.metadata
import json
import os
import platform
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgekv import __version__
from edgekv.device import profile, system_name
from edgekv.errors import ConfigError

Row = dict[str, Any]
Watch = Callable[[str, int, int], None]  # what runs, parts done, parts in all


def unwatched(what: str, done: int, total: int) -> None:
    """Nobody watches."""


class Reporter:
    """Counts the parts of one thing that runs, and tells the watcher."""

    def __init__(self, watch: Watch, label: str, total: int) -> None:
        self._watch = watch
        self._label = label
        self._total = total
        self._done = 0
        watch(label, 0, total)

    def turn_done(self) -> None:
        """One more."""
        self._done = min(self._done + 1, self._total)
        self._watch(self._label, self._done, self._total)


def check_target(target: Path | None) -> None:
    """Make sure, before minutes are spent, that the report can be written.

    Raises:
        ConfigError: The folder does not exist, or the path is a folder.
    """
    if target is None or str(target) == "-":
        return
    if target.is_dir() or not target.parent.is_dir():
        raise ConfigError.of("json", str(target), "a file in a folder that exists, or -")


def write_report(machine: Row, rows: Sequence[Row], target: Path) -> None:
    """Write JSON to a file, or to stdout if `target` is "-"."""
    report = {"machine": machine, "versions": versions(), "rows": list(rows)}
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    if str(target) == "-":
        sys.stdout.write(text)
    else:
        target.write_text(text, encoding="utf-8")


Columns = tuple[tuple[str, str], ...]
"""Heading and template of each column; a template may name several figures of a row, and those
inside an object as `{object[figure]}`, and bytes in MiB as `{figure!m}`."""

_PIPE_COLUMNS = 120
_DASH = "–"


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with the row's figures, and dashes for those that were not measured."""
    parts, figures = "", []
    for text, name, spec, conversion in string.Formatter().parse(template):
        parts += text
        if name is not None:
            outer, _, inner = name.rstrip("]").partition("[")
            value = row[outer]
            if inner and value is not None:
                value = value[inner]
            if conversion == "m" and value is not None:
                value /= 1 << 20
            parts += _DASH if value is None else format(value, spec or "")
            figures.append(value)
    return _DASH if figures and figures.count(None) == len(figures) else parts


def print_columns(title: str, columns: Columns, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows on stdout, as wide as the terminal, or wide enough for a pipe."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(fill(template, row) for _, template in columns))
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_COLUMNS
    console.print(table)


def versions() -> dict[str, str | None]:
    """Versions of what decides speed; None where something is not installed."""
    found: dict[str, str | None] = {"edgekv": __version__}
    for name in ("mlx", "mlx-lm", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "python": platform.python_version()}


def machine() -> dict[str, Any]:
    """The machine and the device on it (imports MLX)."""
    return {
        "os": system_name(),
        "num_cpus": os.cpu_count(),
        # A busy machine measures itself: ratios survive that, absolute figures do not.
        "load_average_1min": round(os.getloadavg()[0], 2),
        **asdict(profile()),
    }
