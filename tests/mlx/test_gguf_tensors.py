"""Tensors of GGUF files against their slow twin, the gguf package's own dequantisation."""

import pathlib
import random
from dataclasses import replace

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from stepping import CPU_PROFILE
from tiny_gguf import finish

from edgekv.errors import CheckpointCorrupt, EdgeKVError
from edgekv.models import checkpoint as checkpoint_module
from edgekv.models.checkpoint import Dense, Quantised
from edgekv.models.gguf_file import GGML_TYPES
from edgekv.models.open_model import open_checkpoint

AFFINE = [Type.Q4_0, Type.Q4_1, Type.Q8_0]
# Those that the gguf package can also quantise to, so that the bytes are sensible.
BLOCKED = [*AFFINE, Type.Q5_0, Type.Q5_1]
KEPT = [*AFFINE, Type.MXFP4]


def write(path: pathlib.Path, tensors: dict[str, tuple[np.ndarray, Type]]) -> pathlib.Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_token_list(["a", "b", "Ġc"])
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    finish(writer)
    return path


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def opened(path, *, dtype="float32", keep=False):
    return open_checkpoint(path, replace(CPU_PROFILE, compute_dtype=dtype, keeps_quantised=keep))


def reference(values: np.ndarray, kind: Type) -> np.ndarray:
    return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)


def test_the_table_of_types_agrees_with_the_gguf_package():
    for number, kind in GGML_TYPES.items():
        assert Type(number).name == kind.name
        assert gguf.GGML_QUANT_SIZES[Type(number)] == (kind.block_size, kind.block_bytes)


def test_a_file_of_the_gguf_package_opens(tmp_path):
    path = write(tmp_path / "a.gguf", {"t.weight": (normal(3, 64), Type.F32)})
    checkpoint = opened(path)
    assert checkpoint.kind == "gguf"
    assert checkpoint.path == path
    assert checkpoint.names == {"t.weight"}
    assert checkpoint.config["general.architecture"] == "llama"
    assert checkpoint.config["tokenizer.ggml.tokens"] == ["a", "b", "Ġc"]
    assert checkpoint.shape("t.weight") == (3, 64)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 32)])
def test_floats_are_exact(tmp_path, kind, shape):
    values = normal(*shape)
    path = write(tmp_path / "a.gguf", {"t": (values, kind)})
    tensor = opened(path).take("t", shape=shape)
    assert isinstance(tensor, Dense)
    assert tensor.array.dtype == mx.float32
    np.testing.assert_array_equal(np.array(tensor.array), reference(values, kind).reshape(shape))


@pytest.mark.parametrize("kind", BLOCKED)
def test_dequantised_values_equal_the_packages(tmp_path, kind):
    values = normal(6, 96)
    path = write(tmp_path / "a.gguf", {"t": (values, kind)})
    tensor = opened(path).take("t", shape=(6, 96))
    assert isinstance(tensor, Dense)
    np.testing.assert_allclose(np.array(tensor.array), reference(values, kind), rtol=1e-6)


@pytest.mark.parametrize("kind", AFFINE)
def test_kept_triples_stand_for_the_same_values(tmp_path, kind):
    values = normal(6, 96)
    path = write(tmp_path / "a.gguf", {"t": (values, kind)})
    for dtype, tolerance in (("float32", 1e-6), ("float16", 4e-3)):
        tensor = opened(path, dtype=dtype, keep=True).take("t", shape=(6, 96))
        assert isinstance(tensor, Quantised)
        assert (tensor.group_size, tensor.bits) == (32, 8 if kind == Type.Q8_0 else 4)
        assert tensor.shape == (6, 96)
        assert tensor.scales.dtype == tensor.biases.dtype == getattr(mx, dtype)
        found = np.array(tensor.dequantised().array.astype(mx.float32))
        np.testing.assert_allclose(found, reference(values, kind), atol=tolerance, rtol=1e-6)


@pytest.mark.parametrize("kind", AFFINE)
def test_kept_triples_multiply_as_the_floats_do(tmp_path, kind):
    path = write(tmp_path / "a.gguf", {"t": (normal(8, 128), kind)})
    kept = opened(path, keep=True).take("t")
    dense = opened(path).take("t")
    assert isinstance(kept, Quantised)
    assert isinstance(dense, Dense)
    x = mx.array(normal(5, 128))
    product = mx.quantized_matmul(
        x, kept.weight, kept.scales, kept.biases, True, kept.group_size, kept.bits
    )
    assert mx.allclose(product, x @ dense.array.T, atol=1e-4).item()


def test_a_vector_is_not_kept_quantised(tmp_path):
    path = write(tmp_path / "a.gguf", {"v": (normal(64), Type.Q8_0)})
    assert isinstance(opened(path, keep=True).take("v", shape=(64,)), Dense)


@pytest.mark.parametrize("pieces", ["one piece", "many"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", [*BLOCKED, Type.MXFP4, Type.F16, Type.BF16])
def test_stacked_experts_have_the_packages_values(tmp_path, monkeypatch, kind, keep, pieces):
    if pieces == "many":  # of 3 and 1 rows, across the experts
        monkeypatch.setattr(checkpoint_module, "PIECE_VALUES", 3 * 64)
    values = normal(2, 5, 64)
    path = write(tmp_path / "a.gguf", {"t": (values, kind)})
    tensor = opened(path, keep=keep).take("t", shape=(2, 5, 64))
    assert isinstance(tensor, Quantised) == (keep and kind in KEPT)
    dense = tensor.dequantised() if isinstance(tensor, Quantised) else tensor
    assert dense.array.dtype == mx.float32
    found, expected = np.array(dense.array), reference(values, kind).reshape(values.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    order = mx.array([4, 0, 2])
    rows = tensor.rows(order)
    rows = rows.dequantised() if isinstance(rows, Quantised) else rows
    np.testing.assert_array_equal(np.array(rows.array), found[:, [4, 0, 2]])


def test_mxfp4_is_mlxs_own_code_for_code(tmp_path):
    values = normal(6, 96)
    words, scales = mx.quantize(mx.array(values), mode="mxfp4")
    exact = np.array(mx.dequantize(words, scales, mode="mxfp4", dtype=mx.float32))
    path = write(tmp_path / "a.gguf", {"t": (exact, Type.MXFP4)})
    kept = opened(path, keep=True, dtype="bfloat16").take("t", shape=(6, 96))
    assert isinstance(kept, Quantised)
    assert (kept.mode, kept.group_size, kept.bits, kept.biases) == ("mxfp4", 32, 4, None)
    assert kept.scales.dtype == mx.uint8
    theirs = mx.dequantize(kept.weight, kept.scales, mode="mxfp4", dtype=mx.float32)
    np.testing.assert_array_equal(np.array(theirs), exact)
    dense = opened(path, dtype="bfloat16").take("t")
    assert dense.arrays[0].dtype == mx.bfloat16
    np.testing.assert_array_equal(np.array(dense.arrays[0].astype(mx.float32)), exact)


@pytest.mark.parametrize(
    "kind", [kind for kind in GGML_TYPES.values() if kind.name not in ("F32", "F16", "BF16")]
)
def test_every_type_is_dequantised_as_the_package_does(tmp_path, monkeypatch, kind):
    """Experts' tensors too, in pieces of three rows that do not end where an expert does."""
    width = 2 * kind.block_size
    monkeypatch.setattr(checkpoint_module, "PIECE_VALUES", 3 * width)
    shape = (2, 4, 2 * kind.block_bytes)
    raw = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    if kind.name == "MXFP4":  # a scale of 255 is no number; ggml takes it for 2**128
        raw[..., ::17] %= 255
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, Type[kind.name])
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("matrix", raw[0], raw_dtype=Type[kind.name])
    writer.add_tensor("experts", raw, raw_dtype=Type[kind.name])
    finish(writer)
    for name, values in (("matrix", expected[0]), ("experts", expected)):
        tensor = opened(path).take(name, shape=(*values.shape[:-1], width))
        assert isinstance(tensor, Dense)
        found = np.array(tensor.array)
        finite = np.isfinite(values) & (np.abs(values) < 1e30)
        np.testing.assert_allclose(found[finite], values[finite], rtol=1e-5, atol=1e-3)


def test_a_file_that_shrinks_while_open(tmp_path):
    path = write(tmp_path / "a.gguf", {"t": (normal(3, 64), Type.F32)})
    checkpoint = opened(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointCorrupt, match="'t' is cut off"):
        checkpoint.take("t")
    path.unlink()
    with pytest.raises(CheckpointCorrupt, match="cannot be read"):
        checkpoint.take("t")


@pytest.mark.slow
def test_flipped_bytes_load_or_are_typed_errors(tmp_path):
    kinds = {
        f"{kind.name}.weight": (normal(2, 64), kind) for kind in [*BLOCKED, Type.MXFP4, Type.BF16]
    }
    good = write(tmp_path / "good.gguf", kinds).read_bytes()
    path = tmp_path / "bad.gguf"
    rng = random.Random(3)
    num_errors = 0
    for _ in range(300):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(len(raw))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        path.write_bytes(raw[: rng.choice((len(raw), len(raw), rng.randrange(len(raw))))])
        try:
            checkpoint = opened(path, keep=rng.random() < 0.5)
            for name in checkpoint.names:
                tensor = checkpoint.take(name)
                mx.eval(tensor.array if isinstance(tensor, Dense) else tensor.weight)
        except EdgeKVError:
            num_errors += 1
    assert 50 < num_errors < 300
