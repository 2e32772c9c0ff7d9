"""GGUF files give the logits of the Hugging Face folder with the same weights."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper
from tiny_gguf import write_gguf
from tiny_models import LLAMA3_ROPE, random_ids, tiny_config, write_folder

from edgekv.models.linear import DenseLinear, QuantisedLinear
from edgekv.models.open_model import open_checkpoint, open_decoder

CONFIGS = {
    "llama": tiny_config("llama"),
    "llama-tied": tiny_config("llama", tie_word_embeddings=True),
    "llama-llama3-rope": tiny_config("llama", rope_scaling=LLAMA3_ROPE),
    "llama-linear-rope": tiny_config("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "qwen2": tiny_config("qwen2"),
    "qwen3": tiny_config("qwen3"),
    # GGUF files have no scalar of their own and take the size of a head.
    "gemma3": tiny_config(
        "gemma3", num_hidden_layers=7, sliding_window_pattern=6, query_pre_attn_scalar=32
    ),
    "openelm": tiny_config("openelm"),
}
IDS = random_ids(40)
QUANTISED = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1]
# Each family plain and quantised; each kind once.
CASES = [(name, kind) for name in CONFIGS for kind in (Kind.F32, Kind.Q8_0)]
CASES += [("llama", kind) for kind in (Kind.F16, Kind.Q5_0, Kind.Q4_0, Kind.Q4_1)]
CASES += [("gemma3", Kind.Q4_0), ("openelm", Kind.Q4_1)]


def stepper_of(path, *, profile=CPU_PROFILE) -> Stepper:
    return Stepper(open_decoder(path, profile))


@pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda case: getattr(case, "name", case))
def test_logits_equal_those_of_the_folder(name, kind, tmp_path):
    config = CONFIGS[name]
    stored = write_gguf(tmp_path / "model.gguf", config, kind=kind)
    folder = write_folder(tmp_path / "folder", config, tensors=stored, tokenizer=False)
    expected = stepper_of(folder).logits(IDS)
    assert expected.std() > 0.5
    # The same f32 numbers, in the same order of operations.
    actual = stepper_of(tmp_path / "model.gguf").logits(IDS)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    if kind in QUANTISED:
        kept = stepper_of(tmp_path / "model.gguf", profile=FUSED_PROFILE)
        assert isinstance(kept.decoder.weights.layers[0].down, QuantisedLinear)
        np.testing.assert_allclose(kept.logits(IDS), expected, rtol=0, atol=1e-4)


def test_dense_kinds_stay_dense(tmp_path):
    write_gguf(tmp_path / "model.gguf", CONFIGS["llama"], kind=Kind.F16)
    decoder = stepper_of(tmp_path / "model.gguf", profile=FUSED_PROFILE).decoder
    assert isinstance(decoder.weights.layers[0].qkv, DenseLinear)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_tensor_names_are_those_of_the_gguf_package(name, tmp_path):
    """Guards the helper: its names are llama.cpp's, not just what our loader looks for."""
    config = CONFIGS[name]
    stored = write_gguf(tmp_path / "model.gguf", config)
    arch = gguf.MODEL_ARCH[name.upper()]
    table = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    expected = {table.get_name(tensor, try_suffixes=(".weight", ".bias")) for tensor in stored}
    assert open_checkpoint(tmp_path / "model.gguf", CPU_PROFILE).names == expected
