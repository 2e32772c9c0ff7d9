"""`edgekv chat` and `edgekv ps` with a daemon that runs at the usual socket."""

import io
import json
import os
import pty
import signal
import sys
import threading
import time

import pytest
from command_errors import error_of
from running_daemon import MODEL
from tiny_models import write_plain_speaker
from tiny_runtime import eventually, sampling

import edgekv
from edgekv.cli import join as join_module
from edgekv.cli.main import main
from edgekv.cli.prompt import ChatPrompt, Command
from edgekv.cli.ps import table
from edgekv.server.keys import socket_path

JOINED = f"joined the daemon that serves {MODEL}\n"


@pytest.fixture(autouse=True)
def state(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("EDGEKV_STATE_DIR", str(folder))
    return folder


@pytest.fixture
def usual(idle_daemon):
    """A daemon at the usual socket."""
    idle_daemon.uds = socket_path()
    return idle_daemon.start()


@pytest.fixture(autouse=True)
def stdin(monkeypatch):
    """What is piped in: nothing, unless a test says so."""

    def piped(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    piped(b"")
    return piped


@pytest.fixture
def loads_nothing(monkeypatch):
    """Fail where a model is opened here."""
    monkeypatch.setattr(edgekv.Runtime, "open", lambda *_, **__: pytest.fail("it loads a model"))


def test_a_chat_joins(usual, loads_nothing, capsys):
    assert main(["chat", "hi", "--max-tokens", "4", "--session", "inbox", "-s", "Be brief."]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(JOINED)
    (info,) = usual.runtime.app("chat").sessions()
    assert (info.name, info.num_messages) == ("inbox", 3)
    assert usual.runtime.app("chat").session("inbox").system == "Be brief."
    session = usual.runtime.app("chat").session("inbox")
    assert captured.out.strip() == session.messages[-1].content.strip()


def test_going_on_and_pipes_and_json(usual, loads_nothing, stdin, tiny_folder, capsys):
    model = ["-m", str(tiny_folder), "--max-tokens", "4"]
    assert main(["chat", "hi", "--session", "inbox", *model]) == 0
    stdin(b"a piped text\n")
    capsys.readouterr()
    assert main(["chat", "Summarise:", "-c", "--json", *model]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert list(answer) == ["text", "finish_reason", "stats"]
    assert answer["stats"]["num_cached_tokens"] > 0
    assert err.startswith(JOINED)
    messages = usual.runtime.app("chat").session("inbox").messages
    assert messages[2].content == "Summarise:\n\na piped text"


def test_continue_goes_on_with_the_last_chat_of_any_model(usual, loads_nothing, capsys):
    assert main(["chat", "hi", "--session", "inbox", "--max-tokens", "2"]) == 0
    assert main(["chat", "more", "-c", "--max-tokens", "2"]) == 0
    assert len(usual.runtime.app("chat").session("inbox").messages) == 4


def test_one_answer_leaves_nothing_open(usual, loads_nothing):
    assert main(["chat", "hi", "--max-tokens", "2"]) == 0
    eventually(lambda: not list(usual.runtime._talks), timeout_s=10)
    assert usual.runtime.app("chat").sessions() == []


def test_errors_are_the_runtimes(usual, loads_nothing, capsys):
    assert main(["chat", "word " * 9000]) == 2
    said = capsys.readouterr().err
    assert "error: the prompt has" in said
    assert "hint: shorten it" in said
    assert main(["chat", "-c", "hi", "-m", MODEL]) == 2
    assert "no session of this model to go on with" in capsys.readouterr().err


def test_interrupt_keeps_the_part(usual, loads_nothing, capsys):
    app = usual.runtime.app("chat")

    def interrupt():
        eventually(lambda: app.knows("inbox") and app.session("inbox").busy, timeout_s=60)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["chat", "hi", "--session", "inbox", "--max-tokens", "1500"]) == 130
    thread.join()
    out, err = capsys.readouterr()
    assert err.endswith("(stopped)\n")
    assert out.rstrip("\n") == app.session("inbox").messages[-1].content.rstrip("\n")


def test_a_conversation(usual, loads_nothing, capsys, monkeypatch):
    keyboard, terminal = pty.openpty()
    lines = [
        Command("/switch", "inbox"),
        "hello",
        Command("/prefill", ""),
        Command("/prefill", "auto"),
        Command("/sessions", ""),
        Command("/switch", ""),
        Command("/exit", ""),
    ]
    monkeypatch.setattr(ChatPrompt, "__init__", lambda *_: None)
    monkeypatch.setattr(ChatPrompt, "read", lambda _: lines.pop(0))
    options = ["-s", "Be brief.", "--max-tokens", "3", "--no-history"]
    with os.fdopen(keyboard, "wb"), os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["chat", *options]) == 0
    err = capsys.readouterr().err
    assert err.startswith(JOINED)
    assert f"{MODEL} · context {usual.runtime.context_max} tokens" in err
    assert "Session inbox: 0 messages." in err
    assert "Prefill: exact." in err
    assert "there is no KV predictor for tiny" in err
    assert "Session without a name, not kept: 1 message." in err
    assert len(usual.runtime.app("chat").session("inbox").messages) == 2


def test_a_daemon_that_ends_ends_the_chat(idle_daemon, request, capsys):
    idle_daemon.options["drain_s"] = 0
    usual = request.getfixturevalue("usual")
    app = usual.runtime.app("chat")

    def end():
        eventually(lambda: app.knows("inbox") and app.session("inbox").busy, timeout_s=60)
        usual.stop()

    thread = threading.Thread(target=end)
    thread.start()
    assert main(["chat", "hi", "--session", "inbox", "--max-tokens", "1500"]) == 1
    thread.join()
    assert "error: " in capsys.readouterr().err


# --- where it does not join ---


class Opened(Exception):
    pass


@pytest.fixture
def opens(monkeypatch):
    """Stop where a model is opened here."""

    def opened(model, **options):
        if "progress" not in options:  # it is the daemon
            return real(model, **options)
        raise Opened(model)

    real = edgekv.Runtime.open

    monkeypatch.setattr(edgekv.Runtime, "open", opened)


@pytest.mark.parametrize(
    "options",
    [
        ["--local"],
        ["--pool-gib", "1"],
        ["--predictor", "p.safetensors"],
        ["--chat-template", "rag"],
        ["--prefill", "predict"],
        ["-m", "another"],
    ],
)
def test_what_only_a_local_runtime_can_do(usual, opens, capsys, options):
    with pytest.raises(Opened):
        main(["chat", "hi", *options])
    assert "joined" not in capsys.readouterr().err


def test_another_models_daemon(usual, opens, tmp_path):
    other = write_plain_speaker(tmp_path / "other")
    with pytest.raises(Opened):
        main(["chat", "hi", "-m", str(other)])


def test_no_daemon(opens, state):
    with pytest.raises(Opened, match="smollm2-135m"):
        main(["chat", "hi"])


def test_a_socket_that_a_killed_daemon_left(opens, usual):
    path = socket_path()
    kept = path.with_name("kept")
    os.link(path, kept)
    usual.stop()
    kept.rename(path)
    assert path.is_socket()
    with pytest.raises(Opened):
        main(["chat", "hi"])


def test_a_chat_whose_app_must_show_its_key(usual, capsys):
    usual.apps.add(join_module.CHAT_APP, key_only=True)
    assert main(["chat", "hi"]) == 1
    message, hint = error_of(capsys)
    assert "must show its key" in message
    assert "--local" in hint


# --- ps ---


def test_ps(usual, capsys):
    with edgekv.connect(app="mail") as connection:
        connection.app().session().respond("hello", sampling=sampling(3))
    assert main(["ps"]) == 0
    first, head, mail = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{MODEL} · up ")
    assert " · pool " in first
    assert head.split()[:3] == ["APP", "RUNNING", "RECENT"]
    assert mail.split()[:3] == ["mail", "0", "1"]
    assert main(["ps", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["model"] == MODEL
    assert [app["name"] for app in status["apps"]] == ["mail"]


def test_ps_watches(usual, capsys, monkeypatch):
    looks = iter([None, None])

    def sleep(seconds):
        if next(looks, "end") == "end":
            raise KeyboardInterrupt

    monkeypatch.setattr("edgekv.cli.ps.time.sleep", sleep)
    assert main(["ps", "--watch", "--json"]) == 130
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["model"] for line in lines] == [MODEL] * 3


def test_ps_without_a_daemon(capsys):
    assert main(["ps"]) == 1
    message, hint = error_of(capsys)
    assert message == f"error: no daemon listens at {socket_path()}"
    assert hint == "hint: edgekv serve begins one"


def test_the_table_of_a_daemon_that_has_done_nothing():
    status = {"model": "m", "started_s": 100, "apps": []}
    assert table(status, 7300.0) == ["m · up 2 h · not loaded", "No app has asked yet."]
