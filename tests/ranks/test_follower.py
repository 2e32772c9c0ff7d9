"""A follower carries out orders, one by one, without a rank 0."""

import pytest
from stepping import CPU_PROFILE
from tiny_models import tiny_config, write_folder

from edgekv.config import RuntimeConfig, StoreOptions, SwapOptions
from edgekv.engine.follower import Follower
from edgekv.models.open_model import open_tokenizer
from edgekv.ranks.exchange import Heard
from edgekv.ranks.orders import Orders, Verb
from edgekv.runtime.loading import close_store, load

NUM_LAYERS = 4  # of the model


@pytest.fixture
def follower(tmp_path):
    """Of a model with windows."""
    folder = write_folder(tmp_path / "gemma3", tiny_config("gemma3"))
    config = RuntimeConfig(
        pool_bytes=1 << 24, store=StoreOptions(folder=tmp_path / "kv", free_reserve_bytes=0)
    )
    loaded = load(folder, "tiny", open_tokenizer(folder), CPU_PROFILE, config)
    assert loaded.pool.layout.window
    follower = Follower(loaded, SwapOptions())
    yield follower
    follower.close()
    close_store(loaded.store)


def carry_out(follower, *orders):
    """Have orders carried out, and then the end."""
    told = Orders()
    for verb, *words in [*orders, (Verb.END,)]:
        told.add(verb, *words)
    follower.serve(lambda reports: Heard(told.take(), [[], list(reports)]))


def test_who_has_yet_to_arrive_keeps_its_slots_when_it_is_cut(follower):
    """Reads that are under way fill the slots that rank 0 has named."""
    carry_out(
        follower,
        (Verb.ALLOCATE, 0, 1, follower._layout.capacity_for(600)),
        *[(Verb.READY, 1)] * NUM_LAYERS,
        (Verb.BASE, 1, 100),
        (Verb.CUT, 1, 500),
    )
    buffers = follower._kvs[1].buffers
    assert buffers.base == 100
    carry_out(follower, (Verb.ARRIVED, 1, 500, -1))
    assert follower._kvs[1].num_tokens == 500
    carry_out(follower, (Verb.CUT, 1, 0))
    assert buffers.base == 0
    carry_out(follower, (Verb.RELEASE, 1))
    assert not follower._kvs
    assert follower._pools[0].snapshot().used_bytes == 0
