"""Logits of every family against mlx-lm's, however the rows are cut into steps.

Tiny random checkpoints, f32. Each variant runs with the CPU's composed ops and with the fused ops
of Metal (which MLX's CPU backend has too, slower); tiles are smaller than the text.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from oracle import mlx_lm_logits
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper
from tiny_families import FAMILY_CONFIGS, write_family
from tiny_models import LLAMA3_ROPE, random_ids, tiny_config, write_folder

from edgekv.models.open_model import open_decoder

ORACLE_ATOL = 1e-4  # against mlx-lm
TWIN_ATOL = 1e-5  # ours against ours; logits are a few units
# The same where numbers are larger, or sums of a whole chunk: exactness ends with f32.
TWIN_ATOL_WIDE = 1e-4
NUM_TOKENS = 56
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}

VARIANTS = {
    "llama": tiny_config("llama"),
    "llama-tied": tiny_config("llama", tie_word_embeddings=True),
    "llama-llama3-rope": tiny_config("llama", rope_scaling=LLAMA3_ROPE),
    "llama-linear-rope": tiny_config("llama", rope_scaling={"type": "linear", "factor": 4.0}),
    "llama-biases": tiny_config("llama", attention_bias=True, mlp_bias=True),
    "mistral-windows": tiny_config("llama", model_type="mistral", num_hidden_layers=4, **SLIDING),
    "llama-one-kv-head": tiny_config("llama", num_key_value_heads=1),
    "llama-all-kv-heads": tiny_config("llama", num_key_value_heads=4),
    "llama-wide-heads": tiny_config("llama", head_dim=48),
    "qwen2": tiny_config("qwen2"),
    "qwen2-untied": tiny_config("qwen2", tie_word_embeddings=False),
    "qwen3": tiny_config("qwen3"),
    "qwen3-tied": tiny_config("qwen3", tie_word_embeddings=True),
    "gemma3": tiny_config("gemma3"),
    "gemma3-untied": tiny_config("gemma3", tie_word_embeddings=False),
    "gemma3-linear-rope": tiny_config(
        "gemma3", rope_scaling={"rope_type": "linear", "factor": 8.0}
    ),
    "gemma3-all-local": tiny_config("gemma3", num_hidden_layers=3, sliding_window_pattern=3),
    "openelm": tiny_config("openelm"),
    "openelm-untied": tiny_config("openelm", share_input_output_layers=False),
    "openelm-no-qk-norm": tiny_config("openelm", normalize_qk_projections=False),
}
WIDE = ("gemma4", "glm4_moe_lite", "lfm2", "qwen3_5", "qwen3_next")
PROFILES = {
    "composed": replace(CPU_PROFILE, attention_tile_rows=16),
    "fused": replace(FUSED_PROFILE, attention_tile_rows=16),
}


@dataclass
class Case:
    """One checkpoint: a text, mlx-lm's logits of it, and our decoders."""

    ids: list[int]
    expected: np.ndarray
    steppers: dict[str, Stepper]
    one_shots: dict[str, np.ndarray]
    twin_atol: float


@pytest.fixture(scope="module", params=[*VARIANTS, *FAMILY_CONFIGS])
def case(request, tmp_path_factory) -> Case:
    place, name = tmp_path_factory.mktemp("model"), request.param
    if name in VARIANTS:
        folder = write_folder(place, VARIANTS[name], tokenizer=False)
    else:
        folder = write_family(place, FAMILY_CONFIGS[name], tokenizer=False)
    steppers = {name: Stepper(open_decoder(folder, profile)) for name, profile in PROFILES.items()}
    ids = random_ids(NUM_TOKENS)
    one_shots = {name: stepper.logits(ids) for name, stepper in steppers.items()}
    twin_atol = TWIN_ATOL_WIDE if name.startswith(WIDE) else TWIN_ATOL
    return Case(ids, mlx_lm_logits(folder, ids), steppers, one_shots, twin_atol)


@pytest.fixture(params=PROFILES)
def mode(request) -> str:
    return request.param


def assert_close(actual: np.ndarray, expected: np.ndarray, atol: float) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def check(case: Case, mode: str, logits: np.ndarray) -> None:
    assert_close(logits, case.expected, ORACLE_ATOL)
    assert_close(logits, case.one_shots[mode], case.twin_atol)


def test_one_shot(case, mode):
    assert case.expected.std() > 0.5, "logits that say something"
    assert_close(case.one_shots[mode], case.expected, ORACLE_ATOL)


def test_composed_and_fused_agree(case):
    assert_close(*case.one_shots.values(), case.twin_atol)


def test_chunks(case, mode):
    for size in (5, 16, 33):
        chunks = [size] * (NUM_TOKENS // size)
        check(case, mode, case.steppers[mode].logits(case.ids, chunks=chunks))


def test_decode_token_by_token(case, mode):
    chunks = [NUM_TOKENS - 10] + [1] * 10
    check(case, mode, case.steppers[mode].logits(case.ids, chunks=chunks))


def test_packed_with_others(case, mode):
    """The case's text in chunks, packed with decode rows and chunks of two other sessions."""
    stepper = case.steppers[mode]
    others = [random_ids(60, seed=1), random_ids(50, seed=2)]
    kv, first, second = stepper.session(NUM_TOKENS), stepper.session(60), stepper.session(50)
    (a,) = stepper.step([(first, others[0][:40])])
    b, c, d = stepper.step([(first, others[0][40:41]), (kv, case.ids[:37]), (second, others[1])])
    e, f = stepper.step([(kv, case.ids[37:]), (first, others[0][41:])])
    check(case, mode, np.concatenate([c, e]))
    assert_close(np.concatenate([a, b, f]), stepper.logits(others[0]), case.twin_atol)
    assert_close(d, stepper.logits(others[1]), case.twin_atol)
