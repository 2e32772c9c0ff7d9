"""A daemon that ends, and one that is killed: each conversation goes on where it was."""

import signal
import subprocess
import threading
import time

import pytest
from daemon_process import DaemonProcess

PROMPT = [{"role": "user", "content": "Remember these words: " + "tree house river " * 40}]


@pytest.mark.slow
def test_sigterm_and_start(tiny_folder, tmp_path):
    with DaemonProcess(tiny_folder, tmp_path) as daemon:
        first = {app: daemon.ask(app, PROMPT) for app in ("mail", "notes")}
        assert daemon.end(signal.SIGTERM) in (0, 143, -signal.SIGTERM)
        assert not daemon.uds.exists()
        daemon.start()
        for app, reply in first.items():
            said = reply["choices"][0]["message"]
            more = [*PROMPT, said, {"role": "user", "content": "Which words?"}]
            usage = daemon.ask(app, more)["usage"]
            known = reply["usage"]["total_tokens"]
            assert usage["prompt_tokens_details"]["cached_tokens"] >= known - 1


@pytest.mark.slow
def test_killed(tiny_folder, tmp_path):
    """While others ask, too: what was said is there, and its KV."""
    with DaemonProcess(tiny_folder, tmp_path) as daemon:
        first = {app: daemon.ask(app, PROMPT) for app in ("mail", "notes")}
        load = [threading.Thread(target=daemon.ask_on, args=[f"load {i}"]) for i in range(4)]
        for thread in load:
            thread.start()
        time.sleep(1)  # meanwhile what the first ones said is written
        daemon.end(signal.SIGKILL)
        for thread in load:
            thread.join(60)
        daemon.start()
        for app, reply in first.items():
            said = reply["choices"][0]["message"]
            more = [*PROMPT, said, {"role": "user", "content": "Which words?"}]
            usage = daemon.ask(app, more)["usage"]
            # The answer's own tokens, not those that its text would be encoded to.
            assert usage["prompt_tokens"] > reply["usage"]["total_tokens"]
            assert usage["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_second_daemon_is_told_so(tiny_folder, tmp_path):
    with DaemonProcess(tiny_folder, tmp_path) as daemon:
        start = time.monotonic()
        second = subprocess.run(
            daemon.command, env=daemon.env, capture_output=True, text=True, timeout=60, check=False
        )
        assert second.returncode == 1
        assert "listens" in second.stderr
        assert "Traceback" not in second.stderr
        assert time.monotonic() - start < 60
