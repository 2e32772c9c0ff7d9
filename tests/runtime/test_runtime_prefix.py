"""Reuse of KV that is already there: within a session, across an app's sessions, never further."""

import pytest
from tiny_models import random_ids
from tiny_runtime import answer, assert_same, greedy_by_hand, sampling

SYSTEM = "You are a clerk. " * 8


def test_a_second_turn_computes_only_what_is_new(runtime, app):
    session = app.session()
    first = session.respond("One", sampling=sampling(30))
    second = session.respond("Two", sampling=sampling(4))
    spoken = first.stats.num_prompt_tokens + 30
    # The last token of the first answer was sampled, but no step has computed its KV.
    assert second.stats.num_cached_tokens == spoken - 1
    assert second.stats.num_prompt_tokens > spoken


def test_an_answer_does_not_depend_on_what_was_cached(runtime, app):
    prompt = random_ids(100)
    session = app.session()
    cold = answer(session, prompt, sampling(10))
    warm = answer(session, prompt, sampling(10))
    assert cold.stats.num_cached_tokens == 0
    assert warm.stats.num_cached_tokens == 99  # the last one's logits are needed
    assert_same(runtime, prompt, warm.token_ids, cold.token_ids)


@pytest.mark.parametrize("common", [1, 15, 16, 17, 63, 99])
def test_a_prompt_that_diverges_keeps_what_is_before(runtime, app, common):
    session = app.session()
    old, new = random_ids(100, seed=1), random_ids(100, seed=2)
    new[:common] = old[:common]
    new[common] = old[common] % 100 + 101
    answer(session, old, sampling(5))
    reply = answer(session, new, sampling(5))
    assert reply.stats.num_cached_tokens == common
    assert_same(runtime, new, reply.token_ids, greedy_by_hand(runtime, new, 5))


def test_a_shorter_prompt_keeps_all_but_its_last_token(app):
    session = app.session()
    answer(session, random_ids(100), sampling(5))
    assert answer(session, random_ids(100)[:50], sampling(5)).stats.num_cached_tokens == 49


def test_sessions_of_one_app_share_a_system_prompt(runtime, app):
    one, two = app.session(system=SYSTEM), app.session(system=SYSTEM)
    first = one.respond("One", sampling=sampling(10))
    second = two.respond("Two", sampling=sampling(10))
    common = len(SYSTEM) // 2  # in tokens it is a good deal less than in characters
    assert first.stats.num_cached_tokens == 0
    assert second.stats.num_cached_tokens > common // 2
    alone = runtime.app(app.name + "-alone").session(system=SYSTEM)
    assert alone.respond("Two", sampling=sampling(10)).token_ids == second.token_ids


def test_sharing_copies(runtime, app):
    prompt = random_ids(100)
    one, two = app.session(), app.session()
    first = answer(one, prompt, sampling(10))
    assert answer(two, prompt, sampling(10)).stats.num_cached_tokens == 99
    one.close()
    runtime.check_integrity()
    again = answer(two, prompt, sampling(10))
    assert_same(runtime, prompt, again.token_ids, first.token_ids)


def test_another_app_never_sees_that_something_is_cached(runtime, app):
    stranger = runtime.app(app.name + "-stranger")
    prompt = random_ids(100)
    answer(app.session(), prompt, sampling(5))
    assert answer(stranger.session(), prompt, sampling(5)).stats.num_cached_tokens == 0


def test_prewarm_computes_the_system_prompt_ahead(app):
    session = app.session(system=SYSTEM)
    cold = app.session()
    assert cold.prewarm() is None  # nothing is known of what it will say
    session.prewarm()
    assert session.last_reply is None
    assert [m.role for m in session.messages] == ["system"]
    stats = session.respond("One", sampling=sampling(4)).stats
    assert 0 < stats.num_prompt_tokens - stats.num_cached_tokens < 40


def test_prewarm_with_the_next_text_leaves_one_token_to_compute(app):
    session = app.session()
    session.prewarm("What is the time?")
    session.prewarm("What is the time?")  # warm already
    assert session.messages == []
    stats = session.respond("What is the time?", sampling=sampling(4)).stats
    assert stats.num_cached_tokens == stats.num_prompt_tokens - 1


def test_a_prewarmed_answer_is_the_same(app):
    expected = app.session(system="A").respond("One", sampling=sampling(12)).token_ids
    session = app.session(system="A")
    session.prewarm("One")
    assert session.respond("One", sampling=sampling(12)).token_ids == expected


def test_history_of_many_turns_is_cached_all_along(app):
    session, spoken = app.session(system="Be brief."), 0
    for turn in range(8):
        reply = session.respond(f"Turn {turn}", sampling=sampling(9))
        assert reply.stats.num_cached_tokens == max(0, spoken - 1)
        spoken = reply.stats.num_prompt_tokens + 9
