import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from edgekv.cli.prompt import ChatPrompt, Command
from edgekv.cli.repl import Repl
from edgekv.config import SamplingParams
from edgekv.errors import ConfigError, EngineFailed, PoolTooSmall, PromptTooLong


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

    def run(*lines, name=None, system=None):
        session = runtime.app("chat").session(name, system=system)
        has_name = name is not None
        prompt = Lines(*lines)
        Repl(runtime, session, prompt, has_name=has_name, sampling=SamplingParams()).run()
        captured = capsys.readouterr()
        greeting, *rest = captured.err.splitlines()
        assert "fake" in greeting
        assert "/?" in greeting
        return captured.out, rest

    return run


def test_answers_with_figures_after_each(runtime, converse):
    runtime.scripts = [["Par", "is."], ["You are", " welcome."]]
    out, err = converse("capital of France?", "Thanks")
    assert out == "Paris.\nYou are welcome.\n"
    assert [line[:11] for line in err] == ["TTFT 412 ms", "", "TTFT 412 ms", ""]
    assert runtime.asked == ["capital of France?", "Thanks"]
    assert len(runtime.sessions) == 1, "one conversation"


def test_stats_off_and_on(converse):
    out, err = converse(Command("/stats", ""), "a", Command("/stats", ""), "b")
    assert out == "ok\nok\n"
    assert [line[:4] for line in err] == ["Figu", "", "Figu", "TTFT", ""]


def test_prefill_is_shown_and_changed(runtime, converse):
    out, err = converse(Command("/prefill", ""), Command("/prefill", "predict"))
    assert err[0] == "Prefill: exact."
    assert err[1] == "error: there is no KV predictor for fake"
    runtime.predicts = True
    out, err = converse(Command("/prefill", "auto"), "a", Command("/prefill", "wrong"))
    assert out == "ok\n"
    assert err[0] == "Prefill: auto."
    assert "error: prefill is 'wrong'" in err


def test_nothing_typed_asks_nothing(runtime, converse):
    assert converse("") == ("", [])
    assert runtime.asked == []


def test_ctrl_c_at_the_prompt_gives_a_hint(converse):
    assert converse(KeyboardInterrupt) == ("", ["Use Ctrl-D or /exit to exit."])


def test_exit(runtime, converse):
    converse(Command("/exit", ""), "never")
    assert runtime.asked == []


def test_unknown_command_is_not_sent(runtime, converse):
    _, err = converse(Command("/nope", ""))
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
    converse("a", Command("/clear", ""), "b")
    assert runtime.sessions[0].cleared == 1


def test_what_was_kept_and_is_gone_is_said(converse):
    clear = Command("/clear", "")
    _, err = converse(clear, "a", clear, Command("/system", "Be brief."), name="trip")
    news = [line for line in err if line.startswith("New")]
    first = "New conversation; the one that was kept is gone."
    assert news == ["New conversation.", first, "New conversation."]


def test_system_prompt_starts_anew(runtime, converse):
    _, err = converse(
        Command("/system", ""), Command("/system", "Be brief."), Command("/system", "")
    )
    assert err == ["No system prompt.", "New conversation.", "Be brief."]
    (session,) = runtime.sessions
    assert (session.system, session.cleared) == ("Be brief.", 1)


# --- sessions ---


def test_a_named_session_says_where_one_is(converse):
    _, err = converse(name="trip")
    assert err == ["Session trip: 0 messages."]


def test_switching_to_a_name_and_back(runtime, converse):
    _, err = converse(
        "a",
        Command("/switch", "trip"),
        "b",
        Command("/switch", "mail"),
        Command("/switch", ""),
        "c",
        Command("/switch", "trip"),
    )
    _, trip, mail = runtime.sessions
    assert (trip.name, mail.name) == ("trip", "mail")
    assert [s.messages[::2] for s in runtime.sessions] == [["a", "c"], ["b"], []]
    assert not any(s.closed for s in runtime.sessions)
    said = [line for line in err if "message" in line]
    assert said == [
        "Session trip: 0 messages.",
        "Session mail: 0 messages.",
        "Session without a name, not kept: 2 messages.",
        "Session trip: 2 messages.",
    ]


def test_where_the_store_is_another_process_one_can_switch_too(runtime, converse):
    runtime.keeps_sessions = False
    _, err = converse(Command("/switch", "trip"), "a", Command("/switch", ""))
    assert err[0] == "Session trip, not kept: 0 messages."
    assert err[-1] == "Session without a name, not kept: 0 messages."


def test_a_chat_that_began_with_a_name_has_an_unnamed_one_too(runtime, converse):
    converse(Command("/switch", ""), "a", Command("/switch", ""), name="trip")
    assert [(s.kept, len(s.messages)) for s in runtime.sessions] == [(True, 0), (False, 2)]


def test_a_switch_that_is_refused_changes_nothing(runtime, converse):
    def refuse():
        runtime.session_error = ConfigError("the name is too long", hint="shorten it")

    runtime.scripts = [["ok", refuse]]
    _, err = converse("a", Command("/switch", "x" * 500), "b")
    assert "error: the name is too long" in err
    assert runtime.sessions[0].messages[::2] == ["a", "b"]


def test_a_name_that_is_not_utf8_is_refused(runtime, converse):
    _, err = converse(Command("/switch", "\udcff"))
    assert err[0].startswith("error: the name is not valid UTF-8")
    assert len(runtime.sessions) == 1


def test_sessions_are_listed(runtime, converse, stored_info):
    _, err = converse(Command("/sessions", ""))
    assert err == ["No conversation is kept; /switch NAME begins one."]
    runtime.stored = [
        stored_info("trip", num_messages=12),
        stored_info("a\x1b[31m b", age_s=7200.0),
        stored_info("broken", num_messages=None, age_s=864_000.0),
    ]
    _, err = converse(Command("/sessions", ""), name="trip")
    assert err[1:] == [
        "* trip     12 messages  just now",
        "  a b       2 messages  2 hours ago",
        "  broken       damaged  1 week ago",
    ]


def test_what_is_wrong_with_a_session_is_said_once(runtime, converse):
    runtime.warning = "session 'trip': its tokens cannot be \x1b[31mread"
    _, err = converse("a", "b", name="trip")
    warnings = [line for line in err if line.startswith("warning")]
    assert warnings == ["warning: session 'trip': its tokens cannot be read"]


def test_a_turn_that_is_not_kept_is_said(runtime, converse):
    def fail():
        runtime.sessions[0].warning = "not kept"

    runtime.scripts = [["ok", fail], ["ok"]]
    _, err = converse("a", "b", name="trip")
    assert [line for line in err if "not kept" in line] == ["warning: not kept"]


def test_error_of_a_request_does_not_end_it(runtime, converse):
    runtime.scripts = [PromptTooLong("too long", hint="shorten it"), ["ok"]]
    out, err = converse("a", "\udcff", "b")
    assert out == "ok\n"
    assert err[:3] == ["error: too long", "", "hint: shorten it"]
    assert "not valid UTF-8" in err[3]
    assert runtime.asked == ["a", "b"]


def test_error_in_the_middle_of_a_reply_has_its_own_line(runtime, converse):
    runtime.scripts = [["Par", PoolTooSmall("the pool is full")]]
    out, err = converse("a")
    assert out == "Par\n"
    assert err == ["error: the pool is full"]


def test_broken_engine_ends_it(runtime, converse):
    runtime.scripts = [EngineFailed("the engine stopped")]
    with pytest.raises(EngineFailed):
        converse("a", "never")
    assert runtime.asked == ["a"]


def test_ctrl_c_stops_the_reply_only(runtime, converse, steps):
    runtime.scripts = [["Par", steps.interrupt, "is."], ["ok"]]
    out, err = converse("a", "b")
    assert out == "Par\nok\n"
    assert err[0] == "(stopped)"
    assert err[1].startswith("TTFT")


def test_second_ctrl_c_leaves_the_reply_only(runtime, converse):
    def interrupt():
        raise KeyboardInterrupt

    runtime.scripts = [["Par", interrupt], ["ok"]]
    out, err = converse("a", "b")
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
        session = runtime.app("chat").session()
        Repl(runtime, session, prompt, has_name=False, sampling=SamplingParams()).run()
    assert runtime.asked == ["hello", "/exit"]
    assert capsys.readouterr().out == "one\ntwo\n"
