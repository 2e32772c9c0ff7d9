"""Ranks on loopback, each a process of its own, without a launcher."""

import dataclasses
import json
import os
import queue
import secrets
import socket
import subprocess
import sys
import threading
from pathlib import Path

from edgekv.ranks.launched import VARIABLE, Launched

CHILD = Path(__file__).parent / "rank_child.py"


def free_ports(count):
    """Ports of loopback that nobody has now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def places(size=2, **changes):
    """What each rank is told."""
    control, *ring = free_ports(size + 1)
    one = Launched(
        rank=0,
        size=size,
        backend="ring",
        control=f"127.0.0.1:{control}",
        token=secrets.token_hex(16),
        hosts=("127.0.0.1",) * size,
        mlx_files={"MLX_HOSTFILE": json.dumps([[f"127.0.0.1:{port}"] for port in ring])},
    )
    one = dataclasses.replace(one, **changes)
    return [dataclasses.replace(one, rank=rank) for rank in range(size)]


class Rank:
    """A rank's process, and the lines that it says."""

    def __init__(self, place, what, **environ):
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), what],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, VARIABLE: place.variable(), **environ},
        )
        self._lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def says(self, timeout_s=30):
        """The next line; None at the end."""
        return self._lines.get(timeout=timeout_s)

    def ends(self, timeout_s=30):
        """Exit status and what was said on stderr."""
        status = self.process.wait(timeout_s)
        return status, self.process.stderr.read()

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
