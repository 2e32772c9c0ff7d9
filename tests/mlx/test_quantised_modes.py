"""MLX's modes of tiny floats, and gpt-oss as published: kept, expanded, and what is refused."""

import pathlib
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from stepping import CPU_PROFILE
from tiny_models import write_folder

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models import checkpoint as checkpoint_module
from edgekv.models.checkpoint import Checkpoint, Dense, Quantised
from edgekv.models.float_codes import code_table
from edgekv.models.linear import Embedding, make_linear
from edgekv.models.open_model import open_checkpoint

SPECS = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
MODULE = "model.layers.0.mlp.down_proj"
NAME = f"{MODULE}.weight"
EXPERTS = "model.layers.0.mlp.experts"


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(0))


def said(mode: str) -> dict[str, Any]:
    group_size, bits = SPECS[mode]
    return {"quantization": {"group_size": group_size, "bits": bits, "mode": mode}}


def parts(values: mx.array, mode: str, module: str = MODULE) -> dict[str, mx.array]:
    codes, scales = mx.quantize(values, mode=mode)
    return {f"{module}.weight": codes, f"{module}.scales": scales}


def opened(
    folder: pathlib.Path,
    config: dict[str, Any],
    tensors: dict[str, mx.array],
    *,
    keep: bool = True,
    dtype: str = "float32",
) -> Checkpoint:
    write_folder(folder, config, tensors=tensors, tokenizer=False)
    return open_checkpoint(folder, replace(CPU_PROFILE, compute_dtype=dtype, keeps_quantised=keep))


def same(found: mx.array, expected: mx.array) -> bool:
    return found.dtype == expected.dtype and mx.array_equal(found, expected).item()


@pytest.mark.parametrize("mode", SPECS)
class TestModes:
    @pytest.mark.parametrize("shape", [(6, 64), (3, 6, 64)])
    def test_kept_parts_are_those_of_the_file(self, tmp_path, mode, shape):
        stored = parts(normal(*shape), mode)
        checkpoint = opened(tmp_path, said(mode), stored)
        assert checkpoint.names == {NAME}
        assert checkpoint.shape(NAME) == shape
        tensor = checkpoint.take(NAME, shape=shape)
        assert isinstance(tensor, Quantised)
        assert (tensor.group_size, tensor.bits, tensor.mode) == (*SPECS[mode], mode)
        assert tensor.biases is None
        for found, expected in zip(tensor.arrays, stored.values(), strict=True):
            assert same(found, expected)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("shape", [(7, 64), (3, 6, 64)])
    @pytest.mark.parametrize("piece_rows", [1, 4, 1000])
    def test_expanded_equal_mlxs(self, tmp_path, monkeypatch, mode, shape, dtype, piece_rows):
        monkeypatch.setattr(checkpoint_module, "PIECE_VALUES", piece_rows * 64)
        stored = parts(normal(*shape), mode)
        tensor = opened(tmp_path, said(mode), stored, keep=False, dtype=dtype).take(NAME)
        assert isinstance(tensor, Dense)
        expected = mx.dequantize(*stored.values(), mode=mode, dtype=getattr(mx, dtype))
        assert tensor.shape == shape
        assert same(tensor.array, expected)

    def test_every_byte_of_codes_and_scales_reads_as_in_mlx(self, mode):
        group_size, bits = SPECS[mode]
        every = np.arange(256, dtype=np.uint8)
        codes = np.tile(every, (256, 1))  # a row of all codes for each scale
        scales = np.repeat(every[:, None], 256 * 8 // bits // group_size, axis=1)
        words = mx.array(codes.view(np.uint32))
        expected = mx.dequantize(words, mx.array(scales), mode=mode, dtype=mx.float32)
        found = code_table(mode).floats(codes, scales)
        np.testing.assert_array_equal(found, np.array(expected))

    def test_kept_and_expanded_multiply_alike(self, tmp_path, mode):
        stored, bias = parts(normal(6, 64), mode), normal(6)
        x = normal(5, 64)
        products = []
        for keep in (True, False):
            checkpoint = opened(tmp_path, said(mode), stored, keep=keep)
            products.append(make_linear([checkpoint.take(NAME)], [bias])(x))
        exact = x @ mx.dequantize(*stored.values(), mode=mode, dtype=mx.float32).T + bias
        for product in products:
            assert mx.allclose(product, exact, rtol=0, atol=1e-4).item()

    def test_kept_and_expanded_embed_alike(self, tmp_path, mode):
        stored, tokens = parts(normal(6, 64), mode), mx.array([5, 0, 5])
        for dtype in ("float32", "bfloat16"):
            kept, expanded = (
                Embedding(opened(tmp_path, said(mode), stored, keep=k, dtype=dtype).take(NAME))
                for k in (True, False)
            )
            assert kept(tokens).dtype == getattr(mx, dtype)
            assert same(kept(tokens), expanded(tokens))

    def test_parts_fuse_with_their_like(self, tmp_path, mode):
        tensors = parts(normal(6, 64), mode, "a") | parts(normal(6, 64) + 1, mode, "b")
        checkpoint = opened(tmp_path, said(mode), tensors)
        both = [checkpoint.take(f"{name}.weight") for name in "ab"]
        fused = make_linear(both, None)
        assert fused.weight.shape == (12, 64)
        expected = mx.concatenate([fused_part.dequantised().array for fused_part in both])
        assert same(fused.weight.dequantised().array, expected)

    @pytest.mark.parametrize(
        "change",
        [
            {"scales": mx.zeros((6, 1), mx.uint8)},
            {"scales": mx.zeros((5, 4), mx.uint8)},
            {"scales": "as floats"},
            {"scales": "of one more axis"},
            {"biases": mx.zeros((6, 2))},
            {"weight": mx.zeros((6, 7), mx.uint32)},
            {"weight": mx.zeros((6,), mx.uint32)},
            {"weight": mx.zeros((), mx.uint32)},
        ],
    )
    def test_parts_that_do_not_fit_are_corrupt(self, tmp_path, mode, change):
        stored = parts(normal(6, 64), mode)
        scales = stored[f"{MODULE}.scales"]
        made = {"as floats": scales.astype(mx.float16), "of one more axis": scales[None]}
        for kind, value in change.items():
            stored[f"{MODULE}.{kind}"] = made[value] if isinstance(value, str) else value
        checkpoint = opened(tmp_path, said(mode), stored)
        expected = rf"model\.safetensors: tensor '{NAME}' of shape .* \(mode {mode}\) needs scales"
        with pytest.raises(CheckpointCorrupt, match=expected):
            checkpoint.take(NAME)

    def test_a_mode_that_the_tensor_is_not_in(self, tmp_path, mode):
        stored = parts(normal(6, 64), mode)
        for other in SPECS.keys() - {mode}:
            with pytest.raises(CheckpointCorrupt, match=rf"'{NAME}' .* \(mode {other}\)"):
                opened(tmp_path, said(other), stored).take(NAME)
        with pytest.raises(CheckpointCorrupt, match=r"needs scales and biases .* in floats"):
            opened(tmp_path, {"quantization": {"group_size": 32, "bits": 4}}, stored).take(NAME)


def test_modes_may_differ_by_module(tmp_path):
    tensors = parts(normal(6, 64), "mxfp4", "a") | parts(normal(6, 64), "nvfp4", "b")
    codes, scales, biases = mx.quantize(normal(6, 64), 64, 8)
    tensors |= {
        "c.weight": codes,
        "c.scales": scales,
        "c.biases": biases,
        "d.weight": normal(6, 64),
    }
    specs = {"b": {"mode": "nvfp4"}, "c": {"group_size": 64, "bits": 8}, "d": False}
    config = {"quantization": said("mxfp4")["quantization"] | specs}
    checkpoint = opened(tmp_path, config, tensors)
    assert checkpoint.names == {f"{name}.weight" for name in "abcd"}
    found = [checkpoint.take(f"{name}.weight", shape=(6, 64)) for name in "abcd"]
    modes = [tensor.mode if isinstance(tensor, Quantised) else None for tensor in found]
    assert modes == ["mxfp4", "nvfp4", "affine", None]


def test_a_scale_of_the_tensor_as_a_whole_is_refused(tmp_path):
    tensors = parts(normal(2, 6, 64), "nvfp4") | {f"{MODULE}.global_scale": mx.ones((2,))}
    with pytest.raises(UnsupportedModel, match=rf"'{NAME}' has a '{MODULE}.global_scale'") as e:
        opened(tmp_path, said("nvfp4"), tensors).take(NAME)
    assert "model.safetensors" in str(e.value)


class TestGptOssAsPublished:
    CONFIG: dict[str, Any] = {  # noqa: RUF012
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        }
    }

    def stored(self) -> dict[str, mx.array]:
        """Two experts, 64 → 2 · 48 rows, gate and up in turns."""
        codes, scales = mx.quantize(normal(2, 96, 64), mode="mxfp4")
        return {
            f"{EXPERTS}.gate_up_proj_blocks": codes.view(mx.uint8).reshape(2, 96, 2, 16),
            f"{EXPERTS}.gate_up_proj_scales": scales,
            f"{EXPERTS}.gate_up_proj_bias": normal(2, 96).astype(mx.bfloat16),
            "model.norm.weight": normal(64).astype(mx.bfloat16),
        }

    @pytest.mark.parametrize("keep", [True, False])
    def test_it_equals_what_mlx_lm_makes_of_it(self, tmp_path, keep):
        from mlx_lm.models import gpt_oss

        theirs = gpt_oss.Model.sanitize(None, self.stored())
        checkpoint = opened(tmp_path, self.CONFIG, self.stored(), keep=keep)
        assert checkpoint.names == {
            f"{EXPERTS}.gate_up_proj",
            f"{EXPERTS}.gate_up_proj_bias",
            "model.norm.weight",
        }
        tensor = checkpoint.take(f"{EXPERTS}.gate_up_proj", shape=(2, 96, 64))
        assert isinstance(tensor, Quantised if keep else Dense)
        bias = checkpoint.take(f"{EXPERTS}.gate_up_proj_bias", shape=(2, 96))
        for which, name in enumerate(("gate_proj", "up_proj")):
            order = mx.arange(which, 96, 2)
            half = tensor.rows(order)
            assert half.shape == (2, 48, 64)
            codes, scales = (theirs[f"{EXPERTS}.{name}.{part}"] for part in ("weight", "scales"))
            if isinstance(half, Quantised):
                assert same(half.weight, codes)
                assert same(half.scales, scales)
                half = half.dequantised()
            expected = mx.dequantize(codes, scales, mode="mxfp4", dtype=mx.float32)
            assert same(half.array, expected)
            their_bias = theirs[f"{EXPERTS}.{name}.bias"].astype(mx.float32)
            assert same(bias.arrays[0][:, order], their_bias)

    @pytest.mark.parametrize(
        ("part", "shape"),
        [
            ("blocks", (2, 96, 2, 8)),
            ("blocks", (2, 96, 3, 16)),
            ("blocks", (2, 96, 32)),
            ("blocks", (16,)),
            ("blocks", ()),
            ("scales", (2, 96, 3)),
            ("scales", (2, 192)),
        ],
    )
    def test_parts_that_do_not_fit_are_corrupt(self, tmp_path, part, shape):
        stored = self.stored() | {f"{EXPERTS}.gate_up_proj_{part}": mx.zeros(shape, mx.uint8)}
        expected = rf"model\.safetensors: tensor '{EXPERTS}.gate_up_proj_blocks' of shape"
        with pytest.raises(CheckpointCorrupt, match=expected):
            opened(tmp_path, self.CONFIG, stored).take(f"{EXPERTS}.gate_up_proj")

    def test_a_part_that_is_missing(self, tmp_path):
        name = f"{EXPERTS}.gate_up_proj"
        for part in ("blocks", "scales"):
            stored = self.stored()
            del stored[f"{name}_{part}"]
            with pytest.raises(CheckpointCorrupt, match=rf"tensor '{name}' is missing"):
                opened(tmp_path, self.CONFIG, stored).take(name)

    def test_a_configuration_that_does_not_say_how(self, tmp_path):
        for config in ({}, {"quantization": {"group_size": 64, "bits": 4}}):
            with pytest.raises(CheckpointCorrupt, match=f"'{EXPERTS}.gate_up_proj_blocks'"):
                opened(tmp_path, config, self.stored()).take(f"{EXPERTS}.gate_up_proj")
