"""SmolLM2 against mlx-lm on the same dequantised weights: greedy text, token for token."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracle import load_mlx_lm
from stepping import CPU_PROFILE, Stepper

from edgekv.models.gguf_file import read_header
from edgekv.models.open_model import open_decoder
from edgekv.tokenizer import load_tokenizer_gguf

pytestmark = [pytest.mark.model, pytest.mark.slow]

NUM_NEW = 100
TIE = 1e-4  # logits closer than this may change places with the shape of a step
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village at the foot of a mountain,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8, 13,",
    "Q: What is the boiling point of water at sea level?\nA:",
    "In 1969, Neil Armstrong",
    "Die Hauptstadt von Deutschland ist",
    "To make a good cup of coffee, first",
    "SELECT name, price FROM products WHERE",
    "The quick brown fox jumps over the lazy dog. The lazy dog",
    "Photosynthesis is the process by which",
    "<html>\n<head>\n<title>",
    "She opened the letter, read it twice, and",
    "The main difference between a stack and a queue is",
    "Roses are red, violets are blue,",
    "Il était une fois",
    "import numpy as np\n\nx = np.",
    "My favourite season is autumn because",
)


@pytest.fixture(scope="module")
def prompts(smollm2_path) -> list[list[int]]:
    metadata = read_header(smollm2_path).metadata
    tokenizer = load_tokenizer_gguf(metadata, smollm2_path)
    return [tokenizer.encode(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def stepper(smollm2_path) -> Stepper:
    """From the GGUF file itself; the folder is for mlx-lm alone."""
    return Stepper(open_decoder(smollm2_path, CPU_PROFILE), pool_bytes=1 << 29)


@pytest.fixture(scope="module")
def theirs(smollm2_folder) -> Any:
    return load_mlx_lm(smollm2_folder)


@pytest.fixture(scope="module")
def expected(theirs, prompts) -> list[list[int]]:
    from mlx_lm.generate import generate_step

    return [
        [int(token) for token, _ in generate_step(mx.array(ids), theirs, max_tokens=NUM_NEW)]
        for ids in prompts
    ]


def assert_same_or_tied(theirs, prompt, ours: Sequence[int], expected: Sequence[int]) -> None:
    assert len(ours) == len(expected) == NUM_NEW
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        if a != b:
            logits = np.array(theirs(mx.array([[*prompt, *expected[:i]]]))[0, -1])
            assert abs(logits[a] - logits[b]) <= TIE, f"token {i} of {prompt}"
            return


def test_logits_of_a_text(stepper, theirs, prompts):
    ids = [i for prompt in prompts for i in prompt]
    expected = np.array(theirs(mx.array([ids]))[0])
    one_shot = stepper.logits(ids)
    np.testing.assert_allclose(one_shot, expected, rtol=0, atol=5e-4)
    chunked = stepper.logits(ids, chunks=[100, 1, 1, 17])
    np.testing.assert_allclose(chunked, one_shot, rtol=0, atol=5e-4)


@pytest.mark.long
def test_greedy_text_alone(stepper, theirs, prompts, expected):
    for prompt, their_tokens in list(zip(prompts, expected, strict=True))[:3]:
        kv = stepper.session(len(prompt) + NUM_NEW)
        ours, rows = [], prompt
        for _ in range(NUM_NEW):
            ours.append(int(stepper.step([(kv, rows)])[0][-1].argmax()))
            rows = ours[-1:]
        assert_same_or_tied(theirs, prompt, ours, their_tokens)
        kv.drop(stepper.pool)


@pytest.mark.long
def test_greedy_text_of_all_together(stepper, theirs, prompts, expected):
    """Twenty sessions in one packed step, as the engine decodes them."""
    sessions = [stepper.session(len(ids) + NUM_NEW) for ids in prompts]
    ours: list[list[int]] = [[] for _ in prompts]
    rows = prompts
    for _ in range(NUM_NEW):
        logits = stepper.step(list(zip(sessions, rows, strict=True)))
        for tokens, segment in zip(ours, logits, strict=True):
            tokens.append(int(segment[-1].argmax()))
        rows = [tokens[-1:] for tokens in ours]
    for prompt, tokens, their_tokens in zip(prompts, ours, expected, strict=True):
        assert_same_or_tied(theirs, prompt, tokens, their_tokens)
