"""Rows of figures as a table on stdout."""

import string
from collections.abc import Mapping, Sequence
from typing import Any

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
