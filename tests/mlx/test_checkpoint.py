"""Folders of safetensors, plain and MLX-quantised, and what is wrong with some of them."""

import json
import os
import pathlib
import random
import struct
from dataclasses import replace

import mlx.core as mx
import pytest
from stepping import CPU_PROFILE

from edgekv.errors import CheckpointCorrupt, EdgeKVError, ModelNotFound, UnsupportedModel
from edgekv.models.checkpoint import Dense, Quantised, concat_rows
from edgekv.models.open_model import open_checkpoint

MODULE = "model.layers.0.mlp.down_proj"
QUANTISED = {"quantization": {"group_size": 32, "bits": 4}}


def make_folder(root: pathlib.Path, tensors: dict[str, mx.array], **config) -> pathlib.Path:
    folder = root / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    return folder


def add_tensor(path: pathlib.Path, name: str, dtype: str, data: bytes) -> None:
    """Append a tensor of whatever dtype to a file."""
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    header, end = json.loads(raw[8:length]), len(raw) - length
    span = [end, end + len(data)]
    header[name] = {"dtype": dtype, "shape": [4], "data_offsets": span}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[length:] + data)


def opened(path, *, dtype="float32", keep=True):
    return open_checkpoint(path, replace(CPU_PROFILE, compute_dtype=dtype, keeps_quantised=keep))


def quantised(values: mx.array, group_size: int, bits: int, module: str = MODULE):
    weight, scales, biases = mx.quantize(values, group_size, bits)
    return {f"{module}.weight": weight, f"{module}.scales": scales, f"{module}.biases": biases}


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and mx.array_equal(a, b).item()


@pytest.fixture
def values():
    return mx.random.normal((4, 128), key=mx.random.key(0))


class TestPlainFolder:
    def test_config_names_and_shapes(self, tmp_path, values):
        folder = make_folder(tmp_path, {"a.weight": values, "b": values[0]}, hidden_size=128)
        checkpoint = opened(folder)
        assert checkpoint.kind == "folder"
        assert checkpoint.path == folder
        assert checkpoint.config == {"model_type": "llama", "hidden_size": 128}
        assert checkpoint.names == {"a.weight", "b"}
        assert checkpoint.shape("a.weight") == (4, 128)
        assert checkpoint.shape("b") == (128,)

    @pytest.mark.parametrize("stored", [mx.float32, mx.float16, mx.bfloat16])
    @pytest.mark.parametrize("compute", ["float32", "bfloat16"])
    def test_floats_are_cast_to_the_compute_dtype(self, tmp_path, values, stored, compute):
        folder = make_folder(tmp_path, {"a": values.astype(stored)})
        tensor = opened(folder, dtype=compute).take("a", shape=(4, 128))
        assert isinstance(tensor, Dense)
        assert same(tensor.array, values.astype(stored).astype(getattr(mx, compute)))

    def test_a_tensor_can_be_taken_again(self, tmp_path, values):
        checkpoint = opened(make_folder(tmp_path, {"a": values, "b": values + 1}))
        for name, expected in (("a", values), ("b", values + 1), ("a", values)):
            assert same(checkpoint.take(name).array, expected)

    def test_shards_are_found_by_the_index(self, tmp_path, values):
        folder = make_folder(tmp_path, {"a": values})
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        second = folder / "model-00002-of-00002.safetensors"
        mx.save_safetensors(str(second), {"b": values * 2})
        index = {"a": "model-00001-of-00002.safetensors", "b": second.name}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        checkpoint = opened(folder)
        assert same(checkpoint.take("a").array, values)
        assert same(checkpoint.take("b").array, values * 2)
        with pytest.raises(CheckpointCorrupt, match=r"model-00002-of-00002.*'b' has shape"):
            checkpoint.take("b", shape=(1, 1))
        mx.save_safetensors(str(second), {"a": values})
        with pytest.raises(CheckpointCorrupt, match="has 'a' too"):
            opened(folder)
        second.unlink()
        with pytest.raises(CheckpointCorrupt, match=r"shard model-00002-of-00002.* is missing"):
            opened(folder)

    def test_numbered_shards_without_an_index(self, tmp_path, values):
        folder = make_folder(tmp_path, {"a": values})
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        with pytest.raises(CheckpointCorrupt, match=r"model-00002-of-00002.* is missing"):
            opened(folder)
        mx.save_safetensors(str(folder / "model-00002-of-00002.safetensors"), {"b": values * 2})
        other = folder / "consolidated-00001-of-00001.safetensors"
        mx.save_safetensors(str(other), {"c": values})
        checkpoint = opened(folder)
        assert checkpoint.names == {"a", "b"}
        assert same(checkpoint.take("b").array, values * 2)
        other.rename(folder / "model-00001-of-00001.safetensors")
        with pytest.raises(UnsupportedModel, match="chooses between"):
            opened(folder)

    def test_an_index_outranks_one_file_unless_it_is_the_left_over(self, tmp_path, values):
        folder = make_folder(tmp_path, {"a": values})
        index = {"weight_map": {"b": "any name.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert opened(folder).names == {"a"}
        mx.save_safetensors(str(folder / "any name.safetensors"), {"b": values})
        assert opened(folder).names == {"b"}

    @pytest.mark.parametrize("dtype", ["F64", "F8_E5M2", "I4"])
    def test_a_dtype_that_mlx_does_not_know_blocks_only_its_tensor(self, tmp_path, values, dtype):
        floats = {kind: values.astype(getattr(mx, kind)) for kind in ("float32", "float16")}
        floats["bfloat16"] = values.astype(mx.bfloat16)
        codes = quantised(values, 32, 4)
        codes["e.weight"], codes["e.scales"] = mx.quantize(values, mode="nvfp4")
        specs = {"quantization": QUANTISED["quantization"] | {"e": {"mode": "nvfp4"}}}
        folder = make_folder(tmp_path, floats | codes)
        add_tensor(folder / "model.safetensors", "odd", dtype, bytes(32))
        checkpoint = opened(folder)
        for name, expected in floats.items():
            assert same(checkpoint.take(name).array, expected.astype(mx.float32))
        whole = make_folder(tmp_path / "other", codes, **specs)
        folder.joinpath("config.json").write_text(whole.joinpath("config.json").read_text())
        for name in (f"{MODULE}.weight", "e.weight"):
            parts = [opened(one).take(name).arrays for one in (folder, whole)]
            assert all(same(a, b) for a, b in zip(*parts, strict=True))
        with pytest.raises(UnsupportedModel, match=f"'odd' has dtype {dtype}"):
            checkpoint.take("odd")

    def test_a_process_whose_stdin_is_closed_loads_it(self, tmp_path, values):
        folder = make_folder(tmp_path, {"a": values})
        saved = os.dup(0)
        os.close(0)  # the next file that is opened has this number
        try:
            assert same(opened(folder).take("a").array, values)
        finally:
            os.dup2(saved, 0)
            os.close(saved)

    def test_missing_and_misshapen_tensors_are_named(self, tmp_path, values):
        checkpoint = opened(make_folder(tmp_path, {"a": values}))
        with pytest.raises(CheckpointCorrupt, match=r"model: tensor 'b' is missing"):
            checkpoint.take("b")
        expected = r"model\.safetensors: tensor 'a' has shape \(4, 128\), expected \(128, 4\)"
        with pytest.raises(CheckpointCorrupt, match=expected):
            checkpoint.take("a", shape=(128, 4))

    def test_integers_are_no_weights(self, tmp_path, values):
        checkpoint = opened(make_folder(tmp_path, {"a": values.astype(mx.int64)}))
        with pytest.raises(UnsupportedModel, match="'a' has dtype I64"):
            checkpoint.take("a")


class TestBrokenFolder:
    @pytest.mark.parametrize(
        ("name", "content", "kind", "message"),
        [
            ("config.json", None, CheckpointCorrupt, r"config\.json cannot be read"),
            ("config.json", b"{", CheckpointCorrupt, "not valid JSON"),
            ("config.json", b"\xff", CheckpointCorrupt, "not valid JSON"),
            ("config.json", b"[]", CheckpointCorrupt, "not a JSON object"),
            ("config.json", b"[" * 100_000, CheckpointCorrupt, "not valid JSON"),
            ("model.safetensors", None, CheckpointCorrupt, "has neither"),
            ("model.safetensors", b"short", CheckpointCorrupt, "too few"),
        ],
    )
    def test_a_missing_or_malformed_file(self, tmp_path, values, name, content, kind, message):
        folder = make_folder(tmp_path, {"a": values})
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(kind, match=message) as caught:
            opened(folder)
        assert str(folder) in str(caught.value)

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            (b"{", "not valid JSON"),
            (b"{}", "no weight_map"),
            (b'{"weight_map": []}', "no weight_map"),
            (b'{"weight_map": {"a": "../model/x.safetensors"}}', "not a file of this"),
            (b'{"weight_map": {"a": "/x.safetensors"}}', "not a file of this"),
            (b'{"weight_map": {"a": ""}}', "not a file of this"),
            (b'{"weight_map": {"a": 7}}', "7 is not a file of this"),
            (b'{"weight_map": {"a": "b", "c": "d"}}', "shard b, and 1 more, are missing"),
        ],
    )
    def test_a_malformed_index(self, tmp_path, values, index, message):
        folder = make_folder(tmp_path, {"a": values})
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_bytes(index)
        with pytest.raises(CheckpointCorrupt, match=message):
            opened(folder)

    def test_pytorch_weights_only(self, tmp_path, values):
        folder = make_folder(tmp_path, {"a": values})
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(UnsupportedModel, match="PyTorch") as caught:
            opened(folder)
        assert "safetensors" in caught.value.hint

    def test_nothing_there_and_not_a_model(self, tmp_path):
        with pytest.raises(ModelNotFound):
            opened(tmp_path / "missing.gguf")
        (tmp_path / "x.gguf").write_bytes(b"not a model")
        with pytest.raises(CheckpointCorrupt, match="not a GGUF file"):
            opened(tmp_path / "x.gguf")

    def test_a_file_that_mlx_refuses_is_a_typed_error(self, tmp_path, values):
        folder = make_folder(tmp_path, {"a": values})
        checkpoint = opened(folder)
        (folder / "model.safetensors").write_bytes(b"damaged since")
        with pytest.raises(CheckpointCorrupt, match="MLX cannot load it"):
            checkpoint.take("a")

    @pytest.mark.slow
    def test_flipped_bytes_load_or_are_typed_errors(self, tmp_path, values):
        tensors = {"a": values, "b": values[0].astype(mx.bfloat16), **quantised(values, 64, 4)}
        tensors["c.weight"], tensors["c.scales"] = mx.quantize(values, mode="nvfp4")
        specs = {"group_size": 64, "bits": 4, "c": {"mode": "nvfp4"}}
        folder = make_folder(tmp_path, tensors, quantization=specs)
        path = folder / "model.safetensors"
        good = path.read_bytes()
        header_bytes = 8 + struct.unpack("<Q", good[:8])[0]
        rng = random.Random(4)
        num_errors = 0
        for _ in range(300):
            raw = bytearray(good)
            for _ in range(rng.randint(1, 2)):
                raw[rng.randrange(header_bytes)] = rng.randrange(32, 127)
            path.write_bytes(raw)
            try:
                checkpoint = opened(folder, keep=False)
                for name in checkpoint.names:
                    tensor = checkpoint.take(name)
                    assert isinstance(tensor, Dense)
                    mx.eval(tensor.array)
                    assert tensor.shape == checkpoint.shape(name)
            except EdgeKVError:
                num_errors += 1
        assert 50 < num_errors < 300


class TestMlxQuantisation:
    @pytest.mark.parametrize("key", ["quantization", "quantization_config"])
    @pytest.mark.parametrize(("group_size", "bits"), [(64, 4), (32, 8), (128, 3), (64, 6)])
    def test_triples_are_kept(self, tmp_path, values, key, group_size, bits):
        parts = quantised(values, group_size, bits)
        config = {key: {"group_size": group_size, "bits": bits, "mode": "affine"}}
        checkpoint = opened(make_folder(tmp_path, {**parts, "b": values[0]}, **config))
        assert checkpoint.names == {f"{MODULE}.weight", "b"}
        assert checkpoint.shape(f"{MODULE}.weight") == (4, 128)
        tensor = checkpoint.take(f"{MODULE}.weight", shape=(4, 128))
        assert isinstance(tensor, Quantised)
        assert tensor.shape == (4, 128)
        assert (tensor.group_size, tensor.bits) == (group_size, bits)
        assert same(tensor.weight, parts[f"{MODULE}.weight"])
        assert same(tensor.scales, parts[f"{MODULE}.scales"])
        assert isinstance(checkpoint.take("b"), Dense)

    def test_triples_are_dequantised_where_asked(self, tmp_path, values):
        parts = quantised(values.astype(mx.bfloat16), 64, 4)
        folder = make_folder(tmp_path, parts, quantization={"group_size": 64, "bits": 4})
        tensor = opened(folder, keep=False).take(f"{MODULE}.weight", shape=(4, 128))
        assert isinstance(tensor, Dense)
        w, s, b = parts.values()
        expected = mx.dequantize(w, s.astype(mx.float32), b.astype(mx.float32), 64, 4)
        assert same(tensor.array, expected)

    def test_single_layers_may_differ(self, tmp_path, values):
        tensors = {
            **quantised(values, 64, 4, "a"),
            **quantised(values, 32, 8, "b"),
            **quantised(values, 64, 4, "d"),
            "c.weight": values,
        }
        config = {
            "group_size": 64,
            "bits": 4,
            "b": {"group_size": 32, "bits": 8},
            "c": False,
            "d": True,
        }
        checkpoint = opened(make_folder(tmp_path, tensors, quantization=config))
        found = {name: checkpoint.take(f"{name}.weight", shape=(4, 128)) for name in "abcd"}
        assert {n: (t.group_size, t.bits) for n, t in found.items() if n != "c"} == {
            "a": (64, 4),
            "b": (32, 8),
            "d": (64, 4),
        }
        assert isinstance(found["c"], Dense)

    @pytest.mark.parametrize(
        ("config", "kind", "message"),
        [
            ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, 1, "by 'gptq'"),
            ({"quantization_config": {"quant_method": "fp8"}}, 1, "by 'fp8'"),
            ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp6"}}, 1, "'mxfp6'"),
            ({"quantization": {"group_size": 48, "bits": 4}}, 1, "groups of 48"),
            ({"quantization": {"group_size": 64, "bits": 7}}, 1, "7 bits"),
            ({"quantization": {"bits": 4}}, 0, "lacks group_size"),
            ({"quantization": {"group_size": True, "bits": 4}}, 0, "lacks group_size"),
            ({"quantization": 4}, 0, "not an object"),
            (
                {"quantization": {"group_size": 64, "bits": 4, "x": {"mode": ["a"]}}},
                1,
                r"x has quantisation mode \['a'\]",
            ),
        ],
    )
    def test_what_is_not_supported_or_malformed(self, tmp_path, values, config, kind, message):
        folder = make_folder(tmp_path, {"a": values}, **config)
        expected = UnsupportedModel if kind else CheckpointCorrupt
        with pytest.raises(expected, match=message) as caught:
            opened(folder)
        assert "config.json" in str(caught.value)
        assert caught.value.hint or not kind

    @pytest.mark.parametrize(
        ("change", "config"),
        [
            ({}, {"group_size": 32, "bits": 4}),
            ({}, {"group_size": 64, "bits": 8}),
            ({"scales": mx.zeros((4, 1))}, {"group_size": 64, "bits": 4}),
            ({"biases": mx.zeros((4, 3))}, {"group_size": 64, "bits": 4}),
            ({"biases": None}, {"group_size": 64, "bits": 4}),
            ({"weight": mx.zeros((16,), mx.uint32)}, {"group_size": 64, "bits": 4}),
            ({"weight": mx.zeros((), mx.uint32)}, {"group_size": 64, "bits": 4}),
        ],
    )
    def test_parts_that_do_not_fit_are_corrupt(self, tmp_path, values, change, config):
        parts = quantised(values, 64, 4) | {f"{MODULE}.{k}": v for k, v in change.items()}
        parts = {name: part for name, part in parts.items() if part is not None}
        checkpoint = opened(make_folder(tmp_path, parts, quantization=config))
        with pytest.raises(CheckpointCorrupt, match="needs scales and biases of shape"):
            checkpoint.take(f"{MODULE}.weight", shape=(4, 128))

    @pytest.mark.parametrize(
        "config", [{}, {"quantization": {"group_size": 64, "bits": 4, MODULE: False}}]
    )
    def test_quantised_tensors_that_the_config_does_not_know(self, tmp_path, values, config):
        checkpoint = opened(make_folder(tmp_path, quantised(values, 64, 4), **config))
        with pytest.raises(CheckpointCorrupt, match="does not say how"):
            checkpoint.take(f"{MODULE}.weight")

    def test_codes_without_scales(self, tmp_path, values):
        parts = quantised(values, 64, 4)
        del parts[f"{MODULE}.scales"]
        config = {"quantization": {"group_size": 64, "bits": 4}}
        checkpoint = opened(make_folder(tmp_path, parts, **config))
        with pytest.raises(EdgeKVError, match=MODULE):
            checkpoint.take(f"{MODULE}.weight", shape=(4, 128))


class TestTensors:
    def test_rows_are_gathered(self, values):
        order = mx.array([2, 0, 3, 1])
        assert same(Dense(values).rows(order).array, values[order])
        triple = Quantised(*mx.quantize(values, 64, 4), 64, 4)
        permuted = triple.rows(order)
        assert permuted.shape == (4, 128)
        assert same(permuted.dequantised().array, triple.dequantised().array[order])

    def test_rows_are_stacked_where_the_kinds_agree(self, values):
        def triple(group_size, bits):
            return Quantised(*mx.quantize(values, group_size, bits), group_size, bits)

        stacked = concat_rows([Dense(values), Dense(values[:1])])
        assert isinstance(stacked, Dense)
        assert same(stacked.array, mx.concatenate([values, values[:1]]))
        both = concat_rows([triple(64, 4), triple(64, 4)])
        assert isinstance(both, Quantised)
        assert both.shape == (8, 128)
        expected = mx.concatenate([triple(64, 4).dequantised().array] * 2)
        assert same(both.dequantised().array, expected)
        assert concat_rows([Dense(values), triple(64, 4)]) is None
        assert concat_rows([triple(64, 4), triple(32, 4)]) is None
        assert concat_rows([triple(64, 4), triple(64, 8)]) is None
