from dataclasses import replace

import pytest

from edgekv.bench.speed.measure import Outcome, SideRun, decode_rate, take_turns
from edgekv.bench.workload import Workload
from edgekv.errors import EngineFailed

WORKLOAD = Workload(lengths=(4, 6), new_tokens=12, reps=3)
PROMPTS = [[1] * 4, [2] * 6]


def steps(first_ms, step_ms, num_tokens):
    return tuple(first_ms + step_ms * i for i in range(num_tokens))


def sample(ttft_ms=(10.0, 30.0), step_ms=2.0, num_tokens=5, tokens=((1, 2), (3, 4)), warm=()):
    return SideRun(
        num_prompt_tokens=60,
        ttft_ms=ttft_ms,
        warm_ttft_ms=warm,
        cold_ms=tuple(steps(t, step_ms, num_tokens) for t in ttft_ms),
        decode_ms=(steps(0.0, step_ms, num_tokens),) * 2,
        peak_memory_bytes=1000,
        tokens=tokens,
    )


class FakeSide:
    def __init__(self, name, log, samples=None, fails_at=()):
        self.name = name
        self.log = log
        self.samples = samples
        self.fails_at = fails_at
        self.num_runs = 0

    def run(self, prompts, new_tokens):
        assert prompts is PROMPTS
        self.log.append((self.name, new_tokens))
        self.num_runs += 1
        if self.num_runs - 1 in self.fails_at:
            raise EngineFailed(f"{self.name} broke")
        return self.samples[self.num_runs - 1] if self.samples else sample()


def test_gaps_between_tokens():
    run = replace(sample(), decode_ms=((5.0, 7.0, 8.0, 12.0),), cold_ms=((5.0,),))
    figures = run.figures()
    assert (figures["tbt_p50_ms"], figures["tbt_max_ms"]) == (2.0, 4.0)
    assert figures["cold_tbt_max_ms"] == 0.0


def test_the_decode_rate_of_sessions_in_step():
    assert decode_rate([(100.0, 110.0, 120.0)] * 4) == pytest.approx(4 * 2 / 0.020)


def test_the_decode_rate_pays_for_steps_that_are_not_shared():
    lines = [(100.0, 110.0, 120.0), (110.0, 120.0, 130.0)]
    assert decode_rate(lines) == pytest.approx(4 / 0.030)


def test_a_run_s_figures():
    figures = sample(warm=(1.0, 3.0)).figures()
    assert figures["ttft_ms_min"] == 10.0
    assert figures["ttft_ms_p50"] == 20.0
    assert figures["ttft_ms_max"] == 30.0
    assert figures["ttft_warm_ms_p50"] == 2.0
    assert figures["prefill_tokens_per_s"] == pytest.approx(2000.0)
    assert figures["e2e_tokens_per_s"] == pytest.approx(10 / 0.038)
    assert figures["decode_tokens_per_s"] == pytest.approx(8 / 0.008)
    assert figures["tbt_p50_ms"] == figures["tbt_max_ms"] == 2.0
    assert sample().figures()["ttft_warm_ms_p50"] is None


def test_sides_take_turns_and_the_warm_up_is_dropped():
    log, turns = [], []
    ours, theirs = FakeSide("a", log), FakeSide("b", log)
    outcome = take_turns([ours.run, theirs.run], PROMPTS, WORKLOAD, lambda: turns.append(len(log)))
    assert [name for name, _ in log] == ["a", "b"] * 4
    assert [new_tokens for _, new_tokens in log] == [8, 8] + [12] * 6
    assert len(outcome.turns) == 3
    assert turns == list(range(1, 9))
    assert outcome.failed == 0


def test_alone_there_is_nothing_to_compare():
    outcome = take_turns([FakeSide("a", []).run], PROMPTS, WORKLOAD, lambda: None)
    assert len(outcome.turns) == 3
    assert outcome.ours("ttft_ms_min") == 10.0
    assert outcome.theirs("ttft_ms_min") is None
    assert outcome.ratio("ttft_ms_min", lower_is_better=True) is None
    assert outcome.agreement() is None
    assert outcome.samples()[0]["theirs"] is None


@pytest.mark.parametrize("culprit", ["a", "b"])
def test_a_pair_that_fails_is_counted_and_not_in_the_figures(culprit):
    sides = {name: FakeSide(name, [], fails_at=(2,) if name == culprit else ()) for name in "ab"}
    outcome = take_turns([side.run for side in sides.values()], PROMPTS, WORKLOAD, lambda: None)
    assert outcome.failed == 1
    assert len(outcome.turns) == 2
    assert outcome.errors == [f"EngineFailed: {culprit} broke"]


def test_a_warm_up_that_fails_is_not_counted_but_told():
    outcome = take_turns([FakeSide("a", [], fails_at=(0,)).run], PROMPTS, WORKLOAD, lambda: None)
    assert outcome.failed == 0
    assert len(outcome.errors) == 1


def test_where_all_failed_there_are_no_figures():
    ours = FakeSide("a", [], fails_at=range(9))
    outcome = take_turns([ours.run, FakeSide("b", []).run], PROMPTS, WORKLOAD, lambda: None)
    assert outcome.failed == 3
    assert outcome.ours("ttft_ms_min") is None
    assert outcome.ratio("ttft_ms_min", lower_is_better=True) is None


def test_ratios_are_medians_over_pairs_and_more_is_better():
    turns = [
        [sample(step_ms=1.0), sample(step_ms=4.0)],  # 4x
        [sample(step_ms=9.0), sample(step_ms=9.0)],  # 1x, on a slow machine
        [sample(step_ms=1.0), sample(step_ms=2.0)],  # 2x
    ]
    outcome = Outcome(turns=turns)
    assert outcome.ratio("decode_tokens_per_s", lower_is_better=False) == pytest.approx(2.0)
    assert outcome.ratio("tbt_p50_ms", lower_is_better=True) == pytest.approx(2.0)


def test_bytes_stay_whole():
    outcome = Outcome(turns=[[sample()]] * 2)
    assert isinstance(outcome.ours("peak_memory_bytes"), int)


def test_agreement_counts_tokens_before_each_session_s_first_difference():
    ours = sample(tokens=((1, 2, 3, 4), (5, 6, 7, 8)))
    assert Outcome(turns=[[ours, ours]]).agreement() == 1.0
    theirs = sample(tokens=((1, 2, 9, 4), (5, 6, 7, 8)))
    assert Outcome(turns=[[ours, theirs]]).agreement() == pytest.approx(6 / 8)
