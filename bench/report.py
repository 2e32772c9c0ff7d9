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
from typing import Any, TextIO

from edgekv import __version__
from edgekv.device import profile, system_name
from edgekv.errors import ConfigError

Row = dict[str, Any]
Watch = Callable[[str, int, int], None]  # what runs, parts done, parts in all


class Reporter:
    """Counts the runs of one workload and tells the watcher."""

    def __init__(self, watch: Watch | None, label: str, total: int) -> None:
        self._watch = watch
        self._label = label
        self._total = total
        self._done = 0
        self._tell()

    def turn_done(self) -> None:
        """One more."""
        self._done += 1
        self._tell()

    def _tell(self) -> None:
        if self._watch is not None:
            self._watch(self._label, self._done, self._total)


def make_report(
    machine: dict[str, Any], versions: dict[str, str | None], rows: Sequence[Row]
) -> dict[str, Any]:
    """The whole report."""
    return {"machine": machine, "versions": versions, "rows": list(rows)}


def check_target(target: Path | None) -> None:
    """Make sure, before minutes are spent, that the report can be written.

    Raises:
        ConfigError: The folder does not exist, or the path is a folder.
    """
    if target is None or str(target) == "-":
        return
    if target.is_dir() or not target.parent.is_dir():
        raise ConfigError.of("json", str(target), "a file in a folder that exists, or -")


def write_report(report: dict[str, Any], target: Path, stdout: TextIO | None = None) -> None:
    """Write JSON to a file, or to stdout if `target` is "-"."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    if str(target) == "-":
        (stdout or sys.stdout).write(text)
    else:
        target.write_text(text, encoding="utf-8")


Columns = tuple[tuple[str, str], ...]
"""Heading and template of each column; a template may name several figures of a row, and those
inside an object as `{object[figure]}`."""

_PIPE_COLUMNS = 120
_DASH = "–"


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with the row's figures, and dashes for those that were not measured."""
    parts, num_known, num_figures = "", 0, 0
    for text, name, spec, _ in string.Formatter().parse(template):
        parts += text
        if name is not None:
            value = _value(row, name)
            parts += _DASH if value is None else format(value, spec or "")
            num_figures += 1
            num_known += value is not None
    return parts if num_known or not num_figures else _DASH


def _value(row: Mapping[str, Any], name: str) -> Any:
    outer, _, inner = name.rstrip("]").partition("[")
    value = row[outer]
    return value[inner] if inner and value is not None else value


def cells(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The filled templates of every row."""
    return [[fill(template, row) for _, template in columns] for row in rows]


def print_columns(title: str, columns: Columns, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows on stdout, as wide as the terminal, or wide enough for a pipe."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    for row in cells(columns, rows):
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_COLUMNS
    console.print(table)


def versions() -> dict[str, str | None]:
    """Versions of what decides speed; None where something is not installed."""
    return {
        "edgekv": __version__,
        "mlx": _version("mlx"),
        "mlx-lm": _version("mlx-lm"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The machine and the device on it (imports MLX)."""
    return {
        "os": system_name(),
        "num_cpus": os.cpu_count(),
        # A busy machine measures itself: ratios survive that, absolute figures do not.
        "load_average_1min": round(os.getloadavg()[0], 2),
        **asdict(profile()),
    }
