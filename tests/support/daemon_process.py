"""A daemon in a process of its own, as a person starts it."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import httpx2


class DaemonProcess:
    """`edgekv serve` with folders of its own, on several ranks if asked to."""

    def __init__(self, folder, tmp_path, num_ranks=1):
        self.uds = tmp_path / "sock"
        self.env = {
            **os.environ,
            "EDGEKV_KV_DIR": str(tmp_path / "kv"),
            "EDGEKV_STATE_DIR": str(tmp_path / "state"),
        }
        self.command = [sys.executable, "-m", "edgekv.cli.main"]
        if num_ranks > 1:
            self.command += ["launch", "--local", str(num_ranks), "--"]
        self.command += ["serve", "-m", str(folder)]
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
            self.command,
            env=self.env,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        for line in self.process.stderr:
            if "connect:" in line:
                return
        raise AssertionError("it did not begin")

    def end(self, number):
        self.process.send_signal(number)
        return self.wait()

    def wait(self):
        """Its status, once it has ended."""
        self.process.stderr.read()
        self.process.stderr.close()
        return self.process.wait(60)

    def children(self):
        """Processes of its ranks, if it is a launcher."""
        pid = self.process.pid
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def http(self):
        """A client at its Unix socket."""
        transport = httpx2.HTTPTransport(uds=str(self.uds))
        return httpx2.Client(transport=transport, base_url="http://localhost", timeout=120)

    def ask(self, app, messages, **options):
        with self.http() as client:
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
