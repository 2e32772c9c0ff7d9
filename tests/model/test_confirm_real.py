"""Confirmed answers to chats on the real model: in the end what exact KV says, whatever happens."""

import contextlib
import itertools
import json
import random

import pytest
from tiny_runtime import TIE, assert_same

from edgekv import SamplingParams
from edgekv.config import PredictionOptions, RuntimeConfig, StoreOptions
from edgekv.engine.predicted import PredictedPrefill
from edgekv.predict.fit.chats import chat_prompts
from edgekv.predict.fit.corpus import Corpus
from edgekv.runtime import Runtime
from edgekv.tokenizer.grammar import Grammar

pytestmark = [pytest.mark.model, pytest.mark.slow]


POOL_BYTES = 160 << 20  # of KV: not room for two of the longer prompts
TITLE = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
SCHEMA = Grammar(kind="json_schema", text=json.dumps(TITLE))


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    config = RuntimeConfig(
        pool_bytes=POOL_BYTES,
        prediction=PredictionOptions(predictor="smollm2-135m-deep"),
        store=StoreOptions(folder=tmp_path_factory.mktemp("kv"), free_reserve_bytes=0),
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


def ask(runtime, app, ids, params, prefill, grammar=None):
    with runtime.app(app).session() as session:
        return read(session.submit_ids(ids, params, prefill=prefill, grammar=grammar))


def often(self, request, unsure):
    """Far more is shown ahead than the gate would let through."""
    return unsure.margin > 0.05 * (request.num_generated % 4)


def take_back(runtime, ids, params, exact, dice):
    """Ask, and give up at some moment."""
    with runtime.app("gone").session() as session:
        stream = session.submit_ids(ids, params, prefill="predict")
        for _ in range(dice.randrange(6)):
            stream.wait(dice.random())
        stream.close()
        num_kept = len(stream.reply.token_ids)
        assert_same(runtime, ids, stream.reply.token_ids, exact.token_ids[:num_kept])


def ask_beside(runtime, ids, params, *, rival, grammar):
    """A predicted answer while others decode, of which one with `rival` wants as much memory."""
    with contextlib.ExitStack() as others:
        decoding = SamplingParams(max_tokens=400, ignore_eos=True)
        prompts = [ids[:60], ids[::-1]] if rival else [ids[:60]]
        for number, prompt in enumerate(prompts):
            session = others.enter_context(runtime.app(f"beside-{number}").session())
            stream = session.submit_ids(prompt, decoding, prefill="exact")
            others.enter_context(stream)
            stream.wait()
        return ask(runtime, "ahead", ids, params, "predict", grammar)


def play(runtime, numbers, longest, monkeypatch, max_tokens=48):
    """Confirmed answers to some of the prompts; returns what is counted of them."""
    num_retracted = num_confirmed = 0
    for number, ids in enumerate(prompts(runtime, numbers.stop, longest)):
        if number not in numbers:
            continue
        dice, params = random.Random(number), params_of(number, max_tokens)
        grammar = SCHEMA if number % 10 == 7 else None  # its prompt is computed exactly
        exact = ask(runtime, "exact", ids, params, "exact", grammar)
        with monkeypatch.context() as patch:
            if number % 4:
                patch.setattr(PredictedPrefill, "goes_ahead", often)
            if number % 3 == 0:
                take_back(runtime, ids, params, exact, dice)
            rival = number % 5 == 2
            reply = ask_beside(runtime, ids, params, rival=rival, grammar=grammar)
        check(runtime, ids, params, reply, exact)
        assert (reply.stats.num_predicted_tokens > 0) == (grammar is None)
        num_retracted += reply.stats.num_retracted_tokens
        num_confirmed += reply.stats.num_confirmed_tokens
        runtime.check_integrity()
    return num_retracted, num_confirmed


def test_two_chats(runtime, monkeypatch):
    num_retracted, num_confirmed = play(runtime, range(2), 320, monkeypatch, max_tokens=24)
    assert num_retracted + num_confirmed > 0


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_sixty_chats(runtime, monkeypatch, part):
    """Of 250 to 1,900 tokens; every other one is drawn at temperature 0.8."""
    numbers = range(15 * part, 15 * part + 15)
    num_retracted, num_confirmed = play(runtime, numbers, 1900, monkeypatch)
    assert num_retracted > 5
    assert num_confirmed > 5
