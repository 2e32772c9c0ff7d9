"""The default model as it is served: fetched, verified and read."""

import hashlib

import gguf
import numpy as np
import pytest
from stepping import CPU_PROFILE, FUSED_PROFILE

from edgekv.models.checkpoint import Dense, Quantised
from edgekv.models.default_model import DEFAULT_MODEL, REGISTRY
from edgekv.models.gguf_file import read_header
from edgekv.models.hub import list_models, resolve
from edgekv.models.open_model import open_checkpoint

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def path():
    return resolve(DEFAULT_MODEL)


def test_it_is_the_pinned_file(path):
    pin = REGISTRY[DEFAULT_MODEL]
    assert path.stat().st_size == pin.size_bytes
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == pin.sha256


def test_later_starts_neither_hash_nor_download(path, monkeypatch):
    monkeypatch.setattr(hashlib, "file_digest", None)  # a call would raise
    assert resolve(DEFAULT_MODEL, offline=True) == path
    entry = next(entry for entry in list_models() if entry.name == DEFAULT_MODEL)
    assert entry.downloaded
    assert entry.path == path


def test_its_header(path):
    checkpoint = open_checkpoint(path, CPU_PROFILE)
    assert checkpoint.config["general.architecture"] == "llama"
    assert checkpoint.config["llama.block_count"] == 30
    assert len(checkpoint.config["tokenizer.ggml.tokens"]) == 49152
    assert len(checkpoint.names) == 272
    assert checkpoint.shape("token_embd.weight") == (49152, 576)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("blk.0.attn_q.weight", 4), ("blk.29.ffn_down.weight", 4), ("token_embd.weight", 8)],
)
def test_its_tensors_equal_the_gguf_packages(path, name, bits):
    dense = open_checkpoint(path, CPU_PROFILE)
    kept = open_checkpoint(path, FUSED_PROFILE)
    info = read_header(path).tensors[name]
    raw = np.fromfile(path, np.uint8, info.end - info.start, offset=info.start)
    kind = gguf.GGMLQuantizationType[info.type.name]
    expected = gguf.quants.dequantize(raw.reshape(info.shape[0], -1), kind)
    floats = dense.take(name, shape=expected.shape)
    assert isinstance(floats, Dense)
    np.testing.assert_array_equal(np.array(floats.array), expected)
    triple = kept.take(name, shape=expected.shape)
    assert isinstance(triple, Quantised)
    assert triple.bits == bits
    np.testing.assert_array_equal(np.array(triple.dequantised().array), expected)
