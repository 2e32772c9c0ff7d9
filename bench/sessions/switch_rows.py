"""Rows of `bench switch`: one a policy and utilisation, with ratios between policies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from edgekv.bench.figures import budget_figures, curve, latency_ratio, speed_up, tail
from edgekv.bench.plot import plot_lines, plot_tails
from edgekv.bench.report import Columns, Row, print_columns
from edgekv.bench.sessions.turns import Played
from edgekv.engine.ledger import EngineCounters
from edgekv.kv.layout import PoolSnapshot
from edgekv.store import StoreSnapshot

RESIDENT = "resident"
BASELINES = ("naive", "recompute")


@dataclass(kw_only=True)
class Run:
    """What came of one policy in one repetition.

    Attributes:
        policy: Its name.
        rep: Which repetition.
        facts: Of the load; `utilisation` among them.
        played: The conversations.
        busy_ms: Service while they were played.
        token_bytes: KV of one token.
        pool: Memory at the end.
        engine: What was computed and moved.
        store: The disk at the end; None where nothing is stored.
        num_differing: Sessions whose answers differ from those of the first policy.
        num_ties: How many of those part where the model finds both tokens equally likely.
    """

    policy: str
    rep: int = 0
    facts: Row
    played: Played
    busy_ms: float = 0.0
    token_bytes: int
    pool: PoolSnapshot
    engine: EngineCounters
    store: StoreSnapshot | None
    num_differing: int = 0
    num_ties: int = 0


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
            row[f"ratio_vs_{name}"] = _over_pairs(speed_up, together, theirs)
        limit = None if policy == RESIDENT else groups.get((utilisation, RESIDENT))
        row["overhead_vs_resident"] = _over_pairs(latency_ratio, together, limit)
        row["samples"] = row.pop("samples")  # long: last
        rows.append(row)
    return rows


def _over_pairs(
    compare: Callable[[Row, Row], dict[str, float | None]],
    ours: Sequence[Run],
    theirs: Sequence[Run] | None,
) -> dict[str, float | None] | None:
    """Medians over repetitions of what two policies compare to; None where the other is missing."""
    if theirs is None:
        return None
    pairs = [compare(_latencies([a]), _latencies([b])) for a, b in zip(ours, theirs, strict=True)]
    known = {key: [v for pair in pairs if (v := pair[key]) is not None] for key in pairs[0]}
    return {key: median(values) if values else None for key, values in known.items()}


def _latencies(runs: Sequence[Run]) -> Row:
    elapsed_ms = sum(run.played.elapsed_ms for run in runs)
    return {
        **tail("ttft_ms", [ms for run in runs for ms in run.played.ttft_ms]),
        **tail("tbt_ms", [ms for run in runs for ms in run.played.tbt_ms]),
        "throughput": 1e3 * sum(run.played.num_output_tokens for run in runs) / elapsed_ms,
    }


def _figures(runs: Sequence[Run]) -> Row:
    played = [run.played for run in runs]
    ttft_ms = [ms for each in played for ms in each.ttft_ms]
    tbt_ms = [ms for each in played for ms in each.tbt_ms]
    elapsed_ms = sum(each.elapsed_ms for each in played)
    errors = [error for each in played for error in each.errors]
    budgets = [budget_figures(run.pool, run.store) for run in runs]
    return {
        "turns": len(ttft_ms),
        "elapsed_s": 1e-3 * elapsed_ms,
        "utilisation_measured": sum(run.busy_ms for run in runs) / elapsed_ms,
        **_latencies(runs),
        "num_ttft": len(ttft_ms),
        "num_tbt": len(tbt_ms),
        "unfinished": sum(len(each.unfinished) for each in played),
        "unanswered": sum(each.num_unanswered for each in played),
        "steps": sum(run.engine.num_steps for run in runs),
        "steps_thrown": sum(run.engine.num_steps_thrown for run in runs),
        "preemptions": sum(r.stats.num_preemptions for each in played for r in each.all_replies),
        "tokens_restored": sum(run.engine.swap.num_restored_tokens for run in runs),
        "tokens_recomputed": sum(
            max(0, run.engine.num_rows - run.played.num_once_tokens) for run in runs
        ),
        **_disk_figures([run.store for run in runs if run.store is not None]),
        "bytes_written_per_new_kv_byte": _wear(runs),
        **{key: max(each[key] for each in budgets) for key in budgets[0]},
        "outputs_sha256": [each.outputs_sha256() for each in played],
        "sessions_differing": sum(run.num_differing for run in runs),
        "sessions_differing_by_a_tie": sum(run.num_ties for run in runs),
        "failed": len(errors),
        "errors": errors,
        "samples": {"ttft_ms": curve(ttft_ms), "tbt_ms": curve(tbt_ms)},
    }


def _disk_figures(stores: Sequence[StoreSnapshot]) -> dict[str, Any]:
    """Bytes and system calls; zeros and None where nothing is stored."""
    if not stores:
        return {
            **dict.fromkeys(("bytes_read", "bytes_written"), 0),
            **dict.fromkeys(("num_reads", "num_writes", "num_ios"), 0),
            **dict.fromkeys(("mean_read_bytes", "mean_write_bytes", "mean_io_bytes"), None),
        }
    read = sum(store.read_bytes for store in stores)
    written = sum(store.payload_written_bytes for store in stores)
    reads = sum(store.num_read_calls for store in stores)
    writes = sum(store.num_write_calls for store in stores)
    return {
        "bytes_read": read,
        "bytes_written": written,
        "num_reads": reads,
        "num_writes": writes,
        "num_ios": reads + writes,
        "mean_read_bytes": read / reads if reads else None,
        "mean_write_bytes": written / writes if writes else None,
        "mean_io_bytes": (read + written) / (reads + writes) if reads + writes else None,
    }


def _wear(runs: Sequence[Run]) -> float | None:
    """Bytes written to byte of KV that was computed for the first time; None without a store.

    Not the store's own figure: where a policy writes KV again, the store takes it for new.
    """
    stored = [(run, run.store) for run in runs if run.store is not None]
    new_bytes = sum(run.played.num_once_tokens * run.token_bytes for run, _ in stored)
    written = sum(store.payload_written_bytes for _, store in stored)
    return written / new_bytes if new_bytes else None


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
    ("read MiB", "{mib_read:.0f}"),
    ("written MiB", "{mib_written:.0f}"),
    ("I/Os", "{num_ios}"),
    ("MiB/I/O", "{mean_io_mib:.3f}"),
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
    print_columns(
        "what moved, in tokens and bytes; peaks to budgets", _MOVES, [_in_mib(row) for row in rows]
    )


def draw(rows: Sequence[Row], target: Path) -> None:
    """Write a picture: distributions at one utilisation, or a curve over several."""
    title = f"bench switch · {rows[0]['model']} · {rows[0]['trace']} trace"
    if len({row["utilisation"] for row in rows}) == 1:
        plot_tails(target, title, rows, ("policy",))
        return
    known = all(row["ttft_ms_p95"] is not None for row in rows)
    which = "p95" if known else "p50"
    lines = {
        policy: [(r["utilisation"], r[f"ttft_ms_{which}"]) for r in rows if r["policy"] == policy]
        for policy in dict.fromkeys(row["policy"] for row in rows)
    }
    names = ("utilisation of the capacity with everything in memory", f"TTFT {which}, ms")
    plot_lines(target, title, *names, lines, x_log=False)


def _in_mib(row: Row) -> Row:
    mean = row["mean_io_bytes"]
    return {
        **row,
        "mib_read": row["bytes_read"] / 2**20,
        "mib_written": row["bytes_written"] / 2**20,
        "mean_io_mib": None if mean is None else mean / 2**20,
    }
