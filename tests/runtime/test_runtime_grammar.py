"""Answers that must match a grammar: they do, and nobody beside them notices."""

import json
import re
import time

import jsonschema
import numpy as np
import pytest
from json_schemas import SCHEMAS
from tiny_models import TURN_END_ID, random_ids
from tiny_runtime import answer, log_softmax, sampling

from edgekv.config import ConfigError, SamplingParams
from edgekv.engine.loop import Loop
from edgekv.errors import GrammarError
from edgekv.tokenizer import constraint as constraint_module
from edgekv.tokenizer.constraint import Constraint
from edgekv.tokenizer.grammar import Grammar

WORDS = Grammar(kind="regex", text="[a-z]{4}( [a-z]{4}){3}")
OPTIONS = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "seed": 4, "top_p": 0.5},
    {"temperature": 2.0, "seed": 5, "top_k": 3, "repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 6, "min_p": 0.2, "logprobs": 2},
]


def ask(app, grammar, ids=None, max_tokens=60, **options):
    """The stream of a constrained answer to token ids."""
    params = SamplingParams(max_tokens=max_tokens, **({"temperature": 0.0} | options))
    return app.session().submit_ids(ids or random_ids(20), params, grammar=grammar)


def whole(stream):
    with stream:
        for _ in stream:
            pass
    return stream.reply


@pytest.fixture
def slow_masks(monkeypatch):
    """All masks are computed beside the engine, and some take longer than it waits."""
    monkeypatch.setattr(constraint_module, "SLOW_S", -1.0)
    mask, num_masks = Constraint.mask, [0]

    def slow(self, num_rows):
        num_masks[0] += 1
        time.sleep(0.05 if num_masks[0] % 5 == 0 else 0.0)
        return mask(self, num_rows)

    monkeypatch.setattr(Constraint, "mask", slow)
    fail, late = Loop._fail, []

    def spy(self, request):
        late.append(request.mask is not None)
        fail(self, request)

    monkeypatch.setattr(Loop, "_fail", spy)
    return late


@pytest.mark.slow
def test_two_hundred_answers_to_twenty_schemas_validate(app):
    """At temperature 1, ten a schema; 20 at a time, so that constrained rows share steps."""
    asked = [(schema, seed) for schema in SCHEMAS.values() for seed in range(10)]
    num_whole = 0
    for start in range(0, len(asked), 20):
        streams = [
            ask(app, Grammar(kind="json_schema", text=json.dumps(schema)), temperature=1.0, seed=s)
            for schema, s in asked[start : start + 20]
        ]
        for (schema, _), stream in zip(asked[start : start + 20], streams, strict=True):
            reply = whole(stream)
            if reply.finish_reason == "length":
                assert len(reply.token_ids) == 60
                continue
            assert reply.finish_reason == "stop"
            jsonschema.validate(json.loads(reply.text), schema)
            num_whole += 1
    assert num_whole >= 150


@pytest.mark.parametrize("options", OPTIONS)
def test_answers_end_where_the_grammar_does(app, options):
    reply = whole(ask(app, WORDS, **options))
    assert reply.finish_reason == "stop"
    assert re.fullmatch(WORDS.text, reply.text)


def test_an_answer_that_may_end_ends_by_the_models_choice(app):
    """Where the grammar may end EOS competes with what may follow; elsewhere it cannot win."""
    grammar = Grammar(kind="regex", text="(abc)*")
    lengths = set()
    for seed in range(12):
        reply = whole(ask(app, grammar, temperature=3.0, seed=seed, max_tokens=12))
        if reply.finish_reason == "stop":
            assert re.fullmatch("(abc)*", reply.text)
            lengths.add(len(reply.text))
        else:
            assert "abcabcabcabc".startswith(reply.text[:12])
    assert len(lengths) > 1


def test_eos_that_is_ignored_ends_a_grammar_all_the_same(app):
    grammar = Grammar(kind="regex", text="a{0,3}")
    for seed in range(4):
        params = sampling(40, temperature=3.0, seed=seed)
        reply = whole(app.session().submit_ids(random_ids(9), params, grammar=grammar))
        assert reply.finish_reason == "stop"
        assert re.fullmatch("a{0,3}", reply.text)


def test_the_length_limit_cuts(app):
    reply = whole(ask(app, WORDS, max_tokens=3))
    assert reply.finish_reason == "length"
    assert len(reply.token_ids) == 3


def test_a_stop_string_ends_it_sooner(app):
    params = SamplingParams(max_tokens=60, temperature=0.0, stop=(" ",))
    reply = app.session().respond("Hi", sampling=params, grammar=WORDS)
    assert re.fullmatch("[a-z]{4}", reply.text)


FORCED = Grammar(kind="regex", text='[ab]{2}, and so "the quick brown fox" said [ab]{2}; over[ab]')


@pytest.mark.parametrize("options", [*OPTIONS[:4], {"temperature": 1.0, "seed": 1}])
def test_what_is_forced_is_not_sampled_and_the_same(runtime, app, options):
    """Where logprobs are wanted every token is sampled: the answer is the same, in more steps."""
    answers, steps = [], []
    for logprobs in (None, 0):
        before = runtime.counters().num_steps
        answers.append(whole(ask(app, FORCED, **(options | {"logprobs": logprobs}))))
        steps.append(runtime.counters().num_steps - before)
    forced, sampled = answers
    assert forced.token_ids == sampled.token_ids
    assert forced.text == sampled.text
    assert sampled.stats.num_forced_tokens == 0
    assert forced.stats.num_forced_tokens > len(forced.token_ids) // 2
    assert steps[1] - steps[0] >= forced.stats.num_forced_tokens // 2


def test_a_limit_and_a_stop_string_cut_within_what_is_forced(app):
    full = whole(ask(app, FORCED))
    for max_tokens in range(1, len(full.token_ids)):
        reply = whole(ask(app, FORCED, max_tokens=max_tokens))
        assert reply.finish_reason == "length"
        assert reply.token_ids == full.token_ids[:max_tokens]
    for stop in ('"', "brown", "said"):
        reply = whole(ask(app, FORCED, stop=(stop,)))
        assert reply.finish_reason == "stop"
        assert reply.text == full.text[: full.text.index(stop)]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_end_that_is_forced_ends(app, ignore_eos):
    """A Lark grammar can name tokens; what ends answers is no part of one, forced or sampled."""
    text = f'start: /[ab]/ "quick" <[{TURN_END_ID}]> " fox"'
    options = {"grammar": Grammar(kind="lark", text=text), "ignore_eos": ignore_eos}
    forced, sampled = (whole(ask(app, logprobs=logprobs, **options)) for logprobs in (None, 0))
    assert forced.stats.num_forced_tokens > 0
    assert forced.token_ids == sampled.token_ids
    assert forced.finish_reason == "stop"
    assert (TURN_END_ID in forced.token_ids) == ignore_eos
    assert forced.text[1:] == ("quick fox" if ignore_eos else "quick")


def test_a_turn_after_forced_tokens_goes_on_over_their_kv(app):
    ids = random_ids(20)
    session = app.session()
    params = SamplingParams(max_tokens=60, temperature=0.0)
    first = whole(session.submit_ids(ids, params, grammar=FORCED))
    more = [*ids, *first.token_ids, *random_ids(5, seed=2)]
    ours = whole(session.submit_ids(more, sampling(10)))
    assert ours.stats.num_cached_tokens >= len(ids) + len(first.token_ids) - 1
    assert ours.token_ids == whole(app.session().submit_ids(more, sampling(10))).token_ids


def test_reasoning_is_free_and_the_answer_is_not(app):
    grammar = Grammar(kind="json_schema", text='{"enum": ["yes", "no"]}', after="e")
    num_whole = 0
    for seed in range(4):
        reply = whole(ask(app, grammar, temperature=1.0, seed=seed, max_tokens=250))
        _, end, text = reply.text.partition("e")
        if reply.finish_reason == "stop":
            assert end
            assert json.loads(text) in ("yes", "no")
            num_whole += 1
    assert num_whole


def test_log_probabilities_are_the_models_own(runtime, app):
    """The mask changes what is chosen, not how likely the model finds it."""
    ids = random_ids(20)
    reply = whole(ask(app, WORDS, ids, max_tokens=6, logprobs=3))
    logits = runtime.logits([*ids, *reply.token_ids])
    expected = log_softmax(logits)[len(ids) - 1 :]
    for row, told in zip(expected, reply.logprobs, strict=False):
        assert told.logprob == pytest.approx(row[told.token_id], abs=1e-3)
        assert [i for i, _ in told.top] == [int(i) for i in np.argsort(-row)[:3]]
    assert any(told.token_id not in dict(told.top) for told in reply.logprobs)


def test_a_greedy_answer_is_the_likeliest_allowed_token_each_time(runtime, app):
    """The slow twin: all logits anew, masked by hand."""
    grammar, ids = Grammar(kind="regex", text="[a-f]{8}"), random_ids(20)
    reply = whole(ask(app, grammar, ids))
    constraint = constraint_module.begin(grammar, runtime.tokenizer)
    known = list(ids)
    while not constraint.ended:
        logits = runtime.logits(known)[-1]
        mask = constraint.mask(len(logits))
        known.append(int(np.where(mask, logits, -np.inf).argmax()))
        constraint.take(known[-1])
    assert known[len(ids) :] == list(reply.token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_streams_beside_a_constrained_one_say_what_they_say_alone(app, late, request):
    """And it says the same, however long its masks take."""
    prompts = [random_ids(30 + 7 * i, seed=i) for i in range(3)]
    free = [sampling(40), sampling(40, temperature=1.0, seed=8), sampling(40, logprobs=1)]
    alone = [answer(app.session(), p, s) for p, s in zip(prompts, free, strict=True)]
    held_alone = [whole(ask(app, WORDS, **options)).token_ids for options in OPTIONS]
    lates = request.getfixturevalue("slow_masks") if late else []
    held = [ask(app, WORDS, **options) for options in OPTIONS]
    streams = [app.session().submit_ids(p, s) for p, s in zip(prompts, free, strict=True)]
    together = [whole(stream) for stream in streams]
    assert [whole(stream).token_ids for stream in held] == held_alone
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [[t.token_id for t in r.logprobs] for r in together] == [
        [t.token_id for t in r.logprobs] for r in alone
    ]
    assert any(lates) == late


@pytest.mark.slow
def test_who_is_preempted_goes_on_where_it_was(open_runtime, monkeypatch):
    """All fit until their answers grow: their constraints outlive their KV."""
    monkeypatch.setattr("edgekv.engine.request.ADMISSION_RESERVE_TOKENS", 1)
    granule_bytes = 128 * 2 * 3 * 2 * 16 * 4
    runtime = open_runtime(pool_bytes=3 * granule_bytes)
    app = runtime.app()
    grammar = Grammar(kind="regex", text="([a-z]{6},){25}")
    prompts = [random_ids(90, seed=i) for i in range(4)]
    options = {"temperature": 1.0, "max_tokens": 200}
    alone = [whole(ask(app, grammar, p, seed=i, **options)) for i, p in enumerate(prompts)]
    streams = [ask(app, grammar, p, seed=i, **options) for i, p in enumerate(prompts)]
    together = [whole(stream) for stream in streams]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert sum(r.stats.num_preemptions for r in together) > 0
    assert sum(r.stats.num_forced_tokens for r in together) > 0
    for reply in together:
        assert re.match("([a-z]{1,6},?)+", reply.text).end() == len(reply.text)


def test_a_cancelled_one_leaves_nothing_behind(runtime, app):
    stream = ask(app, Grammar(kind="regex", text="[a-z]+"), max_tokens=500)
    next(iter(stream))
    stream.close()
    assert stream.reply.finish_reason == "cancelled"
    assert re.fullmatch("[a-z]+", stream.reply.text)
    assert re.fullmatch(WORDS.text, whole(ask(app, WORDS)).text)


@pytest.mark.parametrize("text", ["{", '{"type": "frog"}', "false"])
def test_a_wrong_schema_is_refused_at_the_door(app, text):
    session = app.session()
    with pytest.raises(GrammarError):
        session.respond("Hi", grammar=Grammar(kind="json_schema", text=text))
    assert not session.messages
    assert session.respond("Hi", sampling=sampling(2)).token_ids  # nothing was asked


def test_what_is_no_grammar_is_refused(app):
    with pytest.raises(ConfigError, match="grammar"):
        app.session().respond("Hi", grammar={"type": "object"})


def test_a_constraint_that_fails_later_ends_that_request_only(runtime, app, monkeypatch):
    take = Constraint.take

    def fail_at_space(self, token):
        take(self, token)
        if runtime.tokenizer.decode([token]) == " ":
            self._fail("too complex")

    monkeypatch.setattr(Constraint, "take", fail_at_space)
    other = app.session().submit_ids(random_ids(30), sampling(30))
    session = app.session()
    with pytest.raises(GrammarError, match="too complex"):
        session.respond("Hi", grammar=WORDS, sampling=SamplingParams(temperature=0.0))
    assert len(whole(other).token_ids) == 30
    monkeypatch.undo()
    assert session.respond("Hi", grammar=WORDS).text


def test_the_next_turn_goes_on_over_a_constrained_one(app):
    session = app.session()
    first = session.respond("Hi", grammar=WORDS)
    second = session.respond("And?", sampling=sampling(5))
    assert second.stats.num_cached_tokens > len(first.token_ids)
    assert TURN_END_ID not in first.token_ids
