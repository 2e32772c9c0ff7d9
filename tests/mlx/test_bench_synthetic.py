"""The synthetic model: large KV, visible tokens, answers that need the context."""

import numpy as np
import pytest
from tiny_runtime import answer, sampling

from edgekv.bench.scratch import layout_of
from edgekv.bench.synthetic_model import CONTEXT_MAX, KV_TOKEN_BYTES, write_synthetic_model
from edgekv.bench.workload import TextIds
from edgekv.config import RuntimeConfig, SwapOptions
from edgekv.runtime import Runtime

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_synthetic_model(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="module")
def runtime(folder):
    config = RuntimeConfig(pool_bytes=1 << 26, swap=SwapOptions(mode="off"))
    with Runtime.open(str(folder), config=config) as runtime:
        yield runtime


def test_its_kv_is_that_of_a_1b_model(folder):
    layout = layout_of(folder)
    assert layout.token_bytes == KV_TOKEN_BYTES == 32 << 10
    assert layout.context_max == CONTEXT_MAX


def test_it_is_the_same_every_time(folder, tmp_path):
    again = write_synthetic_model(tmp_path / "again")
    for file in folder.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_every_token_it_says_is_visible(runtime):
    ids = TextIds(runtime.tokenizer).stretch(40, 0)
    reply = answer(runtime.app().session(), ids, sampling(64))
    assert reply.stats.ttft_ms is not None
    for token in range(2, runtime.tokenizer.vocab_size):
        assert len(runtime.tokenizer.decode([token])) >= 1
    assert not {0, 1} & set(reply.token_ids)


def test_what_it_says_depends_on_tokens_far_back(runtime):
    ids = TextIds(runtime.tokenizer).stretch(600, 0)
    logits = runtime.logits(ids)[500:]
    for position in (0, 100, 300):
        other = list(ids)
        other[position] = ids[position] % 100 + 2
        changed = runtime.logits(other)[500:]
        assert np.abs(logits - changed).mean() > 1e-3
        assert (logits.argmax(axis=-1) != changed.argmax(axis=-1)).any()
