import json
from pathlib import Path

import pytest

from edgekv.bench import report
from edgekv.bench.report import fill
from edgekv.bench.speed import scenarios
from edgekv.bench.speed.measure import Outcome, SideRun
from edgekv.bench.workload import Workload
from edgekv.errors import ConfigError


def sample(ms, tokens=(1, 2, 3)):
    line = (ms, 2 * ms, 3 * ms)
    return SideRun(
        num_prompt_tokens=100,
        ttft_ms=(ms,),
        warm_ttft_ms=(ms / 10,),
        cold_ms=(line,),
        decode_ms=(line,),
        peak_memory_bytes=1 << 20,
        tokens=(tokens,),
    )


def row(scenario="ttft", *, peer=True, failed=0, pairs=2):
    theirs = [sample(25.0)] if peer else []
    made = [[sample(10.0), *theirs] for _ in range(pairs)]
    workload = Workload(lengths=(100,), new_tokens=3, reps=2)
    outcome = Outcome(turns=made, failed=failed, errors=["X: broke"] * failed)
    return scenarios.make_row(scenario, "tiny", workload, "mlx-lm 0" if peer else None, outcome)


KEYS = {
    *("scenario", "model", "ttft_ms_p50", "prefill_tokens_per_s", "decode_tokens_per_s"),
    *("tbt_p50_ms", "tbt_max_ms", "peak_memory_bytes", "peer", "ratio", "samples", "failed"),
    *("reps", "warm_ups", "new_tokens"),
}


def test_a_ttft_row():
    made = row("ttft")
    assert set(made) >= KEYS | {"prompt_tokens"}
    assert made["prompt_tokens"] == 100
    assert made["ttft_ms_p50"] == 10.0
    assert made["peer_ttft_ms_p50"] == 25.0
    assert made["prefill_tokens_per_s"] == pytest.approx(10_000.0)
    assert made["ratio"] == pytest.approx(2.5)
    assert made["token_agreement"] == 1.0
    assert made["samples"][1]["theirs"]["ttft_ms"] == [25.0]


def test_a_decode_row():
    made = row("decode")
    assert set(made) >= KEYS | {
        *("sessions", "lengths", "ttft_ms_min", "ttft_ms_max"),
        *("ttft_ratio_min", "ttft_ratio_p50"),
    }
    assert (made["sessions"], made["lengths"]) == (1, [100])
    assert made["decode_tokens_per_s"] == pytest.approx(100.0)
    assert made["ratio"] == made["ttft_ratio_p50"] == pytest.approx(2.5)


def test_a_row_without_peer_has_no_ratio():
    made = row(peer=False)
    assert made["peer"] is made["ratio"] is made["token_agreement"] is None
    assert made["peer_ttft_ms_p50"] is None


@pytest.mark.parametrize("made", [row(), row(peer=False), row(failed=2, pairs=0)])
def test_a_report_is_json(made, tmp_path, capsys):
    report.write_report({"os": "x"}, [made], tmp_path / "r.json")
    whole = json.loads((tmp_path / "r.json").read_text())
    assert list(whole) == ["machine", "versions", "rows"]
    assert (whole["machine"], whole["rows"]) == ({"os": "x"}, [made])
    assert whole["versions"] == report.versions()
    report.write_report({"os": "x"}, [made], Path("-"))
    assert json.loads(capsys.readouterr().out) == whole


def test_the_target_is_checked_before_anything_runs(tmp_path):
    for target in (None, Path("-"), tmp_path / "new.json"):
        report.check_target(target)
    for target in (tmp_path, tmp_path / "nowhere" / "r.json"):
        with pytest.raises(ConfigError):
            report.check_target(target)


def table(made):
    """What stands below each heading in the row's table."""
    return {heading: fill(text, made) for heading, text in scenarios.table_columns([made])}


def test_table_cells():
    assert table(row("ttft")) == {
        "prompt": "100",
        "TTFT ms": "10.0",
        "warm": "1.0",
        "prefill tok/s": "10000",
        "decode tok/s": "100.0",
        "peer TTFT ms": "25.0",
        "ratio": "2.50",
    }
    assert table(row("decode", peer=False)) == {
        "sessions": "1",
        "tok/s": "100.0",
        "TBT ms p50/max": "10.0/10.0",
        "TTFT ms min/p50/max": "10/10/10",
    }


def test_what_failed_is_in_the_table():
    made = table(row(failed=2, pairs=0))
    assert list(made)[-1] == "failed"
    assert made["failed"] == "2"
    assert made["TTFT ms"] == "–"


def test_figures_inside_objects():
    row = {"ratio": {"p95": 2.0, "p99": None}, "other": None}
    assert fill("{ratio[p95]:.1f}", row) == "2.0"
    assert fill("{other[p95]:.1f}/{ratio[p99]:.1f}", row) == "–"
    assert fill("{ratio[p95]:.1f}/{ratio[p99]:.1f}", row) == "2.0/–"


def test_bytes_in_mib():
    assert fill("{written!m:.1f}", {"written": 3 << 19}) == "1.5"
    assert fill("{written!m:.1f}", {"written": None}) == "–"


def test_the_table_is_printed_whole_into_a_pipe(capsys):
    scenarios.print_table([row("decode")])
    out = capsys.readouterr().out
    assert "tiny · peer mlx-lm 0" in out
    assert "TTFT ratio min/p50" in out
    assert "2.5/2.5" in out
