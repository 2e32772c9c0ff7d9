"""`bench disturb`: what a stream notices of everything else that its runtime is asked meanwhile.

One session streams, alone and disturbed in turn: by callers of all kinds, and by a flood, an app
whose limits were lifted, with a thousand requests that wait and ten thousand names. What counts is
the 95th percentile of the gaps between the stream's tokens, a median over pairs. It should stay
within the larger of `ALONE_FACTOR` times what it is alone and `TARGET_FACTOR` times the target for
the time between tokens. A stream that gets nowhere is cut off after `_CUT_FACTOR` times the time
that one takes alone; its last gap is what it had waited by then.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from edgekv.bench.report import Columns, Reporter, Row, Watch, print_columns, unwatched
from edgekv.bench.scratch import layout_of, scratch_model
from edgekv.bench.sessions.drive import Asked, Driver, User
from edgekv.bench.workload import TextIds, answer
from edgekv.config import RuntimeConfig, SamplingParams, StoreOptions, check_int
from edgekv.metrics import percentile
from edgekv.models.cache import Progress
from edgekv.runtime import Runtime

ALONE_FACTOR = 1.5
TARGET_FACTOR = 1.1
_PROMPT_TOKENS = 64
_NUM_OTHERS = 4
_OTHERS_TOKENS = 256
_PAUSE_S = 1e-3  # a loop without one would compete for the interpreter, not for the engine
_TOKENS_MIN = 21  # whose gaps have a 95th percentile
_CUT_FACTOR = 20.0
_CUT_MS_MIN = 10_000.0
_NUM_NAMES = 10_000


@dataclass(kw_only=True)
class Beside:
    """What was asked beside one stream."""

    num_rounds: int = 0  # apps, sessions and suspensions
    num_evaluations: int = 0  # texts whose logits were asked for
    num_waiting: int = 0  # requests that waited when the stream had ended
    num_thrown: int = 0  # steps that were prepared and thrown away meanwhile
    num_plans: int = 0
    plan_ms: float = 0.0  # what they took
    errors: list[Exception] = field(default_factory=list)  # what any of it failed with


Action = Callable[[], None]  # what a thread repeats
Disturb = Callable[[Runtime, Beside, ExitStack], Sequence[Action]]


def run_disturb(
    model: str,
    *,
    reps: int,
    new_tokens: int,
    evaluated_tokens: int,
    num_waiting: int,
    progress: Progress | None = None,
    watch: Watch = unwatched,
) -> list[Row]:
    """Measure; a row for callers, and one for a flood of `num_waiting` requests, if any."""
    check_int("reps", reps, 1, 1000)
    check_int("new tokens", new_tokens, _TOKENS_MIN, 1 << 16)
    check_int("waiting requests", num_waiting, 0, 1 << 16)
    with scratch_model(model, progress) as (path, scratch):
        check_int("evaluated tokens", evaluated_tokens, 1, layout_of(path).context_max)
        kinds: dict[str, Disturb] = {"callers": partial(_callers, evaluated_tokens)}
        if num_waiting:
            kinds["flood"] = partial(_flood, num_waiting)
        config = RuntimeConfig(
            store=StoreOptions(folder=scratch / "store"),
            num_waiting_max=max(1024, 2 * num_waiting),
            num_sessions_max=max(4096, 2 * num_waiting),
        )
        report = Reporter(watch, "disturb", 1 + 2 * reps * len(kinds))
        with Runtime.open(str(path), config=config) as runtime:
            _stream(runtime, new_tokens, math.inf)
            report.turn_done()
            return [
                {
                    "scenario": "disturb",
                    "model": model,
                    "beside": kind,
                    "new_tokens": new_tokens,
                    "evaluated_tokens": evaluated_tokens,
                }
                | _pairs(runtime, disturb, reps, new_tokens, report)
                for kind, disturb in kinds.items()
            ]


def _pairs(runtime: Runtime, disturb: Disturb, reps: int, new_tokens: int, report: Reporter) -> Row:
    alone, disturbed, beside, targets_ms = [], [], [], []
    for _ in range(reps):
        alone.append(_stream(runtime, new_tokens, math.inf))
        report.turn_done()
        # Before it is disturbed: what is slow then would raise the target that allows it.
        targets_ms.append(runtime.counters().tbt_target_ms)
        limit_ms = max(_CUT_MS_MIN, _CUT_FACTOR * alone[-1].waited_ms)
        streamed, done = _disturbed(runtime, disturb, new_tokens, limit_ms)
        disturbed.append(streamed)
        beside.append(done)
        report.turn_done()
    return make_figures(alone, disturbed, beside, median(targets_ms))


def _stream(runtime: Runtime, new_tokens: int, limit_ms: float) -> Asked:
    ids = TextIds(runtime.tokenizer).stretch(_PROMPT_TOKENS, 0)
    driver = Driver()

    def user() -> User:
        with runtime.app("stream").session() as session:
            yield from driver.ask("stream", session, ids, new_tokens)

    driver.run([user()], for_ms=limit_ms)
    return driver.asked[0]


def _disturbed(
    runtime: Runtime, disturb: Disturb, new_tokens: int, limit_ms: float
) -> tuple[Asked, Beside]:
    """One stream and what was asked beside it."""
    done, over = Beside(), threading.Event()
    with ExitStack() as stack:
        actions = disturb(runtime, done, stack)
        threads = [
            threading.Thread(target=_repeat, args=(action, over, done.errors), daemon=True)
            for action in actions
        ]
        before = runtime.counters()
        for thread in threads:
            thread.start()
        try:
            streamed = _stream(runtime, new_tokens, limit_ms)
            after = runtime.counters()
        finally:
            over.set()
            for thread in threads:
                thread.join()
        done.num_thrown = after.num_steps_thrown - before.num_steps_thrown
        done.num_plans = after.num_plans - before.num_plans
        done.plan_ms = after.plan_ms - before.plan_ms
    if done.errors:
        raise done.errors[0]
    return streamed, done


def _callers(
    evaluated_tokens: int, runtime: Runtime, done: Beside, stack: ExitStack
) -> Sequence[Action]:
    """Apps and sessions that open and close, sessions that leave memory, logits of a text."""
    text = TextIds(runtime.tokenizer)
    evaluated = text.stretch(evaluated_tokens, 1)
    others = [stack.enter_context(runtime.app(f"other {i}").session()) for i in range(_NUM_OTHERS)]
    for number, other in enumerate(others):
        answer(other, text.stretch(_OTHERS_TOKENS, 2 + number), 2)

    def ask() -> None:
        runtime.app("x")
        runtime.app("y").session().close()
        others[done.num_rounds % _NUM_OTHERS].suspend()
        done.num_rounds += 1
        time.sleep(_PAUSE_S)

    def evaluate() -> None:
        runtime.logits(evaluated)
        done.num_evaluations += 1

    return (ask, evaluate)


def _flood(num_waiting: int, runtime: Runtime, done: Beside, stack: ExitStack) -> Sequence[Action]:
    """Requests of one app that wait, names that nobody uses, and a loop that looks them up."""
    text = TextIds(runtime.tokenizer)
    flood = runtime.app("flood", num_waiting_max=num_waiting, num_sessions_max=num_waiting)
    for number in range(_NUM_NAMES):
        runtime.app(f"name {number}")
    sessions = [stack.enter_context(flood.session()) for _ in range(num_waiting)]
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    streams = [
        session.submit_ids(text.stretch(_OTHERS_TOKENS, 2 + number), sampling)
        for number, session in enumerate(sessions)
    ]
    stack.callback(lambda: setattr(done, "num_waiting", sum(not s.done for s in streams)))

    def ask() -> None:
        runtime.app(f"name {done.num_rounds % (2 * _NUM_NAMES)}")
        done.num_rounds += 1
        time.sleep(_PAUSE_S)

    return (ask,)


def _repeat(action: Action, over: threading.Event, errors: list[Exception]) -> None:
    """The outermost loop of a thread: what it fails with is raised by its owner."""
    try:
        while not over.is_set():
            action()
    except Exception as error:  # noqa: BLE001
        errors.append(error)


def gaps_of(streamed: Asked) -> list[float]:
    """Milliseconds between tokens; of a stream that was cut off with what it had waited by then."""
    gaps_ms = list(streamed.reply.gaps_ms)
    if not streamed.whole:
        answered = bool(streamed.reply.token_ids)
        gaps_ms.append(streamed.waited_ms - answered * (streamed.ttft_ms + sum(gaps_ms)))
    return gaps_ms


def _gap_ms_p95(streamed: Asked) -> float:
    """The 95th percentile, or the largest gap of a stream that was cut off."""
    gaps_ms = gaps_of(streamed)
    return percentile(gaps_ms, 95.0) if streamed.whole else max(gaps_ms)


def make_figures(
    alone: Sequence[Asked], disturbed: Sequence[Asked], beside: Sequence[Beside], target_ms: float
) -> Row:
    """Figures of pairs of streams, one alone and one disturbed."""
    pairs = [(_gap_ms_p95(a), _gap_ms_p95(b)) for a, b in zip(alone, disturbed, strict=True)]
    alone_ms, disturbed_ms = (median(side) for side in zip(*pairs, strict=True))
    allowed_ms = max(ALONE_FACTOR * alone_ms, TARGET_FACTOR * target_ms)
    return {
        "reps": len(alone),
        "gap_ms_p95_alone": alone_ms,
        "gap_ms_p95_disturbed": disturbed_ms,
        "ratio": median(b / a for a, b in pairs),
        "tbt_target_ms": target_ms,
        "allowed_ms": allowed_ms,
        "within": disturbed_ms <= allowed_ms,
        "cut_off": sum(not each.whole for each in disturbed),
        "rounds": sum(each.num_rounds for each in beside),
        "steps_thrown": sum(each.num_thrown for each in beside),
        "evaluations": sum(each.num_evaluations for each in beside),
        "waiting": min(each.num_waiting for each in beside),
        "plan_ms": sum(each.plan_ms for each in beside)
        / max(1, sum(each.num_plans for each in beside)),
        "samples": {
            "alone": [gaps_of(each) for each in alone],
            "disturbed": [gaps_of(each) for each in disturbed],
        },
    }


_COLUMNS: Columns = (
    ("beside", "{beside}"),
    ("gap ms p95 alone", "{gap_ms_p95_alone:.1f}"),
    ("disturbed", "{gap_ms_p95_disturbed:.1f}"),
    ("ratio", "{ratio:.2f}"),
    ("target", "{tbt_target_ms:.0f}"),
    ("allowed", "{allowed_ms:.0f}"),
    ("cut off", "{cut_off} of {reps}"),
    ("steps thrown", "{steps_thrown}"),
    ("rounds", "{rounds}"),
    ("evaluations", "{evaluations}"),
    ("waiting", "{waiting}"),
    ("a plan ms", "{plan_ms:.2f}"),
)


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table on stdout."""
    tokens = rows[0]["evaluated_tokens"]
    print_columns(f"{rows[0]['model']} · logits of {tokens} tokens", _COLUMNS, rows)
