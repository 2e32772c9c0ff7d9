"""Log-probabilities of a text against llama.cpp's, by the GGUF files in $EDGEKV_ORACLE_MODELS.

What llama.cpp says is in `tests/oracle/llama_cpp.npz`; the script beside it names the files, and
says how to compare others. `--log-cli-level=INFO` shows how far apart they are: Qwen2.5 5e-4 in the
mean, Gemma 3 3e-3, for llama.cpp does not round the scale of its embeddings to bfloat16 as the
makers' code does (without that: 7e-4).
"""

import logging
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from stepping import CPU_PROFILE, Stepper

from edgekv.models.open_model import open_decoder, open_tokenizer

LOGGER = logging.getLogger(__name__)
FOLDER = os.environ.get("EDGEKV_ORACLE_MODELS")
PUBLISHED = np.load(Path(__file__).parents[1] / "oracle" / "llama_cpp.npz")
NAMES = sorted(key.removesuffix(" ids") for key in PUBLISHED if key.endswith(" ids"))
MEAN_MAX = 0.02
ANY_MAX = 0.2
CHUNK = 128

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="EDGEKV_ORACLE_MODELS names no folder of GGUF files"),
]


@pytest.fixture(params=NAMES)
def name(request) -> str:
    if not path_of(request.param).exists():
        pytest.skip(f"{request.param}.gguf is not in {FOLDER}")
    return request.param


def path_of(name: str) -> Path:
    return Path(str(FOLDER), f"{name}.gguf")


def test_tokens_of_a_text(name):
    ids = PUBLISHED[f"{name} ids"].tolist()
    text = str(PUBLISHED[f"{name} text"])
    assert open_tokenizer(path_of(name)).encode(text)[: len(ids)] == ids


def test_logprobs_of_a_text(name):
    ids, theirs = PUBLISHED[f"{name} ids"].tolist(), PUBLISHED[f"{name} chosen"]
    stepper = Stepper(open_decoder(path_of(name), CPU_PROFILE), pool_bytes=1 << 29)
    kv = stepper.session(len(ids))
    ours = []
    for start in range(0, len(theirs), CHUNK):
        following = ids[start + 1 : start + CHUNK + 1]
        logits = mx.array(stepper.step([(kv, ids[start : start + len(following)])])[0])
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        ours += [float(logprobs[row, token]) for row, token in enumerate(following)]
    apart = np.abs(np.array(ours) - theirs)
    LOGGER.info("%s: mean %.5f, max %.5f", name, apart.mean(), apart.max())
    assert len(ours) == len(ids) - 1 == 512
    assert apart.mean() <= MEAN_MAX
    assert apart.max() <= ANY_MAX
