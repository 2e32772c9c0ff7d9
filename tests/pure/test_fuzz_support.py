"""The fuzzers' harness: one seed in every run, many where time is given, and a seed finds again."""

import random

import fuzz
import pytest
from hypothesis import strategies as st


@pytest.fixture
def step():
    return 1


@pytest.fixture
def hours(monkeypatch):
    """Given a second, of which each look at the clock takes a tenth."""
    now_s = iter(tenth / 10 for tenth in range(100))
    monkeypatch.setattr(fuzz, "monotonic", lambda: next(now_s))
    monkeypatch.setenv("EDGEKV_FUZZ_SECONDS", "1")


def test_one_seed_where_no_time_is_given(monkeypatch):
    monkeypatch.delenv("EDGEKV_FUZZ_SECONDS", raising=False)
    monkeypatch.delenv("EDGEKV_FUZZ_SEED", raising=False)
    seeds = []
    fuzz.for_each_seed(seeds.append)
    assert seeds == [0]


def test_one_seed_after_the_other_until_the_time_is_over(monkeypatch, hours, capsys):
    monkeypatch.setenv("EDGEKV_FUZZ_SEED", "7")
    seeds = []
    fuzz.for_each_seed(seeds.append, name="it")
    assert seeds == list(range(7, 17))
    assert "it: seeds 7 to 16; go on with EDGEKV_FUZZ_SEED=17" in capsys.readouterr().out


def test_without_a_seed_each_run_begins_with_another(hours, monkeypatch):
    monkeypatch.delenv("EDGEKV_FUZZ_SEED", raising=False)
    monkeypatch.setattr(fuzz, "_random_seed", lambda: 1234)
    seeds = []
    fuzz.for_each_seed(seeds.append)
    assert seeds[0] == 1234


@fuzz.fuzz(examples=20, number=st.integers(0, 9))
def test_examples_and_fixtures_meet(number, step):
    assert 0 <= number <= 9
    assert step == 1


def test_a_finding_names_a_seed_that_finds_it_again(monkeypatch):
    monkeypatch.setenv("EDGEKV_FUZZ_SEED", str(random.randrange(1 << 20)))

    @fuzz.fuzz(examples=50, number=st.integers(0, 1 << 30))
    def find(number):
        assert number < 1000

    with pytest.raises(AssertionError) as first:
        find()
    (note,) = [note for note in first.value.__notes__ if "EDGEKV_FUZZ_SEED" in note]
    monkeypatch.setenv("EDGEKV_FUZZ_SEED", note.split("=")[1])
    with pytest.raises(AssertionError, match="assert 1000 < 1000"):  # as small as it gets
        find()
