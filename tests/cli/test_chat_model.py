"""The command and the default model, as a person meets them."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.model, pytest.mark.slow]

EDGEKV = [sys.executable, "-m", "edgekv.cli.main"]
PATIENCE_S = 120
PROMPT = ">>>"
PROMPT_LEFT = "\x1b[?2004l"  # the line editor ends bracketed paste


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, arguments):
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(arguments[0], arguments)
        self._seen = ""

    def type(self, text):
        os.write(self._fd, text.encode())

    def wait_for(self, text):
        """Read up to `text`; returns what came before it."""
        give_up = time.monotonic() + PATIENCE_S
        while text not in self._seen:
            ready, _, _ = select.select([self._fd], [], [], give_up - time.monotonic())
            assert ready, f"{text!r} did not come after {self._seen!r}"
            self._seen += os.read(self._fd, 4096).decode(errors="replace")
        before, _, self._seen = self._seen.partition(text)
        return before

    def exit_code(self):
        _, status = os.waitpid(self.pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)


def run(*arguments, stdin=b""):
    return subprocess.run(
        [*EDGEKV, *arguments], input=stdin, capture_output=True, check=True, timeout=PATIENCE_S
    )


def test_answers_with_one_json_object():
    answer = json.loads(run("chat", "What is the capital of France?", "--json").stdout)
    assert "Paris" in answer["text"]
    assert answer["finish_reason"] == "stop"
    assert answer["stats"]["prefill_mode"] == "exact"
    assert answer["stats"]["num_output_tokens"] > 0
    assert answer["stats"]["ttft_ms"] > 0


def test_answers_a_pipe_in_plain_text():
    done = run("chat", "--max-tokens", "40", stdin=b"What is the capital of France?\n")
    assert b"Paris" in done.stdout
    assert done.stdout.endswith(b"\n")
    assert b"TTFT" not in done.stderr


def test_conversation_survives_ctrl_c():
    terminal = Terminal([*EDGEKV, "chat", "--no-history"])
    try:
        terminal.wait_for(PROMPT)
        terminal.type("Tell me a very long story about a dog.\r")
        terminal.wait_for(PROMPT_LEFT)
        terminal.wait_for(" a ")  # the story has begun
        terminal.type("\x03")
        terminal.wait_for("(stopped)")
        assert "tok/s" in terminal.wait_for(PROMPT)
        terminal.type("What is the capital of France?\r")
        terminal.wait_for(PROMPT_LEFT)
        assert "Paris" in terminal.wait_for("TTFT")
        terminal.wait_for(PROMPT)
        terminal.type("/exit\r")
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise
    finally:
        code = terminal.exit_code()
    assert code == 0
