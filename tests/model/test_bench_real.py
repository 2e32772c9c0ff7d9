"""The benchmark and the self-test on the default model."""

import pytest

from edgekv.bench.selftest import logits
from edgekv.bench.speed.scenarios import decode_workloads, run_scenario
from edgekv.device import profile
from edgekv.models.default_model import DEFAULT_MODEL
from edgekv.models.hub import resolve

pytestmark = [pytest.mark.model, pytest.mark.slow]


def test_both_sides_generate_the_same_tokens():
    workloads = decode_workloads(
        sessions=[2], ragged=(16, 80), lengths=None, prompt_tokens=1, new_tokens=8, reps=1
    )
    rows = run_scenario("decode", DEFAULT_MODEL, workloads, peer="mlx-lm")
    for row in rows:
        assert row["failed"] == 0
        # A tie within rounding may part two sessions; other weights or offsets would part all.
        assert row["token_agreement"] > 0.9


def test_packed_steps_equal_one_shot():
    result = logits.check_model(profile(), resolve(DEFAULT_MODEL), DEFAULT_MODEL)
    assert result.status == "pass", result
