"""Confirmed answers to chats on the real model: in the end what exact KV says, whatever happens."""

import itertools
import random

import pytest
from tiny_runtime import TIE, assert_same

from edgekv import SamplingParams
from edgekv.config import PredictionOptions, RuntimeConfig, StoreOptions
from edgekv.engine.predicted import PredictedPrefill
from edgekv.predict.fit.chats import chat_prompts
from edgekv.predict.fit.corpus import Corpus
from edgekv.runtime import Runtime

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def runtime():
    config = RuntimeConfig(
        pool_bytes=1 << 30,
        prediction=PredictionOptions(predictor="smollm2-135m-deep"),
        store=StoreOptions(disk_bytes=0),
    )
    with Runtime.open("smollm2-135m", config=config) as runtime:
        yield runtime


def prompts(runtime, count, longest, seed=0):
    """Chats about held-out sources of the standard library, of many lengths."""
    tokenizer = runtime.tokenizer
    pieces = Corpus().pieces(tokenizer, longest, held_out=True, repeats=False)
    return list(chat_prompts(tokenizer, itertools.islice(pieces, count), shortest=250, seed=seed))


def read(stream):
    """What somebody who follows every delta has in the end, and the reply."""
    text = ""
    with stream:
        for delta in stream:
            text = text[: len(text) - delta.retract] + delta.text
    assert text == stream.reply.text
    return stream.reply


def check(runtime, ids, params, reply, exact):
    if params.temperature:
        assert reply.token_ids == exact.token_ids
    else:
        assert_same(runtime, ids, reply.token_ids, exact.token_ids)
    if reply.token_ids == exact.token_ids:
        assert reply.text == exact.text
        assert reply.finish_reason == exact.finish_reason
        for ours, theirs in zip(reply.logprobs, exact.logprobs, strict=True):
            assert abs(ours.logprob - theirs.logprob) <= TIE


def params_of(number, max_tokens):
    return SamplingParams(
        temperature=0.8 * (number % 2), seed=number, max_tokens=max_tokens, logprobs=0
    )


def ask(runtime, app, ids, params, prefill):
    with runtime.app(app).session() as session:
        return read(session.submit_ids(ids, params, prefill=prefill))


def often(self, request, unsure):
    """Far more is shown ahead than the gate would let through."""
    return unsure.margin > 0.05 * (request.num_generated % 4)


def play(runtime, count, longest, monkeypatch, max_tokens=48):
    dice = random.Random(count)
    num_retracted = num_confirmed = 0
    for number, ids in enumerate(prompts(runtime, count, longest)):
        params = params_of(number, max_tokens)
        exact = ask(runtime, "exact", ids, params, "exact")
        with monkeypatch.context() as patch:
            if number % 4:
                patch.setattr(PredictedPrefill, "goes_ahead", often)
            other = runtime.app("beside").session()
            beside = other.submit_ids(ids[:60], SamplingParams(max_tokens=400, ignore_eos=True))
            beside.wait()
            if number % 3 == 0:  # taken back at some moment
                with runtime.app("gone").session() as session:
                    stream = session.submit_ids(ids, params, prefill="predict")
                    for _ in range(dice.randrange(6)):
                        stream.wait(dice.random())
                    stream.close()
                    num_kept = len(stream.reply.token_ids)
                    assert_same(runtime, ids, stream.reply.token_ids, exact.token_ids[:num_kept])
            reply = ask(runtime, "ahead", ids, params, "predict")
            beside.close()
            other.close()
        check(runtime, ids, params, reply, exact)
        assert reply.stats.num_predicted_tokens > 0
        num_retracted += reply.stats.num_retracted_tokens
        num_confirmed += reply.stats.num_confirmed_tokens
        runtime.check_integrity()
    return num_retracted, num_confirmed


def test_two_chats(runtime, monkeypatch):
    num_retracted, num_confirmed = play(runtime, 2, 320, monkeypatch, max_tokens=24)
    assert num_retracted + num_confirmed > 0


@pytest.mark.long
def test_sixty_chats(runtime, monkeypatch):
    num_retracted, num_confirmed = play(runtime, 60, 1900, monkeypatch)
    assert num_retracted > 20
    assert num_confirmed > 20
