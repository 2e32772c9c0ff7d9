"""GGUF files give the logits of the Hugging Face folder with the same weights."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper
from tiny_gguf import write_gguf
from tiny_models import LLAMA3_ROPE, random_ids, random_tensors, tiny_config, write_folder

from edgekv.models.linear import DenseLinear, QuantisedLinear
from edgekv.models.open_model import open_checkpoint, open_decoder

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 16,
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "attention_factor": 1.25,
}
CONFIGS = {
    "llama": tiny_config("llama"),
    "llama-tied": tiny_config("llama", tie_word_embeddings=True),
    "llama-llama3-rope": tiny_config("llama", rope_scaling=LLAMA3_ROPE),
    "llama-linear-rope": tiny_config("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama-yarn": tiny_config("llama", rope_scaling=YARN),
    "llama-longrope": tiny_config("llama", rope_scaling=LONGROPE),
    "llama-left-over-window": tiny_config("llama", sliding_window=8),
    "qwen2": tiny_config("qwen2"),
    "qwen2-yarn": tiny_config(
        "qwen2", rope_scaling=YARN | {"attention_factor": 1.4, "beta_fast": 20.0}
    ),
    "qwen3": tiny_config("qwen3"),
    # GGUF files have no scalar of their own and take the size of a head.
    "gemma3": tiny_config(
        "gemma3", num_hidden_layers=7, sliding_window_pattern=6, query_pre_attn_scalar=32
    ),
    "openelm": tiny_config("openelm"),
}
IDS = random_ids(40)
QUANTISED = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.MXFP4]
# Each family plain and quantised; each kind once.
CASES = [(name, kind) for name in CONFIGS for kind in (Kind.F32, Kind.Q8_0)]
CASES += [("llama", kind) for kind in (Kind.F16, Kind.Q5_0, *QUANTISED[1:])]
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
        assert isinstance(kept.decoder.weights.layers[0].mlp.down, QuantisedLinear)
        np.testing.assert_allclose(kept.logits(IDS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("context", [None, 40, 16])
def test_longrope_is_chosen_by_the_context_it_is_opened_for(context, tmp_path):
    config = CONFIGS["llama-longrope"]
    tensors = random_tensors(config)
    write_gguf(tmp_path / "model.gguf", config, tensors=tensors)
    folder = write_folder(tmp_path / "longrope", config, tensors=tensors, tokenizer=False)
    used = "short_factor" if context == 16 else "long_factor"
    factors = dict.fromkeys(("short_factor", "long_factor"), LONGROPE[used])
    alike = config | {"rope_scaling": LONGROPE | factors}
    expected = write_folder(tmp_path / "alike", alike, tensors=tensors, tokenizer=False)
    ids = IDS[:16]
    for path in (tmp_path / "model.gguf", folder):
        decoder = open_decoder(path, CPU_PROFILE, context)
        assert decoder.config.context_max == (context or 1024)
        assert decoder.config.layers[0].rope.for_short == (context == 16)
        np.testing.assert_allclose(
            Stepper(decoder).logits(ids), stepper_of(expected).logits(ids), rtol=0, atol=1e-5
        )


def test_dense_kinds_stay_dense(tmp_path):
    write_gguf(tmp_path / "model.gguf", CONFIGS["llama"], kind=Kind.F16)
    decoder = stepper_of(tmp_path / "model.gguf", profile=FUSED_PROFILE).decoder
    assert isinstance(decoder.weights.layers[0].mixer.qkv, DenseLinear)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_tensor_names_are_those_of_the_gguf_package(name, tmp_path):
    """Guards the helper: its names are llama.cpp's, not just what our loader looks for."""
    config = CONFIGS[name]
    stored = write_gguf(tmp_path / "model.gguf", config)
    arch = gguf.MODEL_ARCH[name.upper()]
    table = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    expected = {table.get_name(tensor, try_suffixes=(".weight", ".bias")) for tensor in stored}
    assert open_checkpoint(tmp_path / "model.gguf", CPU_PROFILE).names == expected
