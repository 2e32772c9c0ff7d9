"""What a model with states computes again of a conversation that goes on: a group at most.

In memory, from disk and after a restart; where turns are edited, shared, prewarmed, taken back or
stopped; and where what is on disk is not what it was. Groups are of 64 tokens here.
"""

import pytest
from tiny_families import FAMILY_CONFIGS, write_family
from tiny_models import random_ids
from tiny_runtime import answer, assert_same, eventually, greedy_by_hand, num_again, sampling

from edgekv.config import SwapOptions
from edgekv.kv import layout as kv_layout

GROUP = 64
KINDS = ["lfm2", "qwen3_5"]


@pytest.fixture(scope="module", autouse=True)
def small_groups():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_layout, "SNAPSHOT_TOKENS_MIN", GROUP)
        patch.setattr(kv_layout, "SNAPSHOT_TOKENS_MAX", GROUP)
        yield


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    kind = request.param
    return str(write_family(tmp_path_factory.mktemp("model") / kind, FAMILY_CONFIGS[kind]))


@pytest.fixture
def open_runtime(reopen):
    return reopen


def check(runtime, prompt, reply):
    """The answer is that of all logits computed anew."""
    expected = greedy_by_hand(runtime, prompt, len(reply.token_ids))
    assert_same(runtime, prompt, reply.token_ids, expected)


@pytest.mark.parametrize("how", ["in memory", "from disk", "after a restart"])
def test_a_second_turn_computes_what_is_new(open_runtime, how):
    """2,048 tokens of a conversation, scaled down by four."""
    runtime = open_runtime()
    session = runtime.app("mail").session("inbox")
    first = answer(session, random_ids(500), sampling(12))
    history = [*random_ids(500), *first.token_ids]
    if how == "from disk":
        session.suspend()
    if how == "after a restart":
        runtime = open_runtime()
        session = runtime.app("mail").session("inbox")
    prompt = [*history, *random_ids(30, seed=1)]
    second = answer(session, prompt, sampling(8))
    # The last token of an answer has no KV; nothing else of what is known is computed.
    assert num_again(second, len(history)) == 1
    assert second.stats.num_restored_tokens == (0 if how == "in memory" else len(history) - 1)
    check(runtime, prompt, second)


@pytest.mark.parametrize("how", ["in memory", "from disk", "after a restart"])
@pytest.mark.parametrize("kept", [505, 490, 300, 130, 40])
def test_an_edited_history_costs_a_group(open_runtime, how, kept):
    runtime = open_runtime()
    session = runtime.app("mail").session("inbox")
    first = answer(session, random_ids(500), sampling(12))
    history = [*random_ids(500), *first.token_ids]
    eventually(lambda: runtime.store_snapshot().num_tokens == len(history) - 1)
    if how == "from disk":
        session.suspend()
    if how == "after a restart":
        runtime = open_runtime()
        session = runtime.app("mail").session("inbox")
    prompt = [*history[:kept], *random_ids(20, seed=1)]
    second = answer(session, prompt, sampling(6))
    assert 0 <= num_again(second, kept) < GROUP
    check(runtime, prompt, second)


def test_the_question_asked_again_computes_the_generation_prompt(open_runtime):
    """And a next turn that lacks it goes on in front of it."""
    session = open_runtime().app().session()
    session.respond("The quick brown fox jumps over the lazy dog. " * 12, sampling=sampling(70))
    asked = session._talk.conversation.spoken.ids[: session.last_reply.stats.num_prompt_tokens]
    opening = len(session._tokenizer.encode("<|im_start|>assistant\n"))
    again = answer(session, asked, sampling(5))
    assert 0 < num_again(again, len(asked)) <= opening
    other = answer(session, [*asked[:-opening], *random_ids(9)], sampling(5))
    assert num_again(other, len(asked) - opening) == 0


def test_turns_of_a_conversation_compute_what_is_new(open_runtime):
    runtime = open_runtime()
    session, spoken = runtime.app("mail").session("chat"), 0
    for turn in range(5):
        reply = session.respond(f"Turn {turn}: the lazy dog. " * 5, sampling=sampling(9))
        assert reply.stats.num_cached_tokens == max(0, spoken - 1)
        spoken = reply.stats.num_prompt_tokens + 9
        if turn == 2:
            session.suspend()


def test_sessions_of_an_app_share_up_to_a_group(open_runtime):
    runtime = open_runtime(swap=SwapOptions(mode="off"))
    app, system = runtime.app("a"), random_ids(200)
    first, second = app.session(), app.session()
    answer(first, [*system, *random_ids(30, seed=1)], sampling(4))
    prompt = [*system, *random_ids(40, seed=2)]
    reply = answer(second, prompt, sampling(6))
    assert reply.stats.num_cached_tokens == 192
    check(runtime, prompt, reply)
    first.close()
    more = [*prompt, *reply.token_ids, *random_ids(5, seed=3)]
    check(runtime, more, answer(second, more, sampling(4)))
    stranger = answer(runtime.app("b").session(), prompt, sampling(4))
    assert stranger.stats.num_cached_tokens == 0


def test_a_prefix_is_shared_on_disk_up_to_a_record_s_state(open_runtime):
    runtime = open_runtime()
    app, system = runtime.app("a"), random_ids(200)
    first = app.session("first")
    answer(first, [*system, *random_ids(300, seed=1)], sampling(4))
    first.suspend()
    prompt = [*system, *random_ids(40, seed=2)]
    reply = answer(app.session("second"), prompt, sampling(6))
    assert reply.stats.num_restored_tokens == reply.stats.num_cached_tokens == 192
    check(runtime, prompt, reply)


def test_prewarmed_text_leaves_one_token_to_compute(open_runtime):
    runtime = open_runtime()
    session = runtime.app().session()
    session.prewarm("What is the time?")
    stats = session.respond("What is the time?", sampling=sampling(4)).stats
    assert stats.num_cached_tokens == stats.num_prompt_tokens - 1


def test_an_answer_that_was_taken_back_goes_on_where_it_was(open_runtime):
    runtime = open_runtime()
    session, prompt = runtime.app().session(), random_ids(100)
    with session.submit_ids(prompt, sampling(200)) as stream:
        for _ in range(20):
            next(stream)
    history = [*prompt, *stream.reply.token_ids]
    assert stream.reply.finish_reason == "cancelled"
    more = [*history, *random_ids(9, seed=1)]
    reply = answer(session, more, sampling(6))
    assert 0 <= num_again(reply, len(history)) <= 1
    check(runtime, more, reply)


def test_behind_a_stop_string_it_goes_on_where_it_stopped(open_runtime):
    runtime = open_runtime()
    session, prompt = runtime.app().session(), random_ids(100)
    whole = answer(session, prompt, sampling(30))
    stop = whole.text[len(whole.text) // 2 :][:2]
    cut = answer(session, prompt, sampling(30, stop=(stop,)))
    assert cut.finish_reason == "stop"
    more = [*prompt, *cut.token_ids, *random_ids(9, seed=1)]
    reply = answer(session, more, sampling(6))
    assert num_again(reply, len(prompt) + len(cut.token_ids)) <= GROUP
    check(runtime, more, reply)


@pytest.mark.slow
def test_sixty_four_sessions_in_memory_for_sixteen(open_runtime, monkeypatch):
    """They leave memory and come back, and say what each says alone."""
    monkeypatch.setattr("edgekv.engine.request.ADMISSION_RESERVE_TOKENS", 16)
    prompts = [random_ids(90 + number, seed=number) for number in range(64)]

    def talk(runtime):
        """Two turns each, all at once; histories, and figures of the last turn."""
        sessions = [runtime.app("crowd").session(f"user-{number}") for number in range(64)]
        histories, stats = prompts, []
        for turn in range(2):
            asked = zip(sessions, histories, strict=True)
            streams = [session.submit_ids(ids, sampling(8)) for session, ids in asked]
            for stream in streams:
                for _ in stream:
                    pass
            replies = [stream.reply for stream in streams]
            more = [[*reply.token_ids, *random_ids(20, seed=turn)] for reply in replies]
            histories = [ids + new for ids, new in zip(histories, more, strict=True)]
            stats = [reply.stats for reply in replies]
        return histories, stats

    expected, _ = talk(open_runtime(swap=SwapOptions(mode="off")))
    layout = open_runtime()._engine.loop.ledger.pool.layout
    # An eighth of it is for KV on its way to disk.
    pool_bytes = 16 * layout.capacity_bytes(layout.capacity_for(256)) * 8 // 7
    runtime = open_runtime(pool_bytes=pool_bytes, swap=SwapOptions(group_bytes=1 << 14))
    histories, stats = talk(runtime)
    assert runtime.counters().swap.num_swap_ins >= 48
    # The last token said, and what is new.
    assert all(one.num_prompt_tokens - one.num_cached_tokens == 21 for one in stats)
    for ids, theirs, ours in zip(prompts, expected, histories, strict=True):
        for start in (len(ids), len(ids) + 28):
            if ours[:start] == theirs[:start]:  # else a tie was broken in another way
                said = ours[start : start + 8], theirs[start : start + 8]
                assert_same(runtime, ours[:start], *said)
    assert sum(map(list.__eq__, histories, expected)) >= 60


def test_evaluation_keeps_nothing(open_runtime):
    runtime = open_runtime()
    before = runtime.pool_snapshot().used_bytes
    logits = runtime.logits(random_ids(300))
    assert abs(logits - runtime.logits(random_ids(300))).max() <= 1e-4
    assert runtime.pool_snapshot().used_bytes == before


# --- what is on disk is not what it was ---


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def _flip_state(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def _flip_kv(path):
    data = bytearray(path.read_bytes())
    data[4100] ^= 1
    path.write_bytes(data)


def _other_version(path):
    data = bytearray(path.read_bytes())
    data[8] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip_state, _flip_kv, _other_version])
@pytest.mark.parametrize("which", [-1, 2])
def test_damage_is_computed_again_and_counted(open_runtime, tmp_path, damage, which):
    runtime = open_runtime()
    session = runtime.app("mail").session("inbox")
    prompt = random_ids(500)
    first = answer(session, prompt, sampling(12))
    runtime = open_runtime()
    paths = sorted((tmp_path / "kv").glob("*/kv/*.kv"))
    assert len(paths) > 4
    damage(paths[which])
    more = [*prompt, *first.token_ids, *random_ids(9, seed=1)]
    reply = answer(runtime.app("mail").session("inbox"), more, sampling(8))
    check(runtime, more, reply)
    is_read = which == -1 or damage in {_flip_kv, _other_version}
    assert runtime.store_snapshot().num_corrupt == is_read
    if which == -1:  # it goes on from the record before
        assert GROUP * (500 // GROUP) <= reply.stats.num_cached_tokens <= 500
    elif is_read:
        assert reply.stats.num_cached_tokens == 2 * GROUP
    else:  # only the last one's state is of interest
        assert num_again(reply, len(prompt) + 12) == 1
