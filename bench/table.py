"""Rows of figures as a table on stdout."""

import string
from collections.abc import Mapping, Sequence
from typing import Any

Columns = tuple[tuple[str, str], ...]
"""Heading and template of each column; a template may name several figures of a row, and those
inside an object as `{object[figure]}`."""

_PIPE_COLUMNS = 120


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with the row's figures; a dash where one of them was not measured."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    if any(_value(row, name) is None for name in names):
        return "–"
    return template.format(**row)


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
