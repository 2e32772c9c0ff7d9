"""Fits in several passes: the same predictor, in less memory, from wherever they were stopped."""

import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import tiny_config, write_folder
from tiny_predictors import load, random_ids

from edgekv.errors import ConfigError
from edgekv.predict.fit.closed_form import Fit
from edgekv.predict.fit.passes import MemoryPlan, Part, one_pass
from edgekv.predict.fit.shapes import FeatureOptions, block_shapes
from edgekv.predict.fit.solve import cholesky_in_place, r2_by_group, solve_in_place
from edgekv.predict.forward import predicted_context

NUM_PIECES = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = tiny_config("llama", num_hidden_layers=4)
    return load(write_folder(tmp_path_factory.mktemp("model"), config))


def shapes_of(base, kind, features, depth=1):
    return block_shapes(kind, depth, base.config, FeatureOptions(features=features))


def in_passes(base, shapes, rank, num_targets):
    """Each of so many targets of one block, or of what takes no more."""
    plan = MemoryPlan(shapes, base.config, base.config, rank)
    return plan.passes(plan.num_bytes((Part(0, 0, num_targets),)))


def steps(fit, watch=None):
    """Run a fit; what is given out, at each moment at which it could be interrupted, goes on."""
    while not fit.is_done:
        while fit.num_pieces < NUM_PIECES:
            fit.add(random_ids(48, fit.num_pieces))
            fit = (yield fit) or fit
        fit.end_pass(watch)
        fit = (yield fit) or fit


def run_through(fit):
    for _ in steps(fit):
        pass
    return fit.predictor()


def values(base, predictor):
    """What is predicted of a text, keys and values of all layers."""
    view, *_ = predicted_context(base, base, predictor, random_ids(64, 99), sinks=4, window=8)
    return np.concatenate([np.array(a).ravel() for pair in view.arrays.values() for a in pair])


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("features", ["all", "mapped", "paper"])
@pytest.mark.parametrize("kind", ["self", "aux"])
def test_in_one_pass_and_in_several_it_is_the_same(base, kind, features, rank):
    shapes = shapes_of(base, kind, features)
    passes = in_passes(base, shapes, rank, 1 if features == "paper" else 2)
    assert len(passes) > 1
    whole, whole_r2 = run_through(Fit(base, base, kind, 1, shapes, rank=rank))
    parts, r2 = run_through(Fit(base, base, kind, 1, shapes, rank=rank, passes=passes))
    assert [block.targets for block in parts.blocks] == [shape.targets for shape in shapes]
    assert np.abs(values(base, parts) - values(base, whole)).max() < 1e-4
    assert r2 == pytest.approx(whole_r2, abs=1e-4)


@pytest.mark.parametrize("features", ["all", "mapped"])
@pytest.mark.parametrize("kind", ["self", "aux"])
def test_stopped_between_any_two_pieces_of_any_pass_it_goes_on(base, kind, features, tmp_path):
    shapes, path = shapes_of(base, kind, features), tmp_path / "partial.safetensors"

    def new():
        return Fit(base, base, kind, 1, shapes, rank=8, passes=in_passes(base, shapes, 8, 2))

    whole, whole_r2 = run_through(new())
    moments, running = 0, steps(new())
    fit = next(running)
    while not fit.is_done:
        fit.save(path, "key")
        fit = new()
        fit.resume(path, "key")
        moments += 1
        fit = running.send(fit)
    assert moments == (NUM_PIECES + 1) * len(in_passes(base, shapes, 8, 2)) - 1
    fit.save(path, "key")
    again = new()
    again.resume(path, "key")
    assert again.is_done
    predictor, r2 = again.predictor()
    assert np.abs(values(base, predictor) - values(base, whole)).max() < 1e-5
    assert r2 == pytest.approx(whole_r2, abs=1e-6)


@pytest.mark.parametrize("moment", range(1, 16, 3))
def test_stopped_while_it_is_solved_it_goes_on(base, moment, tmp_path):
    shapes, path = shapes_of(base, "self", "all"), tmp_path / "partial.safetensors"
    passes = in_passes(base, shapes, 8, 2)
    assert len(passes) == 3

    def new():
        return Fit(base, base, "self", 1, shapes, rank=8, passes=passes)

    calls, fit = [], new()

    def stop(done, total):
        calls.append((done, total))
        if done == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for _ in steps(fit, stop):
            pass
    assert calls == [(done, 15) for done in range(1, moment + 1)]
    fit.save(path, "key")
    other = new()
    other.resume(path, "key")
    assert other.num_pieces == NUM_PIECES
    predictor, _ = run_through(other)
    whole, _ = run_through(new())
    assert np.abs(values(base, predictor) - values(base, whole)).max() < 1e-5


def test_a_pass_runs_no_layer_behind_its_targets(base, monkeypatch):
    shapes, last = shapes_of(base, "self", "all"), []
    monkeypatch.setattr(
        "edgekv.predict.fit.closed_form.run",
        lambda *_args, last_layer, taps: last.append(last_layer),
    )
    fit = Fit(base, base, "self", 1, shapes, passes=in_passes(base, shapes, None, 2))
    told = [fit.progress(1000)]
    for fit.pass_index in range(3):
        fit._record([])
        fit.num_tokens = 600
        told.append(fit.progress(1000))
    assert last == [2, 3, 4]
    assert told == [(0, 2250), (300, 2250), (950, 2250), (1850, 2250)]


@pytest.mark.parametrize("rank", [None, 8, 512])
@pytest.mark.parametrize("features", ["all", "mapped", "paper"])
@pytest.mark.parametrize("kind", ["self", "aux"])
def test_passes_hold_every_target_once_and_stay_within_memory(base, kind, features, rank):
    shapes = shapes_of(base, kind, features)
    plan = MemoryPlan(shapes, base.config, base.config, rank)
    most = plan.num_bytes(one_pass(shapes)[0])
    assert plan.passes(most) == one_pass(shapes)
    counts = []
    for num_bytes in range(most, 0, -most // 50):
        try:
            passes = plan.passes(num_bytes)
        except ConfigError:
            break
        assert max(plan.num_bytes(parts) for parts in passes) <= num_bytes
        listed = [(p.block, at) for parts in passes for p in parts for at in range(p.start, p.end)]
        assert listed == [(b, at) for b, s in enumerate(shapes) for at in range(len(s.targets))]
        counts.append(len(passes))
    assert counts == sorted(counts)
    assert counts[-1] > 1
    with pytest.raises(ConfigError, match="GiB") as caught:
        plan.passes(-1)
    assert "--memory-gib" in caught.value.hint


@pytest.mark.parametrize(("rank", "shares"), [(None, (1.0, 0.8, 0.65)), (8, (1.0,))])
def test_memory_stays_under_what_was_planned(tmp_path, monkeypatch, rank, shares):
    """Bytes that NumPy and MLX hold at their peaks, against the plan of each number of passes."""
    for module in ("solve", "passes"):
        monkeypatch.setattr(f"edgekv.predict.fit.{module}.PANEL", 32)
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = tiny_config("llama", hidden_size=128, num_hidden_layers=11, **heads)
    wide = load(write_folder(tmp_path / "wide", config))
    shapes = shapes_of(wide, "self", "all")
    plan = MemoryPlan(shapes, wide.config, wide.config, rank)
    most = plan.num_bytes(one_pass(shapes)[0])
    found = {}
    for share in shares:
        passes = plan.passes(int(share * most))
        fit = Fit(wide, wide, "self", 1, shapes, rank=rank, passes=passes)
        found[len(passes)] = peak_bytes(fit, monkeypatch) / most
        assert found[len(passes)] <= share + 0.1, found  # and activations of a piece
    assert len(found) == len(shares)
    assert found.get(1, 1.0) > 0.85  # so it is no loose bound


def peak_bytes(fit, monkeypatch):
    """What both held at once at the worst moment, as far as peaks between two looks tell."""
    before, peaks = mx.get_active_memory(), [0]

    def look(*_):
        peaks.append(tracemalloc.get_traced_memory()[1] + mx.get_peak_memory() - before)
        tracemalloc.reset_peak()
        mx.reset_peak_memory()

    def look_first(*args):
        look()
        return r2_by_group(*args)

    monkeypatch.setattr("edgekv.predict.fit.closed_form.r2_by_group", look_first)
    mx.reset_peak_memory()
    tracemalloc.start()
    try:
        for _ in steps(fit, look):
            look()
    finally:
        tracemalloc.stop()
    return max(peaks)


@pytest.mark.parametrize("size", [1, 31, 512, 513, 1100])
def test_the_factor_in_place_is_that_of_a_library(size):
    rng = np.random.default_rng(size)
    x = rng.normal(size=(2 * size, size))
    matrix, right = x.T @ x + np.eye(size), rng.normal(size=(size, 3))
    expected = np.linalg.solve(matrix, right)
    assert cholesky_in_place(matrix)
    solve_in_place(matrix, right)
    np.testing.assert_allclose(right, expected, atol=1e-8)
    matrix = np.eye(size)
    matrix[-1, -1] = -1e-9
    assert not cholesky_in_place(matrix)
