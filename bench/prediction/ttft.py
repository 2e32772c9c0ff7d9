"""`bench ttft --prefill predict,auto`: predicted prefill against exact prefill, in turn.

A predicted TTFT is never shown without what it costs: every row carries the quality of the same
predictor with the same sinks and window at the same length (384 tokens for what is shorter). Where
"auto" computed a prompt, it says so: no token is predicted, and nothing is lost.
"""

import itertools
from collections.abc import Sequence

from edgekv.bench.prediction.quality import run_quality
from edgekv.bench.prediction.quality_text import QualityOptions
from edgekv.bench.prediction.quality_ways import EXACT, PREDICTED, Subject, open_subjects
from edgekv.bench.report import Columns, Reporter, Row, Watch, print_columns, unwatched
from edgekv.bench.speed.measure import WARM_UPS, take_turns
from edgekv.bench.speed.ours import EdgeKVSide, open_runtime
from edgekv.bench.speed.scenarios import AS_EXACT, make_row
from edgekv.bench.workload import Workload, check_fits
from edgekv.config import PredictionOptions, PrefillMode
from edgekv.models.cache import Progress
from edgekv.models.open_model import OpenModel
from edgekv.predict.shipped import find_predictor

_QUALITY_SAMPLES = 8
_CONTEXT_MIN = 384  # where recall of what is 180 tokens back can be measured


def run_predicted(
    model: str,
    workloads: Sequence[Workload],
    modes: Sequence[PrefillMode],
    *,
    predictor: str | None = None,
    aux: str | None = None,
    progress: Progress | None = None,
    watch: Watch = unwatched,
) -> list[Row]:
    """Measure; one row for each workload and mode."""
    base, subjects = open_subjects(model, [predictor], aux, progress)
    check_fits(workloads, base.decoder.config.context_max)
    file = find_predictor(base.name, predictor, base.fingerprint)
    options = PredictionOptions(
        predictor=file,
        aux=aux,
        ttft_target_ms=0.0,
        confirm=False,
        repair="off",  # what it goes on with would run into the next measurement
    )
    contexts = [max(_CONTEXT_MIN, *workload.lengths) for workload in workloads]
    qualities = {
        context: _quality(base, subjects, options, context, watch) for context in set(contexts)
    }
    del base, subjects  # the runtime loads the model for itself
    rows = []
    with open_runtime(model, workloads, progress=progress, prediction=options) as runtime:
        exact = EdgeKVSide(runtime, prefill="exact")
        for mode, (number, workload) in itertools.product(modes, enumerate(workloads)):
            label = f"{mode} {number + 1}/{len(workloads)}"
            report = Reporter(watch, label, 2 * (WARM_UPS + workload.reps))
            sides = (EdgeKVSide(runtime, prefill=mode).run, exact.run)
            prompts = workload.prompts(runtime.tokenizer)
            outcome = take_turns(sides, prompts, workload, report.turn_done)
            predicted = max((turn[0].num_predicted for turn in outcome.turns), default=0)
            row = make_row("ttft", model, workload, exact.name, outcome)
            rows.append(
                row
                | {
                    "prefill": mode,
                    "predictor": file.name,
                    "ttft_ratio_vs_exact": outcome.ratio("ttft_ms_p50", lower_is_better=True),
                    "num_predicted_tokens": predicted,
                    "quality": qualities[contexts[number]] if predicted else AS_EXACT,
                }
            )
    return rows


def _quality(
    base: OpenModel,
    subjects: Sequence[Subject],
    options: PredictionOptions,
    context: int,
    watch: Watch,
) -> dict[str, float]:
    """Agreement and loss of the same predictor at the same setting and length."""
    measured = QualityOptions(
        context=context,
        samples=_QUALITY_SAMPLES,
        sinks=options.sinks,
        window=options.window,
    )
    exact, predicted = run_quality(base, subjects, measured, watch, only=(EXACT, PREDICTED))
    found = {"context": context, "samples": predicted["samples"]}
    for kind in ("text", "copy"):
        found[f"{kind}_agree"] = predicted[f"{kind}_agree"]
        found[f"{kind}_nll_gap"] = predicted[f"{kind}_nll"] - exact[f"{kind}_nll"]
    return found


_COLUMNS: Columns = (
    ("prefill", "{prefill}"),
    ("prompt", "{prompt_tokens}"),
    ("TTFT ms", "{ttft_ms_p50:.1f}"),
    ("exact", "{peer_ttft_ms_p50:.1f}"),
    ("ratio", "{ttft_ratio_vs_exact:.2f}"),
    ("predicted", "{num_predicted_tokens}"),
    ("agree", "{quality[text_agree]:.3f}"),
    ("NLL gap", "{quality[text_nll_gap]:.3f}"),
    ("copy agree", "{quality[copy_agree]:.3f}"),
    ("copy NLL gap", "{quality[copy_nll_gap]:.3f}"),
)


def print_predicted(rows: Sequence[Row]) -> None:
    """Print the table on stdout."""
    title = f"{rows[0]['model']} · {rows[0]['predictor']} · approximate; ratio: exact TTFT to ours"
    print_columns(title, _COLUMNS, rows)
