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

import pytest
from tiny_runtime import TIE

from edgekv.ranks.launched import VARIABLE, Launched

CHILD = Path(__file__).parent / "rank_child.py"
PLAY = Path(__file__).parent / "rank_play.py"


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


def said_by(places, folder, models, prefix=lambda _rank: ()):
    """What `rank_play` says of models, by model, on so many ranks; a place of None is alone.

    `prefix` is what each rank's command begins with.
    """
    ranks = []
    try:
        for number, place in enumerate(places):
            environ = {} if place is None else {VARIABLE: place.variable()}
            ranks.append(
                subprocess.Popen(
                    [*prefix(number), sys.executable, str(PLAY), str(folder), *models],
                    env={**os.environ, **environ},
                    text=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        out, errors = ranks[0].communicate(timeout=1200)
        assert ranks[0].returncode == 0, errors[-2000:]
        for rank in ranks[1:]:
            _, errors = rank.communicate(timeout=60)
            assert rank.returncode == 0, errors[-2000:]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return json.loads(out)


def assert_said(said, expected):
    """Assert that a play was answered as another was; numbers but for rounding."""
    assert said.keys() == expected.keys()
    assert said["num_io_errors"] == 0
    for what, value in expected.items():
        if what == "num_swap_outs":
            continue
        if what == "logits" or what.endswith("logprobs"):
            assert said[what] == pytest.approx(value, abs=TIE), what
        else:
            assert said[what] == value, what
