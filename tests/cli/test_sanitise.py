import pytest

from edgekv.cli.render import TerminalText, one_line


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain text", "plain text"),
        ("tab\tand\nnewline", "tab\tand\nnewline"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[1;1Htop", "top"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]52;c;aGk=\x1b\\after", "after"),
        ("\x1bPq#0\x1b\\after", "after"),
        ("\x1b(Bcharset", "charset"),
        ("\x1bcreset", "reset"),
        ("\x9b31mred", "red"),
        ("\x9d0;title\x9cafter", "after"),
        ("back\x08space\rreturn\x00nul\x7fdel\x85nel", "backspacereturnnuldelnel"),
        ("é 日本 🙂", "é 日本 🙂"),
    ],
)
def test_strips_controls_and_whole_sequences(raw, shown):
    assert TerminalText().feed(raw) == shown


@pytest.mark.parametrize("raw", ["a\x1b[1;31mb\x1b]0;t\x07c", "\x1b\x1b[0mx\x9b1my"])
def test_pieces_equal_the_whole(raw):
    whole = TerminalText().feed(raw)
    for cut in range(len(raw) + 1):
        pieces = TerminalText()
        assert pieces.feed(raw[:cut]) + pieces.feed(raw[cut:]) == whole


def test_newline_ends_an_unfinished_sequence():
    assert TerminalText().feed("\x1b]0;never closed\nthe rest") == "\nthe rest"


def test_one_line():
    assert one_line("a\nb\x1b[31mc") == "a bc"
