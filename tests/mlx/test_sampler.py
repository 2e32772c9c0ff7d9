"""Choice of tokens: what filters leave, how often, and that nothing else in a step matters."""

import mlx.core as mx
import numpy as np
import pytest

from edgekv.config import Sampling
from edgekv.engine.sampler import RowSampling, gumbel_noise, sample

PROBABILITIES = np.array([0.40, 0.25, 0.15, 0.10, 0.06, 0.04])
LOGITS = mx.array(np.log(PROBABILITIES) + 3.0).astype(mx.float32)
NUM_DRAWS = 500


def draw(num_draws=NUM_DRAWS, logits=LOGITS, seen=None, counts=None, **params):
    """How often each token is drawn, as fractions."""
    options = Sampling(**({"temperature": 1.0, "seed": 7} | params))
    rows = [
        RowSampling(params=options, position=position, seen=seen, counts=counts)
        for position in range(num_draws)
    ]
    tokens = sample(mx.repeat(logits[None], num_draws, axis=0), rows).tokens
    return np.bincount(np.array(tokens), minlength=logits.size) / num_draws


def assert_drawn(fractions, expected):
    """Within five standard deviations, and never what has no probability."""
    expected = np.asarray(expected) / np.sum(expected)
    deviation = np.sqrt(expected * (1 - expected) / NUM_DRAWS)
    assert (np.abs(fractions - expected) <= 5 * deviation).all()
    assert (fractions[expected == 0] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"temperature": 2.0}, PROBABILITIES**0.5),
        ({"top_k": 2}, [0.40, 0.25, 0, 0, 0, 0]),
        ({"top_k": 6}, PROBABILITIES),
        ({"top_k": 99}, PROBABILITIES),
        ({"top_p": 0.70}, [0.40, 0.25, 0.15, 0, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0, 0]),
        ({"top_p": 0.0}, [1, 0, 0, 0, 0, 0]),
        ({"min_p": 0.3}, [0.40, 0.25, 0.15, 0, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0, 0]),
        ({"top_k": 4, "top_p": 0.6, "min_p": 0.1}, [0.40, 0.25, 0, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should_be(params, expected):
    assert_drawn(draw(**params), expected)


@pytest.mark.slow
def test_the_repetition_penalty_makes_seen_tokens_less_likely():
    seen = mx.array([True, False, False, False, True, False])
    logits = mx.array([2.0, 1.0, 0.5, 0.0, -1.0, -0.5])
    penalised = np.exp([1.0, 1.0, 0.5, 0.0, -2.0, -0.5])
    assert_drawn(draw(logits=logits, seen=seen, repetition_penalty=2.0), penalised)


@pytest.mark.slow
def test_tokens_that_were_said_are_less_likely_by_how_often():
    counts = mx.array([2.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    logits = mx.array([2.0, 1.0, 0.5, 0.0, -1.0, -0.5])
    fractions = draw(logits=logits, counts=counts, presence_penalty=0.5, frequency_penalty=0.25)
    assert_drawn(fractions, np.exp([1.0, 1.0, 0.5, 0.0, -1.75, -0.5]))


def test_greedy_takes_the_likeliest():
    logits = mx.array([[1.0, 3.0, 2.0], [5.0, 4.0, 4.5]])
    rows = [RowSampling(params=Sampling(seed=i), position=i) for i in range(2)]
    sampled = sample(logits, rows)
    assert sampled.tokens.tolist() == [1, 0]
    assert sampled.chosen.tolist() == [3.0, 5.0]
    assert sampled.logprobs == {}


def test_rows_of_all_kinds_go_together():
    seen = mx.array([False, True, False])
    rows = [
        RowSampling(params=Sampling(), position=0),
        RowSampling(params=Sampling(repetition_penalty=9.0), position=0, seen=seen),
        RowSampling(params=Sampling(temperature=1.0, top_k=1), position=0),
        RowSampling(params=Sampling(logprobs=2), position=0),
        RowSampling(params=Sampling(presence_penalty=1.5), position=0, counts=1.0 * seen),
    ]
    sampled = sample(mx.array([[1.0, 3.0, 2.0]] * 5), rows)
    assert sampled.tokens.tolist() == [1, 2, 1, 1, 2]
    assert list(sampled.logprobs) == [3]
    assert sampled.logprobs[3].top_ids.tolist() == [1, 2]
    assert sampled.margins == {}


def margins_of(logits, params):
    rows = [RowSampling(params=params, position=p, margin=True) for p in range(len(logits))]
    sampled = sample(mx.array(logits), rows)
    assert list(sampled.margins) == list(range(len(logits)))
    return sampled.tokens.tolist(), np.array([m.item() for m in sampled.margins.values()])


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_a_margin_is_how_far_a_logit_must_fall_for_another_token(temperature):
    params = Sampling(temperature=temperature, seed=3)
    logits = 3 * np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32)
    tokens, margins = margins_of(logits, params)
    assert (margins > 0).all()
    for by, same in ((0.99, 50), (1.01, 0)):
        moved = logits.copy()
        moved[range(50), tokens] -= by * margins
        again, _ = margins_of(moved, params)
        assert sum(a == b for a, b in zip(tokens, again, strict=True)) == same


def test_a_token_that_was_ruled_out_counts_for_the_margin():
    logits = np.tile(np.float32([1.0, 0.9, 0.0]), (50, 1))
    free, expected = margins_of(logits, Sampling(temperature=1.0, seed=3))
    tokens, margins = margins_of(logits, Sampling(temperature=1.0, seed=3, top_k=1))
    assert tokens == [0] * 50
    first = np.array(free) == 0
    np.testing.assert_allclose(margins[first], expected[first], rtol=1e-5)
    assert 0 < (~first).sum() == (margins < 0).sum()


@pytest.mark.parametrize(
    "params",
    [{}, {"top_p": 0.9}, {"top_k": 50, "min_p": 0.01}, {"temperature": 0.3, "top_p": 0.5}],
)
def test_what_a_steps_shape_does_to_logits_changes_no_token(params):
    generator = np.random.default_rng(0)
    logits = (3 * generator.standard_normal((200, 500))).astype(np.float32)
    moved = logits + 2e-6 * generator.standard_normal(logits.shape).astype(np.float32)
    options = Sampling(**({"temperature": 1.0, "seed": 1} | params))
    rows = [RowSampling(params=options, position=i) for i in range(200)]
    tokens = sample(mx.array(logits), rows).tokens
    others = sample(mx.array(moved[::-1].copy()), rows[::-1]).tokens
    assert tokens.tolist() == others.tolist()[::-1]


def test_noise_depends_on_seed_and_position_alone():
    def noise(seed, position):
        return np.array(gumbel_noise(seed, position, 64)).tobytes()

    keys = [(seed, position) for seed in (0, 1, 2, 1 << 63, (1 << 64) - 1) for position in range(8)]
    assert len({noise(*key) for key in keys}) == len(keys)
    assert noise(3, 4) == noise(3, 4)


def test_noise_is_gumbels():
    noise = np.array(gumbel_noise(1, 2, 100_000)).astype(np.float64)
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 5 * 1.2825 / np.sqrt(noise.size)
    assert abs(noise.std() - 1.2825) < 0.03


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1e-38, 1e-45, 1e-300, 5e-324])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.5}])
def test_the_lowest_temperatures_take_the_likeliest(temperature, params):
    logits = mx.array([[0.5, 3.0, 2.9999, -1.0], [5e4, 2.0, 4.5, 5.1e4], [-9.0, -3.0, -2.0, -8.0]])
    options = Sampling(temperature=temperature, seed=3, **params)
    rows = [RowSampling(params=options, position=i) for i in range(3)]
    assert sample(logits, rows).tokens.tolist() == [1, 3, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0}, {"temperature": 0.5, "top_k": 2, "top_p": 0.5}]
)
def test_a_row_of_no_numbers_is_told_by_the_logit_of_its_token(value, params):
    logits = mx.array([[1.0, 3.0, 2.0], [value] * 3, [4.0, 1.0, 0.0]])
    rows = [RowSampling(params=Sampling(**params), position=i) for i in range(3)]
    sampled = sample(logits, rows)
    chosen = np.array(sampled.chosen)
    assert np.isfinite(chosen).tolist() == [True, False, True]
    assert chosen[0] == np.array(logits)[0, sampled.tokens[0].item()]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"repetition_penalty": 1.5},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.2},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "logprobs": 2},
    ],
)
def test_one_nan_among_numbers_is_told_wherever_it_stands(params):
    """The CPU's `argmax` takes it; where one does not it is passed over, and nobody is told."""
    random = np.random.default_rng(1)
    logits = random.normal(size=(40, 1000)).astype(np.float32)
    places = [0, 999, *random.integers(1, 999, size=37)]
    logits[np.arange(39), places] = np.nan
    options = Sampling(seed=3, **params)
    seen = mx.zeros((1000,), dtype=mx.bool_) if "repetition_penalty" in params else None
    rows = [RowSampling(params=options, position=i, seen=seen) for i in range(40)]
    chosen = np.array(sample(mx.array(logits), rows).chosen)
    assert np.isfinite(chosen).tolist() == [False] * 39 + [True]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0, 0.25, 0, 0.10, 0.06, 0]),
        ({"top_k": 2}, [0, 0.25, 0, 0.10, 0, 0]),
        ({"top_p": 0.8}, [0, 0.25, 0, 0.10, 0, 0]),
        ({"min_p": 0.3}, [0, 0.25, 0, 0.10, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0, 0]),
    ],
)
def test_filters_see_only_what_is_allowed(params, expected):
    options = Sampling(**({"temperature": 1.0, "seed": 7} | params))
    rows = [RowSampling(params=options, position=i) for i in range(NUM_DRAWS)]
    allowed = mx.repeat(mx.array([[False, True, False, True, True, False]]), NUM_DRAWS, axis=0)
    sampled = sample(mx.repeat(LOGITS[None], NUM_DRAWS, axis=0), rows, allowed)
    assert_drawn(np.bincount(np.array(sampled.tokens), minlength=6) / NUM_DRAWS, expected)
    assert np.isfinite(np.array(sampled.chosen)).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_nothing_is_allowed_the_chosen_logit_is_no_number(temperature):
    row = RowSampling(params=Sampling(temperature=temperature, top_p=0.5), position=0)
    sampled = sample(LOGITS[None], [row], mx.zeros((1, 6), dtype=mx.bool_))
    assert not np.isfinite(np.array(sampled.chosen)).any()


def test_rows_that_are_chosen_apart_are_joined_in_their_places():
    logits = mx.array(np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32))
    rows = [
        RowSampling(params=Sampling(logprobs=i % 3 or None), position=i, margin=i == 3)
        for i in range(5)
    ]
    together = sample(logits, rows)
    first, second = [0, 2, 3], [4, 1]
    apart = [sample(logits[mx.array(part)], [rows[i] for i in part]) for part in (first, second)]
    joined = apart[0].joined(apart[1], first + second)
    assert joined.tokens.tolist() == together.tokens.tolist()
    assert joined.chosen.tolist() == together.chosen.tolist()
    assert joined.logprobs.keys() == together.logprobs.keys()
    for row, logprobs in joined.logprobs.items():
        assert logprobs.top_ids.tolist() == together.logprobs[row].top_ids.tolist()
    assert joined.margins[3].item() == together.margins[3].item()
