"""A daemon that ends, and one that is killed: each conversation goes on where it was."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import httpx2
import pytest

PROMPT = [{"role": "user", "content": "Remember these words: " + "tree house river " * 40}]


class Daemon:
    def __init__(self, folder, tmp_path):
        self.uds = tmp_path / "sock"
        self.env = {
            **os.environ,
            "EDGEKV_KV_DIR": str(tmp_path / "kv"),
            "EDGEKV_STATE_DIR": str(tmp_path / "state"),
        }
        self.command = [sys.executable, "-m", "edgekv.cli.main", "serve", "-m", str(folder)]
        self.command += ["--uds", str(self.uds), "--port", "0", "--pool-gib", "0.1"]

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()

    def start(self):
        self.process = subprocess.Popen(
            self.command, env=self.env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for line in self.process.stderr:
            if "connect:" in line:
                return
        raise AssertionError("it did not begin")

    def end(self, number):
        self.process.send_signal(number)
        self.process.stderr.read()
        self.process.stderr.close()
        return self.process.wait(60)

    def ask(self, app, messages, **options):
        transport = httpx2.HTTPTransport(uds=str(self.uds))
        with httpx2.Client(transport=transport, base_url="http://localhost", timeout=120) as client:
            reply = client.post(
                "/v1/chat/completions",
                json={"messages": messages, "max_tokens": 8, **options},
                headers={"x-edgekv-app": app},
            )
            assert reply.status_code == 200, reply.text
            return reply.json()

    def ask_on(self, app):
        """Ask for one long answer after another until the daemon is gone."""
        long = [{"role": "user", "content": "many more words " * 40}]
        with contextlib.suppress(httpx2.TransportError):
            while True:
                self.ask(app, long, max_tokens=400)


@pytest.mark.slow
def test_sigterm_and_start(tiny_folder, tmp_path):
    with Daemon(tiny_folder, tmp_path) as daemon:
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
    with Daemon(tiny_folder, tmp_path) as daemon:
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
    with Daemon(tiny_folder, tmp_path) as daemon:
        start = time.monotonic()
        second = subprocess.run(
            daemon.command, env=daemon.env, capture_output=True, text=True, timeout=60, check=False
        )
        assert second.returncode == 1
        assert "listens" in second.stderr
        assert "Traceback" not in second.stderr
        assert time.monotonic() - start < 60
