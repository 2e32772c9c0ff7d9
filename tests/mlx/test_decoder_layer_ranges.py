"""Running layers in ranges, in one step or in two, is the same as running them all."""

import mlx.core as mx
import numpy as np
import pytest
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper
from tiny_models import FAMILIES, random_ids, tiny_config, write_folder

from edgekv.kv.session_kv import SessionKV
from edgekv.kv.view import StagedView
from edgekv.models.attention import Segment
from edgekv.models.batch import PackedBatch
from edgekv.models.open_model import open_decoder


@pytest.fixture(scope="module", params=FAMILIES)
def stepper(request, tmp_path_factory) -> Stepper:
    folder = write_folder(
        tmp_path_factory.mktemp("model"), tiny_config(request.param), tokenizer=False
    )
    profile = FUSED_PROFILE if request.param == "qwen3" else CPU_PROFILE
    return Stepper(open_decoder(folder, profile))


def kv_arrays(kv: SessionKV, num_tokens: int) -> list[np.ndarray]:
    assert kv.buffers is not None
    return [np.array(a)[:, :num_tokens] for a in [*kv.buffers.keys, *kv.buffers.values]]


def started(stepper: Stepper, ids: list[int]) -> SessionKV:
    """A session that holds all but the last 9 tokens."""
    kv = stepper.session(len(ids))
    stepper.step([(kv, ids[:-9])])
    return kv


def batch_of(kv: SessionKV) -> tuple[StagedView, PackedBatch]:
    view = StagedView(kv, kv.num_tokens)
    return view, PackedBatch([Segment(view, 9)])


def everything_at_once(stepper: Stepper, ids: list[int]):
    kv = started(stepper, ids)
    view, batch = batch_of(kv)
    hidden = stepper.decoder.embed(mx.array(ids[-9:]))
    hidden = stepper.decoder.run_layers(hidden, batch)
    mx.eval(hidden, view.commit())
    return np.array(hidden), kv_arrays(kv, len(ids))


def test_two_ranges_of_one_step(stepper):
    ids = random_ids(40)
    expected, expected_kv = everything_at_once(stepper, ids)
    decoder = stepper.decoder
    for middle in range(decoder.config.num_layers + 1):
        kv = started(stepper, ids)
        view, batch = batch_of(kv)
        hidden = decoder.run_layers(decoder.embed(mx.array(ids[-9:])), batch, last_layer=middle)
        hidden = decoder.run_layers(hidden, batch, first_layer=middle)
        mx.eval(hidden, view.commit())
        np.testing.assert_array_equal(np.array(hidden), expected)
        for ours, theirs in zip(kv_arrays(kv, len(ids)), expected_kv, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_two_ranges_in_two_steps(stepper):
    """The later layers run in a step of their own, from the saved hidden states."""
    ids = random_ids(40)
    expected, expected_kv = everything_at_once(stepper, ids)
    decoder, kv = stepper.decoder, started(stepper, ids)
    view, batch = batch_of(kv)
    saved = decoder.run_layers(decoder.embed(mx.array(ids[-9:])), batch, last_layer=1)
    mx.eval(saved, view.commit())
    view, batch = batch_of(kv)
    hidden = decoder.run_layers(saved, batch, first_layer=1)
    mx.eval(hidden, view.commit())
    np.testing.assert_array_equal(np.array(hidden), expected)
    for ours, theirs in zip(kv_arrays(kv, len(ids)), expected_kv, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_empty_range_changes_nothing(stepper):
    kv = stepper.session(4)
    view = StagedView(kv, 0)
    hidden = stepper.decoder.embed(mx.array([5, 6]))
    batch = PackedBatch([Segment(view, 2)])
    same = stepper.decoder.run_layers(hidden, batch, first_layer=2, last_layer=2)
    np.testing.assert_array_equal(np.array(same), np.array(hidden))
    assert view.commit() == []


def test_only_the_layers_that_ran_have_kv(stepper):
    kv = stepper.session(4)
    before = kv_arrays(kv, 4)
    view = StagedView(kv, 0)
    batch = PackedBatch([Segment(view, 2)])
    decoder = stepper.decoder
    hidden = decoder.run_layers(decoder.embed(mx.array([5, 6])), batch, first_layer=1, last_layer=2)
    mx.eval(hidden, view.commit())
    changed = [
        not np.array_equal(old, new) for old, new in zip(before, kv_arrays(kv, 4), strict=True)
    ]
    num_layers = decoder.config.num_layers
    assert changed == [layer == 1 for layer in range(num_layers)] * 2
