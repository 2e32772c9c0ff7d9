"""Thin layers: fitted, saved, trained, and beside exact rows in one step."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from stepping import FUSED_PROFILE
from threads_group import run_ranks
from tiny_families import FAMILY_CONFIGS, write_family
from tiny_models import FAMILIES, random_tensors, tiny_config, write_folder
from tiny_predictors import fitted_thin, load, random_ids, write_predictor
from tiny_quantised import SPECS, quantised

from edgekv.errors import ConfigError, PredictorCorrupt, UnsupportedModel
from edgekv.models.attention import Segment
from edgekv.models.checkpoint import Dense, Quantised
from edgekv.models.config import prompt_macs
from edgekv.models.linear import expanded, make_linear
from edgekv.models.open_model import open_decoder, open_model
from edgekv.predict.artifact import load_predictor
from edgekv.predict.fit.finetune import Finetune, Piece
from edgekv.predict.fit.run import FitOptions, run_fit
from edgekv.predict.fit.shapes import FeatureOptions
from edgekv.predict.fit.thin import ThinOptions, fit_thin
from edgekv.predict.fit.trial import Trial
from edgekv.predict.forward import ArrayView, predicted_context, run
from edgekv.predict.opening import open_predictor
from edgekv.predict.tensor_file import load_safetensors, write_safetensors
from edgekv.predict.thin import Rows, run_thin

LENGTH, SINKS, WINDOW = 40, 4, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"), tiny_config("llama", num_hidden_layers=4))


@pytest.fixture(scope="module")
def base(folder):
    return load(folder)


def exact_view(base, ids):
    view = ArrayView()
    run(base, ids, view)
    return view


def distance(ours, theirs, layer, start=0, end=None):
    return max(
        float(mx.abs(a[:, start:end] - b[:, start:end]).max())
        for a, b in zip(ours.arrays[layer], theirs.arrays[layer], strict=True)
    )


BIASED = [("llama", {"mlp_bias": True, "attention_bias": True})]


@pytest.mark.parametrize(("family", "more"), [*((name, {}) for name in FAMILIES), *BIASED])
def test_with_all_neurons_and_attention_what_is_predicted_is_exact(family, more, tmp_path):
    base = load(write_folder(tmp_path / "model", tiny_config(family, **more)))
    layers, size = base.config.num_layers, base.config.layers[-1].ffn_size
    predictor = fitted_thin(base, 1, attending=layers, neurons=size)
    ids = random_ids(LENGTH, 1)
    exact = exact_view(base, ids)
    text = predicted_context(base, base, predictor, ids, sinks=SINKS, window=WINDOW)
    for layer in range(layers):
        # What a norm makes of an MLP is no linear map of its neurons.
        if base.weights.layers[layer].ffn_post_norm is None:
            assert distance(text.view, exact, layer) < 0.02
    fewer = fitted_thin(base, 1, attending=0, neurons=4)
    text = predicted_context(base, base, fewer, ids, sinks=SINKS, window=WINDOW)
    assert distance(text.view, exact, layers - 1, 0, SINKS) < 1e-5
    assert distance(text.view, exact, layers - 1, SINKS, -WINDOW) > 0.02


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_biases_cost_weights_no_precision(dtype):
    """A product of ones and nothing less the bias would lose small weights behind a large one."""
    weight = mx.random.normal((24, 32), key=mx.random.key(0)).astype(dtype) * 0.03
    bias = mx.full((24,), 50.0, dtype=dtype)
    parts = [Dense(weight[:16]), Dense(weight[16:])]
    matrix, found = expanded(make_linear(parts, [bias[:16], bias[16:]]), dtype)
    assert mx.array_equal(matrix, weight.T)
    assert mx.array_equal(found, bias)
    matrix, found = expanded(make_linear(parts, None), dtype)
    assert mx.array_equal(matrix, weight.T)
    assert not found.any()


def test_what_is_kept_quantised_or_in_unlike_parts_is_expanded():
    weight = mx.random.normal((24, 64), key=mx.random.key(1))
    quantised = Quantised(*mx.quantize(weight[8:], 32, 4), 32, 4)
    linear = make_linear([Dense(weight[:8]), quantised], [mx.ones(8), mx.zeros(16)])
    matrix, bias = expanded(linear, mx.float32)
    x = mx.random.normal((3, 64), key=mx.random.key(2))
    assert mx.allclose(x @ matrix + bias, linear(x), atol=1e-4)


@pytest.mark.parametrize(("attending", "heads"), [(0, None), (1, None), (3, 2), (3, None)])
def test_beside_exact_rows_in_one_step_as_one_after_the_other(base, attending, heads):
    """Two texts: sinks, predicted rows and a window of each, and predicted rows in two chunks."""
    predictor = fitted_thin(base, 1, attending=attending, heads=heads, neurons=8)
    texts = [random_ids(LENGTH, 5), random_ids(LENGTH - 9, 6)]
    views, exact, thin = [], [], []
    for ids in texts:
        view, end = exact_view(base, ids), len(ids) - WINDOW  # what it holds is overwritten
        hidden = run(base, ids, ArrayView(), last_layer=1)
        exact += [
            (hidden[a:b], Segment(view.at(a), b - a)) for a, b in ((0, SINKS), (end, len(ids)))
        ]
        middle = (SINKS + end) // 2
        spans = ((SINKS, middle), (middle, end))
        thin.append([(hidden[a:b], Segment(view.at(a), b - a)) for a, b in spans])
        views.append(view)
    joined = [
        Rows(mx.concatenate([rows for rows, _ in each]), [segment for _, segment in each])
        for each in (exact, [*thin[0], *thin[1]])
    ]
    last = run_thin(base, predictor.thin, 1, *joined)
    at = 0
    for ids, view in zip(texts, views, strict=True):
        slow = predicted_context(base, base, predictor, ids, sinks=SINKS, window=WINDOW)
        for layer in range(base.config.num_layers):
            assert distance(view, slow.view, layer) < 1e-4
        assert mx.allclose(last[at + SINKS : at + SINKS + WINDOW], slow.rows, atol=1e-4)
        at += SINKS + WINDOW


@pytest.mark.parametrize("family", FAMILIES)
def test_of_an_attention_the_heads_stay_that_a_map_does_not_know(family, tmp_path):
    """All but one are silenced: that one is kept, unless norms are taken over all."""
    base = load(write_folder(tmp_path / "model", tiny_config(family)))
    layer = base.config.layers[1]
    loud = layer.num_heads - 1
    mask = mx.repeat(mx.arange(layer.num_heads) == loud, layer.head_dim)
    attention = base.attention(1)
    out = replace(attention.weights.out, split=None)
    out = replace(out, matrix=out.matrix * mask[:, None])
    attention.weights = replace(attention.weights, out=out)
    heads = fitted_thin(base, 1, attending=1, heads=1, neurons=8).thin[0].heads
    whole = base.config.qk_norm == "whole"
    assert heads == (tuple(range(layer.num_heads)) if whole else (loud,))


@pytest.mark.parametrize("heads", [1, 3])
def test_ranks_that_have_more_or_fewer_neurons_and_heads_predict_the_same(tmp_path, heads):
    """Of a quantised MLP two of four have twice as many, and one or three a head that is kept."""
    config = tiny_config(
        "llama", num_hidden_layers=4, head_dim=32, num_key_value_heads=4, intermediate_size=192
    )
    config, stored = quantised(config, random_tensors(config), SPECS["4 bits"])
    folder = write_folder(tmp_path / "model", config, tensors=stored)
    ids, base = random_ids(LENGTH, 8), open_decoder(folder, FUSED_PROFILE)
    predictor = fitted_thin(base, 1, attending=2, heads=heads, neurons=24)
    alone = predicted_context(base, base, predictor, ids, sinks=SINKS, window=WINDOW)

    def predicted(group):
        part = open_decoder(folder, FUSED_PROFILE, group=group)
        ours = predictor.part_for(part)
        text = predicted_context(part, part, ours, ids, sinks=SINKS, window=WINDOW)
        return part.config.layers[1].ffn_size, len(ours.thin[0].cut.heads), np.array(text.rows)

    found = run_ranks(4, predicted)
    assert sorted(size for size, _, _ in found) == [32, 32, 64, 64]
    assert sum(count for _, count, _ in found) == heads
    for _, _, rows in found:
        assert np.allclose(rows, np.array(alone.rows), atol=1e-4)


def test_fewer_multiplications_are_counted_the_less_is_kept(base):
    config = base.config
    exact = prompt_macs(config, 0, 100)
    found = [
        prompt_macs(config, 0, 100, last_layer=1) + predictor.num_macs(config, 0, 100)
        for predictor in (
            fitted_thin(base, 1, attending=3, neurons=8),
            fitted_thin(base, 1, attending=3, heads=2, neurons=8),
            fitted_thin(base, 1, attending=1, neurons=8),
            fitted_thin(base, 1, attending=1, neurons=2),
            fitted_thin(base, 1, attending=0, neurons=2),
        )
    ]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 5
    assert found[-1] < exact


def test_training_lowers_the_loss(base):
    predictor = fitted_thin(base, 1, attending=2, neurons=8)
    losses = []
    training = Finetune(Trial(base=base, aux=base, window=8), predictor, 8, learning_rate=1e-2)
    trained = training.train([Piece(random_ids(64, 7))] * 8, lambda _, loss: losses.append(loss))
    assert losses[-1] < losses[0]
    assert not mx.allclose(trained.thin[0].weight, predictor.thin[0].weight)


# --- as a file ---


def test_a_file_says_what_was_saved(base, folder, tmp_path):
    predictor = fitted_thin(base, 2, attending=1, neurons=8)
    path = write_predictor(tmp_path / "thin.safetensors", predictor, folder)
    opened = open_predictor(open_model(str(folder)), path).predictor
    for ours, theirs in zip(opened.thin, predictor.thin, strict=True):
        assert (ours.heads, ours.neurons) == (theirs.heads, theirs.neurons)
        assert mx.allclose(ours.weight, theirs.weight, atol=1e-3)
        assert ours.cut is not None
    with path.open("rb") as file:  # no weights of the model are in it
        assert file.seek(0, 2) < 2.5 * sum(a.size for a in predictor.arrays.values()) + 4096


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda thin: thin.pop(), "1 thin layers in place of 2"),
        (lambda thin: thin[0]["neurons"].__setitem__(0, 10_000), "thin layer 0: not neurons of"),
        (lambda thin: thin[0]["neurons"].pop(), "thin layer 0: weight"),
        (lambda thin: thin[0].update(heads=[99]), "thin layer 0: not heads of"),
        (lambda thin: thin[0].update(heads=[0, 0]), "thin layer 0: not heads of"),
        (lambda thin: thin[0]["heads"].reverse(), "thin layer 0: not heads of"),
        (lambda thin: thin[1].update(heads=True), "thin|bool"),
        (lambda thin: thin[1].pop("heads"), "heads"),
        (lambda thin: thin[1].update(neurons=["1"]), "whole numbers"),
        (lambda thin: thin[1].pop("neurons"), "neurons"),
        (lambda thin: thin.append(thin[0]), "thin.2.weight"),
    ],
)
def test_a_damaged_file_is_refused(base, folder, tmp_path, change, said):
    path = tmp_path / "thin.safetensors"
    write_predictor(path, fitted_thin(base, 2, attending=1, neurons=8), folder)
    tensors, metadata = load_safetensors(path)
    thin = json.loads(metadata["thin"])
    change(thin)
    mx.eval(tensors)
    write_safetensors(path, tensors, {**metadata, "thin": json.dumps(thin)})
    with pytest.raises(PredictorCorrupt, match=said):
        open_predictor(open_model(str(folder)), path)


def test_thin_layers_of_another_model_than_the_base_are_refused(base, folder, tmp_path):
    path = tmp_path / "thin.safetensors"
    predictor = replace(fitted_thin(base, 2, attending=1, neurons=8), kind="aux")
    write_predictor(path, predictor, folder)
    with pytest.raises(PredictorCorrupt, match="thin layers are the base's own"):
        open_predictor(open_model(str(folder)), path)


def test_numbers_that_are_not_finite_are_refused(base, folder, tmp_path):
    path = tmp_path / "thin.safetensors"
    write_predictor(path, fitted_thin(base, 2, attending=1, neurons=8), folder)
    tensors, metadata = load_safetensors(path)
    tensors["thin.0.bias"] = tensors["thin.0.bias"] * float("nan")
    mx.eval(tensors)
    write_safetensors(path, tensors, metadata)
    with pytest.raises(PredictorCorrupt, match="not finite"):
        load_predictor(path, mx.float32)


def test_layers_with_more_than_an_mlp_are_refused(tmp_path):
    folder = write_family(tmp_path / "model", FAMILY_CONFIGS["qwen3_moe"])
    options = FitOptions(
        base=str(folder),
        out=tmp_path / "p.safetensors",
        self_depth=1,
        thin=ThinOptions(),
        num_tokens=32 * 512,
    )
    with pytest.raises(UnsupportedModel, match="cannot be made thin"):
        run_fit(options, lambda *_: None)


def test_text_that_does_not_fit_in_memory_is_refused_before_it_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("edgekv.predict.fit.run.fit_thin", lambda *_: pytest.fail("it ran"))
    options = FitOptions(
        base=str(folder),
        out=tmp_path / "p.safetensors",
        self_depth=1,
        thin=ThinOptions(attending=1, neurons=8),
        num_tokens=1 << 24,
        memory_gib=1.0,
    )
    with pytest.raises(ConfigError, match="16777216 tokens are between two layers takes"):
        run_fit(options, lambda *_: None)


def test_what_thin_layers_have_not_is_refused(tmp_path):
    options = FitOptions(base="m", out=tmp_path / "p", self_depth=1, thin=ThinOptions())
    for wrong in (
        {"self_depth": None, "aux": "other"},
        {"rank": 8},
        {"features": FeatureOptions(neighbours=3)},
    ):
        with pytest.raises(ConfigError, match="thin layers"):
            replace(options, **wrong)
    for wrong in ({"neurons": -1}, {"heads": 0}, {"attending": 0, "heads": 1}):
        with pytest.raises(ConfigError):
            ThinOptions(**wrong)
    with pytest.raises(ConfigError, match="or thin layers"):
        FitOptions(base="m", out=tmp_path / "p", start="q", thin=ThinOptions(), finetune=1)


@pytest.mark.parametrize(
    ("family", "wrong", "said"),
    [
        ("llama", {"attending": 4}, "thin is 4"),
        ("llama", {"attending": 1, "heads": 99}, "heads is 99"),
        ("llama", {"attending": 1, "neurons": 1 << 16}, "neurons is 65536"),
        ("olmo3", {"attending": 1, "heads": 1}, "norms queries over all heads"),
    ],
)
def test_more_than_there_is_cannot_stay(tmp_path, family, wrong, said):
    folder = write_family(tmp_path / "model", FAMILY_CONFIGS.get(family, tiny_config("llama")))
    options = FitOptions(
        base=str(folder),
        out=tmp_path / "p.safetensors",
        self_depth=1,
        thin=ThinOptions(**({"neurons": 8} | wrong)),
    )
    with pytest.raises(ConfigError, match=said):
        run_fit(options, lambda *_: None)


def test_more_text_than_runs_at_once_and_more_neurons_than_there_are(base):
    pieces = [random_ids(32, seed) for seed in range(11)]
    done = []
    predictor = fit_thin(
        base,
        1,
        ThinOptions(attending=2, neurons=1 << 16),
        pieces,
        lambda *what: done.append(what),
    )
    running = [("running text", pieces, 11) for pieces in (0, 8)]
    assert done == [*running, *(("fitting layers", layer, 4) for layer in (2, 3, 4))]
    every = tuple(range(base.config.layers[1].num_heads))
    assert [layer.heads for layer in predictor.thin] == [every, every, ()]
    size = base.config.layers[1].ffn_size
    assert predictor.thin[0].neurons == tuple(range(size))
    assert np.isfinite(np.array(predictor.thin[2].weight)).all()
