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


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("language_model.model.", "language_model.lm_head"),
        ("model.language_model.", "lm_head"),
        ("language_model.", "lm_head"),
        ("", "lm_head"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_text_part_of_a_multimodal_gemma3(tmp_path, prefix, head, tied):
    """Whatever tools have put before a text model's tensors."""
    text = tiny_config("gemma3", vocab_size=288, tie_word_embeddings=tied)
    text_tensors = random_tensors(text)
    tensors = {
        head + name.removeprefix("lm_head")
        if name.startswith("lm_head")
        else prefix + name.removeprefix("model."): values
        for name, values in text_tensors.items()
    }
    vision = {"vision_tower.patch.weight": np.zeros((4, 4), np.float32)}
    wrapper = {"model_type": "gemma3", "vocab_size": 288, "text_config": text}
    wrapper["tie_word_embeddings"] = tied
    folder = write_folder(tmp_path / "a", wrapper, tensors=tensors | vision, tokenizer=False)
    plain = write_folder(tmp_path / "b", text, tensors=text_tensors, tokenizer=False)
    np.testing.assert_array_equal(logits(folder), logits(plain))
    if tied and prefix == "language_model.model.":  # mlx-lm knows no other
        np.testing.assert_allclose(logits(folder), mlx_lm_logits(folder, IDS), rtol=0, atol=1e-4)


def test_a_llama_saved_without_its_head(tmp_path):
    """transformers' base classes save their tensors without "model."."""
    config = tiny_config("llama", tie_word_embeddings=True)
    tensors = random_tensors(config)
    bare = {name.removeprefix("model."): values for name, values in tensors.items()}
    folder = write_folder(tmp_path / "a", config, tensors=bare, tokenizer=False)
    plain = write_folder(tmp_path / "b", config, tensors=tensors, tokenizer=False)
    np.testing.assert_array_equal(logits(folder), logits(plain))


@pytest.mark.parametrize("quantised", [False, True])
def test_biases_that_gguf_metadata_do_not_mention(tmp_path, quantised):
    """Query and key biases are permuted as their weights are."""
    config = tiny_config("llama", attention_bias=True, mlp_bias=True)
    stored = write_gguf(tmp_path / "model.gguf", config)
    folder = write_folder(tmp_path / "folder", config, tensors=stored, tokenizer=False)
    profile = FUSED_PROFILE if quantised else CPU_PROFILE
    actual = Stepper(load(tmp_path / "model.gguf", profile)).logits(IDS)
    np.testing.assert_allclose(actual, logits(folder), rtol=0, atol=1e-5)


def test_a_stored_head_counts_where_the_configuration_ties_it(tmp_path):
    """As in transformers 5, whose logits are in `published.npz`."""
    config = tiny_config("llama", tie_word_embeddings=True)
    tensors = random_tensors(config)
    same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    other = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"][::-1].copy()}
    folders = {
        name: write_folder(tmp_path / name, config, tensors=stored, tokenizer=False)
        for name, stored in {"none": tensors, "same": same, "other": other}.items()
    }
    tied = logits(folders["none"])
    np.testing.assert_array_equal(logits(folders["same"]), tied)
    np.testing.assert_allclose(logits(folders["other"]), tied[:, ::-1], rtol=0, atol=1e-5)


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
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    config = tiny_config(family, tie_word_embeddings=False, **biases)
    decoder = load(write_folder(tmp_path, config, tokenizer=False))
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
