"""`bench disturb`: what a stream notices of everything else that its runtime is asked meanwhile.

One session streams, alone and disturbed in turn. Disturbed, one thread registers an app, opens and
closes a session and suspends others in a loop, and a second one asks for the logits of a long text
again and again. What counts is the 95th percentile of the gaps between the stream's tokens, a
median over pairs. It should stay within the larger of `ALONE_FACTOR` times what it is alone and
`TARGET_FACTOR` times the target for the time between tokens.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

from edgekv.bench.figures import tail
from edgekv.bench.report import Columns, Reporter, Row, Watch, print_columns
from edgekv.bench.scratch import layout_of, model_path, scratch_folder
from edgekv.bench.workload import TextIds
from edgekv.config import RuntimeConfig, SamplingParams, StoreOptions, check_int
from edgekv.models.cache import Progress
from edgekv.runtime import Reply, Runtime, Session

ALONE_FACTOR = 1.5
TARGET_FACTOR = 1.1
_PROMPT_TOKENS = 64
_NUM_OTHERS = 4
_OTHERS_TOKENS = 256
_PAUSE_S = 1e-3  # a loop without one would compete for the interpreter, not for the engine
_GAPS_MIN = 21  # tokens of which a 95th percentile can be told


@dataclass(kw_only=True)
class Disturbed:
    """What was asked beside one stream.

    Attributes:
        num_rounds: Apps, sessions and suspensions.
        num_evaluations: Texts whose logits were asked for.
        errors: What any of it failed with.
    """

    num_rounds: int = 0
    num_evaluations: int = 0
    errors: list[Exception] = field(default_factory=list)


def run_disturb(
    model: str,
    *,
    reps: int,
    new_tokens: int,
    evaluated_tokens: int,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> list[Row]:
    """Measure; one row.

    Args:
        model: A model's reference, or `synthetic`.
        reps: Pairs that count, behind one warm-up.
        new_tokens: Of every stream.
        evaluated_tokens: Of the text whose logits are asked for.
        progress: Told of a download.
        watch: Told after every stream.

    Raises:
        ConfigError: An option is out of range.
        ModelError: The model cannot be had.
        EdgeKVError: A request failed.
    """
    check_int("reps", reps, 1, 1000)
    check_int("new tokens", new_tokens, _GAPS_MIN, 1 << 16)
    with scratch_folder() as scratch:
        path = model_path(model, scratch, progress)
        check_int("evaluated tokens", evaluated_tokens, 1, layout_of(path).context_max)
        config = RuntimeConfig(store=StoreOptions(folder=scratch / "store"))
        report = Reporter(watch, "disturb", 1 + 2 * reps)
        with Runtime.open(str(path), config=config) as runtime:
            _stream(runtime, new_tokens)
            report.turn_done()
            alone, disturbed, beside = [], [], []
            for _ in range(reps):
                alone.append(_stream(runtime, new_tokens))
                report.turn_done()
                reply, done = _disturbed(runtime, new_tokens, evaluated_tokens)
                disturbed.append(reply)
                beside.append(done)
                report.turn_done()
            target_ms = runtime.config.tbt_target_ms
    row = {"scenario": "disturb", "model": model, "new_tokens": new_tokens}
    row["evaluated_tokens"] = evaluated_tokens
    return [row | make_figures(alone, disturbed, beside, target_ms)]


def _stream(runtime: Runtime, new_tokens: int) -> Reply:
    ids = TextIds(runtime.tokenizer).stretch(_PROMPT_TOKENS, 0)
    with runtime.app("stream").session() as session:
        return _answer(session, ids, new_tokens)


def _answer(session: Session, ids: Sequence[int], new_tokens: int) -> Reply:
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    with session.submit_ids(list(ids), sampling) as stream:
        for _ in stream:
            pass
    assert stream.reply is not None
    return stream.reply


def _disturbed(runtime: Runtime, new_tokens: int, evaluated_tokens: int) -> tuple[Reply, Disturbed]:
    """One stream and what was asked beside it."""
    text = TextIds(runtime.tokenizer)
    evaluated = text.stretch(evaluated_tokens, 1)
    done, over = Disturbed(), threading.Event()
    with ExitStack() as stack:
        others = [
            stack.enter_context(runtime.app(f"other {i}").session()) for i in range(_NUM_OTHERS)
        ]
        for number, other in enumerate(others):
            _answer(other, text.stretch(_OTHERS_TOKENS, 2 + number), 2)

        def ask() -> None:
            runtime.app("x")
            runtime.app("y").session().close()
            others[done.num_rounds % _NUM_OTHERS].suspend()
            done.num_rounds += 1
            over.wait(_PAUSE_S)

        def evaluate() -> None:
            runtime.logits(evaluated)
            done.num_evaluations += 1

        threads = [
            threading.Thread(target=_repeat, args=(action, over, done.errors), daemon=True)
            for action in (ask, evaluate)
        ]
        for thread in threads:
            thread.start()
        try:
            reply = _stream(runtime, new_tokens)
        finally:
            over.set()
            for thread in threads:
                thread.join()
    if done.errors:
        raise done.errors[0]
    return reply, done


def _repeat(action: Callable[[], None], over: threading.Event, errors: list[Exception]) -> None:
    """The outermost loop of a thread: what it fails with is raised by its owner."""
    try:
        while not over.is_set():
            action()
    except Exception as error:  # noqa: BLE001
        errors.append(error)


def make_figures(
    alone: Sequence[Reply],
    disturbed: Sequence[Reply],
    beside: Sequence[Disturbed],
    target_ms: float,
) -> Row:
    """Figures of pairs of streams, one alone and one disturbed."""
    gaps = {"alone": [r.gaps_ms for r in alone], "disturbed": [r.gaps_ms for r in disturbed]}
    p95_ms = {name: [tail("gap", each)["gap_p95"] for each in g] for name, g in gaps.items()}
    pairs = [
        (a, b)
        for a, b in zip(p95_ms["alone"], p95_ms["disturbed"], strict=True)
        if a is not None and b is not None
    ]
    alone_ms, disturbed_ms = (median(side) for side in zip(*pairs, strict=True))
    allowed_ms = max(ALONE_FACTOR * alone_ms, TARGET_FACTOR * target_ms)
    return {
        "reps": len(pairs),
        "gap_ms_p95_alone": alone_ms,
        "gap_ms_p95_disturbed": disturbed_ms,
        "ratio": median(b / a for a, b in pairs),
        "tbt_target_ms": target_ms,
        "allowed_ms": allowed_ms,
        "within": disturbed_ms <= allowed_ms,
        "rounds": sum(each.num_rounds for each in beside),
        "evaluations": sum(each.num_evaluations for each in beside),
        "samples": {name: [list(each) for each in g] for name, g in gaps.items()},
    }


_COLUMNS: Columns = (
    ("gap ms p95 alone", "{gap_ms_p95_alone:.1f}"),
    ("disturbed", "{gap_ms_p95_disturbed:.1f}"),
    ("ratio", "{ratio:.2f}"),
    ("target", "{tbt_target_ms:.0f}"),
    ("allowed", "{allowed_ms:.0f}"),
    ("rounds", "{rounds}"),
    ("evaluations", "{evaluations}"),
)


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table on stdout."""
    tokens = rows[0]["evaluated_tokens"]
    print_columns(f"{rows[0]['model']} · logits of {tokens} tokens", _COLUMNS, rows)
