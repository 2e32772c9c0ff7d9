"""The cost model learns what steps take, and cannot be driven out of its mind."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.sched.cost import EMPTY_STEP, CostModel, StepShape


def true_ms(shape: StepShape) -> float:
    return 8.0 + 0.15 * shape.num_rows + 0.003 * shape.num_pairs / 1000


def random_shape(source: random.Random) -> StepShape:
    """Some decode rows, and now and then a chunk of a prompt."""
    shape = EMPTY_STEP
    for _ in range(source.randint(1, 8)):
        shape = shape.plus(1, source.randint(1, 4000))
    if source.random() < 0.3:
        shape = shape.plus(source.randint(8, 256), source.randint(0, 3000))
    return shape


def decode_shape(offset: int, num_sessions: int = 4) -> StepShape:
    shape = EMPTY_STEP
    for _ in range(num_sessions):
        shape = shape.plus(1, offset)
    return shape


def assert_sane(model: CostModel) -> None:
    assert all(math.isfinite(w) and w >= 0 for w in model.weights)
    assert 0 < model.drift < 10
    for shape in (EMPTY_STEP, decode_shape(100), StepShape(num_rows=2048, num_pairs=2048**2)):
        assert 0 <= model.step_ms(shape) < 1e7


def trained(num_steps: int, seed: int = 0) -> CostModel:
    source, model = random.Random(seed), CostModel()
    for _ in range(num_steps):
        shape = random_shape(source)
        model = model.observe(shape, true_ms(shape) * source.uniform(0.97, 1.03))
    return model


PROBES = [decode_shape(500, 1), decode_shape(2000, 8), decode_shape(10).plus(256, 1000)]


def test_shapes_add_up():
    shape = EMPTY_STEP.plus(3, 10).plus(1, 5)
    assert (shape.num_rows, shape.num_pairs) == (4, 3 * 13 + 6)


def test_it_converges_on_linear_data():
    model = trained(300)
    for probe in PROBES:
        assert model.step_ms(probe) == pytest.approx(true_ms(probe), rel=0.1)


def test_it_is_of_use_after_a_few_steps():
    model = trained(12)
    for probe in PROBES:
        assert true_ms(probe) / 2 < model.step_ms(probe) < true_ms(probe) * 2


def test_one_interrupted_step_says_little():
    """The machine slept, or another process took it: the next plan must not be timid for it."""
    model = trained(100)
    for probe in PROBES:
        shaken = model.observe(probe, 60_000.0)
        assert shaken.step_ms(probe) < 2 * true_ms(probe)
        for _ in range(10):
            shaken = shaken.observe(probe, true_ms(probe))
        assert shaken.step_ms(probe) == pytest.approx(true_ms(probe), rel=0.15)


def test_a_machine_that_gets_slower_is_followed():
    source, model = random.Random(1), trained(100)
    for _ in range(40):
        shape = random_shape(source)
        model = model.observe(shape, 2.5 * true_ms(shape))
    for probe in PROBES:
        assert model.step_ms(probe) == pytest.approx(2.5 * true_ms(probe), rel=0.35)


@pytest.mark.slow
def test_an_hour_of_decoding_does_not_wash_out_prefill():
    model = trained(100)
    chunk = EMPTY_STEP.plus(256, 1000)
    for step in range(2_000):
        shape = decode_shape(300 + step % 700)
        model = model.observe(shape, true_ms(shape))
    assert model.step_ms(chunk) == pytest.approx(true_ms(chunk), rel=0.25)
    assert_sane(model)


@pytest.mark.slow
def test_constant_shapes_for_ten_thousand_steps():
    model, shape = CostModel(), decode_shape(512)
    source = random.Random(2)
    for step in range(10_000):
        model = model.observe(shape, 7.0 * source.uniform(0.9, 1.1))
        if step % 500 == 0:
            assert_sane(model)
    assert model.step_ms(shape) == pytest.approx(7.0, rel=0.1)
    assert model.step_ms(EMPTY_STEP.plus(256, 0)) < 5_000


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 4096),
            st.integers(0, 100_000),
            st.floats(0, 1e7) | st.sampled_from([0.0, 1e-9, 1e9]),
        ),
        max_size=30,
    )
)
def test_any_observations_leave_it_sane(observations):
    model = CostModel()
    for num_rows, offset, ms in observations:
        model = model.observe(EMPTY_STEP.plus(num_rows, offset), ms)
    assert all(math.isfinite(w) and w >= 0 for w in model.weights)
    assert math.isfinite(model.drift)
    assert model.drift > 0
    assert math.isfinite(model.step_ms(StepShape(num_rows=4096, num_pairs=1 << 30)))


def after(times):
    shape = EMPTY_STEP.plus(8, 500)
    model = CostModel()
    for ms in times:
        model = model.observe(shape, ms)
    return model


def test_the_spread_is_what_one_step_in_twenty_was_late_by():
    draw = random.Random(3)
    steady = after([50.0] * 400)
    noisy = after([50.0 * draw.uniform(0.9, 1.1) for _ in range(400)])
    wild = after([50.0 * draw.uniform(0.2, 4.0) for _ in range(400)])
    assert steady.spread == 1.0
    assert 1.02 < noisy.spread < 1.2
    assert noisy.spread < wild.spread <= 1.3


def test_what_slows_down_a_moment_is_not_how_steps_usually_are():
    one, many = EMPTY_STEP.plus(1, 500), EMPTY_STEP.plus(64, 500)
    model = CostModel()
    for _ in range(50):
        model = model.observe(one, 40.0).observe(many, 100.0)
    usual_ms = model.undisturbed_ms(one)
    for _ in range(3):  # twice as slow, but fewer than half of the steps that are remembered
        model = model.observe(many, 200.0)
    assert model.step_ms(one) > 1.2 * usual_ms
    assert model.undisturbed_ms(one) < 1.1 * usual_ms


class TestRowsWithin:
    MODEL = CostModel(weights=(8.0, 0.15, 0.003))

    @settings(max_examples=200, derandomize=True, deadline=None)
    @given(
        budget_ms=st.floats(0, 500),
        num_decoding=st.integers(0, 16),
        offset=st.integers(0, 10_000),
        rows_max=st.integers(0, 512),
    )
    def test_it_is_the_most_that_fits(self, budget_ms, num_decoding, offset, rows_max):
        base = decode_shape(1000, num_decoding)
        rows = self.MODEL.rows_within(budget_ms, lambda n: base.plus(n, offset), rows_max)
        assert 0 <= rows <= rows_max
        if rows:
            assert self.MODEL.step_ms(base.plus(rows, offset)) <= budget_ms
        if rows < rows_max:
            assert self.MODEL.step_ms(base.plus(rows + 1, offset)) > budget_ms

    def test_more_budget_never_gives_fewer_rows(self):
        base = decode_shape(1000)
        rows = [
            self.MODEL.rows_within(budget_ms, lambda n: base.plus(n, 500), 512)
            for budget_ms in range(0, 200, 5)
        ]
        assert rows == sorted(rows)
        assert rows[0] == 0
        assert rows[-1] == 512

    def test_more_company_and_longer_context_never_give_more_rows(self):
        def within(num_decoding: int, offset: int) -> int:
            base = decode_shape(1000, num_decoding)
            return self.MODEL.rows_within(40.0, lambda n: base.plus(n, offset), 512)

        by_company = [within(n, 0) for n in range(0, 64, 4)]
        by_offset = [within(4, offset) for offset in range(0, 20_000, 1000)]
        assert by_company == sorted(by_company, reverse=True)
        assert by_offset == sorted(by_offset, reverse=True)
        assert by_company[0] > by_company[-1]
        assert by_offset[0] > by_offset[-1]


def test_what_passes_between_steps_is_taken_from_what_a_step_may_take():
    rng = random.Random(5)
    model = CostModel(spread=1.0)
    assert model.may_take_ms(100.0) == 100.0
    passed = [rng.choice((1.0, 1.0, 1.0, 9.0)) for _ in range(600)]
    for ms in passed:
        model = model.observe_between(ms)
    assert 8.0 < model.between_ms < 11.5  # one in four took 9 ms: more than one in twenty
    assert model.may_take_ms(100.0) == 100.0 - model.between_ms
    for _ in range(600):
        model = model.observe_between(0.1)
    assert model.between_ms < 2.1
    assert replace(model, between_ms=80.0).may_take_ms(100.0) == 75.0  # a quarter at most
