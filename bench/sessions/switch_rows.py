"""Rows of `bench switch`: one a policy and utilisation, with ratios between policies."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekv.bench.figures import budget_figures, latency_ratio, over_pairs, ratio
from edgekv.bench.plot import Panel, draw, draw_tails
from edgekv.bench.report import Columns, Row, print_columns
from edgekv.bench.sessions.drive import gaps_ms, latencies, latency_samples, num_unanswered
from edgekv.bench.sessions.turns import Played
from edgekv.engine.ledger import EngineCounters
from edgekv.kv.layout import PoolSnapshot
from edgekv.store import StoreSnapshot

RESIDENT = "resident"
BASELINES = ("naive", "recompute")


@dataclass(kw_only=True)
class Run:
    """What came of one policy in one repetition."""

    policy: str  # its name
    facts: Row  # of the load; `utilisation` among them
    played: Played  # the conversations
    busy_ms: float = 0.0  # service while they were played
    token_bytes: int  # KV of one token
    pool: PoolSnapshot  # memory at the end
    engine: EngineCounters  # what was computed and moved
    store: StoreSnapshot | None  # the disk at the end; None where nothing is stored
    num_differing: int = 0  # sessions whose answers differ from those of the first policy
    num_ties: int = 0  # how many of those part where the model finds both tokens equally likely


def make_rows(head: Row, runs: Sequence[Run]) -> list[Row]:
    """One row for every utilisation and policy, all its repetitions together.

    `ratio_vs_*` are to `BASELINES`, `overhead_vs_resident` to the limit, as far as those ran: the
    median over repetitions, each compared with the other policy's play of the same conversations.
    """
    groups: dict[tuple[Any, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.facts["utilisation"], run.policy), []).append(run)
    rows = []
    for (utilisation, policy), together in groups.items():
        row = {**head, **together[0].facts, "policy": policy, **_figures(together)}
        for name in BASELINES:
            theirs = groups.get((utilisation, name))
            row[f"ratio_vs_{name}"] = theirs and over_pairs(
                [_speed_up(a, b) for a, b in zip(together, theirs, strict=True)]
            )
        limit = None if policy == RESIDENT else groups.get((utilisation, RESIDENT))
        row["overhead_vs_resident"] = limit and over_pairs(
            [
                latency_ratio(latencies(a.played.asked), latencies(b.played.asked))
                for a, b in zip(together, limit, strict=True)
            ]
        )
        row["samples"] = row.pop("samples")  # long: last
        rows.append(row)
    return rows


def _speed_up(ours: Run, theirs: Run) -> dict[str, float | None]:
    """How much better we are: theirs to ours for latencies, ours to theirs for throughput."""
    return {
        **latency_ratio(latencies(theirs.played.asked), latencies(ours.played.asked)),
        "throughput": ratio(_throughput([ours]), _throughput([theirs])),
    }


def _throughput(runs: Sequence[Run]) -> float:
    """Tokens of answers a second."""
    elapsed_ms = sum(run.played.elapsed_ms for run in runs)
    return 1e3 * sum(run.played.num_output_tokens for run in runs) / elapsed_ms


def _figures(runs: Sequence[Run]) -> Row:
    asked = [each for run in runs for each in run.played.asked]
    elapsed_ms = sum(run.played.elapsed_ms for run in runs)
    errors = [error for run in runs for error in run.played.errors]
    budgets = [budget_figures(run.pool, run.store) for run in runs]
    return {
        "turns": len(asked),
        "elapsed_s": 1e-3 * elapsed_ms,
        "utilisation_measured": sum(run.busy_ms for run in runs) / elapsed_ms,
        **latencies(asked),
        "throughput": _throughput(runs),
        "num_ttft": len(asked),
        "num_tbt": len(gaps_ms(asked)),
        "unfinished": sum(not each.whole for each in asked),
        "unanswered": num_unanswered(asked),
        "steps": sum(run.engine.num_steps for run in runs),
        "steps_thrown": sum(run.engine.num_steps_thrown for run in runs),
        "preemptions": sum(each.reply.stats.num_preemptions for each in asked),
        "tokens_restored": sum(run.engine.swap.num_restored_tokens for run in runs),
        "tokens_recomputed": sum(
            max(0, run.engine.num_rows - run.played.num_once_tokens) for run in runs
        ),
        **_disk_figures(runs),
        **{key: max(each[key] for each in budgets) for key in budgets[0]},
        "outputs_sha256": [run.played.outputs_sha256() for run in runs],
        "sessions_differing": sum(run.num_differing for run in runs),
        "sessions_differing_by_a_tie": sum(run.num_ties for run in runs),
        "failed": len(errors),
        "errors": errors,
        "samples": latency_samples(asked),
    }


def _disk_figures(runs: Sequence[Run]) -> Row:
    """Bytes and system calls; zeros and None where nothing is stored."""
    stored = [(run, run.store) for run in runs if run.store is not None]
    read = sum(store.read_bytes for _, store in stored)
    written = sum(store.written_bytes for _, store in stored)
    reads = sum(store.num_read_calls for _, store in stored)
    writes = sum(store.num_write_calls for _, store in stored)
    # Not the store's own figure: where a policy writes KV again, the store takes it for new.
    new_bytes = sum(run.played.num_once_tokens * run.token_bytes for run, _ in stored)
    return {
        "bytes_read": read,
        "bytes_written": written,
        "num_reads": reads,
        "num_writes": writes,
        "num_ios": reads + writes,
        "mean_read_bytes": ratio(read, reads),
        "mean_write_bytes": ratio(written, writes),
        "mean_io_bytes": ratio(read + written, reads + writes),
        "bytes_written_per_new_kv_byte": ratio(written, new_bytes),
    }


# --- tables and curves ---

_P = ("p50", "p95", "p99")
_LATENCIES: Columns = (
    ("policy", "{policy}"),
    ("TTFT ms p50/p95/p99", "/".join(f"{{ttft_ms_{p}:.0f}}" for p in _P)),
    ("TBT ms p50/p95/p99", "/".join(f"{{tbt_ms_{p}:.0f}}" for p in _P)),
    ("turns", "{turns}"),
    ("unanswered", "{unanswered}"),
    ("tok/s", "{throughput:.1f}"),
    ("busy", "{utilisation_measured:.2f}"),
)
_OVERHEAD: Columns = (
    ("to resident: TTFT", "/".join(f"{{overhead_vs_resident[ttft_ms_{p}]:.2f}}" for p in _P)),
    ("TBT", "/".join(f"{{overhead_vs_resident[tbt_ms_{p}]:.2f}}" for p in _P)),
)
_RATIOS: dict[str, Columns] = {
    name: (
        (f"vs {name}: TTFT", "/".join(f"{{ratio_vs_{name}[ttft_ms_{p}]:.1f}}" for p in _P)),
        ("TBT", "/".join(f"{{ratio_vs_{name}[tbt_ms_{p}]:.1f}}" for p in _P)),
        ("tok/s", f"{{ratio_vs_{name}[throughput]:.2f}}"),
    )
    for name in BASELINES
}
_MOVES: Columns = (
    ("policy", "{policy}"),
    ("preempted", "{preemptions}"),
    ("restored", "{tokens_restored}"),
    ("recomputed", "{tokens_recomputed}"),
    ("read MiB", "{bytes_read!m:.0f}"),
    ("written MiB", "{bytes_written!m:.0f}"),
    ("I/Os", "{num_ios}"),
    ("MiB/I/O", "{mean_io_bytes!m:.3f}"),
    ("per new KV", "{bytes_written_per_new_kv_byte:.2f}"),
    ("pool", "{pool_peak_ratio:.2f}"),
    ("disk", "{disk_peak_ratio:.2f}"),
)


def print_rows(rows: Sequence[Row]) -> None:
    """Print the tables of every utilisation: latencies, ratios, and what moved."""
    for utilisation in dict.fromkeys(row["utilisation"] for row in rows):
        _print_tables([row for row in rows if row["utilisation"] == utilisation])


def _print_tables(rows: Sequence[Row]) -> None:
    first = rows[0]
    load = f"{first['sessions']} sessions, {first['turns']} turns"
    if first["utilisation"] is not None:
        load = (
            f"{first['sessions']} sessions open of {first['tokens_mean']} tokens · "
            f"{first['utilisation']:g} of {first['capacity_turns_per_s']:.2f} turns/s, "
            f"{first['window_s']:.0f} s a row"
        )
    trace = f"{first['trace']} trace, update frequency {first['update_frequency']:g}"
    print_columns(f"{first['model']} · {load} · {trace}", _LATENCIES, rows)
    others = [row for row in rows if row["overhead_vs_resident"]]
    if others:
        columns = (_LATENCIES[0], *_OVERHEAD)
        print_columns("to resident, the limit, 1: as fast; p50/p95/p99", columns, others)
    for name in BASELINES:
        others = [row for row in rows if row[f"ratio_vs_{name}"] and row["policy"] != name]
        if others:
            columns = (_LATENCIES[0], *_RATIOS[name])
            print_columns("ratios above 1: better, p50/p95/p99", columns, others)
    print_columns("what moved, in tokens and bytes; peaks to budgets", _MOVES, rows)


def draw_rows(rows: Sequence[Row], target: Path) -> None:
    """Write a picture: distributions at one utilisation, or a curve over several."""
    title = f"bench switch · {rows[0]['model']} · {rows[0]['trace']} trace"
    if len({row["utilisation"] for row in rows}) == 1:
        draw_tails(target, title, rows, ("policy",))
        return
    known = all(row["ttft_ms_p95"] is not None for row in rows)
    which = "p95" if known else "p50"
    panel = Panel(
        x_name="utilisation of the capacity with everything in memory",
        y_name=f"TTFT {which}, ms",
        lines={
            name: [(r["utilisation"], r[f"ttft_ms_{which}"]) for r in rows if r["policy"] == name]
            for name in dict.fromkeys(row["policy"] for row in rows)
        },
        x_log=False,
    )
    draw(target, title, [panel])
