"""Chat templates, made at random too, against the renderer of transformers."""

import re

import pytest
from chat_templates import FAMILIES
from fuzz import fuzz
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from edgekv.errors import ChatTemplateError
from edgekv.tokenizer import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    {"role": "system", "content": "Be brief & <b>plain</b>."},
    {"role": "user", "content": "  Say 'hi' \n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhi 🙂"},
    {"role": "user", "content": "x" * 40, "name": "Ann"},
]


def theirs(source, messages, **options):
    """The text, or None where it fails."""
    try:
        (text,), _ = chat_template_utils.render_jinja_template(
            [messages], chat_template=source, **SPECIAL, **options
        )
    except Exception:  # noqa: BLE001 - whatever a template raises
        return None
    return text


def ours(source, messages, **options):
    template = ChatTemplate(source, origin="tiny.jinja", special_tokens=SPECIAL)
    try:
        return template.render(messages, **options)
    except ChatTemplateError:
        return None


TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks at <b>things</b> & 'more' – é.",
        "parameters": {"type": "object", "properties": {"at": {"type": ["string", "null"]}}},
    },
}
CALL = {
    "type": "function",
    "id": "abcDEF123",
    "function": {"name": "look", "arguments": {"at": 'x\n"é" <&>', "n": [1, 2.5, True, None]}},
}
AGENT = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL],
        "reasoning_content": "hm",
        "thinking": "hm",
    },
    {"role": "tool", "content": '{"found": 1}', "tool_call_id": "abcDEF123", "name": "look"},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_tools_calls_and_results_are_written_as_there(family, variables):
    messages = [MESSAGES[0], *AGENT] if not family.startswith("gemma") else MESSAGES[1:3]
    for tools in (None, [TOOL], [TOOL, TOOL]):
        expected = theirs(
            FAMILIES[family], messages, tools=tools, add_generation_prompt=True, **variables
        )
        assert expected is not None or family in ("deepseek", "chatml", "blocks")
        assert ours(FAMILIES[family], messages, tools=tools, variables=variables) == expected


JOINED = [
    "{{ '<' ~ ('x' | safe) ~ '&' }}",
    "{{ '<' ~ ('&' | e) ~ messages[0].content }}",
    "{{ ('<' | escape) ~ ('>' | escape) ~ 1 ~ none ~ missing }}",
    "{{ ('<' ~ ('x' | safe)) + '<' }}{{ ('x' | safe) + '<' }}",
    "{{ (messages[0].content | e ~ '<') | e }}",
    "{% set x = '<' | safe %}{{ x ~ '>' ~ x }}{{ (x ~ '>') | length }}",
    "{% set x %}<{{ 1 }}>{% endset %}{{ x ~ '<' }}{{ '<' ~ x | e }}",
    "{% autoescape true %}{{ '<' ~ ('<' | safe) ~ '>' }}{% endautoescape %}{{ '<' ~ '>' }}",
    "{% macro m(x) %}<{{ x ~ '>' }}{% endmacro %}{{ m('<') ~ '<' ~ m('a' | e) }}",
    "{{ ['<', '>' | safe] | join('&') ~ '<' }}{{ 1 ~ 2.5 ~ true ~ [1] ~ {'a': '<'} }}",
    "{{ 'a' ~ 'b' ~ 'c' | upper }}{{ ('a' ~ 'b') | upper ~ 'c' }}",
]


@pytest.mark.parametrize("source", JOINED)
def test_joining_marks_nothing_safe_and_escapes_nothing(source):
    expected = theirs(source, MESSAGES)
    assert expected is not None
    assert ours(source, MESSAGES) == expected


# Looks through all messages at each of them, as templates do that search for the last question.
QUADRATIC = (
    "{% for m in messages %}{% set ns = namespace(later=0) %}{% for n in messages %}"
    "{% if n.role == 'user' and n.content == m.content %}{% set ns.later = ns.later + 1 %}"
    "{% endif %}{% endfor %}{{ ns.later }}{% endfor %}"
)


def test_a_long_conversation_is_no_attack(monkeypatch):
    monkeypatch.setattr("edgekv.tokenizer.sandbox.STEPS_MAX", 1000)
    messages = [{"role": ("user", "assistant")[i % 2], "content": str(i)} for i in range(400)]
    assert ours(QUADRATIC, messages) == "10" * 200  # 160,400 steps


def test_what_would_take_hours_is_stopped_whatever_the_conversation(monkeypatch):
    monkeypatch.setattr("edgekv.tokenizer.sandbox.STEPS_MAX", 1000)
    cubic = "{% for a in messages %}" * 3 + "{% endfor %}" * 3
    few, many = MESSAGES, MESSAGES * 20
    assert ours(cubic, few) is not None  # 84 steps of 1064
    assert ours(cubic, many) is None  # 518,480 of 26,600
    assert ours(cubic[23:-12], many) is not None  # of two loops


# --- at random ---


def one_of(fragments):
    """One of some pieces of code, between which there are three spaces or more."""
    return st.sampled_from(re.split(r"\s{3,}", fragments.strip()))


TEXTS = st.sampled_from(["", "<", "&amp;", "hi", " x ", "</think>", "user", "a,b", "Ü", "\\n", "1"])
NAMES = st.sampled_from(["m", "messages", "bos_token", "x", "ns.n", "missing", "loop.index"])
MORE_NAMES = one_of(
    r"""
    m.content   m.role   m['content']   m.name   messages[0]   messages[-1].content
    add_generation_prompt   tools   loop.first   loop.last   loop.index0   loop.length
    """
)
FILTERS = one_of(
    r"""
    trim   upper   lower   title   capitalize   e   escape   safe   string   length   first
    last   tojson   tojson(indent=1)   default('d')   default('d', true)   int   list   reverse
    replace('<', '')   join(',')   indent(2)   items | list   count
    map(attribute='role') | list   selectattr('role', 'equalto', 'user') | list   sort
    rejectattr('name') | list   striptags   truncate(9)   wordcount   abs   float   center(7)
    batch(2) | list   slice(2) | list   dictsort   unique | list   round   urlencode
    forceescape   xmlattr   format('x')   pprint   max   min   sum
    """
)
TESTS = one_of(
    r"""
    defined   none   string   mapping   iterable   even   equalto('user')   sequence
    not defined   not none   number   true   in('user')   escaped   undefined   lower
    """
)
METHODS = one_of(
    r"""
    .split('</think>')   .strip()   .startswith('<')   .endswith('>')   .upper()   [::-1]
    .replace('x', '<')   .lstrip('\n')   .items()   .get('name')   [1:]   [:-1]   [0]
    .rstrip()   .split(',')[-1]   .format(1)   .title()   .keys() | list   .partition('h')
    """
)
OPERATORS = st.sampled_from(
    ["~", "+", "==", "!=", "<", "in", "not in", "and", "or", "%", "-", "//", "/"]
)


def _extended(inner):
    return st.one_of(
        st.builds("({} | {})".format, inner, FILTERS),
        st.builds("({} is {})".format, inner, TESTS),
        st.builds("({}{})".format, inner, METHODS),
        st.builds("({} {} {})".format, inner, OPERATORS, inner),
        st.builds("({} ~ {} ~ {})".format, inner, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("(not {})".format, inner),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("{{'role': {}, 'content': {}}}".format, inner, inner),
        st.builds("f({})".format, inner),
    )


LEAVES = st.one_of(
    TEXTS.map("'{}'".format), NAMES, MORE_NAMES, st.integers(-2, 9).map(str), st.just("none")
)
EXPRESSIONS = st.recursive(LEAVES, _extended, max_leaves=6)
DASH = st.sampled_from(["", "", "-"])
BREAKS = st.sampled_from(["", "", "{% break %}", "{% continue %}"])


def _blocks(inner):
    tag = "{{%{} {} {}%}}".format  # {%- … -%}

    def block(words, end, **between):
        del between
        return st.builds(
            lambda open_, head, body, close: (
                tag(open_, head, close) + body + tag(close, end, open_)
            ),
            DASH,
            words,
            inner,
            DASH,
        )

    return st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{}\n  {}".format, inner, inner),
        block(EXPRESSIONS.map("if {}".format), "endif"),
        st.builds("{{% if {} %}}{}{{% elif {} %}}{}{{% else %}}{}{{% endif %}}".format,
                  EXPRESSIONS, inner, EXPRESSIONS, inner, inner),
        block(st.just("for m in messages"), "endfor"),
        block(EXPRESSIONS.map("for m in messages if {}".format), "endfor"),
        block(EXPRESSIONS.map("for x in {}".format), "endfor"),
        st.builds("{{% for m in messages[1:] %}}{}{}{}{{% else %}}{}{{% endfor %}}".format,
                  inner, BREAKS, inner, inner),
        block(EXPRESSIONS.map("set x = {}".format).map(lambda w: f"{w} %}}{{% if true"), "endif"),
        block(st.just("set x"), "endset"),
        block(EXPRESSIONS.map("set ns.n = {}".format).map(lambda w: f"{w} %}}{{% if 1"), "endif"),
        block(st.just("generation"), "endgeneration"),
        block(FILTERS.map("filter {}".format), "endfilter"),
        block(st.just("call f(1)"), "endcall"),
        block(EXPRESSIONS.map("with x = {}".format), "endwith"),
    )  # fmt: skip


OUTPUT = st.builds("{{{{{} {} {}}}}}".format, DASH, EXPRESSIONS, DASH)
TEXT = st.sampled_from(
    ["<|im_start|>", "\n", " \n ", "user", "{# no #}", "", "{% raw %}{{{% endraw %}"]
)
BODIES = st.recursive(st.one_of(OUTPUT, TEXT), _blocks, max_leaves=6)
HEAD = (
    "{% set ns = namespace(n=0) %}{% macro f(y, z='<') %}[{{ y }}{{ z ~ y }}"
    "{{ caller() if caller }}]{% endmacro %}"
)


def without_addresses(text):
    return text and re.sub("(?i)at 0x[0-9a-f]+", "", text)


@pytest.mark.slow
@fuzz(examples=200, body=BODIES, num_messages=st.integers(0, 4), prompt=st.booleans())
def test_any_template_renders_as_transformers_renders_it(body, num_messages, prompt):
    source, messages = HEAD + body, MESSAGES[:num_messages]
    expected = theirs(source, messages, add_generation_prompt=prompt)
    text = ours(source, messages, add_generation_prompt=prompt)
    assert without_addresses(text) == without_addresses(expected)
