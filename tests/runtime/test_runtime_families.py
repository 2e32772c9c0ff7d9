"""Sessions of every kind of layer: packed, preempted, stored and restored as any other.

One model for each way in which a layer keeps what it saw: heads behind experts, windows and sinks,
latents, layers that read the KV of others, and two kinds of state.
"""

import pytest
from random_play import Play, plays, steady
from stepping import CPU_PROFILE
from tiny_families import FAMILY_CONFIGS, write_family
from tiny_models import random_ids
from tiny_runtime import answer, arrays_of, assert_same, greedy_by_hand, sampling

from edgekv.config import RuntimeConfig
from edgekv.engine.prefill import ExactPrefill
from edgekv.kv.layout import KVLayout
from edgekv.models.config import Fields
from edgekv.models.families import parse_config
from edgekv.models.kv_layout import kv_layout
from edgekv.runtime import Runtime

KINDS = (
    "qwen3_moe",
    "gpt_oss",
    "gemma4, shared",
    "gemma4, experts",
    "glm4_moe_lite",
    "lfm2",
    "qwen3_5",
)
SNAPSHOT_TOKENS = 32


def layout_of(config) -> KVLayout:
    return kv_layout(parse_config(Fields(config, "config.json")), CPU_PROFILE)


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("model") / "tiny", FAMILY_CONFIGS[kind])


@pytest.fixture(scope="module")
def tight(kind, folder):
    """Room for a few: others wait, are pushed out, preempted."""
    layout = layout_of(FAMILY_CONFIGS[kind])
    pool_bytes = 7 * layout.capacity_bytes(layout.capacity_for(128))
    config = RuntimeConfig(pool_bytes=pool_bytes, tbt_target_ms=5.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekv.engine.request.ADMISSION_RESERVE_TOKENS", 1)
        patch.setattr("edgekv.kv.layout.SNAPSHOT_TOKENS_MIN", SNAPSHOT_TOKENS)
        patch.setattr("edgekv.kv.layout.SNAPSHOT_TOKENS_MAX", SNAPSHOT_TOKENS)
        patch.setattr("edgekv.kv.layout.WINDOW_GROUP_TOKENS", 64)
        patch.setattr("edgekv.kv.layout.WINDOW_BACK_TOKENS", 32)
        with Runtime.open(str(folder), config=config) as runtime:
            yield runtime


@pytest.mark.slow
@plays
@steady
def test_eight_sessions_at_random_say_what_each_says_alone(tight, steps, lengths, greedy):
    played = Play(tight, lengths, greedy)
    for index, action in steps:
        getattr(played, action)(index)
    tight.check_integrity()
    played.end_all()
    played.close_all()


def test_a_kept_session_goes_on_after_a_restart(folder):
    config = RuntimeConfig(pool_bytes=1 << 26)
    prompt, more = random_ids(150, seed=1), random_ids(40, seed=2)
    with Runtime.open(str(folder), config=config) as runtime:
        first = answer(runtime.app("mail").session("inbox"), prompt, sampling(12))
        runtime.check_integrity()
    with Runtime.open(str(folder), config=config) as runtime:
        assert_same(runtime, prompt, first.token_ids, greedy_by_hand(runtime, prompt, 12))
        ids = [*prompt, *first.token_ids, *more]
        second = answer(runtime.app("mail").session("inbox"), ids, sampling(8))
        assert second.stats.num_cached_tokens >= len(prompt)
        assert second.stats.num_restored_tokens >= len(prompt)
        assert_same(runtime, ids, second.token_ids, greedy_by_hand(runtime, ids, 8))
        runtime.check_integrity()


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("model") / "a", FAMILY_CONFIGS["gemma4, shared"])


def test_rows_end_where_the_last_kv_is_made(shared_folder, monkeypatch):
    """And nothing is different for it: the same KV, tokens and log-probabilities."""
    prompt = random_ids(300, seed=3)
    found = []
    for cuts_rows in (True, False):
        monkeypatch.setattr(ExactPrefill, "cuts_rows", cuts_rows)
        with Runtime.open(str(shared_folder), config=RuntimeConfig(pool_bytes=1 << 26)) as runtime:
            session = runtime.app().session()
            reply = answer(session, prompt, sampling(6, logprobs=2))
            found.append((reply, arrays_of(session, len(prompt)), runtime.logits(prompt)))
    (cut, cut_kv, cut_logits), (whole, whole_kv, whole_logits) = found
    assert cut.stats.num_rows_cut == len(prompt) - 1
    assert cut.stats.prefill_mode == "exact"
    assert whole.stats.num_rows_cut == 0
    assert cut.token_ids == whole.token_ids
    for ours, theirs in zip(cut_kv, whole_kv, strict=True):
        assert ours.shape == theirs.shape
        assert abs(ours - theirs).max(initial=0.0) <= 1e-4
    assert abs(cut_logits - whole_logits).max() <= 1e-4
    for ours, theirs in zip(cut.logprobs, whole.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_layers_that_share_kv_take_no_memory():
    heads = layout_of(FAMILY_CONFIGS["gemma4, shared"]).heads
    assert [bool(one.num) for one in heads] == [True] * 3 + [False] * 3
