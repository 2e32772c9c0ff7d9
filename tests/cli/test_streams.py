"""Every command with streams that are closed, full, not blocking or gone."""

import itertools
import json
import os
import pty
import select
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_hub import PAGE, FakeHub, serving
from tiny_models import tiny_config, write_folder

from edgekv.cli import streams

pytestmark = pytest.mark.slow

EDGEKV = [sys.executable, "-m", "edgekv.cli.main"]
CLOSING = (
    "import os, sys; [os.close(int(fd)) for fd in sys.argv[1].split()];"
    "os.execv(sys.executable, [sys.executable, '-m', 'edgekv.cli.main', *sys.argv[2:]])"
)
TIMEOUT_S = 120
FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("models") / "tiny", tiny_config("llama")))


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def run(*arguments, closed="", **options):
    """One command in a process of its own, some of whose descriptors are closed."""
    given = {"stdin": subprocess.DEVNULL, "capture_output": True} | options
    done = subprocess.run(
        [sys.executable, "-c", CLOSING, closed, *arguments],
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        **given,
    )
    assert "Traceback" not in f"{done.stdout}{done.stderr}"
    assert "Exception ignored" not in f"{done.stdout}{done.stderr}"
    return done


def chat(model, *arguments, **options):
    usual = ("-m", model, "--max-tokens", "4", "--temperature", "0")
    return run("chat", *usual, *arguments, **options)


COMBINATIONS = [
    " ".join(fds) for number in (1, 2, 3) for fds in itertools.combinations("012", number)
]


@pytest.mark.parametrize("closed", COMBINATIONS)
def test_closed_descriptors(closed, tmp_path):
    (tmp_path / "a.gguf").touch()
    done = run("pull", str(tmp_path / "a.gguf"), closed=closed)
    if "1" in closed:
        assert done.returncode == 1
        assert "2" in closed or "stdout takes no data: Bad file descriptor" in done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'a.gguf'}\n")


def test_an_answer_comes_whatever_else_is_closed(model):
    expected = chat(model, "hi").stdout
    assert expected
    for closed in ("0", "2", "0 2"):
        done = chat(model, "hi", closed=closed)
        assert (done.returncode, done.stdout) == (0, expected)
    reader, writer = os.pipe()
    os.close(reader)
    done = chat(model, "hi", capture_output=False, stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert (done.returncode, done.stdout) == (0, expected), "nobody listens to stderr"


def test_a_closed_stdin_is_no_prompt():
    done = run("chat", closed="0")
    assert done.returncode == 2
    assert "the prompt is empty" in done.stderr


def test_a_stdin_that_cannot_be_read(tmp_path):
    with (tmp_path / "out").open("w") as only_to_write:
        done = run("chat", "hi", stdin=only_to_write)
    assert done.returncode == 2
    assert "stdin cannot be read: Bad file descriptor" in done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="a disk that is always full")
@pytest.mark.parametrize(
    "arguments", [["models"], ["--help"], ["doctor", "--json"], ["chat", "hi"], ["chat", "--help"]]
)
def test_a_full_disk(model, arguments):
    more = ["-m", model] if arguments == ["chat", "hi"] else []
    with FULL.open("w") as full:
        done = run(*arguments, *more, capture_output=False, stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr.startswith("error: stdout takes no data: No space left on device\n")
        assert run("models", capture_output=False, stdout=subprocess.PIPE, stderr=full).stdout


def test_a_benchmark_does_not_run_for_nobody(tmp_path):
    done = run("bench", "ttft", "-m", "no/such", closed="1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: stdout is closed\n")


def test_a_turn_that_could_not_be_shown_is_kept(model):
    assert chat(model, "hi", "--session", "trip", closed="1").returncode == 1
    (row,) = json.loads(run("sessions", "list", "--json").stdout)["sessions"]
    assert (row["name"], row["num_messages"]) == ("trip", 2)


def test_a_full_pipe_that_does_not_block_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    while select.select([], [writer], [], 0)[1]:
        os.write(writer, bytes(4096))
    late = threading.Timer(0.05, os.read, [reader, 1 << 20])
    late.start()
    with streams._Data(writer, "w") as data:
        assert data.write(b"answer") == len(b"answer")
    late.join()
    os.close(reader)


def test_a_pipe_that_stays_open_is_said():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    process = subprocess.Popen(
        [*EDGEKV, "chat", "-m", "no/such", "hi"], stdin=reader, stderr=subprocess.PIPE, text=True
    )
    assert "reading stdin, which is part of the prompt" in process.stderr.readline()
    os.write(writer, b"\xff")
    os.close(writer)
    os.close(reader)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert "not valid UTF-8" in said


def test_a_terminal_that_goes_away(model):
    """A conversation whose terminal is closed ends, quietly."""
    keyboard, screen = pty.openpty()
    with open("/dev/null", "w") as out:  # noqa: PTH123
        process = subprocess.Popen(
            [*EDGEKV, "chat", "-m", model, "--no-history"],
            stdin=screen,
            stdout=out,
            stderr=screen,
            start_new_session=True,  # no SIGHUP: as after nohup
        )
    os.close(screen)
    seen = b""
    while b">>>" not in seen:
        assert select.select([keyboard], [], [], TIMEOUT_S)[0], seen
        seen += os.read(keyboard, 4096)
    os.close(keyboard)
    assert process.wait(TIMEOUT_S) in (0, 1)


def test_another_locale_costs_characters_at_most(model):
    env = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "1"}
    env.pop("TERM", None)
    done = chat(model, "hi", env=env)
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert len(done.stdout) == len(chat(model, "hi").stdout)


@pytest.mark.parametrize("home", ["/dev/null", "/proc"])
@pytest.mark.parametrize("arguments", [["models"], ["sessions", "list"], ["pull"]])
def test_a_home_that_is_none(home, arguments, tmp_path):
    dropped = ("EDGEKV_CACHE_DIR", "EDGEKV_KV_DIR", "HF_HOME", "XDG_CACHE_HOME")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env |= {"HOME": home, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0"}
    done = run(*arguments, env=env, cwd=tmp_path)
    assert done.returncode in (0, 1)
    assert done.returncode == 0 or done.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_login_page_instead_of_the_hub(monkeypatch):
    page = FakeHub({}, stranger=lambda *_: (200, {"Content-Type": "text/html"}, PAGE))
    with serving(page) as portal:
        monkeypatch.setenv("HF_ENDPOINT", portal.endpoint)
        done = run("chat", "-m", "owner/name", "hi")
    assert done.returncode == 1
    first, blank, hint = done.stderr.splitlines()
    assert first == (
        f"error: owner/name cannot be downloaded: {portal.endpoint} answered with an HTML page"
    )
    assert blank == ""
    assert "login page" in hint


def test_what_stdin_says_in_pieces(monkeypatch):
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        late = threading.Timer(0.05, lambda: (os.write(writer, b"late"), os.close(writer)))
        late.start()
        assert streams.read_stdin(1000) == b"late"
        late.join()
