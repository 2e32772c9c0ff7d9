"""Rows of `bench quality` as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path

from edgekv.bench.report import Row
from edgekv.bench.table import Columns, print_columns

_COLUMNS: Columns = (
    ("prefill", "{prefill}"),
    ("FLOPs", "{flops_ratio:.2f}"),
    ("text NLL", "{text_nll:.3f}"),
    ("agree", "{text_agree:.3f}"),
    ("first 8", "{first8_agree:.3f}"),
    ("copy NLL", "{copy_nll:.3f}"),
    ("agree", "{copy_agree:.3f}"),
    ("needle", "{needle:.2f}"),
    ("recovered", "{text_gap_recovered:.2f}/{copy_gap_recovered:.2f}"),
)


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table on stdout."""
    first = rows[0]
    title = (
        f"{first['model']} · {first['predictor'] or 'no predictor'} · context {first['context']}, "
        f"continuation {first['continuation']}, {first['samples']} samples"
    )
    print_columns(title, _COLUMNS, rows)


def plot_rows(rows: Sequence[Row], target: Path) -> None:
    """Quality against FLOPs of the prefill, each way of prefilling a point.

    Args:
        rows: Of one run.
        target: A .png file; see `check_plot`.
    """
    from edgekv.bench.plot import plot_points

    panels = {
        f"{kind} NLL, nats a token": {
            row["prefill"]: (row["flops_ratio"], row[f"{kind}_nll"]) for row in rows
        }
        for kind in ("text", "copy")
    }
    title = f"{rows[0]['model']} · {rows[0]['predictor']}"
    plot_points(target, title, "FLOPs of the prefill, relative to exact", panels)
