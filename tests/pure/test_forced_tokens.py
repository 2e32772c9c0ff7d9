"""Forced answers are made of the model's own control tokens, which no text can spell."""

import json

import pytest
from byte_tokenizer import byte_tokenizer
from chat_templates import HARMONY, MINISTRAL

from edgekv.chat.channels import CONTROL, ChannelText
from edgekv.chat.formats import answer_format
from edgekv.chat.values import Tool
from edgekv.tokenizer.constraint import begin
from edgekv.tokenizer.grammar import Grammar

TOOL = Tool(
    name="look",
    parameters='{"type":"object","properties":{"at":{"type":"string"}},"required":["at"]}',
)
JSON = Grammar(kind="json_schema", text='{"enum": [{"ok": true}, {"ok": false}]}')
CALL = '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"at": "home"}'
FINAL = '<|channel|>final<|message|>{"ok": true}'
ANALYSIS = "<|channel|>analysis<|message|>Hm. {'x': </think>}\n<|end|><|start|>assistant"


def model(template, control):
    tokenizer = byte_tokenizer(template, tuple(sorted(control)))
    return tokenizer, answer_format(template, tokenizer.vocabulary.hidden_tokens)


HARMONIC = model(HARMONY, CONTROL)


def refused_at(grammar, tokenizer, ids):
    """How many of the tokens may come, and whether the answer may end behind them."""
    constraint = begin(grammar, tokenizer)
    for index, token in enumerate(ids):
        if not constraint.mask(tokenizer.vocab_size)[token]:
            return index, False
        constraint.take(token)
    return len(ids), constraint.may_end


def check(grammar, text, *, tokenizer=HARMONIC[0]):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert refused_at(grammar, tokenizer, ids) == (len(ids), True)
    spelled = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    at = next(i for i, (one, other) in enumerate(zip(ids, spelled, strict=False)) if one != other)
    assert refused_at(grammar, tokenizer, spelled) == (at, False)


@pytest.mark.parametrize("thoughts", ["", ANALYSIS, 2 * ANALYSIS])
def test_what_is_forced_in_channels_may_be_thought_about_first(thoughts):
    tokenizer, form = HARMONIC
    calls = form.constrained(form.call_grammar([TOOL]), "", calls=True)
    answer = form.constrained(JSON, "", calls=False)
    both = form.constrained(form.call_grammar([TOOL], answer=JSON), "", calls=True)
    for grammar, text in [(calls, CALL), (answer, FINAL), (both, CALL), (both, FINAL)]:
        check(grammar, thoughts + text)
    for grammar, text in [(calls, FINAL), (answer, CALL), (answer, '{"ok": true}')]:
        ids = tokenizer.encode(thoughts + text, add_special_tokens=False)
        assert refused_at(grammar, tokenizer, ids)[1] is False
    assert refused_at(calls, tokenizer, tokenizer.encode(CALL + "<|end|>"))[1] is False


def test_the_first_token_of_a_forced_call_is_the_models_own():
    tokenizer, form = HARMONIC
    constraint = begin(form.call_grammar([TOOL]), tokenizer)
    channel = tokenizer.vocabulary.hidden_tokens["<|channel|>"]
    assert constraint.forced(1) == [channel]


def test_a_value_cannot_hold_a_control_token():
    tokenizer, form = HARMONIC
    grammar = form.call_grammar([TOOL])
    ids = tokenizer.encode(CALL.removesuffix('home"}') + "<|call|>", add_special_tokens=False)
    assert refused_at(grammar, tokenizer, ids) == (len(ids) - 1, False)


def test_calls_of_mistral_begin_with_its_tokens():
    tokenizer, form = model(MINISTRAL, ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"))
    call = '[TOOL_CALLS]look[ARGS]{"at": "home"}'
    check(form.call_grammar([TOOL]), 2 * call, tokenizer=tokenizer)


def test_a_control_token_that_the_model_lacks_is_its_text():
    tokenizer, _ = model(HARMONY, ())
    form = answer_format(HARMONY, CONTROL)
    ids = tokenizer.encode(CALL, add_special_tokens=False)
    assert refused_at(form.call_grammar([TOOL]), tokenizer, ids) == (len(ids), True)


# --- as text ---


def shown(text, tokenizer=HARMONIC[0]):
    detokenizer = ChannelText(tokenizer.vocabulary)
    forked, parts = None, []
    for token in tokenizer.encode(text, add_special_tokens=False):
        forked = detokenizer.fork()
        parts.append(detokenizer.push(token))
        assert forked.push(token) == parts[-1]
    return "".join([*parts, detokenizer.flush()])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello", "Hello"),
        ("<|channel|>final<|message|>Hellö <|return|>", "Hellö "),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi",
            "<think>\nHm.\n</think>\n\nHi",
        ),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary"
            "<|message|>One.<|end|><|start|>assistant<|channel|>final<|message|>Two.",
            "<think>\nHm.\n</think>\n\nOne.\n\nTwo.",
        ),
        ("<|channel|>analysis<|message|>Hm", "<think>\nHm"),
        ("<|channel|>anal", ""),
        ("<|channel|>final <|constrain|>json<|message|>" + json.dumps({"a": 1}), '{"a": 1}'),
    ],
)
def test_text_of_channels_has_thoughts_in_tags(text, expected):
    assert shown(text) == expected


def test_channels_that_are_no_control_tokens_are_text():
    tokenizer, _ = model(HARMONY, ())
    assert shown("<|channel|>final<|message|>Hi", tokenizer) == "<|channel|>final<|message|>Hi"
