"""A model whose rope goes by the context that it is opened for."""

import numpy as np
import pytest
from tiny_models import random_ids, random_tensors, tiny_config, write_folder
from tiny_runtime import sampling

from edgekv.config import RuntimeConfig
from edgekv.runtime import Runtime
from edgekv.store import Store

LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
}


@pytest.mark.slow
def test_kv_of_one_context_is_not_taken_for_the_other(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKV_KV_DIR", str(tmp_path / "kv"))
    config = tiny_config("llama", rope_scaling=LONGROPE)
    folder = write_folder(tmp_path / "model", config, tensors=random_tensors(config))
    logits, stores = [], []
    for context_max in (None, 128, 129):
        runtime = Runtime.open(
            str(folder), config=RuntimeConfig(pool_bytes=1 << 26, context_max=context_max)
        )
        with runtime:
            assert runtime.context_max == (context_max or 1024)
            logits.append(runtime.logits(random_ids(40)))
            runtime.app("mail").session("kept").respond("hello", sampling=sampling(2))
        stores.append({view.fingerprint for view in Store.open_readonly(tmp_path / "kv")})
    long, short, also_long = logits
    np.testing.assert_array_equal(long, also_long)
    assert np.abs(long - short).max() > 1e-2
    assert [len(found) for found in stores] == [1, 2, 2]
