"""Pictures of a benchmark's rows, with matplotlib where it is installed."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekv.errors import ConfigError

_DPI = 120
_INCHES = (11.0, 4.5)
_FRACTION = "fraction of samples at or below"

Line = Sequence[tuple[float, float | None]]  # where y is None there is no point


def check_plot(target: Path | None) -> None:
    """Make sure, before minutes are spent, that a picture can be drawn and written.

    Raises:
        ConfigError: matplotlib is missing, or the path is not a .png file in a folder that exists.
    """
    if target is None:
        return
    if target.suffix.lower() != ".png" or target.is_dir() or not target.parent.is_dir():
        raise ConfigError.of("plot", str(target), "a .png file in a folder that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("matplotlib is not installed", hint="pip install 'edgekv[bench]'")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines over one pair of axes."""

    x_name: str  # below it
    y_name: str  # beside it
    lines: Mapping[str, Line]  # by label
    x_log: bool = True  # whether the horizontal axis is logarithmic
    y_log: bool = True  # whether the vertical axis is
    notes: Mapping[str, Sequence[str]] | None = None  # what to write beside the points, by label


def draw(target: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write a .png file, two panels a row; distributions are drawn in steps."""
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (_INCHES[0], _INCHES[1] * rows)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, panel in zip(axes, panels, strict=False):
        steps = panel.y_name == _FRACTION
        for label, points in panel.lines.items():
            if known := [(x, y) for x, y in points if y is not None]:
                style = {"drawstyle": "steps-post"} if steps else {"marker": "o"}
                ax.plot(*zip(*known, strict=True), label=label, **style)
            for point, note in zip(points, (panel.notes or {}).get(label, ()), strict=False):
                ax.annotate(note, point, fontsize=5, xytext=(4, 4), textcoords="offset points")
        ax.set(xlabel=panel.x_name, ylabel=panel.y_name)
        ax.set_xscale("log" if panel.x_log else "linear")
        ax.set_yscale("log" if panel.y_log else "linear")
        ax.grid(visible=True, which="both", alpha=0.25)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(target)


def draw_tails(
    target: Path, title: str, rows: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> None:
    """Write the distributions of TTFT and TBT, one curve a row."""
    panels = []
    for name, key in (("TTFT, ms", "ttft_ms"), ("time between tokens, ms", "tbt_ms")):
        lines: dict[str, Line] = {}
        for row in rows:
            samples = row["samples"][key]
            line = [(x, (number + 1) / len(samples)) for number, x in enumerate(samples)]
            lines[" ".join(row[label] for label in labels)] = line
        panels.append(Panel(x_name=name, y_name=_FRACTION, lines=lines, y_log=False))
    draw(target, title, panels)
