"""`bench repair`: what repairing predicted KV behind an answer costs that answer.

Answers over predicted KV that is repaired meanwhile, and over exact KV, to the same prompts, in
turn. **ratio**: their decode speed to that of exact ones, median over pairs. **caught up**: answers
before whose end all that was predicted, and computed over it, had been replaced; **behind**: how
many of the answer's own tokens that were, the later ones being exact at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from edgekv.bench.report import Columns, Reporter, Row, Watch, print_columns
from edgekv.bench.speed.measure import WARM_UPS
from edgekv.bench.speed.ours import open_runtime
from edgekv.bench.workload import Workload, answer, make_prompt
from edgekv.config import PredictionOptions, PrefillMode, RepairMode, check_choice
from edgekv.errors import ConfigError
from edgekv.metrics import Stats
from edgekv.models.cache import Progress
from edgekv.models.fingerprint import weights_fingerprint
from edgekv.models.hub import resolve
from edgekv.predict.shipped import find_predictor
from edgekv.runtime import Runtime

_MODES: tuple[RepairMode, ...] = ("idle", "eager")


@dataclass(frozen=True, kw_only=True)
class _Pair:
    predicted: Stats
    exact: Stats

    @property
    def ratio(self) -> float:
        return self.predicted.decode_tokens_per_s / self.exact.decode_tokens_per_s


def run_repair(
    model: str,
    workloads: Sequence[Workload],
    *,
    predictor: str | None = None,
    aux: str | None = None,
    repair: RepairMode = "idle",
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> list[Row]:
    """Measure; one row for each workload, of one session.

    Raises:
        ConfigError: An option is out of range, or a prompt is too short to predict anything of.
        ModelError: The model or the predictor cannot be had.
    """
    check_choice("repair", repair, _MODES)
    file = find_predictor(model, predictor, weights_fingerprint(resolve(model, progress=progress)))
    options = PredictionOptions(predictor=file, aux=aux, repair=repair)
    shortest = options.sinks + options.window + 1
    for workload in workloads:
        if min(workload.lengths) < shortest:
            raise ConfigError.of("prompt-tokens", min(workload.lengths), f"{shortest} at least")
    rows = []
    with open_runtime(model, workloads, progress=progress, prediction=options) as runtime:
        for number, workload in enumerate(workloads):
            label = f"{workload.lengths[0]} tokens, {number + 1}/{len(workloads)}"
            report = Reporter(watch, label, WARM_UPS + workload.reps)
            pairs = []
            for turn in range(WARM_UPS + workload.reps):
                pairs.append(_pair(runtime, workload, turn))
                report.turn_done()
            row = {"scenario": "repair", "model": model, "predictor": file.name, "repair": repair}
            rows.append(row | _figures(workload, options.sinks, pairs[WARM_UPS:]))
    return rows


def _pair(runtime: Runtime, workload: Workload, turn: int) -> _Pair:
    ids = make_prompt(runtime.tokenizer, workload.lengths[0], turn)

    def answered(prefill: PrefillMode) -> Stats:
        with runtime.app(f"{prefill}-{turn}-{len(ids)}").session() as session:
            return answer(session, ids, workload.new_tokens, prefill=prefill).stats

    return _Pair(predicted=answered("predict"), exact=answered("exact"))


def _figures(workload: Workload, sinks: int, pairs: Sequence[_Pair]) -> Row:
    prompt = workload.lengths[0] - sinks
    own = [pair.predicted.num_repaired_tokens - prompt for pair in pairs]
    behind = [number for number in own if number >= 0]
    agreements = [
        agreement for pair in pairs if (agreement := pair.predicted.repair_agreement) is not None
    ]
    return {
        "prompt_tokens": workload.lengths[0],
        "new_tokens": workload.new_tokens,
        "reps": len(pairs),
        "caught_up": len(behind),
        "tokens_behind_max": max(behind, default=None),
        "repair_agreement": median(agreements) if agreements else None,
        "decode_tokens_per_s": median(pair.predicted.decode_tokens_per_s for pair in pairs),
        "exact_decode_tokens_per_s": median(pair.exact.decode_tokens_per_s for pair in pairs),
        "ratio": median(pair.ratio for pair in pairs),
        "ratio_min": min(pair.ratio for pair in pairs),
        "samples": [
            {"predicted": pair.predicted.to_dict(), "exact": pair.exact.to_dict()} for pair in pairs
        ],
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
