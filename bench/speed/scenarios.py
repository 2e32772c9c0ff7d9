"""The benchmarks `ttft` and `decode`: their workloads, both sides, their rows."""

from collections.abc import Callable, Sequence

from edgekv.bench.report import Row, Scenario, make_row
from edgekv.bench.speed.measure import WARM_UPS, take_turns
from edgekv.bench.workload import Workload, ragged_lengths
from edgekv.errors import ConfigError
from edgekv.models.cache import Progress

Watch = Callable[[str, int, int], None]  # what runs, runs done, runs in all

PEERS = ("mlx-lm",)
TTFT_NEW_TOKENS = 16  # enough for a decode rate behind each prompt length


def ttft_workloads(prompt_tokens: Sequence[int], *, reps: int) -> list[Workload]:
    """One session at each prompt length.

    Raises:
        ConfigError: A value is out of range.
    """
    return [
        Workload(lengths=(length,), new_tokens=TTFT_NEW_TOKENS, reps=reps)
        for length in prompt_tokens
    ]


def decode_workloads(
    *,
    sessions: Sequence[int] | None,
    ragged: tuple[int, int] | None,
    lengths: Sequence[int] | None,
    prompt_tokens: int,
    new_tokens: int,
    reps: int,
) -> list[Workload]:
    """Sessions that decode together: one workload for each number of sessions.

    Args:
        sessions: Numbers of sessions; None is what `lengths` says, or 1, 2, 4 and 8.
        ragged: Prompt lengths are spread evenly between these two.
        lengths: Prompt lengths of the one workload.
        prompt_tokens: Every prompt's length where neither of these is given.
        new_tokens: Tokens that each session generates per phase.
        reps: Runs that count.

    Raises:
        ConfigError: A value is out of range, or options contradict each other.
    """
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
    watch: Watch | None = None,
) -> list[Row]:
    """Measure all workloads of a scenario, with a peer in turn if one is named.

    Args:
        scenario: Which figure the ratio is of, and what the rows show.
        model: A model's reference.
        workloads: One for each row.
        peer: None, or one of `PEERS`.
        progress: Told of a download.
        watch: Told after every run.

    Raises:
        ConfigError: An option is out of range, or the peer is not installed.
        ModelError: The model cannot be had, or the peer cannot run it.
    """
    from edgekv.bench.speed.ours import EdgeKVSide, open_runtime
    from edgekv.bench.speed.peer_mlx_lm import MlxLmSide
    from edgekv.models.open_model import checkpoint_for

    _check_peer(peer, workloads)
    num_sides = 1 if peer is None else 2
    rows = []
    with open_runtime(model, workloads, progress=progress) as runtime:
        theirs = MlxLmSide(checkpoint_for(runtime.path, runtime.device)) if peer else None
        ours = EdgeKVSide(runtime, foreign_bytes=theirs.weights_bytes if theirs else 0)
        for i, workload in enumerate(workloads):
            label = f"{scenario} {i + 1}/{len(workloads)}"
            report = Reporter(watch, label, num_sides * (WARM_UPS + workload.reps))
            outcome = take_turns(
                ours, theirs, workload.prompts(runtime.tokenizer), workload, report.turn_done
            )
            peer_name = theirs.name if theirs else None
            rows.append(make_row(scenario, model, workload, peer_name, outcome))
    return rows


class Reporter:
    """Counts the runs of one workload and tells the watcher."""

    def __init__(self, watch: Watch | None, label: str, total: int) -> None:
        self._watch = watch
        self._label = label
        self._total = total
        self._done = 0
        self._tell()

    def turn_done(self) -> None:
        """One more."""
        self._done += 1
        self._tell()

    def _tell(self) -> None:
        if self._watch is not None:
            self._watch(self._label, self._done, self._total)


def _check_peer(peer: str | None, workloads: Sequence[Workload]) -> None:
    """Before the model is loaded: whether the peer is there and takes these workloads."""
    if peer is None:
        return
    if peer not in PEERS:
        raise ConfigError.of("peer", peer, " or ".join(PEERS))
    from edgekv.bench.speed.peer_mlx_lm import BATCH_MAX, check_installed

    check_installed()
    for workload in workloads:
        if workload.num_sessions > BATCH_MAX:
            raise ConfigError(
                f"{peer} decodes at most {BATCH_MAX} sessions together, "
                f"not {workload.num_sessions}",
                hint="ask for fewer --sessions, or leave out --peer",
            )
