"""Where tensors are found and what becomes of them; logits across families are tested elsewhere."""

import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from oracle import mlx_lm_logits
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper
from tiny_gguf import write_gguf
from tiny_models import FAMILIES, random_ids, random_tensors, tiny_config, write_folder

from edgekv.models.decoder import Decoder
from edgekv.models.open_model import open_decoder

IDS = random_ids(30)
BF16_PROFILE = replace(FUSED_PROFILE, compute_dtype="bfloat16")


def load(path, profile=CPU_PROFILE) -> Decoder:
    return open_decoder(path, profile)


def logits(path) -> np.ndarray:
    return Stepper(load(path)).logits(IDS)


def test_the_text_part_of_a_multimodal_gemma3(tmp_path):
    text = tiny_config("gemma3", vocab_size=288)
    text_tensors = random_tensors(text)
    tensors = {f"language_model.{name}": values for name, values in text_tensors.items()}
    vision = {"vision_tower.patch.weight": np.zeros((4, 4), np.float32)}
    wrapper = {"model_type": "gemma3", "vocab_size": 288, "text_config": text}
    folder = write_folder(tmp_path / "a", wrapper, tensors=tensors | vision, tokenizer=False)
    plain = write_folder(tmp_path / "b", text, tensors=text_tensors, tokenizer=False)
    np.testing.assert_array_equal(logits(folder), logits(plain))
    np.testing.assert_allclose(logits(folder), mlx_lm_logits(folder, IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantised", [False, True])
def test_biases_that_gguf_metadata_do_not_mention(tmp_path, quantised):
    """Query and key biases are permuted as their weights are."""
    config = tiny_config("llama", attention_bias=True, mlp_bias=True)
    stored = write_gguf(tmp_path / "model.gguf", config)
    folder = write_folder(tmp_path / "folder", config, tensors=stored, tokenizer=False)
    profile = FUSED_PROFILE if quantised else CPU_PROFILE
    actual = Stepper(load(tmp_path / "model.gguf", profile)).logits(IDS)
    np.testing.assert_allclose(actual, logits(folder), rtol=0, atol=1e-5)


def test_a_tied_head_wins_over_a_stored_one(tmp_path):
    """As in transformers: some converters write the head although the configuration ties it."""
    config = tiny_config("llama", tie_word_embeddings=True)
    tensors = random_tensors(config)
    stale = tensors | {"lm_head.weight": np.zeros((288, 64), np.float32)}
    with_head = write_folder(tmp_path / "a", config, tensors=stale, tokenizer=False)
    without = write_folder(tmp_path / "b", config, tensors=tensors, tokenizer=False)
    np.testing.assert_array_equal(logits(with_head), logits(without))


def test_tensors_decide_where_the_configuration_does_not(tmp_path):
    config = tiny_config("llama", tie_word_embeddings=None)
    for tied in (True, False):
        explicit = tiny_config("llama", tie_word_embeddings=tied)
        tensors = random_tensors(explicit)
        silent = write_folder(tmp_path / f"a{tied}", config, tensors=tensors, tokenizer=False)
        said = write_folder(tmp_path / f"b{tied}", explicit, tensors=tensors, tokenizer=False)
        np.testing.assert_array_equal(logits(silent), logits(said))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_evaluated_when_loading_ends(tmp_path, family):
    """A lazy array can be evaluated only by the thread that made it; others run anywhere."""
    changes = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    decoder = load(write_folder(tmp_path, tiny_config(family, **changes), tokenizer=False))
    done: list[np.ndarray] = []

    def run() -> None:
        done.append(Stepper(decoder).logits(IDS))
        mx.clear_streams()  # else this thread's stream would outlive it

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    np.testing.assert_array_equal(done[0], Stepper(decoder).logits(IDS))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_so_and_is_near_float32(tmp_path, family):
    """The compute dtype of Metal: nothing on the way widens rows or KV."""
    folder = write_folder(tmp_path, tiny_config(family), tokenizer=False)
    decoder = load(folder, BF16_PROFILE)
    assert decoder.embed(mx.array(IDS)).dtype == mx.bfloat16
    stepper = Stepper(decoder, dtype=mx.bfloat16)
    kv = stepper.session(len(IDS))
    actual = stepper.logits(IDS, chunks=[20, 1, 1], kv=kv)
    assert kv.buffers is not None
    assert {a.dtype for a in [*kv.buffers.keys, *kv.buffers.values]} == {mx.bfloat16}
    assert decoder.logits(decoder.embed(mx.array(IDS))).dtype == mx.bfloat16
    expected = logits(folder)
    assert np.abs(actual - expected).mean() < 0.05 * expected.std()


def test_loading_twice_gives_the_same(tmp_path):
    folder = write_folder(tmp_path, tiny_config("qwen3"), tokenizer=False)
    np.testing.assert_array_equal(logits(folder), logits(folder))
