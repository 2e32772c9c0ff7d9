import io
import os
import random
import re
import signal
import sys
from dataclasses import replace

import pytest
from manual_clock import ManualClock
from wcwidth import wcwidth

from edgekv.cli import progress
from edgekv.cli.reply import remark, stream_reply
from edgekv.config import SamplingParams
from edgekv.engine.outbox import Delta
from edgekv.errors import EngineFailed


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminals(monkeypatch):
    """Put (stdout, stderr) on a terminal; in the test, as pytest changes them after set-up."""

    def put():
        monkeypatch.setattr(sys, "stdout", Terminal())
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stdout, sys.stderr

    return put


@pytest.fixture
def clock(monkeypatch):
    clock = ManualClock()
    monkeypatch.setattr(progress, "MonotonicClock", lambda: clock)
    return clock


@pytest.fixture
def answer(runtime):
    def run(*script, **options):
        runtime.scripts = [list(script)]
        return stream_reply(runtime.app("chat").session(), "hi", SamplingParams(), **options)

    return run


def test_terminal_gets_safe_text(answer, terminals):
    out, _ = terminals()
    reply = answer("a\x1b", "[31mb\x07", "c")
    assert out.getvalue() == "abc\n"
    assert reply.text == "a\x1b[31mb\x07c", "the reply itself keeps what the model said"


def test_nothing_on_stdout_unless_shown(answer, terminals):
    out, _ = terminals()
    assert answer("secret", show=False).text == "secret"
    assert out.getvalue() == ""


def test_prefill_bar_goes_when_the_first_token_comes(answer, terminals, clock, steps):
    out, err = terminals()
    answer(steps.wait, lambda: clock.advance(400), steps.wait, "first", steps.wait, "second")
    drawn = err.getvalue()
    assert "3/10 tokens" in drawn
    assert drawn.endswith("\r")
    assert drawn.split("\r")[-2].strip() == ""
    assert drawn.count("prefill") == 2, "at the two polls before the first token, never after"
    assert out.getvalue() == "firstsecond\n"


def test_quick_prefill_shows_no_bar(answer, terminals, clock, steps):
    _, err = terminals()
    answer(steps.wait, lambda: clock.advance(200), steps.wait, "first")
    assert err.getvalue() == ""


def test_bar_goes_when_the_reply_is_stopped(answer, terminals, clock, steps):
    out, err = terminals()
    reply = answer(lambda: clock.advance(400), steps.wait, steps.interrupt, "never")
    assert reply.finish_reason == "cancelled"
    assert "stopping" in err.getvalue()
    assert err.getvalue().split("\r")[-2].strip() == ""
    assert out.getvalue() == "\n"


def test_what_comes_while_it_is_stopped_is_shown_too(answer, steps, capsys, stream_class):
    """The conversation holds it, so who reads on must have seen it."""
    late = stream_class.close

    def close(stream):
        stream._text += " end"
        late(stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_class, "close", close)
        reply = answer("the", steps.interrupt, "never")
    assert reply.text == "the end"
    assert capsys.readouterr().out == "the end\n"


def test_failure_while_it_is_stopped_is_not_lost(answer, steps):
    with pytest.raises(EngineFailed):
        answer("Par", steps.interrupt, EngineFailed("the engine stopped"))


@pytest.fixture
def interruptible():
    """Python's own handler, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_second_interrupt_is_a_real_one(answer, steps):
    before = signal.getsignal(signal.SIGINT)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        answer(twice)
    assert signal.getsignal(signal.SIGINT) is before


def test_handler_is_put_back(answer):
    before = signal.getsignal(signal.SIGINT)
    answer("ok")
    assert signal.getsignal(signal.SIGINT) is before


def test_remark_on_a_reply_that_was_cut(runtime, answer, capsys):
    runtime.finish_reason = "length"
    remark(answer("cut"), SamplingParams())
    assert "context is full" in capsys.readouterr().err
    remark(answer("cut"), SamplingParams(max_tokens=5))
    assert capsys.readouterr().err == (
        "(cut after 5 tokens; a larger --max-tokens allows more)\n"
    ), "off a terminal, too: who reads a file would take it for the whole answer"


class Screen:
    """What a terminal of `width` columns shows of what was written: lines of (character, dim)."""

    def __init__(self, written, width):
        self.rows, self.row, self.column, self.dim = [[]], 0, 0, False
        self.width = width
        for text in re.findall(r"\x1b\[\d*[A-Za-z]|[^\x1b]", written):
            self.take(text)

    def take(self, text):
        match text[0], text[-1]:
            case "\x1b", "m":
                self.dim = text == "\x1b[2m"
            case "\x1b", "A":
                self.row -= int(text[2:-1])
                assert self.row >= 0
            case "\x1b", "G":
                self.column = int(text[2:-1]) - 1
            case "\x1b", "J":
                del self.rows[self.row + 1 :], self.rows[self.row][self.column :]
            case "\n", _:
                self.down()
            case _:
                self.put(text)

    def down(self):
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append([])

    def put(self, char):
        cells = wcwidth(char)
        if self.column + cells > self.width:
            self.down()
        row = self.rows[self.row]
        row[self.column : self.column + cells] = [(char, self.dim)] + [("", self.dim)] * (cells - 1)
        self.column += cells

    @property
    def lines(self):
        return ["".join(char for char, _ in row) for row in self.rows]


def ahead(text):
    return replace(delta(text), provisional=True)


def delta(text, retract=0):
    return Delta(text=text, retract=retract)


class TestProvisionalText:
    """Dim until it is certain, and written again if it is not what was said."""

    @pytest.fixture(autouse=True)
    def can(self, monkeypatch):
        monkeypatch.setenv("TERM", "xterm")

    def shown(self, answer, terminals, *script, width=80):
        out, _ = terminals()
        reply = answer(*script)
        return Screen(out.getvalue(), width), reply

    def test_is_dim_and_then_is_not(self, answer, terminals):
        out, _ = terminals()
        during = []
        answer("a ", ahead("b "), ahead("c"), lambda: during.append(out.getvalue()), delta(""), "d")
        assert Screen(during[0], 80).rows == [
            [("a", False), (" ", False), ("b", True), (" ", True), ("c", True)]
        ]
        screen = Screen(out.getvalue(), 80)
        assert screen.lines == ["a b cd", ""]
        assert not any(dim for _, dim in screen.rows[0])

    def test_is_written_again_where_it_was_wrong(self, answer, terminals):
        screen, reply = self.shown(
            answer, terminals, ahead("the cat"), ahead(" sat"), delta("e", retract=6), " end"
        )
        assert screen.lines == [reply.text, ""] == ["the ce end", ""]

    def test_goes_when_the_answer_ends_without_it(self, answer, terminals, steps):
        screen, reply = self.shown(answer, terminals, "all ", ahead("of it"), delta("", retract=5))
        assert screen.lines == [reply.text, ""] == ["all ", ""]

    def test_a_terminal_that_cannot_is_told_what_is_certain(self, runtime, answer, monkeypatch):
        asked = []
        session = runtime.app("chat").session()
        stream = type(session).stream

        def noted(self, text, *, sampling=None, confirmed=False):
            asked.append(confirmed)
            return stream(self, text, sampling=sampling)

        monkeypatch.setattr(type(session), "stream", noted)
        answer("not a terminal")
        monkeypatch.setattr(sys, "stdout", Terminal())
        answer("a terminal")
        monkeypatch.setenv("TERM", "dumb")
        answer("a dumb one")
        assert asked == [True, False, True]

    @pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 80])
    def test_of_any_shape(self, answer, terminals, monkeypatch, width):
        size = os.terminal_size((width, 1000))
        monkeypatch.setattr("os.get_terminal_size", lambda _fd: size)
        monkeypatch.setattr(Terminal, "fileno", lambda _self: 1, raising=False)
        rng = random.Random(width)
        alphabet = ["a", "bc", " ", "\n", "é", *(["漢", "😀x"] if width > 1 else [])]
        for _ in range(200):
            script, shown = [], []
            for _ in range(rng.randrange(4)):
                script.append("".join(rng.choices(alphabet, k=rng.randrange(1, 6))))
            for _ in range(rng.randrange(1, 4)):
                shown.append("".join(rng.choices(alphabet, k=rng.randrange(1, 6))))
            retract = rng.choice([0, rng.randrange(len("".join(shown)) + 1)])
            rest = "".join(rng.choices(alphabet, k=rng.randrange(4)))
            correction = [delta(rest, retract=retract)] if rest or retract else []
            screen, reply = self.shown(
                answer, terminals, *script, *map(ahead, shown), *correction, "END", width=width
            )
            expected = Screen(reply.text + "\n", width).lines
            assert screen.lines == expected, (script, shown, retract, rest)
