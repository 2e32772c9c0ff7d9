import pytest

from edgekv.cli.prompt import (
    COMMANDS,
    Command,
    help_text,
    needs_more,
    opens_typed,
    parse,
    unknown_text,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/?", Command("/?", "")),
        ("/help", Command("/?", "")),
        ("/exit", Command("/exit", "")),
        ("/quit", Command("/exit", "")),
        ("/bye ", Command("/exit", "")),
        ("  /clear", Command("/clear", "")),
        ("/system You are terse.", Command("/system", "You are terse.")),
        ("/system\tYou  are", Command("/system", "You  are")),
        ("/switch", Command("/switch", "")),
        ("/switch  my trip ", Command("/switch", "my trip")),
        ("/sessions", Command("/sessions", "")),
        ("/nope a b", Command("/nope", "a b")),
        ("/EXIT", Command("/EXIT", "")),
        ("/", Command("/", "")),
        ("exit", "exit"),
        ("help", "help"),
        ("quit /exit", "quit /exit"),
        ("/exit\nis a path", "/exit\nis a path"),
        ("", ""),
        (" \n ", ""),
        ('"""one\ntwo"""', "one\ntwo"),
        ('"""\n  indented\n"""', "  indented"),
        ('"""/exit"""', "/exit"),
        ('""""""', ""),
        ('say """hi"""', 'say """hi"""'),
    ],
)
def test_parse(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["/exit", "/nope", '"""doc"""', "/exit\n/clear"])
def test_literal_text_is_always_a_message(text):
    assert parse(text, literal=True) == text


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("hello", False),
        ('"""', True),
        ('"""hello', True),
        ('"""hello\nworld', True),
        ('"""hello"""', False),
        ('"""\nhello\n"""\n', False),
        ('""""', True),
        ('""""""', False),
        ('hello """', False),
    ],
)
def test_needs_more(text, more):
    assert needs_more(text) is more


@pytest.mark.parametrize(
    ("before", "typed"),
    [
        ("", False),
        ("/", False),
        ("/system", False),
        ("/system ", True),
        ('"""', True),
        ('"""def f():', True),
        ("hello ", False),
    ],
)
def test_paste_into_a_typed_opening_is_not_literal(before, typed):
    assert opens_typed(before) is typed


def test_help_and_unknown_name_every_command():
    for name in COMMANDS:
        assert name in help_text()
        assert name in unknown_text("/nope")
    assert "/nope" in unknown_text("/nope")
