import pytest

from edgekv.bench.figures import curve, latency_ratio, over_pairs, ratio, tail


def test_percentiles_need_samples():
    assert tail("x", []) == {"x_p50": None, "x_p95": None, "x_p99": None, "x_p999": None}
    few = tail("x", [1.0, 2.0, 3.0])
    assert few == {"x_p50": 2.0, "x_p95": None, "x_p99": None, "x_p999": None}
    assert tail("x", [float(i) for i in range(21)])["x_p95"] == pytest.approx(19.0)
    assert tail("x", [1.0] * 19)["x_p95"] is None
    assert tail("x", [float(i) for i in range(99)])["x_p99"] is None
    assert tail("x", [float(i) for i in range(101)])["x_p99"] == pytest.approx(99.0)
    assert tail("x", [1.0] * 9_999)["x_p999"] is None
    assert tail("x", [1.0] * 10_000)["x_p999"] == 1.0


def row(scale):
    return {f"{what}_ms_{p}": scale for what in ("ttft", "tbt") for p in ("p50", "p95", "p99")}


def test_ratios_of_latencies():
    made = latency_ratio(row(25.0), row(10.0))
    assert set(made) == set(row(0))
    assert made["ttft_ms_p95"] == made["tbt_ms_p99"] == 2.5
    assert ratio(80.0, 40.0) == 2.0


def test_what_was_not_measured_has_no_ratio():
    made = latency_ratio(row(0.0), row(10.0) | {"ttft_ms_p99": None})
    assert made["ttft_ms_p99"] is None
    assert made["ttft_ms_p50"] == 0.0
    assert latency_ratio(row(1.0), row(0.0))["tbt_ms_p50"] is None
    assert ratio(None, 80.0) is ratio(80.0, None) is None


def test_medians_over_pairs_leave_out_what_is_unknown():
    assert over_pairs([{"a": 1.0, "b": None}, {"a": 3.0, "b": None}, {"a": None, "b": None}]) == {
        "a": 2.0,
        "b": None,
    }


def test_a_curve_is_rising_and_has_both_ends():
    samples = [float(i * 7919 % 50_000) for i in range(50_000)]
    made = curve(samples)
    assert len(made) == 1001
    assert made == sorted(made)
    assert (made[0], made[-1]) == (0.0, 49_999.0)
    assert curve([3.0, 1.0]) == [1.0, 3.0]
    assert curve([]) == []
