import io
import signal
import sys

import pytest
from manual_clock import ManualClock

from edgekv.cli import progress
from edgekv.cli.reply import remark, stream_reply
from edgekv.config import SamplingParams
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
