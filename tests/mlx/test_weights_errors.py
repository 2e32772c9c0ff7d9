"""What is wrong with a checkpoint is said with the file, the tensor and what is supported."""

import json
import pathlib

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from stepping import CPU_PROFILE
from tiny_gguf import write_gguf
from tiny_models import FAMILIES, LLAMA3_ROPE, random_tensors, tiny_config, write_folder

from edgekv.errors import CheckpointCorrupt, ModelError, UnsupportedModel
from edgekv.models.examine import examine
from edgekv.models.hollow_copy import ModelFiles
from edgekv.models.open_model import open_decoder


def load(path: pathlib.Path) -> None:
    """Load a model that will be refused: by its headers alone it is refused in the same words."""
    with pytest.raises(ModelError) as loading:
        open_decoder(path, CPU_PROFILE)
    refusal = examine(ModelFiles(path), CPU_PROFILE).refusal
    assert (repr(refusal), refusal.hint) == (repr(loading.value), loading.value.hint)
    raise loading.value


def written(tmp_path, config, tensors) -> pathlib.Path:
    return write_folder(tmp_path / "model", config, tensors=tensors, tokenizer=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_any_missing_tensor_is_named(tmp_path, family):
    config = tiny_config(family)
    tensors = random_tensors(config)
    for name in tensors:
        rest = {other: values for other, values in tensors.items() if other != name}
        folder = written(tmp_path, config, rest)
        with pytest.raises(CheckpointCorrupt) as e:
            load(folder)
        assert f"tensor {name!r} is missing" in str(e.value)
        assert str(folder) in str(e.value)
        assert e.value.hint


@pytest.mark.parametrize("family", FAMILIES)
def test_any_misshapen_tensor_is_named_with_both_shapes(tmp_path, family):
    config = tiny_config(family)
    tensors = random_tensors(config)
    for name, values in tensors.items():
        if ".layers.0." not in name and ".layers." in name:
            continue
        longer = np.concatenate([values, values[:1]])
        folder = written(tmp_path, config, tensors | {name: longer})
        with pytest.raises(CheckpointCorrupt) as e:
            load(folder)
        message = str(e.value)
        assert f"{folder / 'model.safetensors'}: tensor {name!r}" in message
        assert f"has shape {longer.shape}, expected {values.shape}" in message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_that_the_configuration_does_not_know(tmp_path, family):
    """Without it the model would load, and say something else."""
    config = tiny_config(family)
    tensors = random_tensors(config)
    matrices = [n for n, a in tensors.items() if ".layers.0." in n and a.ndim == 2]
    biases = {name.removesuffix("weight") + "bias": tensors[name][:, 0] for name in matrices}
    unknown = {name: values for name, values in biases.items() if name not in tensors}
    assert len(unknown) >= 4
    for name, values in unknown.items():
        with pytest.raises(CheckpointCorrupt, match=f"{name}' is one too many"):
            load(written(tmp_path, config, tensors | {name: values}))


def test_a_missing_head_that_is_not_tied(tmp_path):
    config = tiny_config("llama", tie_word_embeddings=False)
    tensors = random_tensors(config)
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointCorrupt, match=r"tensor 'lm_head.weight' is missing") as e:
        load(written(tmp_path, config, tensors))
    assert "tied" in e.value.hint


def test_an_unknown_model_type(tmp_path):
    config = tiny_config("llama", model_type="bloom")
    folder = written(tmp_path, config, random_tensors(tiny_config("llama")))
    with pytest.raises(UnsupportedModel, match="model_type 'bloom'") as e:
        load(folder)
    assert str(folder / "config.json") in str(e.value)
    for known in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "openelm"):
        assert known in e.value.hint


def test_an_unsupported_rope_scaling(tmp_path):
    config = tiny_config("llama", rope_scaling={"rope_type": "su", "factor": 4.0})
    folder = written(tmp_path, config, random_tensors(config))
    with pytest.raises(UnsupportedModel, match="'su'") as e:
        load(folder)
    assert str(folder / "config.json") in str(e.value)
    assert "linear" in e.value.hint


def test_a_file_cut_anywhere(tmp_path):
    config = tiny_config("qwen2")
    for path in (
        write_folder(tmp_path / "folder", config) / "model.safetensors",
        tmp_path / "model.gguf",
    ):
        if path.suffix == ".gguf":
            write_gguf(path, config, kind=Kind.Q8_0)
        whole = path.read_bytes()
        for keep in (0, 3, 11, 200, len(whole) // 2, len(whole) - 33, len(whole) - 1):
            path.write_bytes(whole[:keep])
            with pytest.raises(CheckpointCorrupt) as e:
                load(path if path.suffix == ".gguf" else path.parent)
            assert str(path) in str(e.value), keep


def test_configuration_that_is_no_configuration(tmp_path):
    folder = write_folder(tmp_path / "model", tiny_config("llama"))
    for text in ("", "[]", "{", '{"model_type": 5}', "{}"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json"):
            load(folder)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_configuration_that_does_not_fit_its_tensors(tmp_path, field):
    config = tiny_config("llama")
    folder = write_folder(tmp_path / "model", config)
    changed = json.dumps(config | {field: config[field] * 2})
    (folder / "config.json").write_text(changed)
    with pytest.raises(CheckpointCorrupt, match="tensor"):
        load(folder)


class TestGguf:
    def test_an_unsupported_architecture(self, tmp_path):
        path = tmp_path / "model.gguf"
        write_gguf(path, tiny_config("llama"))
        path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
        with pytest.raises(UnsupportedModel, match="GGUF architecture 'mamba'") as e:
            load(path)
        assert str(path) in str(e.value)
        for known in ("llama", "qwen2", "qwen3", "gemma3", "openelm"):
            assert known in e.value.hint

    def test_missing_tensors_are_named(self, tmp_path):
        config = tiny_config("qwen3")
        tensors = random_tensors(config)
        del tensors["model.layers.1.self_attn.k_norm.weight"]
        write_gguf(tmp_path / "model.gguf", config, tensors=tensors)
        with pytest.raises(CheckpointCorrupt, match=r"tensor 'blk.1.attn_k_norm.weight'") as e:
            load(tmp_path / "model.gguf")
        assert str(tmp_path / "model.gguf") in str(e.value)

    def test_misshapen_tensors_are_named(self, tmp_path):
        config = tiny_config("qwen3")
        write_gguf(tmp_path / "model.gguf", config, metadata={"qwen3.feed_forward_length": 128})
        with pytest.raises(CheckpointCorrupt, match=r"tensor 'blk.0.ffn_gate.weight'") as e:
            load(tmp_path / "model.gguf")
        assert "(96, 64), expected (128, 64)" in str(e.value)

    def test_an_unsupported_rope_scaling(self, tmp_path):
        metadata = {"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 2.0}
        write_gguf(tmp_path / "model.gguf", tiny_config("llama"), metadata=metadata)
        with pytest.raises(UnsupportedModel, match=r"llama\.rope\.scaling: .* 'su'") as e:
            load(tmp_path / "model.gguf")
        assert "longrope" in e.value.hint

    def test_longrope_without_its_tensors(self, tmp_path):
        metadata = {"llama.rope.scaling.type": "longrope"}
        write_gguf(tmp_path / "model.gguf", tiny_config("llama"), metadata=metadata)
        with pytest.raises(CheckpointCorrupt, match=r"'rope_factors_short\.weight' is missing"):
            load(tmp_path / "model.gguf")

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_damaged_rope_frequencies(self, tmp_path, value):
        path = tmp_path / "model.gguf"
        write_gguf(path, tiny_config("llama", rope_scaling=LLAMA3_ROPE))
        good, bad = np.float32([1, 1]).tobytes(), np.float32([value, 1]).tobytes()
        raw = path.read_bytes()
        at = raw.rindex(good)  # tensors come in order, rope_freqs last; its first factors are 1
        path.write_bytes(raw[:at] + bad + raw[at + len(bad) :])
        with pytest.raises(CheckpointCorrupt, match=r"rope_freqs\.weight"):
            load(path)
