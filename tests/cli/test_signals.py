"""A logout and a window that is closed end a command as the end of its input does."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from terminal import PATIENCE_S, PROMPT, PROMPT_LEFT, Terminal
from tiny_models import tiny_config, write_folder

from edgekv.cli.options import fetching
from edgekv.cli.signals import ENDING, ended_by_signals
from edgekv.store import Store

EDGEKV = [sys.executable, "-m", "edgekv.cli.main"]


@pytest.fixture(autouse=True)
def usual_handlers():
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    return [signal.getsignal(number) for number in ENDING]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_first_is_an_exception_and_blocks_are_left(number, code):
    left = []
    with pytest.raises(SystemExit) as ended, ended_by_signals() as came:  # noqa: PT012
        try:
            signal.raise_signal(number)
        finally:
            left.append(handlers())
    assert ended.value.code == code
    assert came == [number]
    [(terminate, hang_up)] = left
    assert hang_up is signal.SIG_IGN, "the shell tells again what the kernel has told"
    assert (terminate is signal.SIG_DFL) == (number == signal.SIGTERM), "the second ends at once"
    assert handlers() == [signal.SIG_DFL] * 2


def test_what_was_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with ended_by_signals() as came:
        signal.raise_signal(signal.SIGHUP)
    assert came == []
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_other_threads_have_no_signals():
    def on_thread():
        with ended_by_signals():
            return handlers()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(on_thread).result() == [signal.SIG_DFL] * 2


def test_the_workers_of_a_download_end_too():
    with pytest.raises(SystemExit), ended_by_signals(), fetching() as progress:  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            with ThreadPoolExecutor() as workers:
                worker = workers.submit(progress, "fake.gguf", 2, 2)
            assert isinstance(worker.exception(), KeyboardInterrupt)
    assert handlers() == [signal.SIG_DFL] * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("models") / "tiny", tiny_config("llama")))


@pytest.fixture
def chat(model, tmp_path, monkeypatch):
    """A conversation on a terminal, which is killed if the test did not end it."""
    monkeypatch.setenv("EDGEKV_KV_DIR", str(tmp_path))
    options = ["--no-history", "--session", "trip", "--pool-gib", "0.1", "--max-tokens", "300"]
    terminal = Terminal([*EDGEKV, "chat", "-m", model, *options])
    yield terminal
    os.kill(terminal.pid, signal.SIGKILL)  # there, or a zombie until it is waited for
    terminal.exit_code()
    terminal.close()


def say_something(terminal):
    terminal.wait_for(PROMPT)
    terminal.type("Hello\r")
    terminal.wait_for("TTFT")
    terminal.wait_for(PROMPT)


def wait_for_end(terminal):
    """Its exit code; the process is left for `chat` to take."""
    ended = os.waitid(os.P_PID, terminal.pid, os.WEXITED | os.WNOWAIT)
    assert ended.si_code == os.CLD_EXITED, f"it was killed by {ended.si_status}"
    return ended.si_status


def stored(root: Path):
    [store] = Store.open_readonly(root)
    [session] = store.sessions
    return session


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("when", ["at the prompt", "in a reply"])
def test_a_conversation_is_closed_and_the_terminal_is_as_it_was(chat, tmp_path, number, code, when):
    before = chat.modes()
    say_something(chat)
    chat.type("Go on" if when == "at the prompt" else "Go on\r")
    if when == "in a reply":
        chat.wait_for(PROMPT_LEFT)
    os.kill(chat.pid, number)
    assert wait_for_end(chat) == code
    assert chat.modes() == before
    assert stored(tmp_path).num_tokens > 0, "KV is written"


@pytest.mark.slow
def test_a_window_that_is_closed_costs_nothing_that_was_said(chat, tmp_path):
    say_something(chat)
    chat.close()
    assert wait_for_end(chat) in (129, 0)  # the end of its input may come first
    assert stored(tmp_path).num_tokens > 0


@pytest.mark.slow
def test_one_that_reads_a_pipe_ends(model, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKV_KV_DIR", str(tmp_path))
    reading = subprocess.Popen(
        [*EDGEKV, "chat", "-m", model], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "reading stdin" in reading.stderr.readline()
    reading.send_signal(signal.SIGTERM)
    _, said = reading.communicate(timeout=PATIENCE_S)
    assert (reading.returncode, said) == (143, "")
