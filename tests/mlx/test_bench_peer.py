"""The peer computes with our numbers: mlx-lm models built from our checkpoints."""

import importlib.metadata
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper
from tiny_gguf import write_gguf
from tiny_models import FAMILIES, LLAMA3_ROPE, random_ids, random_tensors, tiny_config, write_folder

from edgekv.bench.speed import peer_mlx_lm
from edgekv.bench.speed.peer_mlx_lm import (
    MlxLmSide,
    PeerFailed,
    build_model,
    check_installed,
    hf_checkpoint,
)
from edgekv.errors import ConfigError, UnsupportedModel
from edgekv.models.open_model import open_checkpoint
from edgekv.models.weights import load_decoder

pytestmark = pytest.mark.slow

IDS = random_ids(40)
# What a GGUF file cannot say otherwise: the windows' pattern, and the scale of the attention.
CONFIGS = {family: tiny_config(family) for family in FAMILIES} | {
    "gemma3": tiny_config(
        "gemma3", num_hidden_layers=7, sliding_window_pattern=6, query_pre_attn_scalar=32
    ),
    "tied": tiny_config("llama", tie_word_embeddings=True),
}


def open_tiny(path, *, keep_quantised=False):
    return open_checkpoint(path, FUSED_PROFILE if keep_quantised else CPU_PROFILE)


def peer_logits(model):
    return np.array(model(mx.array([IDS]))[0].astype(mx.float32))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_peer_of_a_folder_has_our_logits(name, tmp_path):
    folder = write_folder(tmp_path / "model", CONFIGS[name], tokenizer=False)
    expected = Stepper(load_decoder(open_tiny(folder), CPU_PROFILE)).logits(IDS)
    actual = peer_logits(build_model(open_tiny(folder)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("keep_quantised", [False, True], ids=["dense", "quantised"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_peer_of_a_gguf_file_has_our_logits(name, keep_quantised, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, CONFIGS[name], kind=Kind.Q8_0)
    checkpoint = open_tiny(path, keep_quantised=keep_quantised)
    profile = FUSED_PROFILE if keep_quantised else CPU_PROFILE
    expected = Stepper(load_decoder(checkpoint, profile)).logits(IDS)
    model = build_model(open_tiny(path, keep_quantised=keep_quantised))
    np.testing.assert_allclose(peer_logits(model), expected, rtol=0, atol=1e-4)
    kinds = {type(module).__name__ for _, module in model.named_modules()}
    assert ("QuantizedLinear" in kinds) is keep_quantised


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_reads_as_the_folder_it_was_made_from(name, tmp_path):
    path, config = tmp_path / "model.gguf", CONFIGS[name]
    write_gguf(path, config)
    fields, tensors = hf_checkpoint(open_tiny(path))
    assert fields["model_type"] == config["model_type"]
    expected = random_tensors(config)
    assert set(tensors) == set(expected)
    for tensor_name, values in expected.items():
        actual = np.array(tensors[tensor_name].array)
        np.testing.assert_allclose(actual, values, rtol=0, atol=1e-6, err_msg=tensor_name)


def test_rope_factors_that_a_config_cannot_say(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_config("llama", rope_scaling=LLAMA3_ROPE))
    with pytest.raises(UnsupportedModel, match="rope factors") as caught:
        hf_checkpoint(open_tiny(path))
    assert caught.value.hint


def test_a_model_that_mlx_lm_does_not_know(tmp_path):
    folder = write_folder(tmp_path / "model", tiny_config("llama"), tokenizer=False)
    checkpoint = open_tiny(folder)
    checkpoint.config["model_type"] = "no_such_model"
    with pytest.raises(UnsupportedModel, match="mlx-lm cannot run") as caught:
        build_model(checkpoint)
    assert "--peer" in caught.value.hint


def test_a_peer_that_breaks_down(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "model", tiny_config("llama"), tokenizer=False)
    side = MlxLmSide(open_tiny(folder))
    assert side.weights_bytes > 0

    def out_of_memory(*_arguments, **_options):
        raise RuntimeError("[malloc] out of memory")

    monkeypatch.setattr(side, "_generate", out_of_memory)
    with pytest.raises(PeerFailed, match="out of memory"):
        side.run([IDS], 2)


def test_mlx_lm_missing(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(peer_mlx_lm.importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match="not installed") as caught:
        check_installed()
    assert caught.value.hint == "pip install 'edgekv[bench]'"


def test_mlx_lm_of_another_version(monkeypatch):
    monkeypatch.setattr(peer_mlx_lm.importlib.metadata, "version", lambda _: "0.29.1")
    with pytest.raises(ConfigError, match=r"0\.29\.1") as caught:
        check_installed()
    assert caught.value.hint


def test_the_limit_of_open_files_stays_as_it_was():
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 3000))\n"
        "from edgekv.bench.speed import peer_mlx_lm\n"
        "peer_mlx_lm._import('models.llama')\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1000, 3000)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (900, 3000))\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (900, 3000)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
