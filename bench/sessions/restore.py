"""`bench restore`: how soon a turn answers, by where its session's KV is.

For each length, in one session, with prompts of the same length that end in a turn of
`TURN_TOKENS` new tokens:

* **recompute**: nothing is cached.
* **resident**: the KV of all but the turn is in memory.
* **swapped**: it is on disk alone; the session was suspended.
* **restarted**: the same in a new process, which opens the store and finds the session by name. Its
  start and the loading of the model are not in the figure.

Where the system allows it, the store's files are dropped from the page cache before each restore,
so that bytes come from the disk. The turn of `swapped` is that of `recompute`, and the turn of
`restarted` that of `resident`: their answers must be the same.

Run as a module, it is the process that starts anew (see `main`).
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from edgekv.bench.figures import budget_figures, ttft_ms
from edgekv.bench.plot import plot_lines
from edgekv.bench.report import Columns, Row, Watch, print_columns
from edgekv.bench.scratch import drop_page_cache, layout_of, model_path, scratch_folder
from edgekv.bench.workload import TextIds, answer
from edgekv.config import RuntimeConfig, StoreOptions, check_int
from edgekv.device import profile
from edgekv.errors import ConfigError, EngineFailed
from edgekv.models.cache import Progress
from edgekv.runtime import Runtime, Session

TURN_TOKENS = 16
OUTPUT_TOKENS = 8
TOKENS_MIN = 128
REPS_MAX = 100
MODES = ("resident", "swapped", "restarted", "recompute")

Turn = dict[str, Any]  # what `ask` returns


@dataclass(kw_only=True)
class Samples:
    """All turns of one length, by mode."""

    tokens: int
    turns: dict[str, list[Turn]] = field(default_factory=lambda: {mode: [] for mode in MODES})

    def ttft_ms(self, mode: str) -> list[float]:
        """One for each repetition."""
        return [turn["ttft_ms"] for turn in self.turns[mode]]

    def ratio(self, mode: str) -> float:
        """Median over repetitions of recompute's TTFT to that of another mode."""
        pairs = zip(self.ttft_ms("recompute"), self.ttft_ms(mode), strict=True)
        return median(theirs / ours for theirs, ours in pairs)

    def num_answers_differing(self) -> int:
        """Answers from restored KV that are not those from computed KV."""
        pairs = (("swapped", "recompute"), ("restarted", "resident"))
        return sum(
            a["token_ids"] != b["token_ids"]
            for restored, computed in pairs
            for a, b in zip(self.turns[restored], self.turns[computed], strict=True)
        )


def run_restore(
    model: str,
    tokens: Sequence[int],
    *,
    reps: int,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> list[Row]:
    """Measure all lengths; one row each.

    Args:
        model: A model's reference, or `synthetic`.
        tokens: Lengths of a session with its last turn and answer.
        reps: Repetitions, each with a new store.
        progress: Told of a download.
        watch: Told after every repetition.

    Raises:
        ConfigError: A length does not fit the model's context.
        ModelError: The model cannot be had.
        EdgeKVError: A request failed.
    """
    check_int("reps", reps, 1, REPS_MAX)
    with scratch_folder() as scratch:
        path = model_path(model, scratch, progress)
        layout = layout_of(path)
        for length in tokens:
            check_int("tokens", length, TOKENS_MIN, layout.context_max)
        largest = layout.capacity_bytes(layout.capacity_for(max(tokens)))
        pool_bytes = max(profile().pool_bytes, 2 * largest)
        disk_bytes = 4 * sum(tokens) * layout.token_bytes
        bench = _RestoreBench(path, pool_bytes, disk_bytes)
        samples = [Samples(tokens=length) for length in tokens]
        for rep in range(reps):
            if watch is not None:
                watch("restore", rep, reps)
            bench.run(scratch / f"store-{rep}", samples)
        return [
            make_row(model, each, dropped=bench.dropped, budgets=bench.budgets) for each in samples
        ]


class _RestoreBench:
    """One repetition after the other, each with a store of its own."""

    def __init__(self, path: pathlib.Path, pool_bytes: int, disk_bytes: int) -> None:
        self._path = path
        self._pool_bytes = pool_bytes
        self._disk_bytes = disk_bytes
        self.dropped = True  # whether the page cache could be emptied each time
        self.budgets: dict[str, float] = {}  # of the last repetition: all are alike

    def run(self, folder: pathlib.Path, samples: Sequence[Samples]) -> None:
        """Measure every mode of every length once."""
        config = runtime_config(folder, self._pool_bytes, self._disk_bytes)
        jobs = []
        with Runtime.open(str(self._path), config=config) as runtime:
            for each in samples:
                jobs.append(self._in_this_process(runtime, folder, each))
            self.budgets = budget_figures(runtime.pool_snapshot(), runtime.store_snapshot())
        self.dropped &= drop_page_cache(folder)
        turns = self._in_a_new_process(folder, jobs)
        for each, turn in zip(samples, turns, strict=True):
            each.turns["restarted"].append(turn)

    def _in_this_process(
        self, runtime: Runtime, folder: pathlib.Path, samples: Samples
    ) -> dict[str, Any]:
        """Measure all modes but `restarted`; return what that one is to be asked."""
        text = TextIds(runtime.tokenizer)
        known = text.stretch(samples.tokens - TURN_TOKENS - OUTPUT_TOKENS, 0)
        first, second = (known + text.stretch(TURN_TOKENS, index) for index in (1, 2))
        name = f"session-{samples.tokens}"
        # An app of its own: sessions of one app share what they have in common.
        session = runtime.app(name).session(name)
        samples.turns["recompute"].append(ask(session, first, OUTPUT_TOKENS))
        samples.turns["resident"].append(ask(session, second, OUTPUT_TOKENS))
        session.suspend()
        self.dropped &= drop_page_cache(folder)
        samples.turns["swapped"].append(ask(session, first, OUTPUT_TOKENS))
        session.suspend()
        return {"name": name, "token_ids": second, "output_tokens": OUTPUT_TOKENS}

    def _in_a_new_process(self, folder: pathlib.Path, jobs: Sequence[dict[str, Any]]) -> list[Turn]:
        order = {
            "model": str(self._path),
            "folder": str(folder),
            "pool_bytes": self._pool_bytes,
            "disk_bytes": self._disk_bytes,
            "jobs": jobs,
        }
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
        turns: list[Turn] = json.loads(done.stdout)
        return turns


def make_row(model: str, samples: Samples, *, dropped: bool, budgets: dict[str, float]) -> Row:
    """One row: medians, ratios and raw samples of a length."""
    return {
        "scenario": "restore",
        "model": model,
        "tokens": samples.tokens,
        "turn_tokens": TURN_TOKENS,
        "reps": len(samples.turns["recompute"]),
        **{f"ttft_ms_{mode}": median(samples.ttft_ms(mode)) for mode in MODES},
        **{f"ratio_{mode}": samples.ratio(mode) for mode in MODES[:-1]},
        **{
            f"tokens_restored_{mode}": min(t["num_restored_tokens"] for t in samples.turns[mode])
            for mode in ("swapped", "restarted")
        },
        "page_cache_dropped": dropped,
        "answers_differing": samples.num_answers_differing(),
        **budgets,
        "samples": {mode: samples.ttft_ms(mode) for mode in MODES},
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


def draw(rows: Sequence[Row], target: pathlib.Path) -> None:
    """Write a picture: one line a mode, TTFT over tokens."""
    lines = {mode: [(row["tokens"], row[f"ttft_ms_{mode}"]) for row in rows] for mode in MODES}
    plot_lines(target, f"bench restore · {rows[0]['model']}", "tokens", "TTFT, ms", lines)


def check_tokens(tokens: Sequence[int]) -> None:
    """Make sure, before a model is loaded, that lengths are given and none is too short.

    Raises:
        ConfigError: They are not.
    """
    if not tokens:
        raise ConfigError.of("tokens", "", "whole numbers separated by commas")
    for length in tokens:
        check_int("tokens", length, TOKENS_MIN, 1 << 24)


def runtime_config(folder: pathlib.Path, pool_bytes: int, disk_bytes: int) -> RuntimeConfig:
    """Both processes' configuration."""
    store = StoreOptions(folder=folder, disk_bytes=disk_bytes)
    return RuntimeConfig(pool_bytes=pool_bytes, store=store)


def ask(session: Session, token_ids: list[int], output_tokens: int) -> dict[str, Any]:
    """Continue token ids to the end.

    Returns:
        `ttft_ms`, `restore_ms`, `num_restored_tokens`, and the answer's `token_ids`.
    """
    reply = answer(session, token_ids, output_tokens)
    stats = reply.stats
    return {
        "ttft_ms": ttft_ms(stats),
        "restore_ms": stats.restore_ms,
        "num_restored_tokens": stats.num_restored_tokens,
        "token_ids": list(reply.token_ids),
    }


def main() -> None:
    """Carry out an order from stdin: `model`, `folder`, `pool_bytes`, `disk_bytes`, and `jobs`.

    A job is a session's `name` (its app has the same), `token_ids` and `output_tokens`; what `ask`
    returns for each goes to stdout. All of it is JSON.
    """
    order = json.load(sys.stdin)
    config = runtime_config(pathlib.Path(order["folder"]), order["pool_bytes"], order["disk_bytes"])
    with Runtime.open(order["model"], config=config) as runtime:
        turns = []
        for job in order["jobs"]:
            session = runtime.app(job["name"]).session(job["name"])
            turns.append(ask(session, job["token_ids"], job["output_tokens"]))
            session.suspend()
    json.dump(turns, sys.stdout)


if __name__ == "__main__":
    main()
