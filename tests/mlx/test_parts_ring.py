"""Two processes that MLX's ring connects give the logits of one."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from stepping import CPU_PROFILE, Stepper
from tiny_models import random_ids, tiny_config, write_folder

from edgekv.models.open_model import open_decoder

IDS = random_ids(40)
CHILD = pathlib.Path(__file__).parents[1] / "support" / "ring_child.py"
_TIMEOUT_S = 120


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.mark.slow
def test_two_processes(tmp_path):
    folder = write_folder(tmp_path / "model", tiny_config("gemma3"), tokenizer=False)
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    outs = [tmp_path / f"{rank}.npz" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(CHILD), str(folder), json.dumps(IDS), str(out)],
            env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
        )
        for rank, out in enumerate(outs)
    ]
    try:
        assert [rank.wait(_TIMEOUT_S) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    expected = Stepper(open_decoder(folder, CPU_PROFILE)).logits(IDS)
    for out in outs:
        for found in np.load(out).values():
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
