"""Tensors (experts, out, in): gathered, concatenated and stacked, dense and in every mode."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from stepping import CPU_PROFILE
from tiny_models import write_folder

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models import checkpoint
from edgekv.models.checkpoint import Dense, Quantised, Tensor, concat_rows, stack
from edgekv.models.open_model import open_checkpoint
from edgekv.models.parts import Axis

SPECS = {"affine": (32, 3), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
KINDS = [None, *SPECS]


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def tensor_of(values: mx.array, mode: str | None) -> Tensor:
    if mode is None:
        return Dense(values)
    weight, scales, *biases = mx.quantize(values, *SPECS[mode], mode=mode)
    return Quantised(weight, scales, biases[0] if biases else None, *SPECS[mode], mode, mx.float32)


def floats(tensor: Tensor) -> np.ndarray:
    dense = tensor.dequantised() if isinstance(tensor, Quantised) else tensor
    assert dense.array.dtype == mx.float32
    assert dense.shape == tensor.shape
    return np.array(dense.array)


@pytest.mark.parametrize("mode", KINDS)
class TestOutAxis:
    def test_rows_are_taken_of_every_expert(self, mode):
        tensor, order = tensor_of(normal(3, 6, 64), mode), [5, 1, 3, 0]
        taken = tensor.rows(mx.array(order))
        assert taken.shape == (3, 4, 64)
        np.testing.assert_array_equal(floats(taken), floats(tensor)[:, order])
        assert taken.kind == tensor.kind

    def test_rows_are_concatenated_expert_by_expert(self, mode):
        gate, up = tensor_of(normal(3, 6, 64), mode), tensor_of(normal(3, 2, 64, seed=1), mode)
        both = concat_rows([gate, up])
        assert both is not None
        assert both.shape == (3, 8, 64)
        expected = np.concatenate([floats(gate), floats(up)], axis=1)
        np.testing.assert_array_equal(floats(both), expected)

    def test_a_gathered_product_is_each_experts_own(self, mode):
        tensor = tensor_of(normal(3, 6, 64), mode)
        x, experts = normal(2, 1, 64, seed=1), mx.array([2, 0], mx.uint32)
        if isinstance(tensor, Quantised):
            y = mx.gather_qmm(
                x,
                tensor.weight,
                tensor.scales,
                tensor.biases,
                rhs_indices=experts,
                transpose=True,
                group_size=tensor.group_size,
                bits=tensor.bits,
                mode=tensor.mode,
            )
        else:
            y = mx.gather_mm(x, tensor.array.swapaxes(-1, -2), rhs_indices=experts)
        expected = np.array(x) @ floats(tensor)[[2, 0]].swapaxes(-1, -2)
        np.testing.assert_allclose(np.array(y), expected, rtol=0, atol=1e-4)


def test_modes_are_kinds():
    values = normal(3, 6, 64)
    tensors = [tensor_of(values, mode) for mode in KINDS]
    for one in tensors:
        for other in tensors:
            assert (concat_rows([one, other]) is None) == (one is not other)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("mode", KINDS)
def test_stacked_experts_are_each_in_its_place(mode, count):
    experts = [tensor_of(normal(6, 64, seed=i), mode) for i in range(count)]
    stacked = stack(iter(experts), count, what="experts")
    assert stacked.shape == (count, 6, 64)
    assert stacked.kind == experts[0].kind
    np.testing.assert_array_equal(floats(stacked), np.stack([floats(e) for e in experts]))


def test_experts_of_unlike_kinds_are_refused():
    experts = [tensor_of(normal(6, 64), mode) for mode in ("mxfp4", "mxfp4", "mxfp8")]
    with pytest.raises(UnsupportedModel, match=r"^experts of layer 3 are not quantised alike") as e:
        stack(experts, 3, what="experts of layer 3")
    assert e.value.hint


def peak_bytes(make: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """What MLX held at most, beyond what it held before, while a tensor was made."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tensor = make()
    mx.eval(*tensor.arrays)
    return mx.get_peak_memory() - before, tensor


@pytest.mark.parametrize("mode", [None, "affine", "mxfp4"])
def test_stacking_needs_room_for_the_result_and_few_experts(mode):
    one = tensor_of(normal(64, 1024), mode)
    mx.eval(*one.arrays)
    size = sum(array.nbytes for array in one.arrays)

    def experts() -> Iterator[Tensor]:
        for _ in range(32):
            yield one.like([mx.array(array) for array in one.arrays])

    peak, stacked = peak_bytes(lambda: stack(experts(), 32, what="experts"))
    assert sum(array.nbytes for array in stacked.arrays) == 32 * size
    assert peak < 35 * size + (64 << 10)


@pytest.mark.parametrize("mode", SPECS)
def test_expanding_needs_room_for_the_result_and_a_few_pieces(monkeypatch, mode):
    monkeypatch.setattr(checkpoint, "PIECE_VALUES", 1 << 15)
    tensor = tensor_of(normal(8, 128, 1024), mode)
    assert isinstance(tensor, Quantised)
    mx.eval(*tensor.arrays)
    peak, dense = peak_bytes(tensor.dequantised)
    assert dense.arrays[0].nbytes == 4 << 20
    assert peak < (4 << 20) + 10 * (128 << 10)


class TestFolder:
    def opened(self, path, modes, *, keep=True):
        tensors, specs = {}, {"group_size": 32, "bits": 3}
        for i, mode in enumerate(modes):
            tensor = tensor_of(normal(6, 64, seed=i), mode)
            parts = ("weight", "scales", "biases") if mode else ("weight",)
            tensors |= {
                f"mlp.experts.{i}.up_proj.{part}": array
                for part, array in zip(parts, tensor.arrays, strict=False)
            }
            if mode:
                group_size, bits = SPECS[mode]
                module = {"group_size": group_size, "bits": bits, "mode": mode}
                specs[f"mlp.experts.{i}.up_proj"] = module
        write_folder(path, {"quantization": specs}, tensors=tensors, tokenizer=False)
        return open_checkpoint(path, replace(CPU_PROFILE, keeps_quantised=keep))

    NAMES = [f"mlp.experts.{i}.up_proj.weight" for i in range(3)]  # noqa: RUF012
    AXES = (Axis(6), Axis(64))

    @pytest.mark.parametrize("keep", [True, False])
    @pytest.mark.parametrize("mode", KINDS)
    def test_experts_of_their_own_become_one_tensor(self, tmp_path, mode, keep):
        folder = self.opened(tmp_path, [mode] * 3, keep=keep)
        stacked = folder.take_stack(self.NAMES, self.AXES)
        assert isinstance(stacked, Quantised) == (keep and mode is not None)
        assert stacked.shape == (3, 6, 64)
        expected = [floats(folder.take(name)) for name in self.NAMES]
        np.testing.assert_array_equal(floats(stacked), np.stack(expected))

    def test_experts_quantised_in_unlike_ways(self, tmp_path):
        folder = self.opened(tmp_path, ["affine", "affine", "nvfp4"])
        expected = rf"{tmp_path}: tensors '{self.NAMES[0]}' to '{self.NAMES[2]}' are not quantised"
        with pytest.raises(UnsupportedModel, match=expected):
            folder.take_stack(self.NAMES, self.AXES)
        expanded = self.opened(tmp_path, ["affine", "affine", "nvfp4"], keep=False)
        assert expanded.take_stack(self.NAMES, self.AXES).shape == (3, 6, 64)

    def test_a_missing_and_a_misshapen_expert_are_named(self, tmp_path):
        folder = self.opened(tmp_path, ["mxfp4"] * 2)
        with pytest.raises(CheckpointCorrupt, match=rf"tensor '{self.NAMES[2]}' is missing"):
            folder.take_stack(self.NAMES, self.AXES)
        with pytest.raises(CheckpointCorrupt, match=rf"'{self.NAMES[0]}' has shape \(6, 64\)"):
            folder.take_stack(self.NAMES[:2], (Axis(6), Axis(32)))
