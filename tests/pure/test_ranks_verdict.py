"""What is judged a failure of a group of ranks, and whose."""

import pytest

from edgekv.ranks.verdict import IDLE, JOINING, LOADING, WAITING, Bounds, Report, judge

BOUNDS = Bounds(silence_s=5, join_s=60, stuck_s=60)


def group(*phases):
    """Reports of ranks by (phase, seconds)."""
    return [
        Report(rank=rank, counter=7, phase=phase, phase_s=seconds)
        for rank, (phase, seconds) in enumerate(phases)
    ]


def silent(phase, seconds):
    return [Report(rank=0, phase=IDLE), Report(rank=1, phase=phase, silent_s=seconds)]


@pytest.mark.parametrize(
    ("phase", "seconds", "fails"),
    [
        (WAITING, 4.9, False),
        (WAITING, 5.1, True),
        (LOADING, 5.1, True),
        (JOINING, 59, False),
        (JOINING, 61, True),
    ],
)
def test_silence_has_a_bound_that_is_longer_while_joining(phase, seconds, fails):
    found = judge(silent(phase, seconds), BOUNDS)
    assert (found is not None) == fails
    if fails:
        assert found == (1, f"has not answered for {60 if phase == JOINING else 5} s")


def test_who_says_that_it_failed_has_failed():
    reports = [Report(rank=0, phase=IDLE), Report(rank=1, failed="weights.safetensors: truncated")]
    assert judge(reports, BOUNDS) == (1, "has failed: weights.safetensors: truncated")


@pytest.mark.parametrize(
    "phases",
    [
        [(IDLE, 9e9), (WAITING, 9e9), (WAITING, 9e9)],  # no request
        [(LOADING, 9e9), (WAITING, 9e9)],
        [(WAITING, 100), (JOINING, 100)],
        [("computing", 59), ("computing", 59)],
        [("planning", 1), (WAITING, 300)],  # it was idle before
        [("computing", 61), (IDLE, 61)],  # nobody waits for it
        [(WAITING, 61), (WAITING, 1)],
    ],
)
def test_who_works_or_waits_for_somebody_who_does_has_not_failed(phases):
    assert judge(group(*phases), BOUNDS) is None


@pytest.mark.parametrize(
    ("phases", "rank", "what"),
    [
        ([(WAITING, 60), ("restoring", 61)], 1, "restoring"),
        ([("swapping", 61), (WAITING, 61)], 0, "swapping"),
        ([("computing", 3), (WAITING, 61), ("restoring", 62)], 2, "restoring"),
        ([("computing", 62), ("computing", 63)], 1, "computing"),
        ([(WAITING, 62), (WAITING, 61)], 0, "waiting, as all others are,"),
    ],
)
def test_the_one_that_the_others_wait_for_is_named(phases, rank, what):
    assert judge(group(*phases), BOUNDS) == (rank, f"has been {what} for 60 s (exchange 7)")


def test_nobody_is_nobody():
    assert judge([], BOUNDS) is None
