"""The command and the default model, as a person meets them."""

import json
import os
import signal
import subprocess
import sys

import pytest
from terminal import PATIENCE_S, PROMPT, PROMPT_LEFT, Terminal

pytestmark = [pytest.mark.model, pytest.mark.slow]

EDGEKV = [sys.executable, "-m", "edgekv.cli.main"]


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
        terminal.close()
    assert code == 0
