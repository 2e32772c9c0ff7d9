"""Public configurations, made small, give the logits that transformers and mlx-lm compute."""

import functools

import numpy as np
import pytest
from oracle import mlx_lm_logits
from published_models import NAMES, ORACLE_FILE, SEEN, VOCAB_SIZE, small, text_ids, write_small
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper

from edgekv.models.open_model import open_decoder

ATOL = 1e-4
IDS = text_ids()
# Where mlx-lm (0.32.2) is not right, and why; all of them are right in transformers.
NOT_IN_MLX_LM = {
    "mistralai/Mistral-7B-v0.1": "its Mistral has no windows",
    "google/gemma-3-4b-it": "does not know this prefix of tensors",
    "google/gemma-3-27b-it": "does not know this prefix of tensors",
    "google/gemma-3-1b-it": "scales embeddings in bfloat16 always",
    "google/gemma-3-270m": "scales embeddings in bfloat16 always",
}


@functools.cache
def oracle() -> dict[str, np.ndarray]:
    with np.load(ORACLE_FILE) as file:
        return {name: file[name] for name in file.files}


def ours(folder, profile=CPU_PROFILE) -> np.ndarray:
    stepper = Stepper(open_decoder(folder, profile))
    return stepper.logits(IDS, chunks=[20, 50, 1, 1, 40])


def test_there_are_twenty_and_more_and_each_has_an_oracle():
    published = [name for name in NAMES if "/" in name]
    assert len(published) >= 20
    assert set(oracle()) == {name for name in NAMES if "OpenELM" not in name}
    assert all(logits.shape == (len(SEEN), VOCAB_SIZE) for logits in oracle().values())


@pytest.mark.parametrize("name", oracle())
def test_as_transformers(name, tmp_path):
    folder = write_small(tmp_path, name)
    for profile in (CPU_PROFILE, FUSED_PROFILE):
        np.testing.assert_allclose(
            ours(folder, profile)[list(SEEN)], oracle()[name], rtol=0, atol=ATOL
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if "/" in n and n not in NOT_IN_MLX_LM])
def test_as_mlx_lm(name, tmp_path):
    folder = write_small(tmp_path, name)
    np.testing.assert_allclose(ours(folder), mlx_lm_logits(folder, IDS), rtol=0, atol=ATOL)


def test_the_settings_matter():
    """Guards the cases: what a field changes shows in the logits of these weights."""
    plain = oracle()["meta-llama/Meta-Llama-3-8B"]
    assert small("meta-llama/Llama-3.1-8B")["rope_scaling"]
    far = [SEEN.index(position) for position in (97, 130, 159)]
    assert np.abs(plain - oracle()["meta-llama/Llama-3.1-8B"])[far].max() > 1e-2
