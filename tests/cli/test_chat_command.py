import io
import json
import os
import pty
import sys

import platformdirs
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input

from edgekv.cli import chat as chat_module
from edgekv.cli.main import main
from edgekv.errors import ModelNotFound, PromptTooLong


class Keyboard(io.TextIOWrapper):
    """stdin of a terminal."""

    def __init__(self):
        super().__init__(io.BytesIO())

    def isatty(self):
        return True


@pytest.fixture
def keyboard(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Keyboard())


@pytest.fixture
def pipe(monkeypatch):
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def error_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    first, blank, last = captured.err.splitlines()
    assert first.startswith("error: ")
    assert blank == ""
    assert last.startswith("hint: ")
    return first


def test_answers_once(runtime, keyboard, capsys):
    runtime.scripts = [["Par", "is."]]
    assert main(["chat", "What is the capital of France?", "-s", "Be brief."]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Paris.\n"
    assert captured.err == "", "figures and bars are for terminals"
    assert runtime.asked == ["What is the capital of France?"]
    assert runtime.sessions[0].system == "Be brief."
    assert runtime.opened == [("smollm2-135m", None)]
    assert runtime.closed


def test_options_reach_the_runtime(runtime, keyboard):
    options = "--temperature 0.7 --top-k 5 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1"
    more = "--seed 7 --max-tokens 9 --stop a --stop b --pool-gib 0.5 -m other hi"
    assert main(["chat", *options.split(), *more.split()]) == 0
    (sampling,) = runtime.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 5, 0.9)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0.1, 1.1, 7)
    assert (sampling.max_tokens, sampling.stop) == (9, ("a", "b"))
    assert runtime.opened == [("other", 0.5)]


def test_newline_is_not_doubled_and_pipes_get_raw_text(runtime, keyboard, capsys):
    runtime.scripts = [["\x1b[31mred\x1b[0m\n"]]
    assert main(["chat", "hi"]) == 0
    assert capsys.readouterr().out == "\x1b[31mred\x1b[0m\n"


def test_json(runtime, keyboard, capsys, stats):
    runtime.scripts = [["Pâr", "is."]]
    assert main(["chat", "hi", "--json"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert list(answer) == ["text", "finish_reason", "stats"]
    assert answer["text"] == "Pâris."
    assert answer["finish_reason"] == "stop"
    assert answer["stats"] == stats().to_dict()


@pytest.mark.parametrize(
    ("arguments", "data", "asked"),
    [
        ([], "Überschrift\n".encode(), "Überschrift"),
        (["Summarise:"], b"a\ntext\n", "Summarise:\n\na\ntext"),
        (["Just this"], b"", "Just this"),
        ([""], b"only this", "only this"),
    ],
)
def test_piped_stdin(runtime, pipe, arguments, data, asked):
    pipe(data)
    assert main(["chat", *arguments]) == 0
    assert runtime.asked == [asked]


@pytest.mark.parametrize(("arguments", "data"), [([], b""), ([" "], b" \n"), (["--json"], b"")])
def test_nothing_to_answer(runtime, pipe, capsys, arguments, data):
    pipe(data)
    assert main(["chat", *arguments]) == 2
    assert "prompt is empty" in error_of(capsys)
    assert runtime.opened == [], "found out before a model is loaded"


def test_empty_argument_at_a_terminal(runtime, keyboard, capsys):
    assert main(["chat", ""]) == 2
    assert "prompt is empty" in error_of(capsys)


def test_closed_stdin(runtime, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "hi"]) == 0
    assert runtime.asked == ["hi"]
    assert capsys.readouterr().out == "ok\n"
    assert main(["chat"]) == 2


def test_stdin_that_is_not_utf8(runtime, pipe, capsys):
    pipe(b"caf\xe9")
    assert main(["chat"]) == 2
    assert "0xe9 at offset 3" in error_of(capsys)


def test_stdin_without_end(runtime, pipe, capsys, monkeypatch):
    monkeypatch.setattr(chat_module, "STDIN_BYTES_MAX", 1 << 20)
    pipe(b"x" * ((1 << 20) + 1))
    assert main(["chat"]) == 2
    assert "longer than 1 MiB" in error_of(capsys)


@pytest.mark.parametrize("arguments", [["\udcff"], ["-s", "\udcff", "hi"]])
def test_argument_that_is_not_utf8(runtime, keyboard, capsys, arguments):
    assert main(["chat", *arguments]) == 2
    assert "not valid UTF-8" in error_of(capsys)


def test_json_needs_a_prompt(runtime, keyboard, capsys):
    assert main(["chat", "--json"]) == 2
    assert "--json" in error_of(capsys)


def test_unknown_model(runtime, keyboard, capsys):
    runtime.open_error = ModelNotFound("no model 'nope'", hint="edgekv models lists the names")
    assert main(["chat", "-m", "nope", "hi"]) == 1
    assert "nope" in error_of(capsys)


def test_error_of_the_request(runtime, keyboard, capsys):
    runtime.scripts = [PromptTooLong("9000 tokens, context 2048", hint="shorten it")]
    assert main(["chat", "hi"]) == 2
    assert "9000" in error_of(capsys)
    assert runtime.closed


def test_first_use_downloads(runtime, keyboard, capsys):
    runtime.downloads = True
    assert main(["chat", "hi"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "ok\n"
    assert captured.err == "downloading fake.gguf (98.4 MB)\n"


@pytest.mark.parametrize(("options", "kept"), [([], True), (["--no-history"], False)])
def test_without_a_prompt_it_converses(runtime, capsys, monkeypatch, tmp_path, options, kept):
    keyboard, terminal = pty.openpty()
    monkeypatch.setattr(platformdirs, "user_state_dir", lambda app: str(tmp_path / app))
    with (
        os.fdopen(keyboard, "wb"),
        os.fdopen(terminal) as stdin,
        create_pipe_input() as keys,
        create_app_session(input=keys),
    ):
        monkeypatch.setattr(sys, "stdin", stdin)
        runtime.scripts = [["Hello!", lambda: keys.send_text("\x04")]]
        keys.send_text("hello\r")
        assert main(["chat", "-s", "Be brief.", *options]) == 0
    assert runtime.asked == ["hello"]
    assert runtime.sessions[0].system == "Be brief."
    assert runtime.closed
    assert "Hello!\n" in capsys.readouterr().out
    assert (tmp_path / "edgekv" / "chat_history").exists() is kept


def test_interrupt_keeps_the_part(runtime, keyboard, capsys, steps):
    runtime.scripts = [["Par", steps.interrupt, "is."]]
    assert main(["chat", "hi"]) == 130
    captured = capsys.readouterr()
    assert captured.out == "Par\n"
    assert captured.err == "(stopped)\n"
    assert runtime.closed


def test_interrupt_with_json(runtime, keyboard, capsys, steps):
    runtime.scripts = [[steps.wait, steps.interrupt, "never"]]
    assert main(["chat", "hi", "--json"]) == 130
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["finish_reason"]) == ("", "cancelled")


def test_interrupt_outside_a_reply_is_quiet(runtime, keyboard, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "open", interrupted)
    assert main(["chat", "hi"]) == 130
    assert capsys.readouterr() == ("", "")


def test_reader_that_went_away(runtime, keyboard, capsys):
    def gone():
        raise BrokenPipeError(32, "Broken pipe")

    runtime.scripts = [["Par", gone]]
    try:
        code = main(["chat", "hi"])
    except SystemExit as exit_:  # Typer's own way
        code = exit_.code
    assert code == 1
    assert capsys.readouterr().err == ""
