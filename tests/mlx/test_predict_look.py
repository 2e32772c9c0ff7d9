"""Looking twice: what is looked at most, and that it is computed after all."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import FAMILIES, tiny_config, write_folder
from tiny_predictors import fitted, identity, load, random_ids

from edgekv.predict.forward import ArrayView, predicted_context, run
from edgekv.predict.look import Glance, chosen

IDS = random_ids(150, 3)


class TestChoice:
    def test_the_chunks_around_what_is_looked_at_most(self):
        weights = np.zeros(200)
        weights[[61, 62, 130]] = 1.0, 0.8, 0.4
        assert chosen(weights, (4, 168), 0.02) == [(60, 64)]
        # What is around 61 and 62 begins at 59 and ends at 64.
        assert chosen(weights, (4, 168), 0.05) == [(58, 66)]
        assert chosen(weights, (4, 168), 0.085) == [(58, 66), (128, 134)]

    def test_neighbours_are_one_span(self):
        assert chosen(np.ones(100), (0, 100), 1.0) == [(0, 100)]
        # The first two have fewer neighbours to be smoothed with.
        assert chosen(np.ones(100), (0, 100), 0.16) == [(2, 18)]

    @pytest.mark.parametrize("end", [5, 11, 12, 13, 20, 100])
    @pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 1.0])
    def test_spans_are_of_the_span_and_as_many(self, end, share):
        weights = np.random.default_rng(0).random(120)
        spans = chosen(weights, (4, end), share)
        flat = [token for first, last in spans for token in range(first, last)]
        assert flat == sorted(set(flat))
        assert flat[0] >= 4
        assert flat[-1] < end
        assert len(flat) <= share * (end - 4) + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_glance_is_the_attention_of_rows(tmp_path, family):
    decoder = load(write_folder(tmp_path, tiny_config(family), tokenizer=False))
    view = ArrayView()
    run(decoder, IDS, view)
    start = len(IDS) - 8
    weights = glance_at(decoder, view, start, 4)
    assert weights.shape == (4, start + 4)
    assert (weights >= 0).all()
    assert (weights.sum(axis=1) >= 1 - 1e-5).all()
    assert 1 / len(IDS) < weights.max() <= 1 + 1e-5
    windows = [layer.sliding_window for layer in decoder.config.layers]
    for row in range(4):
        alone = glance_at(decoder, view, start + row, 1)[0]
        np.testing.assert_allclose(weights[row, : start + row + 1], alone, atol=1e-5)
        assert not weights[row, start + row + 1 :].any()
        if all(windows):
            assert not alone[: start + row + 1 - max(windows)].any()


def test_a_glance_knows_its_layers(deep):
    decoder, view = load(deep), ArrayView()
    run(decoder, IDS, view)
    every = [glance_at(decoder, view, 100, 1, first_layer=i) for i in (0, 1, 2, 3)]
    means = [4 * every[0] - 3 * every[1], 3 * every[1] - 2 * every[2], 2 * every[2] - every[3]]
    for alone in (*means, every[3]):
        assert alone.sum() >= 1 - 1e-4  # each layer's own heads: a mean over layers


def glance_at(decoder, view, start, num_rows, *, first_layer=0):
    """Where rows look, of a text that is there: they run again."""
    glance = Glance(0, num_rows, first_layer=first_layer)
    run(decoder, IDS[start : start + num_rows], view.copy(start), taps=glance)
    return np.array(glance.weights(decoder, view.at(start)))


def test_who_looks_at_everything_has_exact_kv(deep):
    decoder = load(deep)
    predictor = fitted(decoder, "self", 2)
    exact = ArrayView()
    rows = run(decoder, IDS, exact)
    view, ours, *_ = predicted_context(
        decoder, decoder, predictor, IDS, sinks=4, window=16, look=1.0
    )
    np.testing.assert_allclose(np.array(ours), np.array(rows[-16:]), atol=1e-4)
    for layer in range(decoder.config.num_layers):
        for mine, theirs in zip(view.arrays[layer], exact.arrays[layer], strict=True):
            np.testing.assert_allclose(np.array(mine), np.array(theirs), atol=1e-4)


@pytest.mark.parametrize("kind", ["self", "aux"])
def test_who_looks_twice_is_nearer(deep, kind):
    decoder = load(deep)
    predictor = fitted(decoder, kind, 2)
    found = []
    for look in (0.0, 0.3, 0.6):
        errors = []
        for seed in range(8):
            ids = random_ids(150, seed)
            exact = run(decoder, ids, ArrayView())[-1]
            _, rows, *_ = predicted_context(
                decoder, decoder, predictor, ids, sinks=4, window=16, look=look
            )
            errors.append(float(mx.abs(rows[-1] - exact).mean()))
        found.append(np.mean(errors))
    assert found[0] > found[1] > found[2]


def test_what_is_exact_stays_so(deep):
    decoder = load(deep)
    plain, once, *_ = predicted_context(
        decoder, decoder, identity(decoder), IDS, sinks=4, window=16
    )
    _, twice, *_ = predicted_context(
        decoder, decoder, identity(decoder), IDS, sinks=4, window=16, look=0.1
    )
    np.testing.assert_allclose(np.array(once), np.array(twice), atol=1e-4)
    assert plain.offset == len(IDS)
