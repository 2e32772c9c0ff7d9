"""`bench quality`: what predicted KV costs in quality, beside what else the same time could buy.

A context is prefilled in one way or another, then a continuation is forced through the base model
token by token; `edgekv bench quality --help` says which, and what the figures are. Not said there:
`first8_agree` is that of the first eight positions; `prefill_ms` is a median over samples, outside
any engine, and `prefill_speedup` exact's to this one's of the same sample, a median too;
`gap_recovered` is 1 - (nll - exact) / (truncated - exact).
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from edgekv.bench.plot import Panel, draw
from edgekv.bench.prediction.quality_text import FIRST, Piece, QualityOptions, pieces_of
from edgekv.bench.prediction.quality_ways import ALONE, EXACT, TRUNCATED, Subject, Way, ways
from edgekv.bench.report import Columns, Reporter, Row, Watch, print_columns, unwatched
from edgekv.errors import ConfigError
from edgekv.models.open_model import OpenModel

Figures = dict[str, float]  # of one piece, prefilled in one way
Logits = dict[str, np.ndarray]  # of its continuations, "text" and "copy"


def run_quality(
    base: OpenModel,
    subjects: Sequence[Subject],
    options: QualityOptions,
    watch: Watch = unwatched,
    *,
    only: Sequence[str] = (),
) -> list[Row]:
    """Measure; one row for each way to prefill, or for those named in `only`, "exact" among them.

    Raises ConfigError: The files hold too little text, or a piece of it is longer than the model's
    context.
    """
    needed, context_max = options.context + options.continuation, base.decoder.config.context_max
    if needed > context_max:
        raise ConfigError(
            f"context and continuation are {needed} tokens; the model's context is {context_max}",
            hint="ask for a shorter --context",
        )
    compared = [
        way for way in ways(base.decoder, subjects, options) if not only or way.name in only
    ]
    found: list[list[Figures]] = [[] for _ in compared]
    pieces = pieces_of(base.tokenizer, options)
    report = Reporter(watch, "quality", len(pieces))
    for piece in pieces:
        exact: Logits = {}
        for way, figures in zip(compared, found, strict=True):
            figures.append(_measure(way, piece, exact))
        report.turn_done()
    rows = [
        _row(base.name, way, options, figures, found[0])
        for way, figures in zip(compared, found, strict=True)
    ]
    _add_gaps(rows)
    return rows


def _measure(way: Way, piece: Piece, exact: Logits) -> Figures:
    """One piece; what exact KV says of its continuations is left in `exact` by the first way."""
    started = time.perf_counter()
    prefilled = way.prefill(piece.context)
    prefilled.logits(piece.following[:1])
    # All KV, as a session would have it before its answer goes on.
    mx.eval([array for pair in prefilled.view.arrays.values() for array in pair])
    figures = {"ms": 1e3 * (time.perf_counter() - started)}
    for kind, ids in (("text", piece.following), ("copy", piece.repeated)):
        logits = prefilled.logits(ids)
        same = logits.argmax(axis=-1) == exact.setdefault(kind, logits).argmax(axis=-1)
        figures[f"{kind}_nll"] = _nll(logits, ids)
        figures[f"{kind}_agree"] = float(same.mean())
        if kind == "text":
            figures["first8_agree"] = float(same[:FIRST].mean())
    answered = way.prefill(piece.needle).logits(piece.answer)
    figures["needle"] = float((answered.argmax(axis=-1) == piece.answer).all())
    figures["needle_nll"] = _nll(answered, piece.answer)
    mx.clear_cache()
    return figures


def _nll(logits: np.ndarray, ids: Sequence[int]) -> float:
    """Of a continuation, nats a token."""
    top = logits.max(axis=-1, keepdims=True)
    logs = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    return float(-logs[np.arange(len(ids)), ids].mean())


def _row(
    model: str,
    way: Way,
    options: QualityOptions,
    figures: Sequence[Figures],
    exact: Sequence[Figures],
) -> Row:
    speedups = [theirs["ms"] / ours["ms"] for ours, theirs in zip(figures, exact, strict=True)]
    means = {key: float(np.mean([each[key] for each in figures])) for key in figures[0]}
    del means["ms"]
    return {
        "scenario": "quality",
        "model": model,
        "predictor": way.predictor,
        "prefill": way.name,
        "context": options.context,
        "continuation": options.continuation,
        "samples": len(figures),
        **means,
        "flops_ratio": way.flops_ratio,
        "prefill_ms": float(np.median([each["ms"] for each in figures])),
        "prefill_speedup": float(np.median(speedups)),
    }


def _add_gaps(rows: list[Row]) -> None:
    """What of the loss against a baseline of the same predictor is recovered.

    What belongs to no predictor is compared with the baseline if there is one alone.
    """
    exact = rows[0]
    assert exact["prefill"] == EXACT
    for row, (suffix, name) in itertools.product(rows, (("", TRUNCATED), ("_vs_aux", ALONE))):
        baselines = [
            other
            for other in rows
            if other["prefill"] == name and row["predictor"] in ("", other["predictor"])
        ]
        for kind in ("text", "copy"):
            figure, recovered = f"{kind}_nll", None
            if len(baselines) == 1 and (gap := baselines[0][figure] - exact[figure]) > 0:
                recovered = float(1 - (row[figure] - exact[figure]) / gap)
            row[f"{kind}_gap_recovered{suffix}"] = recovered


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
    ("NLL", "{needle_nll:.3f}"),
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
    """Quality against what the prefill costs, in FLOPs and in time: one line a way to prefill."""
    panels = []
    for x_name, cost in (
        ("FLOPs of the prefill, relative to exact", "flops_ratio"),
        ("measured prefill, ms", "prefill_ms"),
    ):
        ordered = sorted(rows, key=lambda row: row[cost])
        by_way = {
            way: [row for row in ordered if row["prefill"] == way]
            for way in dict.fromkeys(row["prefill"] for row in rows)
        }
        panels += [
            Panel(
                x_name=x_name,
                y_name=f"{kind} NLL, nats a token",
                lines={
                    way: [(row[cost], row[f"{kind}_nll"]) for row in found]
                    for way, found in by_way.items()
                },
                notes={
                    way: [Path(row["predictor"]).stem for row in found]
                    for way, found in by_way.items()
                },
                x_log=False,
                y_log=False,
            )
            for kind in ("text", "copy")
        ]
    draw(target, f"{rows[0]['model']} · {', '.join(_names(rows))}", panels)


def _names(rows: Sequence[Row]) -> list[str]:
    """Of the predictors, in order; "" if there is none."""
    return [name for name in dict.fromkeys(r["predictor"] for r in rows) if name] or [""]
