"""Predicted KV against exact KV, without an engine: identity, chunks, positions, norms."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import FAMILIES, tiny_config, write_folder
from tiny_predictors import fitted, identity, load, random_ids

from edgekv.predict.features import Recorder
from edgekv.predict.forward import ArrayView, predicted_context, run

LENGTH = 40
SINKS, WINDOW = 4, 8


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("model"), tiny_config(request.param))
    return load(folder)


def exact_context(base, ids):
    view = ArrayView()
    return view, run(base, ids, view)


def test_a_base_that_is_its_own_auxiliary_predicts_exactly(base):
    ids = random_ids(LENGTH, 1)
    exact, hidden = exact_context(base, ids)
    view, rows, *_ = predicted_context(base, base, identity(base), ids, sinks=SINKS, window=WINDOW)
    logits = base.logits(hidden[-WINDOW:])
    assert np.abs(np.array(base.logits(rows) - logits)).max() < 1e-4
    for layer in range(base.config.num_layers):
        for ours, theirs in zip(view.arrays[layer], exact.arrays[layer], strict=True):
            assert np.abs(np.array(ours - theirs)).max() < 1e-4


def test_computed_ends_and_lower_layers_are_exact(base):
    ids = random_ids(LENGTH, 2)
    predictor = fitted(base, "self", 1)
    exact, _ = exact_context(base, ids)
    view, *_ = predicted_context(base, base, predictor, ids, sinks=SINKS, window=WINDOW)
    assert mx.allclose(view.arrays[0][0], exact.arrays[0][0], atol=1e-5)
    last = base.config.num_layers - 1
    sinks = [array[:, :SINKS] for array in (view.arrays[last][0], exact.arrays[last][0])]
    assert mx.allclose(*sinks, atol=1e-5)
    middle = [array[:, SINKS:-WINDOW] for array in (view.arrays[last][0], exact.arrays[last][0])]
    assert not mx.allclose(*middle, atol=1e-3)


def test_what_is_predicted_for_a_token_does_not_depend_on_its_position(base):
    """Keys differ by the rotation alone: taken back, they are those of any other position."""
    predictor = fitted(base, "self", 1, neighbours=0)
    layer = base.config.num_layers - 1
    heads, dim = base.config.layers[layer].num_kv_heads, base.config.layers[layer].head_dim
    ids = random_ids(LENGTH, 3)
    recorder = Recorder(predictor.places)
    run(base, ids, ArrayView(), last_layer=1, taps=recorder)
    found = []
    for offset in (0, 100):
        view = ArrayView(offset)
        view.arrays[layer] = (mx.zeros((heads, offset, dim)),) * 2
        predictor.predict(base, recorder.seen, (0, LENGTH), 0, predictor.trail(), view)
        found.append(tuple(array[:, offset:] for array in view.arrays[layer]))
    assert mx.allclose(found[0][1], found[1][1])
    assert not mx.allclose(found[0][0], found[1][0], atol=1e-3)
    norms = [mx.linalg.norm(keys, axis=-1) for keys, _ in found]
    assert mx.allclose(*norms, atol=1e-4)
    # Query-key products see differences of positions only.
    products = [mx.sum(keys[:, :-1] * keys[:, 1:], axis=-1) for keys, _ in found]
    assert mx.allclose(*products, atol=1e-3)
