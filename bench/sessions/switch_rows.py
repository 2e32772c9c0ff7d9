"""Rows of `bench switch`: one a policy, with ratios between policies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgekv.bench.figures import budget_figures, curve, speed_up, tail
from edgekv.bench.report import Columns, Row, print_columns
from edgekv.bench.sessions.conversations import ConversationShape
from edgekv.bench.sessions.turns import Played
from edgekv.engine.ledger import EngineCounters
from edgekv.kv.layout import PoolSnapshot
from edgekv.store import StoreSnapshot

BASELINES = ("naive", "recompute")


@dataclass(kw_only=True)
class Run:
    """What came of one policy.

    Attributes:
        policy: Its name.
        played: The conversations.
        token_bytes: KV of one token.
        pool: Memory at the end.
        engine: What was computed and moved.
        store: The disk at the end; None where nothing is stored.
        num_differing: Sessions whose answers differ from those of the first policy.
        num_ties: How many of those part where the model finds both tokens equally likely.
    """

    policy: str
    played: Played
    token_bytes: int
    pool: PoolSnapshot
    engine: EngineCounters
    store: StoreSnapshot | None
    num_differing: int = 0
    num_ties: int = 0


def make_rows(
    model: str,
    trace: str,
    update_frequency: float,
    shape: ConversationShape,
    runs: Sequence[Run],
) -> list[Row]:
    """One row a run; ratios to `BASELINES`, as far as those ran."""
    workload = {
        "scenario": "switch",
        "model": model,
        "trace": trace,
        "update_frequency": update_frequency,
        "sessions": shape.num_sessions,
        "turns_mean": shape.turns_mean,
        "tokens_mean": shape.tokens_mean,
        "arrivals_per_s": shape.arrivals_per_s,
        "think_scale": shape.think_scale,
        "seed": shape.seed,
    }
    rows = [{**workload, **_figures(run)} for run in runs]
    by_policy = {row["policy"]: row for row in rows}
    for row in rows:
        for name in BASELINES:
            theirs = by_policy.get(name)
            row[f"ratio_vs_{name}"] = None if theirs is None else speed_up(row, theirs)
        row["samples"] = row.pop("samples")  # long: last
    return rows


def _figures(run: Run) -> Row:
    played = run.played
    ttft_ms, tbt_ms = played.ttft_ms, played.tbt_ms
    return {
        "policy": run.policy,
        "turns": len(ttft_ms),
        "elapsed_s": 1e-3 * played.elapsed_ms,
        **tail("ttft_ms", ttft_ms),
        **tail("tbt_ms", tbt_ms),
        "num_ttft": len(ttft_ms),
        "num_tbt": len(tbt_ms),
        "throughput": 1e3 * played.num_output_tokens / played.elapsed_ms,
        "steps": run.engine.num_steps,
        "preemptions": sum(reply.stats.num_preemptions for reply in played.all_replies),
        "tokens_restored": run.engine.swap.num_restored_tokens,
        "tokens_recomputed": max(0, run.engine.num_rows - played.num_once_tokens),
        **_disk_figures(run.store),
        "bytes_written_per_new_kv_byte": _wear(run),
        **budget_figures(run.pool, run.store),
        "outputs_sha256": played.outputs_sha256(),
        "sessions_differing": run.num_differing,
        "sessions_differing_by_a_tie": run.num_ties,
        "failed": len(played.errors),
        "errors": played.errors,
        "samples": {"ttft_ms": curve(ttft_ms), "tbt_ms": curve(tbt_ms)},
    }


def _disk_figures(store: StoreSnapshot | None) -> dict[str, Any]:
    """Bytes and system calls; zeros and None where nothing is stored."""
    if store is None:
        return {
            **dict.fromkeys(("bytes_read", "bytes_written"), 0),
            **dict.fromkeys(("num_reads", "num_writes", "num_ios"), 0),
            **dict.fromkeys(("mean_read_bytes", "mean_write_bytes", "mean_io_bytes"), None),
        }
    read, written = store.read_bytes, store.payload_written_bytes
    reads, writes = store.num_read_calls, store.num_write_calls
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


def _wear(run: Run) -> float | None:
    """Bytes written to byte of KV that was computed for the first time; None without a store.

    Not the store's own figure: where a policy writes KV again, the store takes it for new.
    """
    new_bytes = run.played.num_once_tokens * run.token_bytes
    return run.store.payload_written_bytes / new_bytes if run.store and new_bytes else None


# --- tables ---

_P = ("p50", "p95", "p99")
_LATENCIES: Columns = (
    ("policy", "{policy}"),
    ("TTFT ms p50/p95/p99", "/".join(f"{{ttft_ms_{p}:.0f}}" for p in _P)),
    ("TBT ms p50/p95/p99", "/".join(f"{{tbt_ms_{p}:.0f}}" for p in _P)),
    ("tok/s", "{throughput:.1f}"),
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
    """Print the tables: latencies, ratios, and what moved."""
    first = rows[0]
    title = (
        f"{first['model']} · {first['sessions']} sessions, {first['turns']} turns · "
        f"{first['trace']} trace, update frequency {first['update_frequency']:g}"
    )
    print_columns(title, _LATENCIES, rows)
    for name in BASELINES:
        others = [row for row in rows if row[f"ratio_vs_{name}"] and row["policy"] != name]
        if others:
            columns = (_LATENCIES[0], *_RATIOS[name])
            print_columns("ratios above 1: better, p50/p95/p99", columns, others)
    print_columns(
        "what moved, in tokens and bytes; peaks to budgets", _MOVES, [_in_mib(row) for row in rows]
    )


def _in_mib(row: Row) -> Row:
    mean = row["mean_io_bytes"]
    return {
        **row,
        "mib_read": row["bytes_read"] / 2**20,
        "mib_written": row["bytes_written"] / 2**20,
        "mean_io_mib": None if mean is None else mean / 2**20,
    }
