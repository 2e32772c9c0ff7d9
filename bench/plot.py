"""Plots of a benchmark's rows, with matplotlib where it is installed."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekv.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 120
_INCHES = (11.0, 4.5)

Curves = Mapping[str, Sequence[float]]  # sorted samples by label


def check_plot(target: Path | None) -> None:
    """Make sure, before minutes are spent, that a plot can be drawn and written.

    Raises:
        ConfigError: matplotlib is missing, or the path is not a .png file in a folder that exists.
    """
    if target is None:
        return
    if target.suffix.lower() != ".png" or target.is_dir() or not target.parent.is_dir():
        raise ConfigError.of("plot", str(target), "a .png file in a folder that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("matplotlib is not installed", hint="pip install 'edgekv[bench]'")


def plot_cdfs(target: Path, title: str, panels: Mapping[str, Curves]) -> None:
    """Write cumulative distributions, one panel a quantity and one curve a label.

    Args:
        target: A .png file.
        title: Over all panels.
        panels: By the quantity's name, for example "TTFT, ms".
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (name, curves) in zip(axes, panels.items(), strict=True):
        for label, samples in curves.items():
            if samples:
                fractions = [(i + 1) / len(samples) for i in range(len(samples))]
                ax.step(samples, fractions, where="post", label=label)
        _dress(ax, name)
        ax.set_ylabel("fraction of samples at or below")
        ax.set_ylim(0.0, 1.01)
    figure.suptitle(title)
    figure.savefig(target)


def plot_points(
    target: Path,
    title: str,
    panels: Mapping[tuple[str, str], Mapping[str, Sequence[tuple[float, float, str]]]],
) -> None:
    """Write points, two panels a row; those of one label are joined, from left to right.

    Args:
        target: A .png file.
        title: Over all panels.
        panels: By the names of their axes, labels and their points (x, y, what it is).
    """
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(_INCHES[0], _INCHES[1] * rows), dpi=_DPI, layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for ax, ((x_name, y_name), points) in zip(axes, panels.items(), strict=False):
        for label, found in points.items():
            line = sorted(found)
            ax.plot([x for x, _, _ in line], [y for _, y, _ in line], marker="o", label=label)
            for x, y, what in line:
                ax.annotate(what, (x, y), fontsize=5, xytext=(4, 4), textcoords="offset points")
        ax.set_xlabel(x_name)
        ax.set_ylabel(y_name)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(target)


def plot_tails(
    target: Path, title: str, rows: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> None:
    """Write the distributions of TTFT and TBT, one curve a row.

    Args:
        target: A .png file.
        title: Over both.
        rows: With their `samples`.
        labels: Keys whose values name a row.
    """
    panels = {
        name: {" ".join(row[label] for label in labels): row["samples"][key] for row in rows}
        for name, key in (("TTFT, ms", "ttft_ms"), ("time between tokens, ms", "tbt_ms"))
    }
    plot_cdfs(target, title, panels)


def plot_lines(
    target: Path, title: str, x_name: str, y_name: str, lines: "Lines", *, x_log: bool = True
) -> None:
    """Write one line a label, the vertical axis logarithmic.

    Args:
        target: A .png file.
        title: Over the plot.
        x_name: Below it.
        y_name: Beside it.
        lines: (x, y) points by label; where y is None there is no point.
        x_log: The horizontal axis is logarithmic too.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    ax = figure.subplots()
    for label, points in lines.items():
        known = [(x, y) for x, y in points if y is not None]
        if not known:
            continue
        ax.plot([x for x, _ in known], [y for _, y in known], marker="o", label=label)
    _dress(ax, x_name)
    ax.set_xscale("log" if x_log else "linear")
    ax.set_yscale("log")
    ax.set_ylabel(y_name)
    figure.suptitle(title)
    figure.savefig(target)


Lines = Mapping[str, Sequence[tuple[float, float | None]]]


def _dress(ax: "Axes", x_name: str) -> None:
    ax.set_xscale("log")
    ax.set_xlabel(x_name)
    ax.grid(visible=True, which="both", alpha=0.25)
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
