"""What a play is judged by: a row for each app at each target, and how targets compare. Pure.

A row's latencies are of requests that were answered whole, and of those that time cut off, with the
time that they had waited: else a server that starves somebody would remove the evidence. What a
server failed is counted by kind of error, and has no latency.

* good: answered whole, and with a first token within `GOOD_FACTOR` times what the app's took alone
  at the first target, so that it means the same on any machine. goodput: good ones a second.
* tokens/s: of answers, those of cut ones too, from the first moment to the end of the last.
* jain: of tokens that equal apps got (`AppTraffic.demand`), prompts of whole answers included.
* ratios: another target's latency to the first's, the first's tokens a second to the other's. Above
  1 is in the first's favour.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekv.bench.figures import ratio, tail
from edgekv.bench.plot import Panel, draw
from edgekv.bench.report import Columns, Row, print_columns
from edgekv.bench.serving.play import Served
from edgekv.bench.serving.schedule import Scripted
from edgekv.bench.serving.stream import Answer
from edgekv.bench.serving.traffic import AppTraffic, Scenario
from edgekv.bench.sessions.shares import jain

GOOD_FACTOR = 5.0
_TIMES = ("headers_ms", "opening_ms", "ttft_ms", "total_ms")
_QUANTILES = ("p50", "p95", "p99")
_RATIOS = tuple(f"{time}_{q}" for time in (*_TIMES, "gap_ms") for q in _QUANTILES)


def make_rows(
    scenario: Scenario,
    target: str,
    script: Sequence[Scripted],
    served: Sequence[Served],
    *,
    window_s: float,
    alone_ms: Mapping[str, float],
) -> list[Row]:
    """A row for each app of one scenario that was played at one target."""
    fairness = _jain_of_equals(scenario, served)
    asked = [each for each in served if each.turn >= 0]
    elapsed_s = max([window_s, *(1e-3 * (s.sent_ms + s.answer.total_ms) for s in asked)])
    num_output = sum(each.answer.num_output_tokens for each in asked)
    shared = {
        "scenario": scenario.name,
        "target": target,
        "window_s": window_s,
        "elapsed_s": elapsed_s,
        "tokens_per_s_all": num_output / elapsed_s,
    }
    rows = []
    for app in scenario.apps:
        own = [each for each in asked if each.app == app.name]
        due = [ms for s in script if s.app == app.name for ms in s.due_ms()]
        alone = alone_ms.get(app.name)
        row = {
            **shared,
            "app": app.name,
            "class": app.priority,
            "alone_ttft_ms": alone,
            # Of conversations whose answers were late, or that an error ended.
            "unsent": sum(ms < 1e3 * window_s for ms in due) - len(own),
            "jain": fairness.get(app.demand),
            **_outcome(target, [each for each in served if each.app == app.name]),
            **_latencies(own),
            **_work(own, elapsed_s, alone),
        }
        rows.append(row)
    return rows


def _outcome(target: str, own: Sequence[Served]) -> Row:
    faults = Counter(s.answer.fault for s in own if s.answer.fault and not s.answer.timed_out)
    return {
        "requests": sum(each.turn >= 0 for each in own),
        "answered": sum(each.turn >= 0 and each.answer.fault is None for each in own),
        "unanswered": sum(each.answer.timed_out for each in own),
        "failed": faults.total(),
        "faults": dict(faults),
        "errors": [f"{target}: {fault}, {number} times" for fault, number in faults.items()],
    }


def _latencies(asked: Sequence[Served]) -> Row:
    """Percentiles, and the samples that they are of."""
    counted = [s.answer for s in asked if s.answer.fault is None or s.answer.timed_out]
    samples = {time: [_reached(answer, time) for answer in counted] for time in _TIMES}
    samples["gap_ms"] = [gap for answer in counted for gap in answer.gaps_ms]
    samples["late_ms"] = [each.late_ms for each in asked]
    figures = [tail(name, values) for name, values in samples.items()]
    return {**{k: v for each in figures for k, v in each.items()}, "samples": samples}


def _reached(answer: Answer, time: str) -> float:
    """When an answer was as far; of one that was cut before, how long it had waited."""
    value: float | None = getattr(answer, time)
    return answer.total_ms if value is None else value


def _work(own: Sequence[Served], elapsed_s: float, alone_ms: float | None) -> Row:
    limit_ms = math.inf if alone_ms is None else GOOD_FACTOR * alone_ms
    whole = [each.answer for each in own if each.answer.fault is None]
    num_good = sum(_reached(answer, "ttft_ms") <= limit_ms for answer in whole)
    num_prompt = sum(answer.num_prompt_tokens or 0 for answer in whole)
    num_cached = sum(answer.num_cached_tokens or 0 for answer in whole)
    num_output = sum(each.answer.num_output_tokens for each in own)
    return {
        "good": num_good,
        "goodput_per_s": num_good / elapsed_s,
        "prompt_tokens": num_prompt,
        "cached_tokens": num_cached,
        "cached_share": ratio(num_cached, num_prompt),
        "output_tokens": num_output,
        "tokens_per_s": num_output / elapsed_s,
    }


def _jain_of_equals(
    scenario: Scenario, served: Sequence[Served]
) -> dict[tuple[object, ...], float | None]:
    """By demand, where several apps want the same."""
    got: dict[tuple[object, ...], list[float]] = {}
    for app in scenario.apps:
        got.setdefault(app.demand, []).append(_got(app, served))
    return {demand: jain(tokens) for demand, tokens in got.items() if len(tokens) > 1}


def _got(app: AppTraffic, served: Sequence[Served]) -> float:
    answers = [each.answer for each in served if each.app == app.name and each.turn >= 0]
    whole = sum(answer.num_prompt_tokens or 0 for answer in answers if answer.fault is None)
    return whole + sum(answer.num_output_tokens for answer in answers)


def compare(rows: Sequence[Row]) -> None:
    """Set `ratio` of each row: to that of the same app at the first target; None at that one."""
    firsts: dict[tuple[str, str], Row] = {}
    for row in rows:
        first = firsts.setdefault((row["scenario"], row["app"]), row)
        row["ratio"] = None if first is row else _ratios(row, first)


def _ratios(row: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, float | None]:
    latencies = {key: ratio(row[key], first[key]) for key in _RATIOS}
    speeds = ("tokens_per_s", "tokens_per_s_all", "goodput_per_s")
    return latencies | {key: ratio(first[key], row[key]) for key in speeds}


_TABLE: Columns = (
    ("target", "{target}"),
    ("app", "{app}"),
    ("answered", "{answered}/{requests}"),
    ("failed", "{failed}"),
    ("headers, opening ms p95", "{headers_ms_p95:.0f}, {opening_ms_p95:.0f}"),
    ("TTFT ms p50/p95", "{ttft_ms_p50:.0f}/{ttft_ms_p95:.0f}"),
    ("gap ms p50/p95", "{gap_ms_p50:.0f}/{gap_ms_p95:.0f}"),
    ("cached", "{cached_share:.2f}"),
    ("tok/s of all", "{tokens_per_s_all:.1f}"),
    ("good/s", "{goodput_per_s:.2f}"),
)
_RATIO_TABLE: Columns = (
    ("target", "{target}"),
    ("app", "{app}"),
    ("TTFT p50/p95", "{ratio[ttft_ms_p50]:.2f}/{ratio[ttft_ms_p95]:.2f}"),
    ("gap p50/p95", "{ratio[gap_ms_p50]:.2f}/{ratio[gap_ms_p95]:.2f}"),
    ("total p50/p95", "{ratio[total_ms_p50]:.2f}/{ratio[total_ms_p95]:.2f}"),
    ("tok/s of all", "{ratio[tokens_per_s_all]:.2f}"),
    ("good/s", "{ratio[goodput_per_s]:.2f}"),
    ("Jain", "{jain:.4f}"),
)


def print_rows(rows: Sequence[Row]) -> None:
    """Print a table of figures for each scenario, and one of ratios where targets were several."""
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        own = [row for row in rows if row["scenario"] == scenario]
        load = f"{own[0]['rate_per_s']:.2f} requests/s for {own[0]['window_s']:.0f} s"
        if (utilisation := own[0]["utilisation"]) is not None:
            load += f", {utilisation:g} of what {own[0]['target']} can do"
        print_columns(f"{scenario} · {load}", _TABLE, own)
        if others := [row for row in own if row["ratio"] is not None]:
            title = f"{scenario}: to {own[0]['target']}, which is ahead above 1"
            print_columns(title, _RATIO_TABLE, others)


def draw_rows(rows: Sequence[Row], target: Path) -> None:
    """Write percentiles of TTFT by app and target, a panel for each scenario."""
    panels = []
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        own = [row for row in rows if row["scenario"] == scenario]
        panels.append(
            Panel(
                x_name=f"{scenario}: percentile of requests",
                y_name="TTFT, ms",
                lines={f"{r['target']} {r['app']}": _percentiles(r) for r in own},
                x_log=False,
            )
        )
    draw(target, "bench serve", panels)


def _percentiles(row: Row) -> list[tuple[float, float | None]]:
    ordered = sorted(row["samples"]["ttft_ms"])
    return [(100.0 * (i + 1) / len(ordered), ms) for i, ms in enumerate(ordered)]
