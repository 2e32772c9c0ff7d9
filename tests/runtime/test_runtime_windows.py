"""Layers with a window keep what it reaches, and a conversation goes on as if they kept all.

In memory, from disk and after a restart; where turns are edited, shared or taken back; where the
disk refuses what leaves memory. Windows are of 16 tokens, and there is room for 128 or, of one
model, 256: behind these, windows roll.
"""

import itertools

import pytest
from faulty_files import Fault, FaultyFiles
from tiny_families import FAMILY_CONFIGS, write_family
from tiny_models import random_ids, tiny_config, write_folder
from tiny_predictors import fitted, load, write_predictor
from tiny_runtime import answer, assert_same, eventually, num_again, sampling

from edgekv.config import PredictionOptions, RuntimeConfig, StoreOptions, SwapOptions
from edgekv.kv import layout as kv_layout
from edgekv.runtime import Runtime, loading

GROUP, BACK, WINDOW, SLOTS = 64, 32, 16, 128
_apps = itertools.count()
KINDS = ["gpt_oss", "gemma4, shared", "gemma3", "all windowed"]


@pytest.fixture(scope="module", autouse=True)
def small_groups():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_layout, "WINDOW_GROUP_TOKENS", GROUP)
        patch.setattr(kv_layout, "WINDOW_BACK_TOKENS", BACK)
        yield


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    if kind in FAMILY_CONFIGS:
        return str(write_family(folder, FAMILY_CONFIGS[kind]))
    pattern = 1000 if kind == "all windowed" else 3
    return str(write_folder(folder, tiny_config("gemma3", sliding_window_pattern=pattern)))


@pytest.fixture(scope="module")
def whole(model):
    """The same model with all KV in memory, which says what is right."""
    config = RuntimeConfig(swap=SwapOptions(mode="async"), store=StoreOptions(disk_bytes=0))
    with Runtime.open(model, config=config) as runtime:
        assert not layout_of(runtime).window
        yield runtime


def layout_of(runtime):
    return runtime._engine.loop.ledger.pool.layout


@pytest.fixture
def open_runtime(reopen):
    """Opens the model, whose windows roll."""

    def open_again(**options):
        runtime = reopen(**options)
        assert layout_of(runtime).window == WINDOW
        assert layout_of(runtime).window_slots in {SLOTS, 2 * SLOTS}
        return runtime

    return open_again


def check(whole, prompt, reply):
    """The answer is that with all KV in memory."""
    with whole.app(f"alone-{next(_apps)}").session() as session:
        expected = answer(session, prompt, sampling(len(reply.token_ids)))
    assert_same(whole, prompt, reply.token_ids, expected.token_ids)


def test_logits_are_those_of_all_kv(open_runtime, whole):
    runtime, ids = open_runtime(), random_ids(500)
    assert abs(runtime.logits(ids) - whole.logits(ids)).max() <= 1e-4
    assert runtime.store_snapshot().kv_written_bytes == 0  # nobody will ask for it again


@pytest.mark.parametrize("persistent", [True, False])
def test_memory_of_a_session_is_what_its_windows_reach(open_runtime, whole, persistent):
    runtime = open_runtime()
    layout, all_of_it = layout_of(runtime), layout_of(whole)
    session = runtime.app().session("kept" if persistent else None)
    check(whole, random_ids(900), answer(session, random_ids(900), sampling(30)))
    capacity = session._talk.kv.kv.capacity
    assert capacity >= 929
    used_bytes = runtime.pool_snapshot().used_bytes
    windowed, slots = layout.windowed_token_bytes, layout.window_slots
    assert used_bytes == capacity * (all_of_it.token_bytes - windowed) + slots * windowed
    assert all_of_it.capacity_bytes(capacity) - used_bytes == (capacity - slots) * windowed


@pytest.mark.parametrize("how", ["in memory", "from disk", "after a restart"])
@pytest.mark.parametrize("length", [130, 500])
def test_a_second_turn_computes_what_is_new(open_runtime, whole, how, length):
    runtime = open_runtime()
    session = runtime.app("mail").session("inbox")
    first = answer(session, random_ids(length), sampling(12))
    history = [*random_ids(length), *first.token_ids]
    if how == "from disk":
        session.suspend()
    if how == "after a restart":
        runtime = open_runtime()
        session = runtime.app("mail").session("inbox")
    prompt = [*history, *random_ids(30, seed=1)]
    second = answer(session, prompt, sampling(150))
    # The last token of an answer has no KV; nothing else of what is known is computed.
    assert num_again(second, len(history)) == 1
    assert second.stats.num_restored_tokens == (0 if how == "in memory" else len(history) - 1)
    check(whole, prompt, second)


@pytest.mark.parametrize(
    ("how", "name", "kept"),
    [
        *(("in memory", name, kept) for name in ("inbox", None) for kept in (490, 300, 40)),
        ("from disk", "inbox", 490),
        ("from disk", None, 300),
        ("after a restart", "inbox", 505),
        ("after a restart", "inbox", 130),
    ],
)
def test_an_edited_history_keeps_its_prefix(open_runtime, whole, how, kept, name):
    """Also that of a session without a name, whose KV is on disk as far as it left memory."""
    runtime = open_runtime()
    session = runtime.app("mail").session(name)
    first = answer(session, random_ids(500), sampling(12))
    history = [*random_ids(500), *first.token_ids]
    if name is not None:
        eventually(lambda: runtime.store_snapshot().num_tokens == len(history) - 1)
    if how == "from disk":
        session.suspend()
    if how == "after a restart":
        runtime = open_runtime()
        session = runtime.app("mail").session("inbox")
    prompt = [*history[:kept], *random_ids(20, seed=1)]
    second = answer(session, prompt, sampling(6))
    assert num_again(second, kept) == 0
    check(whole, prompt, second)


@pytest.mark.parametrize("kept", [300, 90])
def test_without_a_disk_an_edited_history_is_computed_again(open_runtime, whole, kept):
    runtime = open_runtime(swap=SwapOptions(mode="off"))
    session = runtime.app().session()
    answer(session, random_ids(500), sampling(4))
    prompt = [*random_ids(500)[:kept], *random_ids(20, seed=1)]
    second = answer(session, prompt, sampling(6))
    assert second.stats.num_cached_tokens == 0
    check(whole, prompt, second)


@pytest.mark.parametrize("back", [1, 5, BACK])
def test_the_last_few_tokens_are_taken_back_in_memory(open_runtime, whole, back):
    runtime = open_runtime(swap=SwapOptions(mode="off"))
    session, prompt = runtime.app().session(), random_ids(480)
    first = answer(session, prompt, sampling(4))
    for _ in range(4):  # wherever the last roll was
        prompt = [*prompt, *first.token_ids]
        prompt = [*prompt[: len(prompt) - 1 - back], *random_ids(back + 11, seed=len(prompt))]
        first = answer(session, prompt, sampling(4))
        assert first.stats.num_cached_tokens >= len(prompt) - 2 * back - 16
        check(whole, prompt, first)


@pytest.mark.parametrize("shared", [60, 200, 490])
@pytest.mark.parametrize("name", ["kept", None])
def test_sessions_of_an_app_share_a_prefix(open_runtime, whole, shared, name):
    runtime = open_runtime()
    app, ids = runtime.app("a"), random_ids(500)
    first = app.session(name)
    answer(first, ids, sampling(4))
    if name:
        eventually(lambda: runtime.store_snapshot().num_tokens == 503)
    else:
        rolled = 500 - layout_of(runtime).window_slots
        eventually(lambda: runtime.store_snapshot().num_tokens >= rolled)
    prompt = [*ids[:shared], *random_ids(40, seed=2)]
    reply = answer(app.session(), prompt, sampling(6))
    assert reply.stats.num_cached_tokens == shared
    check(whole, prompt, reply)
    # And the first goes on where it was.
    again = answer(first, [*ids, *random_ids(9, seed=3)], sampling(4))
    assert num_again(again, 500) == 0
    check(whole, [*ids, *random_ids(9, seed=3)], again)


@pytest.mark.parametrize("said", [0, 7, 60])
def test_another_session_goes_on_from_where_one_is(open_runtime, whole, said):
    """By copy, where all that the windows reach there is in memory."""
    app, prompt = open_runtime(swap=SwapOptions(mode="off")).app(), random_ids(400)
    first, second = app.session(), app.session()
    history = [*prompt, *answer(first, prompt, sampling(said + 1)).token_ids]
    more = [*history, *random_ids(8, seed=1)]
    reply = answer(second, more, sampling(70))
    assert num_again(reply, len(history)) == 1
    check(whole, more, reply)
    # Neither has changed the other.
    other = [*history, *random_ids(9, seed=2)]
    again = answer(first, other, sampling(70))
    assert num_again(again, len(history)) <= 1
    check(whole, other, again)


@pytest.mark.parametrize(
    ("how", "name"), [("from disk", "copy"), ("from disk", None), ("after a restart", "copy")]
)
def test_what_was_copied_is_on_disk_with_what_the_copy_lacks(open_runtime, whole, name, how):
    """The first tokens are in the records of the session that it was copied from."""
    runtime, ids = open_runtime(), random_ids(500)
    app = runtime.app("a")
    first, second = app.session("first"), app.session(name)
    answer(first, ids, sampling(4))
    prompt = [*ids, *random_ids(9, seed=1)]
    reply = answer(second, prompt, sampling(4))
    assert reply.stats.num_cached_tokens == 500
    assert reply.stats.num_restored_tokens == 0
    if how == "from disk":
        second.suspend()
    else:
        second = open_runtime().app("a").session("copy")
    more = [*prompt, *reply.token_ids, *random_ids(9, seed=2)]
    again = answer(second, more, sampling(9))
    assert again.stats.num_restored_tokens == len(prompt) + 3
    check(whole, more, again)


def test_evaluation_writes_nothing(open_runtime):
    runtime = open_runtime()
    runtime.logits(random_ids(500))
    snapshot = runtime.store_snapshot()
    assert (snapshot.num_writes, runtime.pool_snapshot().used_bytes) == (0, 0)


def test_it_grows_and_is_preempted(open_runtime, whole):
    """Four at once where there is memory for two."""
    layout = layout_of(open_runtime())
    pool_bytes = 2 * layout.capacity_bytes(layout.capacity_for(512)) * 8 // 7
    runtime = open_runtime(pool_bytes=pool_bytes, swap=SwapOptions(group_bytes=1 << 14))
    prompts = [random_ids(200 + 50 * n, seed=n) for n in range(4)]
    sessions = [runtime.app("crowd").session(f"user-{n}") for n in range(4)]
    asked = zip(sessions, prompts, strict=True)
    streams = [session.submit_ids(prompt, sampling(120)) for session, prompt in asked]
    for stream in streams:
        for _ in stream:
            pass
    for prompt, stream in zip(prompts, streams, strict=True):
        check(whole, prompt, stream.reply)


def test_all_is_kept_where_kv_is_predicted(tmp_path):
    """Repair begins at the first token."""
    folder, file = tmp_path / "tiny", tmp_path / "predictor.safetensors"
    write_folder(folder, tiny_config("gemma3"))
    write_predictor(file, fitted(load(folder), "self", 2), folder)
    prediction = PredictionOptions(predictor=str(file), repair="eager")
    config = RuntimeConfig(prediction=prediction, store=StoreOptions(disk_bytes=0))
    prompt = random_ids(400)
    with Runtime.open(str(folder), config=config) as runtime:
        assert not layout_of(runtime).window
        with runtime.app().session().submit_ids(prompt, sampling(40), prefill="predict") as stream:
            for _ in stream:
                pass
        exact = answer(runtime.app("other").session(), prompt, sampling(40))
        assert stream.reply.stats.num_predicted_tokens > 0
        assert_same(runtime, prompt, stream.reply.token_ids, exact.token_ids)


# --- the disk refuses ---


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("nth", [1, 3, 6])
def test_what_cannot_be_written_is_computed_again(open_runtime, whole, monkeypatch, fault, nth):
    files = FaultyFiles([Fault("pwritev", nth, fault)])
    monkeypatch.setattr(loading, "OS_FILES", files)
    runtime = open_runtime()
    session, other = runtime.app("a").session("one"), runtime.app("a").session("two")
    first = answer(session, random_ids(500), sampling(40))
    history = [*random_ids(500), *first.token_ids]
    answer(other, random_ids(300, seed=9), sampling(4))
    check(whole, random_ids(500), first)
    session.suspend()
    prompt = [*history, *random_ids(30, seed=1)]
    second = answer(session, prompt, sampling(20))
    check(whole, prompt, second)
    runtime = open_runtime()
    third = answer(runtime.app("a").session("one"), prompt, sampling(20))
    check(whole, prompt, third)


def _flip_kv(path):
    data = bytearray(path.read_bytes())
    data[4100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("which", [-1, -2, 2])
def test_damage_is_computed_again_and_counted(open_runtime, whole, tmp_path, which):
    runtime = open_runtime(swap=SwapOptions(group_bytes=1 << 14))
    session = runtime.app("mail").session("inbox")
    prompt = random_ids(500)
    first = answer(session, prompt, sampling(12))
    runtime = open_runtime()
    paths = sorted((tmp_path / "kv").glob("*/kv/*.kv"))
    assert len(paths) > 3
    _flip_kv(paths[which])
    more = [*prompt, *first.token_ids, *random_ids(9, seed=1)]
    reply = answer(runtime.app("mail").session("inbox"), more, sampling(8))
    check(whole, more, reply)
    assert runtime.store_snapshot().num_corrupt == 1
    assert 0 < reply.stats.num_cached_tokens < 511
