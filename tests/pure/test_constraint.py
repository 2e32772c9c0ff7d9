"""Grammars over tokenizers of every kind: what may come next, where answers end, what is refused.

Answers are driven by hand: of what the mask allows, a token is taken at random.
"""

import json
import pathlib
import random
import re
import time

import jsonschema
import numpy as np
import pytest
from json_schemas import SCHEMAS
from tiny_sentencepiece import train_model
from tiny_tokenizers import CORPUS, STYLES, make

from edgekv.errors import ConfigError, GrammarError, RequestError
from edgekv.tokenizer import load_tokenizer_folder, load_tokenizer_gguf
from edgekv.tokenizer.constraint import (
    GRAMMAR_BYTES_MAX,
    Constraint,
    GrammarTokens,
    begin,
)
from edgekv.tokenizer.grammar import Grammar

NUM_TOKENS_MAX = 120


def json_schema(schema, **fields):
    return Grammar(kind="json_schema", text=json.dumps(schema), **fields)


def gguf_of(theirs):
    """Metadata of a byte-level tokenizer, as a GGUF file has it."""
    spec = json.loads(theirs.to_str())
    control = {t["id"] for t in spec["added_tokens"] if t["special"]}
    tokens = [theirs.id_to_token(i) for i in range(theirs.get_vocab_size())]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in control else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
    }


@pytest.fixture(scope="module", params=[*STYLES, "gguf", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "gguf":
        return load_tokenizer_gguf(gguf_of(make("gpt2")), pathlib.Path("tiny.gguf"))
    if request.param == "sentencepiece":
        options = {"vocab_size": 400, "byte_fallback": True, "control_symbols": ["<|im_end|>"]}
        (folder / "tokenizer.model").write_bytes(train_model(CORPUS, **options))
    else:
        make(request.param).save(str(folder / "tokenizer.json"))
    return load_tokenizer_folder(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A byte-level one."""
    folder = tmp_path_factory.mktemp("plain")
    make("qwen").save(str(folder / "tokenizer.json"))
    return load_tokenizer_folder(folder)


def allowed(constraint, tokenizer):
    return [int(i) for i in np.flatnonzero(constraint.mask(tokenizer.vocab_size))]


def drive(constraint, tokenizer, seed, num_tokens_max=NUM_TOKENS_MAX):
    """The text of an answer whose tokens are taken at random; None if it was cut."""
    chance, ids = random.Random(seed), []
    while not constraint.ended:
        choices = allowed(constraint, tokenizer)
        assert constraint.error is None
        assert constraint.may_end == bool(tokenizer.eos_ids.intersection(choices))
        token = chance.choice(choices)
        if token in tokenizer.eos_ids:
            break
        if len(ids) == num_tokens_max:
            return None
        ids.append(token)
        constraint.take(token)
        for token in constraint.forced(num_tokens_max - len(ids)):
            assert allowed(constraint, tokenizer) == [token]
            ids.append(token)
            constraint.take(token)
    return tokenizer.decode(ids)


def lacks_bytes(tokenizer):
    """Whether it is one that cannot spell every text."""
    return len({len(t) == 1 and t for t in map(tokenizer.vocabulary.token_bytes, range(400))}) < 200


def test_answers_of_all_tokenizers_are_valid(tokenizer):
    if lacks_bytes(tokenizer):
        pytest.skip("a vocabulary without braces")
    num_whole = 0
    for seed, (name, schema) in enumerate(SCHEMAS.items()):
        text = drive(begin(json_schema(schema), tokenizer), tokenizer, seed)
        if text is not None:
            num_whole += 1
            jsonschema.validate(json.loads(text), schema), name
    assert num_whole >= 15


@pytest.mark.parametrize("pattern", [r"[ab]{3}", r" ?x| y", r"a/b\n?c", r"é+日?", r"^(ab|c)$"])
def test_answers_match_a_regular_expression(tokenizer, pattern):
    """To the letter: the space in front that some vocabularies have is no part of the text."""
    if lacks_bytes(tokenizer):
        pytest.skip("a vocabulary without braces")
    for seed in range(4):
        text = drive(begin(Grammar(kind="regex", text=pattern), tokenizer), tokenizer, seed)
        assert text is None or re.fullmatch(pattern, text), text


def test_answers_match_a_lark_grammar(tokenizer):
    grammar = Grammar(kind="lark", text='start: pair ("," pair)*\npair: /[a-c]/ "=" /[0-9]{1,2}/')
    if lacks_bytes(tokenizer):
        pytest.skip("a vocabulary without braces")
    for seed in range(6):
        text = drive(begin(grammar, tokenizer), tokenizer, seed)
        assert text is None or re.fullmatch(r"([a-c]=\d\d?)(,[a-c]=\d\d?)*", text)


def test_what_a_grammar_forces_comes_as_many_tokens_at_once(plain):
    constraint = begin(Grammar(kind="regex", text="[ab]: the quick brown fox[cd]"), plain)
    assert constraint.forced(50) == []
    constraint.take(plain.encode("a")[0])
    forced = constraint.forced(50)
    assert len(forced) > 2
    assert constraint.forced(2) == forced[:2]
    assert ": the quick brown fox".startswith(plain.decode(forced))
    for token in forced:
        constraint.take(token)
    assert constraint.forced(50) == []


def test_an_answer_is_free_until_its_reasoning_ends(tokenizer):
    """Every way to write the end of it begins the grammar, and nothing hides behind it."""
    if lacks_bytes(tokenizer):
        pytest.skip("a vocabulary without braces")
    eos = tokenizer.eos_ids
    grammar = json_schema({"enum": ["yes", "no"]}, after="</think>")
    for said in ("Hm.</think>", "a</thi</think>", "<</</think>"):
        constraint = begin(grammar, tokenizer)
        ids = tokenizer.encode(said, add_special_tokens=False)
        for token in ids:
            choices = allowed(constraint, tokenizer)
            assert not eos.intersection(choices)
            assert not constraint.may_end
            assert token in choices
            constraint.take(token)
        text = drive(constraint, tokenizer, 1)
        assert text is not None
        assert json.loads(text) in ("yes", "no")
        assert constraint.may_end


def test_a_token_that_goes_on_behind_the_end_of_reasoning_is_left_out(plain):
    tokens = GrammarTokens.of(plain)
    beyond = [i for i, text in enumerate(tokens.spelled) if b"e" in text[:-1]]
    assert beyond
    constraint = begin(Grammar(kind="regex", text="x", after="e"), plain)
    assert not set(beyond).intersection(allowed(constraint, plain))


def test_rows_beyond_the_vocabulary_are_never_allowed(plain):
    constraint = begin(Grammar(kind="regex", text="(?s:.)*"), plain)
    size = plain.vocab_size
    mask = constraint.mask(size + 50)
    assert mask.shape == (size + 50,)
    assert mask[:size].any()
    assert not mask[size:].any()
    assert constraint.mask(size - 50).shape == (size - 50,)


def test_control_tokens_are_no_text(plain):
    mask = begin(Grammar(kind="regex", text="(?s:.)*"), plain).mask(plain.vocab_size)
    hidden = plain.vocabulary.hidden_ids
    assert not mask[sorted(hidden - plain.eos_ids)].any()
    assert mask[sorted(plain.eos_ids)].all()


def test_forced_text_is_spelled_as_the_tokenizer_spells_it(plain):
    word = " world"
    constraint = begin(Grammar(kind="regex", text=f"Hello{word}!"), plain)
    for token in plain.encode(f"Hello{word}!", add_special_tokens=False)[:-1]:
        assert allowed(constraint, plain) == [token]
        constraint.take(token)


def test_constraints_of_one_grammar_are_each_its_own(plain):
    grammar = Grammar(kind="regex", text="ab")
    first, second = begin(grammar, plain), begin(grammar, plain)
    assert isinstance(first, Constraint)
    before = allowed(second, plain)
    first.take(before[0])
    assert allowed(second, plain) == before != allowed(first, plain)


def test_a_token_that_was_not_allowed_fails_it_for_good(plain):
    constraint = begin(Grammar(kind="regex", text="ab"), plain)
    wrong = plain.encode("z", add_special_tokens=False)[0]
    constraint.take(wrong)
    assert isinstance(constraint.error, GrammarError)
    assert not constraint.mask(plain.vocab_size).any()
    assert not constraint.ended


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 2}, r"^#: Unsatisfiable.*5.*2"),
        (
            {"properties": {"a": {"anyOf": [True, {"type": "frog"}]}}},
            r"^#/properties/a/anyOf/1: .*f",
        ),
        ({"$defs": {"x/y": {"pattern": "("}}, "$ref": "#/$defs/x~1y"}, r"^#/\$defs/x~1y: regex"),
        ({"items": {"not": {"type": "string"}}}, r"^#/items: Unimpl.*not"),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, r"^#/properties/a: .*nowhere"),
        ({"$ref": "http://127.0.0.1:9/x"}, r"^#: .*127"),
        ({"$ref": "#"}, r"^#: "),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, None),
        ({"enum": []}, r"^#: Unsat"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, r"^#: Unsat"),
        (False, r"^#: Unsat"),
        ([1], "^#: a schema is an object"),
        (7, "^#: a schema is an object"),
    ],
)
def test_a_schema_that_is_wrong_is_refused_with_its_place(plain, schema, message):
    if message is None:  # endless, and llguidance does not see it
        begin(json_schema(schema), plain)
        return
    with pytest.raises(GrammarError, match=message) as caught:
        begin(json_schema(schema), plain)
    assert isinstance(caught.value, RequestError)
    assert "backtrace" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", "{", "not JSON"),
        ("json_schema", "", "not JSON"),
        ("json_schema", '{}}, {"lark_grammar": "start: /a/"', "not JSON"),
        ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000, "nested too deeply"),
        ("json_schema", '{"enum": ["\\ud800"]}', "escape"),
        ("regex", "(", "unclosed"),
        ("regex", "a\ud800", "surrogate"),
        ("regex", "(?=a)b", "look-around"),
        ("lark", "start: nothing", "nothing"),
        ("lark", "x: /a/", "start"),
        ("lark", "start: (" * 300, "Expected"),
    ],
)
def test_a_grammar_that_is_malformed_is_refused(plain, kind, text, message):
    with pytest.raises(GrammarError, match=message):
        begin(Grammar(kind=kind, text=text), plain)


@pytest.mark.parametrize("kind", ["json_schema", "regex", "lark"])
def test_megabytes_are_refused_at_once(plain, kind):
    text = json.dumps({"enum": ["x" * 1000] * 3000})
    start_s = time.process_time()
    with pytest.raises(GrammarError, match=str(GRAMMAR_BYTES_MAX)):
        begin(Grammar(kind=kind, text=text), plain)
    with pytest.raises(GrammarError, match="256"):
        begin(Grammar(kind="json_object", after="x" * 300), plain)
    assert time.process_time() - start_s < 1.0


def test_a_large_schema_of_what_people_send_compiles(plain):
    tools = [
        {"properties": {"name": {"const": f"tool_{i}"}, "n": {"type": "integer"}}, "type": "object"}
        for i in range(100)
    ]
    begin(json_schema({"anyOf": tools}), plain)


@pytest.mark.parametrize("fields", [{"kind": "xml"}, {"text": None}, {"after": 3}])
def test_what_is_no_grammar_names_its_field(plain, fields):
    (field,) = fields
    with pytest.raises(ConfigError, match=f"grammar.{field}"):
        begin(Grammar(**({"kind": "regex", "text": "a"} | fields)), plain)


@pytest.mark.slow
def test_a_grammar_made_to_be_slow_is_known_to_be(plain):
    constraint = begin(json_schema({"type": "string", "pattern": "^(a{1000}){300}$"}), plain)
    for _ in range(40):
        choices = allowed(constraint, plain)
        if constraint.is_slow:
            return
        constraint.take(choices[-1])
    pytest.fail("it is not slow")
