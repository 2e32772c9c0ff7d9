"""Logits of every family against transformers', from folders laid out as transformers saves them.

`test_families_oracle` has mlx-lm's names and shapes, and what mlx-lm does not do cannot be seen
there: windows of Gemma 2 and Phi, YaRN that is not truncated, experts in one tensor.
"""

import re

import numpy as np
import pytest
from hf_families import (
    CASES,
    NUM_TOKENS,
    SEEN,
    draw,
    oracle_logits,
    oracle_shapes,
    text_ids,
    write_hf_family,
)
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper
from tiny_models import write_folder

from edgekv.models.open_model import open_decoder

ATOL = 1e-4
PROFILES = {"composed": CPU_PROFILE, "fused": FUSED_PROFILE}


@pytest.mark.parametrize("name", CASES)
def test_as_transformers(name, tmp_path):
    folder, expected = write_hf_family(tmp_path, name), oracle_logits(name)
    assert expected.std() > 0.5, "logits that say something"
    for mode, profile in PROFILES.items():
        stepper = Stepper(open_decoder(folder, profile))
        for chunks in ((), (20, 1, 17)):
            logits = stepper.logits(text_ids(), chunks=chunks)
            assert len(logits) == NUM_TOKENS
            np.testing.assert_allclose(
                logits[list(SEEN)], expected, rtol=0, atol=ATOL, err_msg=mode
            )


@pytest.mark.parametrize(
    ("plain", "other"),
    [
        ("mixtral", "mixtral, windows"),
        ("gpt_oss", "gpt_oss, not truncated"),
        ("smollm3", "smollm3, windows"),
        ("phi3, longrope for short", "phi3, longrope for long"),
        ("mistral3 of a mistral, untied", "ministral3"),
    ],
)
def test_the_settings_matter(plain, other):
    """Guards the cases: what a field changes shows in the logits of these weights."""
    assert np.abs(oracle_logits(plain) - oracle_logits(other)).max() > 1e-2


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5, experts, multimodal", "glm4_moe_lite"])
def test_experts_in_one_tensor(name, tmp_path):
    """As Qwen 3.5 is on the Hub; transformers reads both and saves a tensor for each expert."""
    tensors = draw(name, oracle_shapes(name))
    each: dict[str, dict[tuple[str, int], np.ndarray]] = {}
    for key in list(tensors):
        if (found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", key)) is not None:
            each.setdefault(found[1], {})[found[3], int(found[2])] = tensors.pop(key)
    assert len(each) >= 3
    for at, parts in each.items():
        gate, up, down = (
            np.stack([parts[part, i] for i in range(len(parts) // 3)])
            for part in ("gate", "up", "down")
        )
        fused = {"gate_up_proj": np.concatenate([gate, up], axis=1), "down_proj": down}
        tensors |= {f"{at}.{part}": values for part, values in fused.items()}
    folder = write_folder(tmp_path, CASES[name], tensors=tensors, tokenizer=False)
    logits = Stepper(open_decoder(folder, CPU_PROFILE)).logits(text_ids())
    np.testing.assert_allclose(logits[list(SEEN)], oracle_logits(name), rtol=0, atol=ATOL)
