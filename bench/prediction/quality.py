"""`bench quality`: what predicted KV costs in quality, beside what else the same time could buy.

A context is prefilled in one way or another, then a continuation is forced through the base model
token by token. `text_*`: the continuation is what follows in the text. `copy_*`: it repeats a
passage that ended 180 tokens before the context's end: long-range recall. `needle`: a fact stated
in the first tenth is asked for at the end.

* **nll**: negative log-likelihood of the continuation, nats a token.
* **agree**: share of its positions at which the likeliest token is the one that exact KV says;
  first8 of the first eight alone.
* **flops_ratio**: multiplications of the prefill, relative to exact.
* **prefill_ms**: time of the prefill up to the first logits, median over samples, outside any
  engine; **prefill_speedup**: exact's to this one's of the same sample, median.
* **gap_recovered**: 1 - (nll - exact) / (truncated - exact).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from edgekv.bench.prediction.quality_text import FIRST, QualityOptions, Sample, samples_of
from edgekv.bench.prediction.quality_ways import (
    ALONE,
    EXACT,
    TRUNCATED,
    Prefilled,
    Subject,
    Way,
    ways,
)
from edgekv.bench.report import Columns, Row, Watch, print_columns
from edgekv.errors import ConfigError
from edgekv.models.open_model import OpenModel


@dataclass
class _Score:
    """Of one way and one kind of continuation, a figure for each sample."""

    nll: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def add(self, logits: np.ndarray, exact: np.ndarray, ids: Sequence[int]) -> None:
        top = logits.max(axis=-1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        self.nll.append(float(-logs[np.arange(len(ids)), ids].mean()))
        same = logits.argmax(axis=-1) == exact.argmax(axis=-1)
        self.agree.append(float(same.mean()))
        self.first.append(float(same[:FIRST].mean()))


@dataclass
class _Result:
    """Of one way."""

    text: _Score = field(default_factory=_Score)
    copy: _Score = field(default_factory=_Score)
    needle: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)


def run_quality(
    base: OpenModel,
    subjects: Sequence[Subject],
    options: QualityOptions,
    watch: Watch | None = None,
    *,
    only: Sequence[str] = (),
) -> list[Row]:
    """Measure; one row for each way to prefill.

    Args:
        base: The model.
        subjects: See `ways`.
        options: What is measured.
        watch: Told after every sample.
        only: Names of ways to prefill, "exact" among them; () measures all.

    Raises:
        ConfigError: The files hold too little text, or a piece of it is longer than the model's
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
    results = [_Result() for _ in compared]
    samples = samples_of(base.tokenizer, options)
    for number, sample in enumerate(samples):
        exact: tuple[np.ndarray, np.ndarray] | None = None
        for way, result in zip(compared, results, strict=True):
            exact = _measure(way, sample, result, exact)
        if watch is not None:
            watch("quality", number + 1, len(samples))
    rows = [
        _row(base.name, way, options, result, results[0])
        for way, result in zip(compared, results, strict=True)
    ]
    _add_gaps(rows)
    return rows


def _measure(
    way: Way, sample: Sample, result: _Result, exact: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Add one sample; returns what exact KV says of its two continuations."""
    started = time.perf_counter()
    prefilled = way.prefill(sample.context)
    prefilled.logits(sample.following[:1])
    _evaluate(prefilled)
    result.ms.append(1e3 * (time.perf_counter() - started))
    text, copy = prefilled.logits(sample.following), prefilled.logits(sample.repeated)
    exact = exact or (text, copy)
    result.text.add(text, exact[0], sample.following)
    result.copy.add(copy, exact[1], sample.repeated)
    answered = way.prefill(sample.needle).logits(sample.answer)
    result.needle.append(float((answered.argmax(axis=-1) == sample.answer).all()))
    mx.clear_cache()
    return exact


def _evaluate(prefilled: Prefilled) -> None:
    """All KV, as a session would have it before its answer goes on."""
    mx.eval([array for pair in prefilled.view.arrays.values() for array in pair])


def _row(model: str, way: Way, options: QualityOptions, result: _Result, exact: _Result) -> Row:
    return {
        "scenario": "quality",
        "model": model,
        "predictor": way.predictor,
        "prefill": way.name,
        "context": options.context,
        "continuation": options.continuation,
        "samples": len(result.ms),
        "text_nll": float(np.mean(result.text.nll)),
        "text_agree": float(np.mean(result.text.agree)),
        "first8_agree": float(np.mean(result.text.first)),
        "copy_nll": float(np.mean(result.copy.nll)),
        "copy_agree": float(np.mean(result.copy.agree)),
        "needle": float(np.mean(result.needle)),
        "flops_ratio": way.flops_ratio,
        "prefill_ms": float(np.median(result.ms)),
        "prefill_speedup": float(np.median(np.array(exact.ms) / np.array(result.ms))),
    }


def _add_gaps(rows: list[Row]) -> None:
    """What of the loss against a baseline of the same predictor is recovered.

    What belongs to no predictor is compared with the baseline if there is one alone.
    """
    exact = rows[0]
    assert exact["prefill"] == EXACT
    for row in rows:
        for suffix, name in (("", TRUNCATED), ("_vs_aux", ALONE)):
            baselines = [
                other
                for other in rows
                if other["prefill"] == name and row["predictor"] in ("", other["predictor"])
            ]
            against = baselines[0] if len(baselines) == 1 else None
            for kind in ("text", "copy"):
                row[f"{kind}_gap_recovered{suffix}"] = (
                    None if against is None else _recovered(row, exact, against, f"{kind}_nll")
                )


def _recovered(row: Row, exact: Row, against: Row, figure: str) -> float | None:
    gap = against[figure] - exact[figure]
    return float(1 - (row[figure] - exact[figure]) / gap) if gap > 0 else None


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
