"""`bench restore`: how soon a turn answers, by where its session's KV is.

Measured for each length, in one session, with prompts of the same length that end in a turn of
`TURN_TOKENS` new tokens. The turn of `swapped` is that of `recompute`, and the turn of `restarted`
that of `resident`: their answers must be the same. A restarted process finds the session by name;
its start and the loading of the model are not in the figure. It is this module, run as one (see
`main`).
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from edgekv.bench.figures import budget_figures, ttft_ms
from edgekv.bench.plot import Panel, draw
from edgekv.bench.report import Columns, Row, Watch, print_columns, unwatched
from edgekv.bench.scratch import drop_page_cache, layout_of, scratch_model
from edgekv.bench.workload import TextIds, answer
from edgekv.config import RuntimeConfig, StoreOptions, check_int
from edgekv.device import profile
from edgekv.errors import EngineFailed
from edgekv.models.cache import Progress
from edgekv.runtime import Runtime, Session

TURN_TOKENS = 16
MODES = ("resident", "swapped", "restarted", "recompute")
_OUTPUT_TOKENS = 8
_TOKENS_MIN = 128
_SAME = (("swapped", "recompute"), ("restarted", "resident"))  # modes that are asked the same

Answer = dict[str, Any]  # what `_ask` returns
Answers = dict[str, list[Answer]]  # of one length, by mode, one for each repetition


def run_restore(
    model: str,
    tokens: Sequence[int],
    *,
    reps: int,
    progress: Progress | None = None,
    watch: Watch = unwatched,
) -> list[Row]:
    """Measure all lengths; one row each."""
    check_int("reps", reps, 1, 100)
    for length in tokens:
        check_int("tokens", length, _TOKENS_MIN, 1 << 24)
    found: dict[int, Answers] = {length: {mode: [] for mode in MODES} for length in tokens}
    dropped, budgets = True, {}
    with scratch_model(model, progress) as (path, scratch):
        layout = layout_of(path)
        check_int("tokens", max(tokens), _TOKENS_MIN, layout.context_max)
        largest = layout.capacity_bytes(layout.capacity_for(max(tokens)))
        options = {
            "pool_bytes": max(profile().pool_bytes, 2 * largest),
            "disk_bytes": 4 * sum(tokens) * layout.token_bytes,
        }
        for rep in range(reps):
            watch("restore", rep, reps)
            folder = scratch / f"store-{rep}"
            with _open(str(path), str(folder), **options) as runtime:
                jobs = [_measure(runtime, folder, n, turns) for n, turns in found.items()]
                budgets = budget_figures(runtime.pool_snapshot(), runtime.store_snapshot())
            dropped = drop_page_cache(folder)
            order = {"model": str(path), "folder": str(folder), "jobs": jobs, **options}
            for turns, turn in zip(found.values(), _in_a_new_process(order), strict=True):
                turns["restarted"].append(turn)
    head = {"scenario": "restore", "model": model, "page_cache_dropped": dropped, **budgets}
    return [make_row(head, length, turns) for length, turns in found.items()]


def _open(model: str, folder: str, *, pool_bytes: int, disk_bytes: int) -> Runtime:
    """As both processes do."""
    store = StoreOptions(folder=pathlib.Path(folder), disk_bytes=disk_bytes)
    return Runtime.open(model, config=RuntimeConfig(pool_bytes=pool_bytes, store=store))


def _measure(runtime: Runtime, folder: pathlib.Path, tokens: int, turns: Answers) -> Answer:
    """Measure all modes but `restarted`; return what that one is to be asked."""
    text = TextIds(runtime.tokenizer)
    known = text.stretch(tokens - TURN_TOKENS - _OUTPUT_TOKENS, 0)
    first, second = (known + text.stretch(TURN_TOKENS, index) for index in (1, 2))
    name = f"session-{tokens}"
    # An app of its own: sessions of one app share what they have in common.
    session = runtime.app(name).session(name)
    turns["recompute"].append(_ask(session, first))
    turns["resident"].append(_ask(session, second))
    session.suspend()
    drop_page_cache(folder)
    turns["swapped"].append(_ask(session, first))
    session.suspend()
    return {"name": name, "token_ids": second}


def _ask(session: Session, token_ids: list[int]) -> Answer:
    """Continue token ids to the end."""
    reply = answer(session, token_ids, _OUTPUT_TOKENS)
    return {
        "ttft_ms": ttft_ms(reply.stats),
        "num_restored_tokens": reply.stats.num_restored_tokens,
        "token_ids": list(reply.token_ids),
    }


def _in_a_new_process(order: dict[str, Any]) -> list[Answer]:
    done = subprocess.run(
        [sys.executable, "-m", "edgekv.bench.sessions.restore"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise EngineFailed(
            f"the restarted process ended with code {done.returncode}: {done.stderr[-500:]}",
            hint="this is a bug in edgekv; please report it",
        )
    turns: list[Answer] = json.loads(done.stdout)
    return turns


def main() -> None:
    """Carry out an order from stdin, what `_open` takes and `jobs`; the turns go to stdout as JSON.

    A job is a session's `name` (its app has the same) and the `token_ids` to continue.
    """
    order = json.load(sys.stdin)
    jobs = order.pop("jobs")
    turns = []
    with _open(**order) as runtime:
        for job in jobs:
            session = runtime.app(job["name"]).session(job["name"])
            turns.append(_ask(session, job["token_ids"]))
            session.suspend()
    json.dump(turns, sys.stdout)


def make_row(head: Row, tokens: int, turns: Mapping[str, Sequence[Answer]]) -> Row:
    """One row: medians, ratios of recompute's TTFT over repetitions, and raw samples of a length.

    `answers_differing`: from restored KV, that are not those from computed KV.
    """
    times_ms = {mode: [turn["ttft_ms"] for turn in turns[mode]] for mode in MODES}

    def ratio(mode: str) -> float:
        pairs = zip(times_ms["recompute"], times_ms[mode], strict=True)
        return float(median(theirs / ours for theirs, ours in pairs))

    return {
        **head,
        "tokens": tokens,
        "turn_tokens": TURN_TOKENS,
        "reps": len(turns["recompute"]),
        **{f"ttft_ms_{mode}": median(times_ms[mode]) for mode in MODES},
        **{f"ratio_{mode}": ratio(mode) for mode in MODES[:-1]},
        **{
            f"tokens_restored_{mode}": min(turn["num_restored_tokens"] for turn in turns[mode])
            for mode, _ in _SAME
        },
        "answers_differing": sum(
            a["token_ids"] != b["token_ids"]
            for restored, computed in _SAME
            for a, b in zip(turns[restored], turns[computed], strict=True)
        ),
        "samples": times_ms,
    }


_COLUMNS: Columns = (
    ("tokens", "{tokens}"),
    ("TTFT ms resident", "{ttft_ms_resident:.1f}"),
    ("swapped", "{ttft_ms_swapped:.1f}"),
    ("restarted", "{ttft_ms_restarted:.1f}"),
    ("recompute", "{ttft_ms_recompute:.1f}"),
    ("ratio swapped", "{ratio_swapped:.1f}"),
    ("ratio restarted", "{ratio_restarted:.1f}"),
    ("tokens restored", "{tokens_restored_swapped}/{tokens_restored_restarted}"),
)


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table."""
    cold = "the disk" if rows[0]["page_cache_dropped"] else "the page cache, perhaps"
    title = f"{rows[0]['model']} · turns of {TURN_TOKENS} tokens · restored from {cold}"
    print_columns(title, _COLUMNS, rows)


def draw_rows(rows: Sequence[Row], target: pathlib.Path) -> None:
    """Write a picture: one line a mode, TTFT over tokens."""
    lines = {mode: [(row["tokens"], row[f"ttft_ms_{mode}"]) for row in rows] for mode in MODES}
    panel = Panel(x_name="tokens", y_name="TTFT, ms", lines=lines)
    draw(target, f"bench restore · {rows[0]['model']}", [panel])


if __name__ == "__main__":
    main()
