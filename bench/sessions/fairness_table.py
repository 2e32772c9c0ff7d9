"""The tables of `bench fairness`."""

from collections.abc import Sequence

from edgekv.bench.report import Row
from edgekv.bench.table import Columns, print_columns

_LATENCIES: Columns = (
    ("policy", "{policy}"),
    ("app", "{app}"),
    ("requests", "{requests}"),
    ("TTFT ms p50/p95", "{ttft_ms_p50:.0f}/{ttft_ms_p95:.0f}"),
    ("TBT ms p50/p95", "{tbt_ms_p50:.0f}/{tbt_ms_p95:.0f}"),
    ("TTFT p95 to alone", "{slowdown[ttft_ms_p95]:.1f}"),
    ("TBT p95 to alone", "{slowdown[tbt_ms_p95]:.1f}"),
    ("tok/s of all", "{throughput:.0f}"),
    ("to fcfs", "{throughput_vs_fcfs:.2f}"),
)
_SHARES: Columns = (
    ("policy", "{policy}"),
    ("app", "{app}"),
    ("users", "{users}"),
    ("share", "{service_share:.3f}"),
    ("weight", "{weight_share:.3f}"),
    ("backlogged s", "{backlogged_s:.1f}"),
    ("Jain", "{jain:.4f}"),
    ("service difference ms", "{service_difference_ms_max:.0f}"),
    ("in windows of s", "{window_s:.1f}"),
)


def print_rows(rows: Sequence[Row]) -> None:
    """Print one table of latencies for each mix, and the shares of apps of equal class."""
    for mix in dict.fromkeys(row["mix"] for row in rows):
        of_mix = [row for row in rows if row["mix"] == mix]
        print_columns(f"{rows[0]['model']} · {mix}", _LATENCIES, of_mix)
        shared = [row for row in of_mix if row["service_share"] is not None]
        if shared and len({row["priority"] for row in shared}) == 1:
            print_columns(f"{mix}: service while all are backlogged", _SHARES, shared)
