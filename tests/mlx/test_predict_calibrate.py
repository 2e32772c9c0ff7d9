"""Answers over predicted KV against exact KV, and how sure those were that are corrected."""

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_predictors import fitted, identity, load, random_ids

from edgekv.kv.provenance import ProvenanceMap
from edgekv.models.open_model import open_model
from edgekv.predict.fit.calibrate import (
    AheadAnswer,
    Asking,
    answer_ahead,
    calibrate,
    gate_of,
)
from edgekv.predict.fit.chats import TASKS, chat_prompts
from edgekv.predict.fit.trial import Trial
from edgekv.predict.forward import ArrayView, predicted_context, run
from edgekv.predict.gate import ASKED_AGAIN, HOPE, NUM_GATES, STRICTNESS, certainty
from edgekv.predict.look import Glance, chosen, hopeful_share

OPTIONS = {"sinks": 4, "window": 16, "look": 0.1, "num_tokens": 12, "eos_ids": frozenset()}


@pytest.fixture(scope="module")
def decoder(deep):
    return load(deep)


def asking_of(*tokens, ends=(), hopes=(), number=0):
    """Without hope, unless there is some; how sure, by how much surer than at once it must be."""
    certain, agreed = zip(*tokens, strict=True)
    certain = tuple(each * STRICTNESS[number] for each in certain)
    hopes = [*hopes, *[(-1.0,) * len(tokens)] * (1 + len(ASKED_AGAIN))]
    ends = tuple(index in ends for index in range(len(tokens)))
    return Asking(certain=certain, hopes=tuple(hopes), agreed=agreed, ends=ends)


def answer_of(*askings):
    return AheadAnswer(num_prompt=9, askings=askings)


def test_what_would_be_shown_and_corrected():
    once = answer_of(asking_of((0.5, True), (0.9, False), (0.1, True)))
    assert [once.shown(t) for t in (0.01, 0.5, 0.51)] == [(2, True), (2, True), (0, False)]
    assert once.critical(0) == 0.5
    assert answer_of(asking_of((0.5, True), (0.1, True))).critical(0) is None
    later = answer_of(asking_of((0.5, True), (0.2, False), (0.1, False)))
    assert later.critical(0) == 0.2


def test_an_answer_is_asked_for_again():
    sure = (9.0, 9.0, 9.0)
    first = asking_of((0.5, True), (0.3, False), (0.9, True), hopes=[sure])
    twice = asking_of((0.2, True), (0.4, True), (0.32, False), number=1)
    answer = answer_of(first, twice)
    shown = {0.6: (0, False), 0.45: (1, False), 0.4: (2, False), 0.32: (3, True), 0.3: (2, True)}
    assert {threshold: answer.shown(threshold, 0) for threshold in shown} == shown
    assert answer.critical(0) == 0.32
    # What would end the answer is never shown, and not asked again.
    held = answer_of(first, replace(twice, ends=(False, False, True)))
    assert held.shown(0.32, 0) == (2, False)
    ended = answer_of(replace(first, ends=(False, True, False)), twice)
    assert ended.shown(0.4, 0) == (1, False)


def test_without_hope_it_is_not_asked_again():
    enough = [HOPE * strictness for strictness in STRICTNESS]
    first = asking_of((0.5, True), (0.3, True), hopes=[(0.0, 0.4 * enough[1]), (0.0, enough[2])])
    twice = asking_of((0.9, True), (0.9, False), hopes=[(0.0, 0.0)], number=1)
    there = asking_of((0.9, True), (1.0, False), number=2)
    answer = answer_of(first, twice, there)
    assert [answer.shown(0.4, 0), answer.shown(0.41, 0)] == [(2, True), (1, False)]
    # The one without hope is left out, and the next one asked at once.
    assert [answer.shown(0.41, 1), answer.shown(1.0, 1)] == [(2, True), (0, False)]
    assert answer.critical(1) == pytest.approx(0.5)


def test_what_is_critical_at_a_later_asking_is_found_to_the_last_bit():
    sure = [index / 100 for index in range(1, 1000)]
    assert any(each / STRICTNESS[1] * STRICTNESS[1] > each for each in sure)
    first = asking_of((0.0, True), hopes=[(1e9,)])
    for each in sure:
        answer = answer_of(first, asking_of((each, False)))
        assert answer.critical(0) == each / STRICTNESS[1]
        answer = answer_of(replace(first, hopes=((each,),)), asking_of((1e9, False)))
        assert answer.critical(0) == each / (HOPE * STRICTNESS[1])


def test_critical_values_of_a_gate():
    answers = [answer_of(asking_of(token)) for token in ((2.0, False), (1.0, True))]
    first = asking_of((1.0, False), hopes=[(9.0,), (9.0,)])
    again = [asking_of((c, False), hopes=[(9.0,)], number=n) for n, c in ((1, 3.0), (2, 4.0))]
    gate = gate_of([*answers, answer_of(first, *again)])
    assert (gate.num_answers, gate.critical[:2]) == (3, ((2.0, 3.0), (2.0, 4.0)))
    assert len(gate.critical) == NUM_GATES


@given(data=st.data())
def test_a_critical_value_is_the_least_upper_bound(data):
    sure = st.floats(0.01, 3.0)
    three = st.lists(sure, min_size=3, max_size=3)
    tokens = st.lists(st.tuples(sure, st.booleans()), min_size=3, max_size=3)
    count = 2 + len(ASKED_AGAIN)
    answer = answer_of(
        *(
            asking_of(
                *data.draw(tokens),
                hopes=[tuple(data.draw(three)) for _ in range(count - number - 1)],
            )
            for number in range(count)
        )
    )
    num_places = data.draw(st.integers(0, len(ASKED_AGAIN)))
    critical = answer.critical(num_places)
    if critical is not None:
        assert answer.shown(critical, num_places)[1]
    above = data.draw(st.floats(0.001 if critical is None else critical, 9.0, exclude_min=True))
    assert not answer.shown(above, num_places)[1]


def test_an_answer_by_hand(decoder):
    predictor = fitted(decoder, "self", 1)
    agreed = [looked_at(decoder, predictor, random_ids(100, s)) for s in range(6)]
    assert len(set(agreed)) == 2


def looked_at(decoder, predictor, ids):
    """An answer, and each of its figures asserted; whether all was right at first."""
    found = answer_ahead(decoder, decoder, predictor, ids, **OPTIONS)
    exact, tokens = ArrayView(), []
    rows = run(decoder, ids, exact)
    for _ in range(12):
        tokens.append(int(mx.argmax(decoder.logits(rows[-1:])[0]).item()))
        rows = run(decoder, tokens[-1:], exact)
    provenance = ProvenanceMap()
    for kind, start, end in (("exact", 0, 4), ("predicted", 4, 84), ("computed", 84, 112)):
        provenance.mark(start, end, kind)
    places = [0, 0, *(84 - int(share * 80) for share in ASKED_AGAIN)]
    assert len(found.askings) == len(places)
    for number, (asking, place) in enumerate(zip(found.askings, places, strict=True)):
        look = hopeful_share(0.1) if number else 0.0
        text = predicted_context(decoder, decoder, predictor, ids, sinks=4, window=16, look=look)
        looked = chosen(text.weights, (4, 84), hopeful_share(0.1))
        if number:
            for span in looked:
                provenance.mark(*span, "computed")
        provenance.mark(0, max(4, place), "exact")
        for layer in range(decoder.config.num_layers):
            arrays = [array[:, : max(4, place)] for array in exact.arrays[layer]]
            text.view.at(0).write(layer, *arrays)
        mixed = text.view.copy(84)
        run(decoder, ids[84:99], mixed)
        for index, token in enumerate([ids[99], *tokens[:-1]]):
            glance = Glance(0, first_layer=predictor.first_layer)
            logits = decoder.logits(run(decoder, [token], mixed, taps=glance))[0]
            margin = np.diff(np.sort(np.array(logits))[-2:])[0]
            weights = np.array(glance.weights(decoder, mixed.at(99 + index)))[0]
            sure = certainty(margin, weights, provenance)
            assert asking.certain[index] == pytest.approx(sure, rel=1e-3, abs=1e-3)
            for hopes, at in zip(asking.hopes, places[number + 1 :], strict=True):
                hope = certainty(margin, weights, provenance, at, looked)
                assert hopes[index] == pytest.approx(hope, rel=1e-3, abs=1e-3)
            assert (int(mx.argmax(logits).item()) == tokens[index]) == asking.agreed[index]
    return all(found.askings[0].agreed)


def test_an_answer_over_what_is_exact_is_right(decoder):
    ids = random_ids(100, 2)
    found = answer_ahead(decoder, decoder, identity(decoder), ids, **OPTIONS)
    assert found.critical() is None


def test_an_answer_ends_where_it_ends(decoder):
    ids = random_ids(100, 3)
    found = answer_ahead(
        decoder, decoder, identity(decoder), ids, **OPTIONS | {"eos_ids": frozenset(range(4096))}
    )
    assert [asking.ends for asking in found.askings] == [(True,)] * (2 + len(ASKED_AGAIN))
    assert found.shown(0.1) == (0, False)


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
    assert gate.num_answers == 5 >= max(map(len, gate.critical)) > 0
