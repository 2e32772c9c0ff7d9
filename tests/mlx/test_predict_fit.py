"""Fitting: linear targets are found, rank and ridge do what they say, files come back."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import FAMILIES, tiny_config, write_folder
from tiny_predictors import fitted, identity, load, random_ids, write_predictor

from edgekv.device import profile
from edgekv.errors import ConfigError, PredictorCorrupt, PredictorMismatch
from edgekv.models.config import Fields, prompt_macs
from edgekv.models.families import parse_config
from edgekv.models.open_model import open_decoder, open_model
from edgekv.predict.artifact import (
    as_saved,
    check_made_for,
    load_predictor,
    read_info,
    save_predictor,
)
from edgekv.predict.fit.closed_form import Fit
from edgekv.predict.fit.finetune import Finetune, Piece
from edgekv.predict.fit.importance import Importance
from edgekv.predict.fit.shapes import (
    RANK_MIN,
    FeatureOptions,
    block_shapes,
    mapped_layer,
    usual_rank,
)
from edgekv.predict.fit.solve import Sums, fit_ridge, r2_by_group, reduce_rank
from edgekv.predict.fit.trial import Trial
from edgekv.predict.forward import ArrayView, predicted_context, run
from edgekv.predict.opening import open_pair, open_predictor
from edgekv.predict.predictor import Predictor
from edgekv.predict.prune import kept_layers, pruned, source_layer
from edgekv.predict.tensor_file import load_safetensors


def sums_of(x, y):
    x = np.hstack([x, np.ones((len(x), 1))])
    return Sums(xx=x.T @ x, xy=x.T @ y, yy=(y**2).sum(0))


class TestSolve:
    RNG = np.random.default_rng(0)
    TRUE = RNG.normal(size=(12, 6))
    X = RNG.normal(size=(400, 12)) + 3.0
    Y = X @ TRUE + 7.0

    def test_what_is_linear_is_found_with_its_bias(self):
        sums = sums_of(self.X, self.Y)
        groups = [slice(0, 3), slice(3, 6)]
        weight, _ = fit_ridge(sums, sums, groups)
        assert np.abs(weight[:-1] - self.TRUE).max() < 1e-3
        assert np.abs(weight[-1] - 7.0).max() < 1e-2
        assert min(r2_by_group(sums, weight, groups)) > 0.999

    def test_noise_takes_the_larger_ridge(self):
        rng = np.random.default_rng(1)
        x, held = rng.normal(size=(20, 12)), rng.normal(size=(500, 12))
        y, held_y = rng.normal(size=(20, 2)), rng.normal(size=(500, 2))
        _, ridges = fit_ridge(sums_of(x, y), sums_of(held, held_y), [slice(0, 2)])
        assert ridges == (1e-2,)

    def test_of_a_map_of_rank_three_three_factors_lose_nothing(self):
        low = self.TRUE[:, :3] @ np.random.default_rng(2).normal(size=(3, 6))
        sums = sums_of(self.X, self.X @ low)
        weight, _ = fit_ridge(sums, sums, [slice(0, 6)])
        down, up = reduce_rank(sums, weight, 3, np.ones(6))
        assert down.shape == (12, 3)
        assert np.abs(down @ up - low).max() < 1e-3
        down, up = reduce_rank(sums, weight, 2, np.ones(6))
        bias = sums.xy[-1] / 400 - (sums.xx[-1, :-1] / 400) @ down @ up
        (r2,) = r2_by_group(sums, np.vstack([down @ up, bias]), [slice(0, 6)])
        assert 0.3 < r2 < 0.999

    def test_of_a_large_matrix_the_leading_part_is_found_without_all_of_it(self):
        rng = np.random.default_rng(3)
        x = rng.normal(size=(2000, 80)) * np.linspace(3, 0.1, 80)
        true = rng.normal(size=(80, 600)) * np.linspace(2, 0.05, 600)
        y = x @ true
        sums = sums_of(x, y)
        weight = np.vstack([true, np.zeros(600)])
        errors = {}
        for rank in (8, 40):
            down, up = reduce_rank(sums, weight, rank, np.ones(600))
            assert (down.shape, up.shape) == ((80, rank), (rank, 600))
            centred = (x - x.mean(0)) @ true
            _, _, axes = np.linalg.svd(centred, full_matrices=False)
            best = np.square(centred - centred @ axes[:rank].T @ axes[:rank]).sum()
            errors[rank] = np.square(centred - (x - x.mean(0)) @ down @ up).sum() / best
        assert max(errors.values()) < 1.001

    def test_what_matters_more_is_kept(self):
        sums = sums_of(self.X, self.Y)
        weight, _ = fit_ridge(sums, sums, [slice(0, 6)])
        importance = np.array([100.0, 1, 1, 1, 1, 1])
        down, up = reduce_rank(sums, weight, 2, importance)
        errors = np.abs(down @ up - self.TRUE).max(axis=0)
        assert errors[0] < 0.1 * errors[1:].max()


class TestShapes:
    def test_the_papers_layer_map(self):
        # OpenELM 1.1B (28 layers) from 270M (16): the first 12 feed two layers, the rest one.
        mapped = [mapped_layer(layer, 28, 16) for layer in range(28)]
        assert mapped == [*[i // 2 for i in range(24)], 12, 13, 14, 15]
        assert [mapped_layer(layer, 6, 3) for layer in range(6)] == [0, 0, 1, 1, 2, 2]

    @pytest.mark.parametrize("fraction", ["0.25", "0.5", "0.75"])
    def test_pruned_layers_feed_those_near_them(self, fraction):
        kept = kept_layers(fraction, 28)
        assert len(kept) == round(28 * float(fraction))
        for layer in range(28):
            assert abs(kept[source_layer(fraction, layer)] - layer) <= 3
        for place, layer in enumerate(kept):
            assert source_layer(fraction, layer) == place


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"), tiny_config("llama", num_hidden_layers=4))


@pytest.fixture(scope="module")
def base(folder):
    return load(folder)


@pytest.mark.parametrize("family", ["llama", "qwen3", "openelm"])
def test_importance_is_of_every_target_and_relative(family, tmp_path):
    base = load(write_folder(tmp_path / family, tiny_config(family)))
    importance = Importance((), 4)
    run(base, random_ids(40, 0), ArrayView(), taps=importance)
    (shape,) = block_shapes("self", 1, base.config, FeatureOptions())
    found = importance.of(base, shape.targets)
    widths = [
        base.config.layers[t.layer].num_kv_heads * base.config.layers[t.layer].head_dim
        for t in shape.targets
    ]
    assert found.shape == (sum(widths),)
    assert (found > 0).all()
    other = Importance((), 4)
    other.from_arrays(importance.to_arrays())
    assert np.allclose(other.of(base, shape.targets), found, rtol=1e-4)


def error(base, predictor, seed=99):
    ids = random_ids(64, seed)
    exact = ArrayView()
    run(base, ids, exact)
    view, *_ = predicted_context(base, base, predictor, ids, sinks=4, window=8)
    last = base.config.num_layers - 1
    gap = view.arrays[last][1][:, 4:-8] - exact.arrays[last][1][:, 4:-8]
    return float(mx.mean(mx.abs(gap)).item())


def sized(family, hidden, ffn, num_layers, num_heads, num_kv_heads):
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": num_layers}
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    return parse_config(Fields(tiny_config(family, head_dim=64, **sizes, **heads), "config.json"))


def test_the_map_of_a_large_base_takes_a_twentyfifth_of_its_work():
    large = sized("qwen3", 1536, 8960, 28, 24, 4)
    shapes = block_shapes("aux", 24, large, FeatureOptions())
    aux = sized("qwen3", 896, 4864, 24, 14, 2)
    num_features = 24 * 2 * 128 + 5 * 896
    rank = usual_rank(shapes, large, aux)
    macs = rank * (num_features + 28 * 2 * 256)
    assert 0.0399 < macs / prompt_macs(large, 0, 1) <= 0.04
    small = sized("llama", 576, 1536, 30, 9, 3)  # the default model
    shapes = block_shapes("self", 14, small, FeatureOptions())
    assert usual_rank(shapes, small, small) == RANK_MIN


def test_more_features_predict_better(base):
    paper = error(base, fitted(base, "self", 2, features="paper"))
    everything = error(base, fitted(base, "self", 2))
    assert everything < paper


def test_sums_survive_an_interruption(base, tmp_path):
    shapes = block_shapes("self", 2, base.config, FeatureOptions())
    whole = Fit(base, base, "self", 2, shapes)
    first = Fit(base, base, "self", 2, shapes)
    for seed in range(32):
        whole.add(random_ids(48, seed))
        if seed < 20:
            first.add(random_ids(48, seed))
    first.save(tmp_path / "partial.safetensors", "key")
    second = Fit(base, base, "self", 2, shapes)
    with pytest.raises(ConfigError, match="partial"):
        second.resume(tmp_path / "partial.safetensors", "another key")
    assert second.num_pieces == 0
    second.resume(tmp_path / "partial.safetensors", "key")
    assert second.num_pieces == 20
    for seed in range(20, 32):
        second.add(random_ids(48, seed))
    for fit in (second, whole):
        fit.end_pass()
    ours, theirs = (fit.predictor()[0].blocks[0].up for fit in (second, whole))
    assert mx.allclose(ours, theirs, atol=1e-4)


def test_a_mean_of_thousands_of_times_the_spread_does_not_hide_it(base):
    """Keys with a large bias, as some families have them."""
    (shape,) = block_shapes("self", 2, base.config, FeatureOptions())
    plain, moved = Fit(base, base, "self", 2, (shape,)), Fit(base, base, "self", 2, (shape,))
    record = moved._record

    def offset(token_ids):
        ours, theirs = record(token_ids)
        return ours, {place: array + 3000.0 for place, array in theirs.items()}

    moved._record = offset
    for seed in range(32):
        plain.add(random_ids(48, seed))
        moved.add(random_ids(48, seed))
    moved.end_pass()
    plain.end_pass()
    (ours, our_r2), (theirs, their_r2) = moved.predictor(), plain.predictor()
    assert abs(our_r2 - their_r2) < 1e-3
    (block,), (other,) = ours.blocks, theirs.blocks
    assert mx.allclose(block.up, other.up, atol=1e-2)
    assert mx.allclose(block.bias, other.bias + 3000.0, atol=1.0)


def test_training_lowers_the_loss_and_goes_on_after_an_interruption(base, tmp_path):
    predictor = fitted(base, "self", 2, features="paper")
    trial = Trial(base=base, aux=base, window=8)
    pieces = [random_ids(64, 7) for _ in range(8)]
    losses = []
    training = Finetune(trial, predictor, 8, learning_rate=1e-2)
    training.train(map(Piece, pieces[:4]), lambda step, loss: losses.append(loss))
    training.save(tmp_path / "t.safetensors", "key")
    other = Finetune(trial, predictor, 8, learning_rate=1e-2)
    other.resume(tmp_path / "t.safetensors", "key")
    assert other.step == 4
    ours = other.train(map(Piece, pieces[4:]), lambda step, loss: losses.append(loss))
    theirs = training.train(map(Piece, pieces[4:]))
    assert losses[-1] < losses[0]
    for a, b in zip(ours.blocks, theirs.blocks, strict=True):
        assert mx.allclose(a.up, b.up, atol=1e-5)


@pytest.mark.parametrize("kind", ["self", "aux"])
def test_a_trial_of_what_is_exact_finds_no_difference(base, kind):
    trial = Trial(base=base, aux=base, window=8)
    pieces = [random_ids(64, seed) for seed in range(3)]
    if kind == "aux":
        found = trial.quality(identity(base), pieces)
        assert max(map(abs, found.values())) < 1e-5
    predictor = fitted(base, kind, 2)
    exact = trial.exact(predictor, pieces[0], 0)
    losses = trial.losses(predictor, exact)
    assert losses.text.item() > 1e-6
    assert losses.copy.item() > 1e-6
    # Against the slow twin: the text's continuation, token by token.
    context, following = pieces[0][: exact.context], pieces[0][exact.context :]
    following = following[: exact.follow.target.shape[0]]
    view, rows, *_ = predicted_context(base, base, predictor, context, sinks=4, window=8)
    hidden = mx.concatenate([rows[-1:], run(base, following[:-1], view)])
    logits = base.logits(hidden)
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    divergence = mx.mean(mx.sum(exact.follow.target * (mx.log(exact.follow.target) - logs), -1))
    assert abs(divergence.item() - losses.text.item()) < 1e-5


def test_contexts_of_all_lengths_are_tried(base):
    trial = Trial(base=base, aux=base, window=8)
    predictor = fitted(base, "self", 2)
    ids = random_ids(256, 0)
    exacts = [trial.exact(predictor, ids, seed) for seed in range(24)]
    lengths = [exact.context for exact in exacts]
    assert min(lengths) < 96
    assert max(lengths) > 160
    for exact in exacts:
        following = exact.follow.target.shape[0]
        assert (following, exact.repeat.target.shape[0]) == (64, 64)
        assert exact.context + following <= len(ids)


def test_the_gradient_is_that_of_the_divergence(base):
    """It is not derived but known; here against differences."""
    trial = Trial(base=base, aux=base, window=8)
    predictor = fitted(base, "self", 2, rank=4)
    exact = trial.exact(predictor, random_ids(64, 5), 0)
    (block,) = predictor.blocks

    def loss(bias):
        moved = Predictor("self", 2, (replace(block, bias=bias),))
        return trial.losses(moved, exact).text

    direction = mx.random.normal(block.bias.shape, key=mx.random.key(0))
    slope = mx.sum(mx.grad(loss)(block.bias) * direction).item()
    step = 1e-2
    differences = loss(block.bias + step * direction) - loss(block.bias - step * direction)
    assert abs(slope - differences.item() / (2 * step)) < 0.05 * abs(slope)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_device_computes_in_bf16(tmp_path, family):
    folder = write_folder(tmp_path / "model", tiny_config(family))
    device = replace(profile(), compute_dtype="bfloat16")
    base = open_decoder(folder, device)
    assert base.weights.final_norm.dtype == mx.bfloat16
    predictor = fitted(base, "self", 1, rank=8)
    trial = Trial(base=base, aux=base, window=8)
    training = Finetune(trial, predictor, 2)
    trained = training.train(Piece(random_ids(64, seed)) for seed in range(2))
    for before, after in zip(predictor.blocks, trained.blocks, strict=True):
        assert after.up.dtype == mx.float32
        assert mx.mean(before.up != after.up).item() > 0.9
    assert np.isfinite(list(trial.quality(trained, [random_ids(64, 9)]).values())).all()


def test_a_start_is_trained_in_f32_whatever_the_device_computes_in(base, folder, tmp_path):
    path = write_predictor(tmp_path / "p.safetensors", fitted(base, "self", 2), folder)
    device = replace(profile(), compute_dtype="bfloat16")
    half = replace(open_model(str(folder)), decoder=open_decoder(folder, device))
    for dtype, expected in ((None, mx.bfloat16), (mx.float32, mx.float32)):
        opened = open_predictor(half, path, dtype=dtype)
        assert opened.predictor.blocks[0].up.dtype == expected


def test_trained_again_it_sees_other_text(base):
    predictor = fitted(base, "self", 2)
    seeds = []

    class Watched(Trial):
        def exact(self, predictor, token_ids, seed, context=None):
            seeds.append(seed)
            return super().exact(predictor, token_ids, seed, context)

    trial = Watched(base=base, aux=base, window=8)
    for before in (0, 3):
        training = Finetune(trial, predictor, 3, before)
        training.train(Piece(random_ids(64, seed)) for seed in range(3))
    assert seeds == [0, 1, 2, 3, 4, 5]


class TestFile:
    def test_comes_back_as_it_was(self, base, folder, tmp_path):
        predictor = fitted(base, "self", 2, rank=4)
        path = write_predictor(tmp_path / "p.safetensors", predictor, folder)
        loaded, info = load_predictor(path, mx.float32)
        assert info == read_info(path)
        assert (loaded.kind, loaded.depth) == ("self", 2)
        assert loaded.taps == predictor.taps
        for ours, theirs in zip(loaded.blocks, predictor.blocks, strict=True):
            assert ours.down is not None
            assert mx.allclose(ours.up, theirs.up, atol=1e-2)
        assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]

    def test_for_another_model_names_both_fingerprints(self, base, folder, tmp_path):
        predictor = fitted(base, "self", 2)
        path = write_predictor(tmp_path / "p.safetensors", predictor, folder)
        info = read_info(path)
        ours = {
            "base": info.base_fingerprint,
            "aux": info.aux_fingerprint,
        }
        check_made_for(info, path, **ours)
        for what in ours:
            with pytest.raises(PredictorMismatch, match="0123") as caught:
                check_made_for(info, path, **{**ours, what: "0123"})
            assert ours[what] in str(caught.value)

    @pytest.mark.parametrize("damage", ["cut", "empty", "other", "version"])
    def test_what_is_no_predictor_is_refused(self, base, folder, tmp_path, damage):
        path = write_predictor(tmp_path / "p.safetensors", fitted(base, "self", 2), folder)
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "other":
            mx.save_safetensors(str(path), {"x": mx.zeros(3)})
        else:
            mx.save_safetensors(str(path), {"x": mx.zeros(3)}, {"edgekv_predictor": "999"})
        with pytest.raises(PredictorCorrupt, match=r"p\.safetensors"):
            load_predictor(path, mx.float32)

    @pytest.mark.parametrize(
        "change",
        [
            {"kind": ["self"]},
            {"kind": "aux", "aux": None},
            {"aux": 5},
            {"depth": "2"},
            {"depth": 2.0},
            {"finetune_steps": "many"},
            {"corpus": 5},
            {"quality": "good"},
            {"quality": {"text_kl": "low"}},
            {"quality": {"text_kl": float("nan")}},
            {"tap": ("hidden", 1.5, 0)},
            {"tap": ("hidden", 1, 0.5)},
            {"tap": ("hidden", True, 0)},
            {"target": (2.0, "key")},
        ],
        ids=str,
    )
    def test_metadata_of_other_types(self, base, folder, tmp_path, change):
        path = write_predictor(tmp_path / "p.safetensors", fitted(base, "self", 2), folder)
        tensors, metadata = load_safetensors(path)
        info, blocks = json.loads(metadata["info"]), json.loads(metadata["blocks"])
        blocks[0]["taps"][0] = change.pop("tap", blocks[0]["taps"][0])
        blocks[0]["targets"][0] = change.pop("target", blocks[0]["targets"][0])
        changed = {"info": json.dumps(info | change), "blocks": json.dumps(blocks)}
        mx.save_safetensors(str(path), tensors, metadata | changed)
        with pytest.raises(PredictorCorrupt, match=r"p\.safetensors"):
            load_predictor(path, mx.float32)

    @pytest.mark.parametrize("number", [np.nan, np.inf, 1e6])
    def test_numbers_that_no_file_can_have(self, base, folder, tmp_path, number):
        predictor = fitted(base, "self", 2)
        (block,) = predictor.blocks
        broken = Predictor("self", 2, (replace(block, bias=block.bias + number),))
        for refuse in (as_saved, lambda p: write_predictor(tmp_path / "p.safetensors", p, folder)):
            with pytest.raises(PredictorCorrupt, match="finite"):
                refuse(broken)
        assert not list(tmp_path.iterdir())
        path = write_predictor(tmp_path / "p.safetensors", predictor, folder)
        tensors, metadata = load_safetensors(path)
        mx.save_safetensors(str(path), {**tensors, "0.bias": tensors["0.bias"] + number}, metadata)
        with pytest.raises(PredictorCorrupt, match="finite"):
            load_predictor(path, mx.float32)

    def test_what_is_saved_is_known_before(self, base, folder, tmp_path):
        predictor = fitted(base, "self", 2, rank=4)
        path = write_predictor(tmp_path / "p.safetensors", predictor, folder)
        loaded, _ = load_predictor(path, mx.float32)
        for ours, theirs in zip(as_saved(predictor).blocks, loaded.blocks, strict=True):
            assert mx.array_equal(ours.up, theirs.up)
            assert mx.array_equal(ours.bias, theirs.bias)

    def test_missing(self, tmp_path):
        with pytest.raises(PredictorCorrupt):
            read_info(tmp_path / "nothing.safetensors")


def test_a_pruned_model_has_the_others_layers(base):
    half = pruned(base, "0.5")
    assert half.config.num_layers == 2
    assert half.weights.layers == (base.weights.layers[0], base.weights.layers[2])


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("[write] No space")])
def test_save_leaves_nothing_half_behind(base, folder, tmp_path, monkeypatch, error):
    path = write_predictor(tmp_path / "p.safetensors", fitted(base, "self", 2), folder)
    predictor, info = load_predictor(path, mx.float32)
    before = path.read_bytes()

    def full_disk(*_args):
        raise error

    monkeypatch.setattr(mx, "save_safetensors", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_predictor(path, predictor, info)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_an_auxiliary_makes_the_same_ids_of_a_text_whatever_its_template(tmp_path):
    """As of two sizes of one model, whose templates differ by two characters and ends by one."""
    base, aux = (write_folder(tmp_path / name, tiny_config("llama")) for name in ("base", "aux"))
    settings = json.loads((aux / "tokenizer_config.json").read_text())
    settings["chat_template"] += "\n\n"
    (aux / "tokenizer_config.json").write_text(json.dumps(settings))
    (aux / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    model, other = open_pair(str(base), str(aux))
    assert model.tokenizer.fingerprint == other.tokenizer.fingerprint
    assert model.tokenizer.chat_template.source != other.tokenizer.chat_template.source

    spec = json.loads((aux / "tokenizer.json").read_text())
    spec["model"]["merges"].pop()
    (aux / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(PredictorMismatch, match="tokenizer") as caught:
        open_pair(str(base), str(aux))
    assert model.tokenizer.fingerprint in str(caught.value)


def test_a_predictor_of_a_model_whose_template_changed_is_still_its_own(base, folder, tmp_path):
    path = write_predictor(tmp_path / "p.safetensors", fitted(base, "self", 2), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "x"}))
    opened = open_predictor(open_model(str(folder)), path)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert opened.predictor.depth == 2


def test_chats_are_answered_together_as_one_by_one(base):
    trial = Trial(base=base, aux=base, window=8)
    prompts = [(random_ids(length, length), length) for length in (40, 9, 64)]
    assert trial.answers(prompts, 12) == [trial.answers([each], 12)[0] for each in prompts]
    assert trial.answers([], 12) == []


def test_a_chat_is_answered_by_the_base_and_its_prompt_is_the_context(base, tmp_path):
    seen = []

    class Noting(Trial):
        def exact(self, predictor, token_ids, seed, context=None):
            seen.append((token_ids, context))
            return super().exact(predictor, token_ids, seed, context)

    trial = Noting(base=base, aux=base, window=8)
    training = Finetune(trial, fitted(base, "self", 2, rank=8), steps=2)
    prompt = random_ids(64, 1)
    training.train(iter([Piece(prompt, is_prompt=True)] * 2))
    (first, context), (second, _) = seen
    assert context == 64
    assert first[:64] == second[:64] == prompt
    assert len(first) == len(second) == 96
    assert first != second  # each step draws anew
    exact = trial.exact(fitted(base, "self", 2, rank=8), first, 0, 64)
    assert exact.context == 64
    assert exact.follow.target.shape[0] == 32
    logits = base.logits(run(base, first[:-1], ArrayView())[63:])
    np.testing.assert_allclose(
        np.array(exact.follow.target), np.array(mx.softmax(logits, axis=-1)), atol=1e-5
    )
