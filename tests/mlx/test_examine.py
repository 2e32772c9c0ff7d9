"""What headers say of a model is what loading it shows, and nothing is computed for it."""

import json
import math
import pathlib
import struct
import threading
from dataclasses import fields, is_dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from published_models import NAMES, write_small
from stepping import CPU_PROFILE, FUSED_PROFILE
from tiny_families import FAMILY_CONFIGS, write_family
from tiny_gguf import write_gguf
from tiny_models import (
    FAMILIES,
    LLAMA3_ROPE,
    random_tensors,
    tensor_shapes,
    tiny_config,
    write_folder,
    write_tokenizer,
)

from edgekv.device import DeviceProfile
from edgekv.errors import CheckpointCorrupt, TokenizerError, UnsupportedModel
from edgekv.models import split, unread
from edgekv.models.examine import Stored, examine
from edgekv.models.hollow_copy import ModelFiles
from edgekv.models.open_model import open_decoder


def look(path: pathlib.Path, device: DeviceProfile = CPU_PROFILE):
    return examine(ModelFiles(path), device)


def write_quantised(folder: pathlib.Path, config, bits: int = 4, mode: str = "affine"):
    """All matrices as MLX quantises them, in groups of 32."""
    tensors = {}
    spec = {"group_size": 32, "bits": bits, "mode": mode}
    for name, values in random_tensors(config).items():
        tensors[name] = mx.array(values)
        if values.ndim == 2:
            module = name.removesuffix(".weight")
            names = (name, f"{module}.scales", f"{module}.biases")
            tensors |= zip(names, mx.quantize(tensors[name], **spec), strict=False)
    return write_folder(folder, config | {"quantization": spec}, tensors=tensors)


MODELS = {
    **{name: (lambda p, name=name: write_folder(p / "m", tiny_config(name))) for name in FAMILIES},
    **{
        name: (lambda p, config=config: write_family(p / "m", config))
        for name, config in FAMILY_CONFIGS.items()
    },
    "mxfp4": lambda p: write_quantised(p / "m", tiny_config("llama"), mode="mxfp4"),
    "4-bit": lambda p: write_quantised(p / "m", tiny_config("llama")),
    "6-bit": lambda p: write_quantised(p / "m", tiny_config("gemma3"), bits=6),
    **{
        kind.name: (lambda p, kind=kind: gguf_of(p, kind))
        for kind in (Kind.F16, Kind.Q4_0, Kind.Q5_1, Kind.Q8_0)
    },
    "a head that is tied and there all the same": lambda p: write_with_two_heads(p),
    "rope factors": lambda p: gguf_of(p, Kind.F32, rope_scaling=LLAMA3_ROPE),
}


def gguf_of(folder: pathlib.Path, kind: Kind, **changes) -> pathlib.Path:
    write_gguf(folder / "m.gguf", tiny_config("llama", **changes), kind=kind)
    return folder / "m.gguf"


def write_with_two_heads(folder: pathlib.Path) -> pathlib.Path:
    config = tiny_config("llama", tie_word_embeddings=True)
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return write_folder(folder / "m", config, tensors=tensors)


def buffers_of(weights) -> dict[int, int]:
    """Bytes of all arrays in dataclasses and tuples, by where they are: views are no second one."""
    if isinstance(weights, mx.array):
        return {np.array(weights, copy=False).ctypes.data: weights.nbytes}
    if is_dataclass(weights):
        weights = [getattr(weights, field.name) for field in fields(weights)]
    elif not isinstance(weights, list | tuple):
        return {}
    return {at: size for part in weights for at, size in buffers_of(part).items()}


def assert_as_loaded(path: pathlib.Path, device: DeviceProfile) -> None:
    found = look(path, device)
    decoder = open_decoder(path, device)
    assert found.refusal is None
    assert found.config == decoder.config
    assert found.memory_bytes == sum(buffers_of(decoder.weights).values())


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_what_a_loaded_model_takes(tmp_path, name):
    path = MODELS[name](tmp_path)
    for device in (CPU_PROFILE, FUSED_PROFILE):
        assert_as_loaded(path, device)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe", "F16"])
def test_memory_where_matrices_are_kept_transposed(tmp_path, name, monkeypatch):
    monkeypatch.setattr(split, "_measured", [False])
    assert_as_loaded(MODELS[name](tmp_path), replace(CPU_PROFILE, measures_few_rows=True))


@pytest.mark.parametrize("name", NAMES)
def test_public_configurations_load_by_their_headers(tmp_path, name):
    folder = write_small(tmp_path, name)
    write_tokenizer(folder)
    assert look(folder).refusal is None


# --- what is on disk ---


def test_types_on_disk_with_scales_and_biases(tmp_path):
    config = tiny_config("llama")
    stored = look(write_quantised(tmp_path, config)).stored
    shapes = tensor_shapes(config).values()
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    vectors = sum(math.prod(shape) for shape in shapes if len(shape) == 1)
    # A group of 32 codes of half a byte has a scale and a bias, 4 bytes each.
    assert stored == {
        "4-bit": Stored(num_parameters=matrices, num_bytes=matrices // 32 * (16 + 8)),
        "F32": Stored(num_parameters=vectors, num_bytes=4 * vectors),
    }
    assert list(stored) == ["4-bit", "F32"]


def test_types_of_a_gguf_file(tmp_path):
    stored = look(gguf_of(tmp_path, Kind.Q8_0)).stored
    matrices = stored["Q8_0"]
    assert matrices.num_bytes == matrices.num_parameters // 32 * 34
    total = sum(math.prod(shape) for shape in tensor_shapes(tiny_config("llama")).values())
    assert sum(one.num_parameters for one in stored.values()) == total


# --- what does not load ---


def test_a_refusal_leaves_what_is_known_besides(tmp_path):
    config = tiny_config("llama")
    tensors = random_tensors(config)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    found = look(write_folder(tmp_path, config, tensors=tensors))
    assert isinstance(found.refusal, CheckpointCorrupt)
    assert found.config.num_layers == 3
    assert list(found.stored) == ["F32"]
    assert found.memory_bytes is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by 'gptq'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised by 'awq'"),
        ({"model_type": "mamba"}, "model_type 'mamba'"),
    ],
)
def test_what_edgekv_does_not_run(tmp_path, changes, message):
    folder = write_folder(tmp_path, tiny_config("llama"))
    (folder / "config.json").write_text(json.dumps(tiny_config("llama") | changes))
    found = look(folder)
    assert isinstance(found.refusal, UnsupportedModel)
    assert message in str(found.refusal)


def test_a_shard_that_is_missing(tmp_path):
    folder = write_folder(tmp_path, tiny_config("llama"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    refusal = look(folder).refusal
    assert isinstance(refusal, CheckpointCorrupt)
    assert "shard model-00002-of-00002.safetensors is missing" in str(refusal)


def test_a_configuration_without_weights_says_what_it_knows(tmp_path):
    config = FAMILY_CONFIGS["qwen3_5"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = look(tmp_path)
    assert isinstance(found.refusal, CheckpointCorrupt)
    assert "has neither model.safetensors" in str(found.refusal)
    assert (found.config.family, found.config.num_layers) == ("qwen3_5", 4)
    assert found.stored is None


@pytest.mark.parametrize(
    "changes", [{"model_type": "qwen9"}, {"layer_types": ["linear_attention", "mamba"] * 2}]
)
def test_weights_that_would_not_help_are_not_asked_for(tmp_path, changes):
    config = FAMILY_CONFIGS["qwen3_5"] | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    refusal = look(tmp_path).refusal
    assert isinstance(refusal, UnsupportedModel)
    assert str(tmp_path / "config.json") in str(refusal)
    assert next(iter(changes)) in str(refusal)


def test_a_tokenizer_that_is_missing_or_unknown(tmp_path):
    folder = write_folder(tmp_path / "m", tiny_config("llama"), tokenizer=False)
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny_config("llama"), metadata={"tokenizer.ggml.pre": "of nobody"})
    for found in (look(folder), look(path)):
        assert isinstance(found.refusal, TokenizerError)
        assert found.memory_bytes > 0


# --- nothing is computed ---


def write_large(folder: pathlib.Path) -> pathlib.Path:
    """Eight layers of a model of 70 B parameters, in a file that is a hole."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256}
    config = tiny_config("llama", **sizes, **heads, tie_word_embeddings=True)
    shapes = tensor_shapes(config) | {"lm_head.weight": (128_256, 8192)}
    tensors, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        tensors[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(tensors).encode()
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return folder


@pytest.mark.slow
def test_a_large_model_takes_no_memory(tmp_path):
    folder = write_large(tmp_path)
    mx.reset_peak_memory()
    before_bytes = mx.get_active_memory()
    found = look(folder)
    assert mx.get_peak_memory() - before_bytes < 1 << 20
    assert found.refusal is None
    assert found.memory_bytes > 29 << 30


def test_two_at_once_leave_no_trace(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, tiny_config("llama"))
    evaluate, load = mx.eval, unread.load_decoder
    other = threading.Thread(target=look, args=(folder,))

    def load_beside_another(*arguments):
        if not other.ident:
            other.start()
            other.join(0.2)  # it waits for us
        return load(*arguments)

    monkeypatch.setattr(unread, "load_decoder", load_beside_another)
    assert look(folder).refusal is None
    other.join()
    assert mx.eval is evaluate


def test_other_threads_compute_meanwhile_and_all_do_afterwards(tmp_path, monkeypatch):
    seen = {}

    def evaluate(where):
        zeros = mx.zeros((1 << 20,)) + 1
        before_bytes = mx.get_active_memory()
        mx.eval(zeros)
        seen[where] = mx.get_active_memory() - before_bytes

    def load(*arguments):
        evaluate("here")
        other = threading.Thread(target=evaluate, args=("elsewhere",))
        other.start()
        other.join()
        raise UnsupportedModel("enough")

    monkeypatch.setattr(unread, "load_decoder", load)
    assert str(look(write_folder(tmp_path, tiny_config("llama"))).refusal) == "enough"
    evaluate("afterwards")
    assert seen["here"] == 0
    assert seen["elsewhere"] > 4_000_000
    assert seen["afterwards"] > 4_000_000
