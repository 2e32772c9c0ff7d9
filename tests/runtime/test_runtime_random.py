"""Eight sessions that join, leave and cancel at random say what each says alone."""

from pathlib import Path

import pytest
from random_play import Play, plays, steady

from edgekv.config import RuntimeConfig
from edgekv.runtime import Runtime


@pytest.fixture(scope="module")
def roomy(tiny_folder: Path):
    with Runtime.open(str(tiny_folder), config=RuntimeConfig(pool_bytes=1 << 26)) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def tight(tiny_folder: Path):
    """Room for a few, and none reserved for answers: others wait, are pushed out, preempted."""
    config = RuntimeConfig(pool_bytes=7 * 128 * 768, tbt_target_ms=5.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekv.engine.request.ADMISSION_RESERVE_TOKENS", 1)
        with Runtime.open(str(tiny_folder), config=config) as runtime:
            yield runtime


def play(runtime, steps, lengths, greedy):
    played = Play(runtime, lengths, greedy)
    for index, action in steps:
        getattr(played, action)(index)
    runtime.check_integrity()
    played.end_all()
    played.close_all()


@pytest.mark.slow
@plays
@steady
def test_eight_sessions_at_random_say_what_each_says_alone(roomy, steps, lengths, greedy):
    play(roomy, steps, lengths, greedy)


@pytest.mark.slow
@plays
@steady
def test_eight_sessions_in_too_small_a_pool_say_what_each_says_alone(tight, steps, lengths, greedy):
    play(tight, steps, lengths, greedy)
