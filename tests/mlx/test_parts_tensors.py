"""Parts of tensors in a file: the numbers of the whole, and neither bytes nor memory more."""

import pathlib
from collections.abc import Callable
from dataclasses import replace

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from stepping import CPU_PROFILE, FUSED_PROFILE
from tiny_gguf import finish, write_gguf
from tiny_models import random_tensors, tiny_config, write_folder
from tiny_quantised import SPECS, quantised

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.checkpoint import Quantised, Tensor
from edgekv.models.gguf_file import GGML_TYPES
from edgekv.models.open_model import open_checkpoint, open_decoder
from edgekv.models.parts import Axis
from edgekv.ranks.group import Group

IO = pathlib.Path("/proc/self/io")


def floats(tensor: Tensor) -> np.ndarray:
    dense = tensor.dequantised() if isinstance(tensor, Quantised) else tensor
    return np.array(dense.array.astype(mx.float32))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def taken(whole: np.ndarray, axes: tuple[Axis, ...]) -> np.ndarray:
    return whole[np.ix_(*(axis.places for axis in axes))]


# --- the same numbers ---

SOME = Axis(8, np.array([5, 4, 7, 1]))
EXPERTS = Axis(3)
HEADS = Axis(3, np.array([2]))


def columns(width: int, start: int, end: int) -> Axis:
    return Axis.of(range(start, end), width)


@pytest.mark.parametrize("kind", GGML_TYPES.values(), ids=lambda kind: kind.name)
def test_every_type_of_gguf(tmp_path, kind):
    """Columns that begin and end within a block too, of rows in another order."""
    width = 4 * kind.block_size
    shape = (3, 8, 4 * kind.block_bytes)
    raw = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    if kind.name == "MXFP4":
        raw[..., ::17] %= 255
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if kind.name == "F32":
        writer.add_tensor("t", raw.view(np.float32))
    elif kind.name == "F16":
        writer.add_tensor("t", raw.view(np.float16))
    else:
        writer.add_tensor("t", raw, raw_dtype=Type[kind.name])
    finish(writer)
    checkpoint = open_checkpoint(path, CPU_PROFILE)
    whole = floats(checkpoint.take("t", shape=(3, 8, width)))
    for axes in (
        (EXPERTS, SOME, columns(width, 1, width - 1)),
        (EXPERTS, SOME, Axis(width)),
        (HEADS, Axis(8), Axis(width)),
        (EXPERTS, Axis(8), columns(width, width // 4, 3 * width // 4)),
    ):
        found = floats(checkpoint.take_axes("t", axes))
        np.testing.assert_array_equal(found, taken(whole, axes))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_floats_of_a_folder(tmp_path, dtype):
    tensors = {"t": mx.array(normal(3, 8, 12)).astype(dtype)}
    write_folder(tmp_path, {}, tensors=tensors, tokenizer=False)
    whole = np.array(tensors["t"].astype(mx.float32))
    checkpoint = open_checkpoint(tmp_path, CPU_PROFILE)
    for axes in ((EXPERTS, SOME, columns(12, 5, 9)), (HEADS, Axis(8), Axis(12))):
        found = floats(checkpoint.take_axes("t", axes))
        np.testing.assert_array_equal(found, taken(whole, axes))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_modes_of_a_folder(tmp_path, spec, keep):
    config, stored = quantised({}, {"t.weight": normal(3, 8, 128)}, SPECS[spec])
    write_folder(tmp_path, config, tensors=stored, tokenizer=False)

    def opened():
        return open_checkpoint(tmp_path, replace(CPU_PROFILE, keeps_quantised=keep))

    whole = floats(opened().take("t.weight", shape=(3, 8, 128)))
    for axes in ((EXPERTS, SOME, columns(128, 32, 96)), (HEADS, Axis(8), Axis(128))):
        tensor = opened().take_axes("t.weight", axes)
        assert isinstance(tensor, Quantised) == keep
        np.testing.assert_array_equal(floats(tensor), taken(whole, axes))


def test_groups_of_all_tensors_where_they_are_kept(tmp_path):
    config = {"quantization": {"group_size": 32, "bits": 4, "a": {"group_size": 64, "bits": 8}}}
    write_folder(tmp_path, config, tensors={"t": normal(8, 96)}, tokenizer=False)
    path = gguf_of(tmp_path / "a.gguf", Type.Q8_0)
    assert open_checkpoint(tmp_path, FUSED_PROFILE).group_size == 64
    assert open_checkpoint(path, FUSED_PROFILE).group_size == 32
    assert {open_checkpoint(p, CPU_PROFILE).group_size for p in (tmp_path, path)} == {1}


@pytest.mark.parametrize("keep", [True, False])
def test_blocks_as_gpt_oss_has_them(tmp_path, keep):
    codes, scales = mx.quantize(mx.array(normal(3, 8, 128)), **SPECS["mxfp4"])
    blocks = codes.view(mx.uint8).reshape(3, 8, 4, 16)
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    tensors = {"t_blocks": blocks, "t_scales": scales}
    write_folder(tmp_path, config, tensors=tensors, tokenizer=False)
    checkpoint = open_checkpoint(tmp_path, replace(CPU_PROFILE, keeps_quantised=keep))
    whole = np.array(mx.dequantize(codes, scales, **SPECS["mxfp4"], dtype=mx.float32))
    axes = (EXPERTS, SOME, columns(128, 32, 96))
    np.testing.assert_array_equal(floats(checkpoint.take_axes("t", axes)), taken(whole, axes))


# --- what is wrong ---


def gguf_of(path: pathlib.Path, kind: Type) -> pathlib.Path:
    writer = gguf.GGUFWriter(path, "llama")
    values = normal(8, 96)
    writer.add_tensor("t", gguf.quants.quantize(values, kind), raw_dtype=kind)
    finish(writer)
    return path


@pytest.mark.parametrize("start", [0, 48])
def test_groups_that_would_be_cut(tmp_path, start):
    path = gguf_of(tmp_path / "a.gguf", Type.Q8_0)
    axes = (Axis(8), columns(96, start, start + 48))
    with pytest.raises(UnsupportedModel) as raised:
        open_checkpoint(path, FUSED_PROFILE).take_axes("t", axes)
    assert "48 of 96 columns of tensor 't' are not whole groups of 32" in str(raised.value)
    assert open_checkpoint(path, CPU_PROFILE).take_axes("t", axes).shape == (8, 48)
    # What no device keeps as it is can be cut anywhere.
    other = gguf_of(tmp_path / "b.gguf", Type.Q5_0)
    assert open_checkpoint(other, FUSED_PROFILE).take_axes("t", axes).shape == (8, 48)


def test_a_tensor_of_another_shape_and_none(tmp_path):
    checkpoint = open_checkpoint(gguf_of(tmp_path / "a.gguf", Type.F32), CPU_PROFILE)
    part = columns(8, 0, 4)
    with pytest.raises(CheckpointCorrupt, match=r"'t' has shape \(8, 96\), expected \(8, 64\)"):
        checkpoint.take_axes("t", (part, Axis(64)))
    with pytest.raises(CheckpointCorrupt, match="'other' is missing"):
        checkpoint.take_axes("other", (part, Axis(64)))


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_a_file_that_shrinks_while_open(tmp_path, form):
    if form == "gguf":
        path = opened = gguf_of(tmp_path / "a.gguf", Type.F32)
    else:
        opened = write_folder(tmp_path, {}, tensors={"t": normal(8, 96)}, tokenizer=False)
        path = opened / "model.safetensors"
    checkpoint = open_checkpoint(opened, CPU_PROFILE)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointCorrupt, match="tensor 't' is cut off"):
        checkpoint.take_axes("t", (columns(8, 4, 8), Axis(96)))


# --- no more bytes, no more memory ---

# Rows of the products out of a block are of four pages at least, so half of one is worth a call.
LARGE = tiny_config(
    "llama", hidden_size=256, intermediate_size=8192, head_dim=1024, num_hidden_layers=2
)


def of_two(rank: int) -> Group:
    """A rank without others, which is enough to load."""
    group = Group(None)
    group.rank, group.size = rank, 2
    return group


def num_bytes_read(run: Callable[[], object]) -> int:
    def so_far() -> int:
        return int(IO.read_text().split()[1])

    before = so_far()
    run()
    return so_far() - before


@pytest.mark.skipif(not IO.exists(), reason="counts what the process reads, which Linux tells")
@pytest.mark.parametrize("form", ["folder", "quantised folder", "gguf"])
def test_a_rank_reads_and_holds_half(tmp_path, form):
    path = tmp_path
    match form:
        case "gguf":
            path = tmp_path / "model.gguf"
            write_gguf(path, LARGE)
        case "folder":
            write_folder(path, LARGE, tokenizer=False)
        case _:
            config, stored = quantised(LARGE, random_tensors(LARGE), SPECS["4 bits"])
            write_folder(path, config, tensors=stored, tokenizer=False)
    profile = FUSED_PROFILE if form == "quantised folder" else CPU_PROFILE

    def load(group: Group) -> tuple[int, int, int]:
        """Bytes read, at most allocated, and kept."""
        mx.clear_cache()
        mx.reset_peak_memory()
        before, decoders = mx.get_active_memory(), []
        num_read = num_bytes_read(lambda: decoders.append(open_decoder(path, profile, group=group)))
        return num_read, mx.get_peak_memory() - before, mx.get_active_memory() - before

    whole = load(Group(None))
    for rank in range(2):
        read, peak, kept = load(of_two(rank))
        # Of rows of codes what is left out is less than a page, and so read.
        assert read < (0.85 if form == "quantised folder" else 0.55) * whole[0]
        assert peak < 0.55 * whole[1]
        assert kept < 0.51 * whole[2]
