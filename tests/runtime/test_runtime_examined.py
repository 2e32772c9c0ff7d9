"""What a model's headers say of its KV is what a runtime then has and uses."""

import pytest
from tiny_models import random_ids
from tiny_runtime import answer, sampling

from edgekv.config import RuntimeConfig, StoreOptions
from edgekv.device import profile
from edgekv.models.examine import examine
from edgekv.models.hollow_copy import ModelFiles
from edgekv.models.kv_layout import kv_layout
from edgekv.runtime import Runtime
from edgekv.runtime.loading import session_tokens_max


@pytest.mark.parametrize("pool_bytes", [300_000, 500_000, 1 << 24])
def test_the_longest_session_and_what_it_takes(tiny_folder, tmp_path, pool_bytes):
    found = examine(ModelFiles(tiny_folder), profile())
    layout = kv_layout(found.config, profile())
    config = RuntimeConfig(pool_bytes=pool_bytes, store=StoreOptions(folder=tmp_path))
    with Runtime.open(str(tiny_folder), config=config) as runtime:
        assert runtime.context_max == session_tokens_max(layout, pool_bytes)
        answer(runtime.app().session(), random_ids(100), sampling(1))
        used_bytes = runtime.pool_snapshot().used_bytes
        assert used_bytes % layout.token_bytes == 0
        assert used_bytes >= layout.capacity_bytes(layout.capacity_for(101))
