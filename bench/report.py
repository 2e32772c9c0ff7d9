"""Rows of a benchmark as JSON and as a table."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from edgekv.bench.speed.measure import WARM_UPS, Outcome
from edgekv.bench.table import Columns, print_columns
from edgekv.bench.workload import Workload
from edgekv.errors import ConfigError

Scenario = Literal["ttft", "decode"]
Row = dict[str, Any]

_OF_BOTH = (
    "ttft_ms_p50",
    "prefill_tokens_per_s",
    "e2e_tokens_per_s",
    "decode_tokens_per_s",
    "tbt_p50_ms",
    "tbt_max_ms",
    "peak_memory_bytes",
)
_OF_SEVERAL = ("ttft_ms_min", "ttft_ms_max", "cold_tbt_max_ms")  # sessions that start together
_RATIO_OF = {"ttft": "prefill_tokens_per_s", "decode": "decode_tokens_per_s"}
AS_EXACT = {"text_agree": 1.0, "text_nll_gap": 0.0, "copy_agree": 1.0, "copy_nll_gap": 0.0}
_UNPREDICTED: Row = {
    "predictor": "",
    "num_predicted_tokens": 0,
    "ttft_ratio_vs_exact": 1.0,
    "quality": AS_EXACT,
}


def make_row(
    scenario: Scenario, model: str, workload: Workload, peer: str | None, outcome: Outcome
) -> Row:
    """One row: medians over the repetitions, ratios as medians over pairs, and raw samples.

    Every ratio is turned so that more is better for edgekv. `ratio` is that of the scenario's own
    figure: prefill tokens/s (that is, TTFT) or decode tokens/s.
    """
    figures = _OF_BOTH if scenario == "ttft" else _OF_BOTH + _OF_SEVERAL
    agreements = [a for pair in outcome.pairs if (a := pair.agreement()) is not None]
    return {
        "scenario": scenario,
        "model": model,
        **_shape(scenario, workload),
        "new_tokens": workload.new_tokens,
        **{figure: outcome.ours(figure) for figure in (*figures, "ttft_warm_ms_p50")},
        "peer": peer,
        "prefill": "exact",
        **(_UNPREDICTED if scenario == "ttft" else {}),
        "ratio": outcome.ratio(_RATIO_OF[scenario], lower_is_better=False),
        **_ttft_ratios(scenario, outcome),
        "e2e_ratio": outcome.ratio("e2e_tokens_per_s", lower_is_better=False),
        "token_agreement": min(agreements, default=None),
        **{f"peer_{figure}": outcome.theirs(figure) for figure in figures},
        "reps": workload.reps,
        "warm_ups": WARM_UPS,
        "failed": outcome.failed,
        "errors": outcome.errors,
        "samples": [pair.to_dict() for pair in outcome.pairs],
    }


def _ttft_ratios(scenario: Scenario, outcome: Outcome) -> Row:
    """Of the earliest and the median session; with one session `ratio` says it already."""
    if scenario == "ttft":
        return {}
    return {
        f"ttft_ratio_{which}": outcome.ratio(f"ttft_ms_{which}", lower_is_better=True)
        for which in ("min", "p50")
    }


def _shape(scenario: Scenario, workload: Workload) -> Row:
    """What the row is about."""
    if scenario == "ttft":
        return {"prompt_tokens": workload.lengths[0]}
    return {"sessions": workload.num_sessions, "lengths": list(workload.lengths)}


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


# --- the table ---

_COLUMNS: dict[str, Columns] = {
    "ttft": (
        ("prompt", "{prompt_tokens}"),
        ("TTFT ms", "{ttft_ms_p50:.1f}"),
        ("warm", "{ttft_warm_ms_p50:.1f}"),
        ("prefill tok/s", "{prefill_tokens_per_s:.0f}"),
        ("decode tok/s", "{decode_tokens_per_s:.1f}"),
    ),
    "decode": (
        ("sessions", "{sessions}"),
        ("tok/s", "{decode_tokens_per_s:.1f}"),
        ("TBT ms p50/max", "{tbt_p50_ms:.1f}/{tbt_max_ms:.1f}"),
        ("TTFT ms min/p50/max", "{ttft_ms_min:.0f}/{ttft_ms_p50:.0f}/{ttft_ms_max:.0f}"),
    ),
}
_PEER_COLUMNS: dict[str, Columns] = {
    "ttft": (
        ("peer TTFT ms", "{peer_ttft_ms_p50:.1f}"),
        ("ratio", "{ratio:.2f}"),
    ),
    "decode": (
        ("peer", "{peer_decode_tokens_per_s:.1f}"),
        ("ratio", "{ratio:.2f}"),
        ("TTFT ratio min/p50", "{ttft_ratio_min:.1f}/{ttft_ratio_p50:.1f}"),
    ),
}


def table_columns(rows: Sequence[Row]) -> Columns:
    """The columns that rows of one scenario need."""
    scenario = rows[0]["scenario"]
    columns: Columns = _COLUMNS[scenario]
    if rows[0]["peer"]:
        columns += _PEER_COLUMNS[scenario]
    if any(row["failed"] for row in rows):
        columns += (("failed", "{failed}"),)
    return columns


def print_table(rows: Sequence[Row]) -> None:
    """Print rows of one scenario on stdout."""
    title = str(rows[0]["model"])
    if rows[0]["peer"]:
        title += f" · peer {rows[0]['peer']} · ratios above 1: edgekv is faster"
    print_columns(title, table_columns(rows), rows)
