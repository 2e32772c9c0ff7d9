"""What an answer says: text, tokens, ends, log-probabilities, figures."""

import asyncio
from collections import Counter

import numpy as np
import pytest
from tiny_models import BOS_ID, EOS_ID, TURN_END_ID, VOCAB_SIZE, random_ids
from tiny_runtime import answer, assert_same, greedy_by_hand, log_softmax, sampling

from edgekv.config import SamplingParams
from edgekv.errors import ConfigError, PromptEmpty, PromptTooLong, RequestError


def test_greedy_decoding_equals_computing_everything_anew_for_each_token(runtime, app):
    prompt = random_ids(37, seed=1)
    reply = answer(app.session(), prompt, sampling(20))
    assert_same(runtime, prompt, reply.token_ids, greedy_by_hand(runtime, prompt, 20))


def test_respond_stream_and_their_async_twins_say_the_same(app):
    def respond():
        return app.session().respond("Hello there", sampling=sampling(24))

    def stream():
        session = app.session()
        with session.stream("Hello there", sampling=sampling(24)) as stream:
            text = "".join(delta.text for delta in stream)
        assert stream.done
        assert session.last_reply is stream.reply
        assert text == stream.reply.text
        return stream.reply

    async def arespond():
        return await app.session().arespond("Hello there", sampling=sampling(24))

    async def astream():
        session = app.session()
        async with await session.astream("Hello there", sampling=sampling(24)) as stream:
            text = "".join([delta.text async for delta in stream])
        assert text == stream.reply.text
        return session.last_reply

    replies = [respond(), stream(), asyncio.run(arespond()), asyncio.run(astream())]
    assert len({(r.text, r.token_ids, r.finish_reason) for r in replies}) == 1


def test_the_text_is_what_the_tokens_spell(runtime, app):
    reply = app.session().respond("Tell me", sampling=sampling(60))
    assert reply.text == runtime.tokenizer.decode(reply.token_ids)


def test_deltas_carry_every_token_once(app):
    deltas = list(app.session().stream("Tell me", sampling=sampling(40)))
    assert sum(len(delta.token_ids) for delta in deltas) == 40


def test_figures_add_up(app):
    reply = app.session().respond("Tell me", sampling=sampling(16))
    stats = reply.stats
    assert stats.num_output_tokens == len(reply.token_ids) == 16
    assert stats.num_prompt_tokens > 0
    assert stats.num_cached_tokens == 0
    assert stats.prefill_mode == "exact"
    assert 0 <= stats.queue_ms <= stats.queue_ms + stats.prefill_ms <= stats.ttft_ms
    assert 0 < stats.tbt_p50_ms <= stats.tbt_max_ms
    assert stats.decode_tokens_per_s > 0
    assert stats.peak_memory_bytes > 0


def test_one_token_has_no_gaps(app):
    stats = app.session().respond("Tell me", sampling=sampling(1)).stats
    assert (stats.decode_tokens_per_s, stats.tbt_p50_ms, stats.tbt_max_ms) == (0, 0, 0)


# --- ends ---


def test_max_tokens_ends_with_length(app):
    reply = app.session().respond("Hi", sampling=sampling(7))
    assert (len(reply.token_ids), reply.finish_reason) == (7, "length")


def test_an_end_of_sequence_token_ends_with_stop_and_is_not_part_of_the_answer(app):
    def tell(seed, **options):
        params = SamplingParams(max_tokens=100, temperature=3.0, seed=seed, **options)
        return app.session().stream("Hi", sampling=params)

    def read(stream):
        for _ in stream:
            pass
        return stream.reply

    # Random weights: of twenty seeds some draw the end of the turn.
    replies = [read(stream) for stream in [tell(seed) for seed in range(20)]]
    ends = {TURN_END_ID, EOS_ID}  # one by its key, one by its text
    assert not [reply for reply in replies if ends & set(reply.token_ids)]
    seed, stopped = next((i, r) for i, r in enumerate(replies) if r.finish_reason == "stop")
    whole = read(tell(seed, ignore_eos=True))
    assert whole.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    assert whole.token_ids[len(stopped.token_ids)] in ends


def test_the_context_ends_an_answer_that_nothing_else_ends(open_runtime):
    runtime = open_runtime(context_max=64)
    prompt = random_ids(40)
    reply = answer(runtime.app().session(), prompt, SamplingParams(ignore_eos=True))
    assert reply.finish_reason == "length"
    assert len(reply.token_ids) == 24


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it(app):
    whole = app.session().respond("Hi", sampling=sampling(60)).text
    stop = whole[20:26]
    session = app.session()
    deltas = list(session.stream("Hi", sampling=sampling(60, stop=("never", stop))))
    assert session.last_reply.finish_reason == "stop"
    expected = whole[: whole.index(stop)]
    assert session.last_reply.text == "".join(d.text for d in deltas) == expected


def test_the_beginning_of_a_stop_string_is_text_after_all_at_the_end(app):
    whole = app.session().respond("Hi", sampling=sampling(60)).text
    stop = whole[-3:] + "never"
    reply = app.session().respond("Hi", sampling=sampling(60, stop=(stop,)))
    assert (reply.text, reply.finish_reason) == (whole, "length")


# --- choice of tokens ---


def test_logprobs_are_the_models_own(runtime, app):
    prompt = random_ids(20)
    reply = answer(app.session(), prompt, sampling(12, temperature=1.3, seed=3, logprobs=5))
    assert len(reply.logprobs) == 12
    expected = log_softmax(runtime.logits([*prompt, *reply.token_ids]))[len(prompt) - 1 :]
    for i, entry in enumerate(reply.logprobs):
        assert entry.token_id == reply.token_ids[i]
        assert entry.logprob == pytest.approx(expected[i, entry.token_id], abs=1e-3)
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True)
        best = np.sort(expected[i])[::-1][:5]
        assert values == pytest.approx(best, abs=1e-3)


def test_logprobs_zero_gives_the_chosen_tokens_only(app):
    reply = app.session().respond("Hi", sampling=sampling(3, logprobs=0))
    assert [entry.top for entry in reply.logprobs] == [(), (), ()]
    assert app.session().respond("Hi", sampling=sampling(3)).logprobs == ()


def test_seeds_decide(app):
    def tokens(seed):
        params = sampling(16, temperature=1.0, seed=seed)
        return app.session().respond("Hi", sampling=params).token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)


def test_top_k_of_one_is_greedy(app):
    greedy = app.session().respond("Hi", sampling=sampling(16))
    narrow = app.session().respond("Hi", sampling=sampling(16, temperature=5.0, top_k=1))
    assert narrow.token_ids == greedy.token_ids


def test_a_huge_repetition_penalty_forbids_repetition(app):
    prompt = random_ids(16)
    params = sampling(60, repetition_penalty=100.0)
    tokens = answer(app.session(), prompt, params).token_ids
    plain = answer(app.session(), prompt, sampling(60)).token_ids
    assert len(set(plain)) < len(plain)
    assert len(set(tokens)) == len(tokens)
    assert not set(tokens) & set(prompt)


def test_what_was_said_is_taken_off_its_logits_each_time(app):
    presence, frequency = 0.6, 0.9
    params = sampling(60, presence_penalty=presence, frequency_penalty=frequency, logprobs=100)
    reply = answer(app.session(), random_ids(16), params)
    said = Counter[int]()
    for token, told in zip(reply.token_ids, reply.logprobs, strict=True):
        scores = {i: p - presence * (said[i] > 0) - frequency * said[i] for i, p in told.top}
        assert scores[token] >= max(scores.values()) - 1e-5
        said[token] += 1
    plain = Counter(answer(app.session(), random_ids(16), sampling(60)).token_ids)
    assert max(said.values()) < max(plain.values())


# --- prompts ---


def test_an_empty_prompt_is_refused_and_leaves_no_trace(app):
    session = app.session()
    for text in ("", "  \n"):
        with pytest.raises(PromptEmpty):
            session.respond(text)
    assert session.messages == []
    assert session.respond("Hi", sampling=sampling(2)).text


def test_a_prompt_beyond_the_context_is_refused_with_the_figures(app, runtime):
    session = app.session()
    with pytest.raises(PromptTooLong, match=str(runtime.context_max)) as caught:
        session.respond("a long story " * 500)
    assert caught.value.hint
    with pytest.raises(PromptTooLong):
        session.submit_ids(random_ids(runtime.context_max), sampling(1))
    assert session.respond("Hi", sampling=sampling(2)).text


def test_the_longest_prompt_has_room_for_one_token(runtime, app):
    reply = answer(app.session(), random_ids(runtime.context_max - 1), sampling(50))
    assert len(reply.token_ids) == 1


def test_text_that_is_not_unicode_is_refused(app):
    with pytest.raises(RequestError, match="surrogate"):
        app.session().respond("broken \ud800 text")


def test_a_raw_prompt_has_no_template_and_no_history(runtime, app):
    session = app.session(system="Be brief.")
    reply = session.respond("Once upon a time", sampling=sampling(8), raw=True)
    prompt = runtime.tokenizer.encode("Once upon a time")
    assert reply.stats.num_prompt_tokens == len(prompt)
    assert [m.role for m in session.messages] == ["system"]
    assert_same(runtime, prompt, reply.token_ids, greedy_by_hand(runtime, prompt, 8))


@pytest.mark.parametrize("timeout_s", [-1, float("nan"), "1"])
def test_absurd_timeouts_are_refused(app, timeout_s):
    with pytest.raises(ConfigError, match="timeout_s"):
        app.session().respond("Hi", timeout_s=timeout_s)


# --- evaluation ---


def test_score_is_the_log_probability_of_what_follows(runtime):
    ids = [BOS_ID, *random_ids(40)]
    expected = log_softmax(runtime.logits(ids))[np.arange(40), ids[1:]]
    scores = runtime.score(iter(ids))
    assert scores.shape == (40,)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_logits_have_one_row_a_token(runtime):
    logits = runtime.logits(random_ids(300))
    assert logits.shape == (300, VOCAB_SIZE)
    np.testing.assert_allclose(logits[:10], runtime.logits(random_ids(300)[:10]), atol=1e-4)


def test_evaluation_of_nothing_too_much_or_unknown_tokens_is_refused(runtime):
    with pytest.raises(PromptEmpty):
        runtime.logits([])
    with pytest.raises(PromptTooLong):
        runtime.logits([5] * (runtime.context_max + 1))
    with pytest.raises(ConfigError, match="token id"):
        runtime.score([1, VOCAB_SIZE])
    with pytest.raises(ConfigError, match="token id"):
        runtime.score([1, -1])
