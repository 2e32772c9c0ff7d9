"""`bench repair`: what repairing predicted KV behind an answer costs that answer.

Answers over predicted KV that is repaired meanwhile, and over exact KV, to the same prompts, in
turn. **ratio**: their decode speed to that of exact ones, median over pairs. **caught up**: answers
before whose end all that was predicted, and computed over it, had been replaced; **behind**: how
many of the answer's own tokens that were, the later ones being exact at once.
"""

from collections.abc import Sequence
from statistics import median

from edgekv.bench.report import Columns, Reporter, Row, Watch, print_columns, unwatched
from edgekv.bench.speed.measure import WARM_UPS
from edgekv.bench.speed.ours import open_runtime
from edgekv.bench.workload import TextIds, Workload, answer
from edgekv.config import PredictionOptions, PrefillMode, check_choice
from edgekv.errors import ConfigError
from edgekv.metrics import Stats
from edgekv.models.cache import Progress
from edgekv.models.fingerprint import weights_fingerprint
from edgekv.models.hub import resolve
from edgekv.predict.shipped import find_predictor
from edgekv.runtime import Runtime

Pair = tuple[Stats, Stats]  # of an answer over predicted KV, and of one over exact KV


def run_repair(
    model: str,
    workloads: Sequence[Workload],
    *,
    predictor: str | None = None,
    aux: str | None = None,
    repair: str = "idle",
    progress: Progress | None = None,
    watch: Watch = unwatched,
) -> list[Row]:
    """Measure; one row for each workload, of one session."""
    check_choice("repair", repair, ("idle", "eager"))
    file = find_predictor(model, predictor, weights_fingerprint(resolve(model, progress=progress)))
    options = PredictionOptions(
        predictor=file,
        aux=aux,
        confirm=False,
        repair=repair,  # type: ignore[arg-type]  # it is one
    )
    shortest = options.sinks + options.window + 1
    for workload in workloads:
        if min(workload.lengths) < shortest:
            raise ConfigError.of("prompt-tokens", min(workload.lengths), f"{shortest} at least")
    rows = []
    with open_runtime(model, workloads, progress=progress, prediction=options) as runtime:
        for number, workload in enumerate(workloads, start=1):
            label = f"{workload.lengths[0]} tokens, {number}/{len(workloads)}"
            report = Reporter(watch, label, WARM_UPS + workload.reps)
            pairs = []
            for turn in range(WARM_UPS + workload.reps):
                pairs.append(_pair(runtime, workload, turn))
                report.turn_done()
            row = {"scenario": "repair", "model": model, "predictor": file.name, "repair": repair}
            rows.append(row | _figures(workload, options.sinks, pairs[WARM_UPS:]))
    return rows


def _pair(runtime: Runtime, workload: Workload, turn: int) -> Pair:
    ids = TextIds(runtime.tokenizer).prompt(workload.lengths[0], turn)

    def answered(prefill: PrefillMode) -> Stats:
        with runtime.app(f"{prefill}-{turn}-{len(ids)}").session() as session:
            return answer(session, ids, workload.new_tokens, prefill=prefill).stats

    return answered("predict"), answered("exact")


def _figures(workload: Workload, sinks: int, pairs: Sequence[Pair]) -> Row:
    own = [predicted.num_repaired_tokens - (workload.lengths[0] - sinks) for predicted, _ in pairs]
    behind = [number for number in own if number >= 0]
    known = [a.repair_agreement for a, _ in pairs if a.repair_agreement is not None]
    ratios = [a.decode_tokens_per_s / b.decode_tokens_per_s for a, b in pairs]
    return {
        "prompt_tokens": workload.lengths[0],
        "new_tokens": workload.new_tokens,
        "reps": len(pairs),
        "caught_up": len(behind),
        "tokens_behind_max": max(behind, default=None),
        "repair_agreement": median(known) if known else None,
        "decode_tokens_per_s": median(a.decode_tokens_per_s for a, _ in pairs),
        "exact_decode_tokens_per_s": median(b.decode_tokens_per_s for _, b in pairs),
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "samples": [{"predicted": a.to_dict(), "exact": b.to_dict()} for a, b in pairs],
    }


_COLUMNS: Columns = (
    ("prompt", "{prompt_tokens}"),
    ("answer", "{new_tokens}"),
    ("repair", "{repair}"),
    ("caught up", "{caught_up} of {reps}"),
    ("behind", "{tokens_behind_max}"),
    ("agreement", "{repair_agreement:.3f}"),
    ("tok/s", "{decode_tokens_per_s:.1f}"),
    ("exact", "{exact_decode_tokens_per_s:.1f}"),
    ("ratio", "{ratio:.2f}"),
    ("least", "{ratio_min:.2f}"),
)


def print_repair(rows: Sequence[Row]) -> None:
    """Print the table on stdout."""
    title = f"{rows[0]['model']} · {rows[0]['predictor']} · ratio: tok/s to exact's"
    print_columns(title, _COLUMNS, rows)
