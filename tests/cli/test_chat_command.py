import io
import json
import os
import pty
import sys
import time
import types

import platformdirs
import pytest
from command_errors import error_of
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input

from edgekv.cli import chat as chat_module
from edgekv.cli import sessions as sessions_module
from edgekv.cli.main import main
from edgekv.cli.render import length_note
from edgekv.config import RuntimeConfig
from edgekv.errors import (
    CheckpointCorrupt,
    ConfigError,
    ModelNotFound,
    PredictorCorrupt,
    PromptTooLong,
    StoreUnusable,
)


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


def test_which_template_writes_the_conversation(runtime, keyboard):
    assert main(["chat", "--chat-template", "rag", "hi"]) == 0
    assert runtime.config.chat_template == "rag"
    assert main(["chat", "hi"]) == 0
    assert runtime.config.chat_template is None


def test_an_answer_has_a_limit_that_nobody_asked_for(runtime, keyboard, capsys, stats):
    runtime.finish_reason = "length"
    assert main(["chat", "hi"]) == 0
    (sampling,) = runtime.sampling
    assert sampling.max_tokens == chat_module.ANSWER_TOKENS_MAX
    note = length_note(stats(num_output_tokens=2048), sampling)
    assert note == "(cut after 2048 tokens; a larger --max-tokens allows more)"
    assert "(cut" in capsys.readouterr().err


def test_how_prompts_are_prefilled(runtime, keyboard, capsys):
    assert main(["chat", "--prefill", "predict", "--predictor", "p.safetensors", "hi"]) == 0
    prediction = runtime.config.prediction
    assert (prediction.prefill, prediction.predictor) == ("predict", "p.safetensors")
    assert main(["chat", "hi"]) == 0
    assert not runtime.config.prediction.wanted
    assert main(["chat", "--prefill", "perhaps", "hi"]) == 2
    assert "prefill is 'perhaps'" in capsys.readouterr().err


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
    assert answer["stats"] == json.loads(json.dumps(stats().to_dict()))
    assert answer["stats"]["sampling"]["temperature"] == 0.0


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
    assert "prompt is empty" in error_of(capsys)[0]
    assert runtime.opened == [], "found out before a model is loaded"


def test_empty_argument_at_a_terminal(runtime, keyboard, capsys):
    assert main(["chat", ""]) == 2
    assert "prompt is empty" in error_of(capsys)[0]


def test_closed_stdin(runtime, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "hi"]) == 0
    assert runtime.asked == ["hi"]
    assert capsys.readouterr().out == "ok\n"
    assert main(["chat"]) == 2


def test_text_that_begins_with_a_dash(runtime, keyboard, capsys):
    assert main(["chat", "-5 + 3?"]) == 2
    assert error_of(capsys)[1].endswith("what is no option but begins with - goes behind --")
    assert main(["chat", "--", "-5 + 3?"]) == 0
    assert runtime.asked == ["-5 + 3?"]
    capsys.readouterr()
    assert main(["doctor", "--nope"]) == 2
    assert "behind" not in error_of(capsys)[1], "doctor takes no words"


def test_stdin_that_is_not_utf8(runtime, pipe, capsys):
    pipe(b"caf\xe9")
    assert main(["chat"]) == 2
    assert "0xe9 at offset 3" in error_of(capsys)[0]


def test_stdin_without_end(runtime, pipe, capsys, monkeypatch):
    monkeypatch.setattr(chat_module, "STDIN_BYTES_MAX", 1 << 20)
    pipe(b"x" * ((1 << 20) + 1))
    assert main(["chat"]) == 2
    assert "longer than 1 MiB" in error_of(capsys)[0]


@pytest.mark.parametrize("arguments", [["\udcff"], ["-s", "\udcff", "hi"]])
def test_argument_that_is_not_utf8(runtime, keyboard, capsys, arguments):
    assert main(["chat", *arguments]) == 2
    assert "not valid UTF-8" in error_of(capsys)[0]


def test_json_needs_a_prompt(runtime, keyboard, capsys):
    assert main(["chat", "--json"]) == 2
    assert "--json" in error_of(capsys)[0]


def test_unknown_model(runtime, keyboard, capsys):
    runtime.open_error = ModelNotFound("no model 'nope'", hint="edgekv models lists the names")
    assert main(["chat", "-m", "nope", "hi"]) == 1
    assert "nope" in error_of(capsys)[0]


@pytest.mark.parametrize(
    ("model", "options", "hint"),
    [
        ("owner/name@v1", [], "edgekv pull --force owner/name@v1 fetches it again"),
        ("a/b c.gguf", [], "edgekv pull --force 'a/b c.gguf' fetches it again"),
        ("{folder}", [], "copy it anew"),
        (
            "o/n",
            ["--prefill", "predict", "--aux", "p"],
            "edgekv pull --force MODEL fetches it again",
        ),
    ],
)
def test_a_damaged_model_is_fetched_again_by_its_name(
    runtime, keyboard, capsys, tmp_path, model, options, hint
):
    runtime.open_error = CheckpointCorrupt("model.safetensors: 3 bytes are too few")
    assert main(["chat", "-m", model.format(folder=tmp_path), "hi", *options]) == 1
    assert error_of(capsys)[1].endswith(f": {hint}")


def test_error_of_the_request(runtime, keyboard, capsys):
    runtime.scripts = [PromptTooLong("9000 tokens, context 2048", hint="shorten it")]
    assert main(["chat", "hi"]) == 2
    assert "9000" in error_of(capsys)[0]
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
    monkeypatch.delenv("EDGEKV_STATE_DIR")
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


# --- sessions ---


@pytest.mark.parametrize(
    ("options", "kept"), [([], False), (["--session", "trip"], True), (["-c"], True)]
)
def test_one_answer_uses_the_disk_only_for_a_session(runtime, keyboard, stored_info, options, kept):
    runtime.stored = [stored_info("trip")]
    assert main(["chat", "-m", "fake", "hi", *options]) == 0
    (session,) = runtime.sessions
    assert session.kept is kept
    assert (runtime.disk_bytes > 0) is kept
    assert (session.name == "trip") is kept


def test_continue_takes_the_last_that_was_begun(runtime, keyboard, stored_info):
    runtime.stored = [stored_info("typo", is_begun=False), stored_info("b"), stored_info("a")]
    assert main(["chat", "-m", "fake", "-c", "hi"]) == 0
    assert [session.name for session in runtime.sessions] == ["b"]


@pytest.mark.parametrize("stored", [[], ["typo"]])
def test_nothing_to_continue(runtime, keyboard, capsys, stored_info, stored):
    runtime.stored = [stored_info(name, is_begun=False) for name in stored]
    assert main(["chat", "-m", "fake", "-c", "hi"]) == 2
    assert "no session of this model" in error_of(capsys)[0]


def test_continue_without_a_model_takes_the_one_of_the_last_chat(
    runtime, keyboard, stored_info, monkeypatch
):
    models = [("old", "chat", 100.0, "{}"), ("new", "chat", 10.0, "{}")]
    models += [("newest", "chat", 1.0, None), ("other", "mail", 0.0, "{}")]

    def stored_sessions(*, app, model):
        assert model is None
        return [
            types.SimpleNamespace(
                store=types.SimpleNamespace(model=name),
                session=types.SimpleNamespace(used_s=time.time() - age_s, conversation=text),
            )
            for name, owner, age_s, text in models
            if owner == app
        ]

    monkeypatch.setattr(sessions_module, "stored_sessions", stored_sessions)
    runtime.stored = [stored_info("trip")]
    assert main(["chat", "-c", "hi"]) == 0
    assert runtime.opened == [("new", None)]


def test_nothing_to_continue_of_any_model(runtime, keyboard, capsys, monkeypatch):
    monkeypatch.setattr(sessions_module, "stored_sessions", lambda **options: [])
    assert main(["chat", "-c", "hi"]) == 2
    assert "no session to go on with" in error_of(capsys)[0]
    assert runtime.opened == []


def test_a_name_and_continue_exclude_each_other(runtime, keyboard, capsys):
    assert main(["chat", "--session", "trip", "-c", "hi"]) == 2
    assert "--continue" in error_of(capsys)[0]
    assert runtime.opened == []


@pytest.mark.parametrize("options", [["--session", "trip"], ["-c", "-m", "fake"]])
def test_sessions_that_another_process_has(runtime, keyboard, capsys, options):
    runtime.keeps_sessions = False
    assert main(["chat", "hi", *options]) == 1
    assert "another process" in error_of(capsys)[0]
    assert runtime.asked == []


def test_another_system_prompt_is_the_runtimes_to_refuse(runtime, keyboard, capsys):
    runtime.session_error = ConfigError("begun with another system prompt", hint="leave it away")
    assert main(["chat", "--session", "trip", "-s", "Be long.", "hi"]) == 2
    assert "another system prompt" in error_of(capsys)[0]


def test_what_could_not_be_kept_is_said_at_the_end(runtime, keyboard, capsys):
    runtime.warning = "session 'trip': its last turns are not kept: the disk is full"
    assert main(["chat", "--session", "trip", "hi"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "ok\n"
    assert captured.err == f"warning: {runtime.warning}\n"


def test_a_session_name_that_is_not_utf8(runtime, keyboard, capsys):
    assert main(["chat", "--session", "\udcff", "hi"]) == 2
    assert "not valid UTF-8" in error_of(capsys)[0]


UNUSABLE = StoreUnusable("/kv: \x1b[31mRead-only file system", hint="choose another store folder")


def test_a_disk_that_is_needed_and_cannot_be_used(runtime, keyboard, capsys):
    runtime.store_error = UNUSABLE
    assert main(["chat", "--session", "trip", "hi"]) == 1
    assert "Read-only" in error_of(capsys)[0]


def test_a_disk_that_is_not_needed_stops_nobody(runtime, keyboard, capsys):
    runtime.store_error = UNUSABLE
    assert main(["chat", "hi"]) == 0
    assert capsys.readouterr() == ("ok\n", "")
    with chat_module._open("fake", None, "welcome", RuntimeConfig()) as opened:
        assert opened is runtime
    assert capsys.readouterr().err == (
        "warning: /kv: Read-only file system; nothing goes to disk\n"
    )


def test_a_predictor_that_nobody_asked_for_stops_nobody(runtime, keyboard, capsys, monkeypatch):
    def damaged(model):
        raise PredictorCorrupt(f"{model}.safetensors: not a predictor")

    monkeypatch.setattr(chat_module, "known_predictor", damaged)
    with chat_module._open("fake", None, "unused", RuntimeConfig(), offers=True) as opened:
        assert opened is runtime
    assert "not a predictor; there is no /prefill predict" in capsys.readouterr().err
