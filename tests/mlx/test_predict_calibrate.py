"""Answers over predicted KV against exact KV, and at which margin they would be corrected."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from tiny_predictors import fitted, identity, load, random_ids

from edgekv.models.open_model import open_model
from edgekv.predict.fit.calibrate import AheadAnswer, answer_ahead, calibrate, gate_of
from edgekv.predict.fit.chats import TASKS, chat_prompts
from edgekv.predict.fit.trial import Trial
from edgekv.predict.forward import ArrayView, predicted_context, run

OPTIONS = {"sinks": 4, "window": 16, "look": 0.1, "num_tokens": 12, "eos_ids": frozenset()}


@pytest.fixture(scope="module")
def decoder(deep):
    return load(deep)


def answer_of(*tokens):
    margins, agreed = zip(*tokens, strict=True)
    return AheadAnswer(num_prompt=9, margins=margins, agreed=agreed)


def test_what_would_be_shown_and_corrected():
    assert answer_of((0.5, True), (0.1, True)).critical is None
    assert answer_of((0.5, True), (0.9, False), (0.1, True)).critical == 0.5
    assert answer_of((0.5, True), (0.2, False), (0.1, False)).critical == 0.2
    gate = gate_of([answer_of((2.0, False)), answer_of((1.0, True)), answer_of((1.0, False))])
    assert (gate.num_answers, gate.critical) == (3, (1.0, 2.0))


def test_an_answer_by_hand(decoder):
    predictor = fitted(decoder, "self", 1)
    assert {all(looked_at(decoder, predictor, random_ids(100, s)).agreed) for s in range(6)} == {
        True,
        False,
    }


def looked_at(decoder, predictor, ids):
    """An answer, and each of its figures asserted."""
    found = answer_ahead(decoder, decoder, predictor, ids, **OPTIONS)
    view, rows = predicted_context(decoder, decoder, predictor, ids, sinks=4, window=16, look=0.1)
    tokens = []
    for margin, agreed in zip(found.margins, found.agreed, strict=True):
        logits = np.sort(np.array(decoder.logits(rows[-1:])[0]))
        assert margin == pytest.approx(logits[-1] - logits[-2], abs=1e-4)
        tokens.append(int(mx.argmax(decoder.logits(rows[-1:])[0]).item()))
        exact = run(decoder, [*ids, *tokens[:-1]], ArrayView())
        assert (int(mx.argmax(decoder.logits(exact[-1:])[0]).item()) == tokens[-1]) == agreed
        rows = run(decoder, tokens[-1:], view)
    assert len(tokens) == 12
    return found


def test_an_answer_over_what_is_exact_is_right(decoder):
    ids = random_ids(100, 2)
    found = answer_ahead(decoder, decoder, identity(decoder), ids, **OPTIONS)
    assert found.critical is None


def test_an_answer_ends_where_it_ends(decoder):
    ids = random_ids(100, 3)
    found = answer_ahead(
        decoder, decoder, identity(decoder), ids, **OPTIONS | {"eos_ids": frozenset(range(4096))}
    )
    assert len(found.agreed) == 1


def test_chats_are_about_all_kinds_of_length(deep):
    tokenizer = open_model(str(deep)).tokenizer
    text = tokenizer.encode("the quick brown fox jumps over a lazy dog. " * 100)
    pieces = itertools.repeat(text[:600], 200)
    prompts = list(chat_prompts(tokenizer, pieces, shortest=100))
    assert prompts == list(chat_prompts(tokenizer, itertools.repeat(text[:600], 200), shortest=100))
    lengths = sorted(map(len, prompts))
    assert 100 <= lengths[0] < 300 < lengths[100] < 500 < lengths[-1] < 800
    decoded = {tokenizer.decode(ids) for ids in prompts}
    asked = [task for task in TASKS if any(task.split("{text}")[1][-12:] in d for d in decoded)]
    assert len(asked) == len(TASKS)


def test_a_calibration(deep, decoder):
    model = open_model(str(deep))
    trial = Trial(base=decoder, aux=decoder, window=16)
    pieces = [random_ids(150, seed) for seed in range(5)]
    done = []
    gate = calibrate(trial, fitted(decoder, "self", 2), model.tokenizer, pieces, done.append)
    assert done == [1, 2, 3, 4, 5]
    assert gate.num_answers == 5 >= len(gate.critical) > 0
