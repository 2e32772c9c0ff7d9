"""The benchmarks `ttft` and `decode`: their workloads, both sides, their rows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from edgekv.bench.report import Columns, Reporter, Row, Watch, print_columns, unwatched
from edgekv.bench.speed.measure import WARM_UPS, Outcome, Side, take_turns
from edgekv.bench.workload import Workload, ragged_lengths
from edgekv.errors import ConfigError
from edgekv.models.cache import Progress

if TYPE_CHECKING:
    from edgekv.bench.speed.ours import AllRowsSide
    from edgekv.bench.speed.peer_mlx_lm import MlxLmSide
    from edgekv.runtime import Runtime

Scenario = Literal["ttft", "decode"]
PEERS = ("mlx-lm", "all-rows")


def decode_workloads(
    *,
    sessions: Sequence[int] | None,
    ragged: tuple[int, int] | None,
    lengths: Sequence[int] | None,
    prompt_tokens: int,
    new_tokens: int,
    reps: int,
) -> list[Workload]:
    """Sessions that decode together: one workload for each number of sessions."""
    if lengths is not None:
        if ragged is not None or (sessions is not None and list(sessions) != [len(lengths)]):
            raise ConfigError(
                f"--lengths names {len(lengths)} sessions",
                hint="leave out --ragged and --sessions",
            )
        return [Workload(lengths=tuple(lengths), new_tokens=new_tokens, reps=reps)]

    def spread(count: int) -> tuple[int, ...]:
        return (prompt_tokens,) * count if ragged is None else ragged_lengths(*ragged, count)

    return [
        Workload(lengths=spread(count), new_tokens=new_tokens, reps=reps)
        for count in sessions or (1, 2, 4, 8)
    ]


def run_scenario(
    scenario: Scenario,
    model: str,
    workloads: Sequence[Workload],
    *,
    peer: str | None = None,
    progress: Progress | None = None,
    watch: Watch = unwatched,
) -> list[Row]:
    """Measure all workloads of a scenario, one row each, with a peer in turn if one is named."""
    from edgekv.bench.speed.ours import EdgeKVSide, open_runtime

    _check_peer(peer, workloads)
    rows = []
    with open_runtime(model, workloads, progress=progress) as runtime:
        theirs = [] if peer is None else [_peer_side(peer, runtime)]
        foreign_bytes = sum(getattr(side, "weights_bytes", 0) for side in theirs)
        ours = EdgeKVSide(runtime, foreign_bytes=foreign_bytes)
        sides: list[Side] = [ours.run, *(side.run for side in theirs)]
        for number, workload in enumerate(workloads, start=1):
            label = f"{scenario} {number}/{len(workloads)}"
            report = Reporter(watch, label, len(sides) * (WARM_UPS + workload.reps))
            prompts = workload.prompts(runtime.tokenizer)
            outcome = take_turns(sides, prompts, workload, report.turn_done)
            peer_name = theirs[0].name if theirs else None
            rows.append(make_row(scenario, model, workload, peer_name, outcome))
    return rows


def _peer_side(peer: str, runtime: "Runtime") -> "MlxLmSide | AllRowsSide":
    from edgekv.bench.speed.ours import AllRowsSide
    from edgekv.bench.speed.peer_mlx_lm import MlxLmSide
    from edgekv.models.open_model import open_checkpoint
    from edgekv.models.weights import parse_checkpoint

    checkpoint = open_checkpoint(runtime.path, runtime.device)
    if peer == "all-rows":
        return AllRowsSide(runtime, parse_checkpoint(checkpoint)[0])
    return MlxLmSide(checkpoint)


def _check_peer(peer: str | None, workloads: Sequence[Workload]) -> None:
    """Before the model is loaded: whether the peer is there and takes these workloads."""
    if peer is None:
        return
    if peer not in PEERS:
        raise ConfigError.of("peer", peer, " or ".join(PEERS))
    if peer != "mlx-lm":
        return
    from edgekv.bench.speed.peer_mlx_lm import BATCH_MAX, check_installed

    check_installed()
    most = max(len(workload.lengths) for workload in workloads)
    if most > BATCH_MAX:
        raise ConfigError(
            f"{peer} decodes at most {BATCH_MAX} sessions together, not {most}",
            hint="ask for fewer --sessions, or leave out --peer",
        )


# --- rows ---

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
    figures: tuple[str, ...] = _OF_BOTH
    shape: Row = {"prompt_tokens": workload.lengths[0], **_UNPREDICTED}
    ratio = outcome.ratio("prefill_tokens_per_s")
    if scenario == "decode":
        figures += _OF_SEVERAL
        ratio = outcome.ratio("decode_tokens_per_s")
        shape = {"sessions": len(workload.lengths), "lengths": list(workload.lengths)}
        # Of the earliest and the median session; with one session `ratio` says it already.
        for which in ("min", "p50"):
            figure = f"ttft_ms_{which}"
            shape[f"ttft_ratio_{which}"] = outcome.ratio(figure, lower_is_better=True)
    return {
        "scenario": scenario,
        "model": model,
        **shape,
        "new_tokens": workload.new_tokens,
        **{figure: outcome.ours(figure) for figure in (*figures, "ttft_warm_ms_p50")},
        "peer": peer,
        "prefill": "exact",
        "ratio": ratio,
        "e2e_ratio": outcome.ratio("e2e_tokens_per_s"),
        "token_agreement": outcome.agreement(),
        **{f"peer_{figure}": outcome.theirs(figure) for figure in figures},
        "reps": workload.reps,
        "warm_ups": WARM_UPS,
        "failed": outcome.failed,
        "errors": outcome.errors,
        "samples": outcome.samples(),
    }


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
