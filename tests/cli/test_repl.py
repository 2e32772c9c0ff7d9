import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from edgekv.cli.commands import Command, Message, UnknownCommand
from edgekv.cli.prompt import ChatPrompt
from edgekv.cli.repl import Repl
from edgekv.config import SamplingParams
from edgekv.errors import EngineFailed, PoolTooSmall, PromptTooLong


class Lines:
    """A prompt at which the lines were typed in advance."""

    def __init__(self, *lines):
        self._lines = list(lines)

    def read(self):
        if not self._lines:
            raise EOFError
        line = self._lines.pop(0)
        if isinstance(line, type):
            raise line
        return line


@pytest.fixture
def converse(runtime, capsys):
    """Run a conversation of these lines; returns (stdout, stderr without the greeting)."""

    def run(*lines, system=None):
        repl = Repl(runtime, Lines(*lines), sampling=SamplingParams(), system=system)
        repl.run()
        captured = capsys.readouterr()
        greeting, *rest = captured.err.splitlines()
        assert "fake" in greeting
        assert "/?" in greeting
        return captured.out, rest

    return run


def test_answers_with_figures_after_each(runtime, converse):
    runtime.scripts = [["Par", "is."], ["You are", " welcome."]]
    out, err = converse(Message("capital of France?"), Message("Thanks"))
    assert out == "Paris.\nYou are welcome.\n"
    assert [line[:11] for line in err] == ["TTFT 412 ms", "", "TTFT 412 ms", ""]
    assert runtime.asked == ["capital of France?", "Thanks"]
    assert len(runtime.sessions) == 1, "one conversation"


def test_stats_off_and_on(converse):
    out, err = converse(Command("/stats", ""), Message("a"), Command("/stats", ""), Message("b"))
    assert out == "ok\nok\n"
    assert [line[:4] for line in err] == ["Figu", "", "Figu", "TTFT", ""]


def test_nothing_typed_asks_nothing(runtime, converse):
    assert converse(Message("")) == ("", [])
    assert runtime.asked == []


def test_ctrl_c_at_the_prompt_gives_a_hint(converse):
    assert converse(KeyboardInterrupt) == ("", ["Use Ctrl-D or /exit to exit."])


def test_exit(runtime, converse):
    converse(Command("/exit", ""), Message("never"))
    assert runtime.asked == []


def test_unknown_command_is_not_sent(runtime, converse):
    _, err = converse(UnknownCommand("/nope"))
    assert "/nope" in err[0]
    assert "/system" in err[0]
    assert runtime.asked == []


def test_help(converse):
    _, err = converse(Command("/?", ""))
    assert any("/clear" in line for line in err)


def test_argument_too_many(runtime, converse):
    _, err = converse(Command("/clear", "now"))
    assert err == ["/clear takes no argument."]
    assert runtime.sessions[0].cleared == 0


def test_clear(runtime, converse):
    converse(Message("a"), Command("/clear", ""), Message("b"))
    assert runtime.sessions[0].cleared == 1


def test_system_prompt_starts_anew(runtime, converse):
    _, err = converse(
        Command("/system", ""), Command("/system", "Be brief."), Command("/system", "")
    )
    assert err == ["No system prompt.", "New conversation.", "Be brief."]
    old, new = runtime.sessions
    assert old.closed
    assert (new.system, new.closed) == ("Be brief.", False)


def test_error_of_a_request_does_not_end_it(runtime, converse):
    runtime.scripts = [PromptTooLong("too long", hint="shorten it"), ["ok"]]
    out, err = converse(Message("a"), Message("\udcff"), Message("b"))
    assert out == "ok\n"
    assert err[:3] == ["error: too long", "", "hint: shorten it"]
    assert "not valid UTF-8" in err[3]
    assert runtime.asked == ["a", "b"]


def test_error_in_the_middle_of_a_reply_has_its_own_line(runtime, converse):
    runtime.scripts = [["Par", PoolTooSmall("the pool is full")]]
    out, err = converse(Message("a"))
    assert out == "Par\n"
    assert err == ["error: the pool is full"]


def test_broken_engine_ends_it(runtime, converse):
    runtime.scripts = [EngineFailed("the engine stopped")]
    with pytest.raises(EngineFailed):
        converse(Message("a"), Message("never"))
    assert runtime.asked == ["a"]


def test_ctrl_c_stops_the_reply_only(runtime, converse, steps):
    runtime.scripts = [["Par", steps.interrupt, "is."], ["ok"]]
    out, err = converse(Message("a"), Message("b"))
    assert out == "Par\nok\n"
    assert err[0] == "(stopped)"
    assert err[1].startswith("TTFT")


def test_second_ctrl_c_leaves_the_reply_only(runtime, converse):
    def interrupt():
        raise KeyboardInterrupt

    runtime.scripts = [["Par", interrupt], ["ok"]]
    out, err = converse(Message("a"), Message("b"))
    assert out == "Par\nok\n"
    assert "(stopped)" in err


def test_with_real_keys(runtime, capsys):
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        runtime.scripts = [
            ["one", lambda: keys.send_text("\x1b[200~/exit\x1b[201~\r")],
            ["two", lambda: keys.send_text("/exit\r")],
        ]
        keys.send_text("hello\r")
        prompt = ChatPrompt(InMemoryHistory())
        Repl(runtime, prompt, sampling=SamplingParams(), system=None).run()
    assert runtime.asked == ["hello", "/exit"]
    assert capsys.readouterr().out == "one\ntwo\n"
