import pytest

from edgekv.bench.sessions.shares import Moment, jain, shares_of


def moments(*rows, backlogged="ab"):
    """Moments 100 ms apart; each row is what a and b have got."""
    return [
        Moment(
            at_ms=100.0 * i,
            service_ms={"a": row[0], "b": row[1]},
            backlogged=frozenset(row[2] if len(row) > 2 else backlogged),
        )
        for i, row in enumerate(rows)
    ]


def test_equal_service_by_weight_is_fair():
    made = shares_of(moments((0, 0), (60, 20), (90, 30)), {"a": 3.0, "b": 1.0}, 100.0)
    assert made.service_share == made.weight_share == {"a": 0.75, "b": 0.25}
    assert made.jain == pytest.approx(1.0)
    assert made.backlogged_ms == 200.0
    assert made.difference_ms_max == made.difference_ms_mean == 0.0


def test_one_app_with_everything():
    made = shares_of(moments((5, 5), (105, 5)), {"a": 1.0, "b": 1.0}, 100.0)
    assert made.service_share == {"a": 1.0, "b": 0.0}
    assert made.jain == pytest.approx(0.5)
    assert made.difference_ms_max == 100.0


def test_time_in_which_an_app_wants_nothing_does_not_count():
    rows = [(0, 0), (50, 50), (150, 50, "a"), (250, 50, "a"), (250, 50), (300, 100)]
    made = shares_of(moments(*rows), {"a": 1.0, "b": 1.0}, 100.0)
    assert made.service_share == {"a": 0.5, "b": 0.5}
    assert made.backlogged_ms == 200.0
    assert made.difference_ms_max == 0.0


def test_a_window_spans_several_moments():
    rows = [(0, 0), (30, 0), (30, 30), (60, 30), (60, 60)]
    made = shares_of(moments(*rows), {"a": 1.0, "b": 1.0}, 200.0)
    assert made.difference_ms_max == 0.0  # unfair for 100 ms, fair over any 200
    assert shares_of(moments(*rows), {"a": 1.0, "b": 1.0}, 100.0).difference_ms_max == 30.0


def test_windows_longer_than_the_run_are_none():
    made = shares_of(moments((0, 0), (1, 1)), {"a": 1.0, "b": 1.0}, 1000.0)
    assert made.difference_ms_max is made.difference_ms_mean is None


def test_nothing_at_all():
    made = shares_of([], {"a": 1.0, "b": 1.0}, 100.0)
    assert made.jain is None
    assert made.service_share == {"a": 0.0, "b": 0.0}


def test_jain():
    assert jain([1.0, 1.0, 1.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0]) == pytest.approx(1 / 3)
    assert jain([0.0]) is None
