"""Rows of `bench quality` as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path

from edgekv.bench.report import Row
from edgekv.bench.table import Columns, print_columns

_COLUMNS: Columns = (
    ("prefill", "{prefill}"),
    ("FLOPs", "{flops_ratio:.2f}"),
    ("ms", "{prefill_ms:.0f}"),
    ("text NLL", "{text_nll:.3f}"),
    ("agree", "{text_agree:.3f}"),
    ("first 8", "{first8_agree:.3f}"),
    ("copy NLL", "{copy_nll:.3f}"),
    ("agree", "{copy_agree:.3f}"),
    ("needle", "{needle:.2f}"),
    ("recovered", "{text_gap_recovered:.2f}/{copy_gap_recovered:.2f}"),
)


def print_rows(rows: Sequence[Row]) -> None:
    """Print tables on stdout, one a predictor, each with exact and no context."""
    for name in _names(rows):
        first = rows[0]
        title = (
            f"{first['model']} · {name or 'no predictor'} · context {first['context']}, "
            f"continuation {first['continuation']}, {first['samples']} samples"
        )
        print_columns(title, _COLUMNS, [r for r in rows if r["predictor"] in ("", name)])


def plot_rows(rows: Sequence[Row], target: Path) -> None:
    """Quality against what the prefill costs, in FLOPs and in time: one line a way to prefill.

    Args:
        rows: Of one run.
        target: A .png file; see `check_plot`.
    """
    from edgekv.bench.plot import plot_points

    costs = {
        "FLOPs of the prefill, relative to exact": "flops_ratio",
        "measured prefill, ms": "prefill_ms",
    }
    panels = {
        (x_name, f"{kind} NLL, nats a token"): {
            way: [
                (r[cost], r[f"{kind}_nll"], Path(r["predictor"]).stem)
                for r in rows
                if r["prefill"] == way
            ]
            for way in dict.fromkeys(r["prefill"] for r in rows)
        }
        for x_name, cost in costs.items()
        for kind in ("text", "copy")
    }
    plot_points(target, f"{rows[0]['model']} · {', '.join(_names(rows))}", panels)


def _names(rows: Sequence[Row]) -> list[str]:
    """Of the predictors, in order; "" if there is none."""
    return [name for name in dict.fromkeys(r["predictor"] for r in rows) if name] or [""]
