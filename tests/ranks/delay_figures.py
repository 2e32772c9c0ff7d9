"""Tokens/s on two ranks against the delay between them, beside what `edgekv doctor` predicts.

    python tests/ranks/delay_figures.py MODEL [MILLISECONDS...]

Each rank reaches the other through a relay of this process, which delays what it hands on.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from delaying_relay import DelayingRelay
from rank_world import free_ports, places

from edgekv.ranks.launched import VARIABLE

DOCTOR = ["-m", "edgekv.bench.selftest.ranks"]
BENCH = [
    "-m",
    "edgekv.cli.main",
    "bench",
    "decode",
    "--prompt-tokens",
    "64",
    "--new-tokens",
    "16",
    "--sessions",
    "1",
    "--reps",
    "3",
    "--json",
    "-",
]


def relayed(delay_ms):
    """Two ranks, and the relays between them."""
    first, second = free_ports(2)
    relays = [DelayingRelay(port, delay_ms / 1e3) for port in (first, second)]
    to_first, to_second = (relay.port for relay in relays)
    ranks = []
    for place, ports in zip(places(), ([first, to_second], [to_first, second]), strict=True):
        hostfile = json.dumps([[f"127.0.0.1:{port}"] for port in ports])
        ranks.append(dataclasses.replace(place, mlx_files={"MLX_HOSTFILE": hostfile}))
    return ranks, relays


def run(delay_ms, arguments):
    """What rank 0 prints of a program that both run, as JSON."""
    ranks, relays = relayed(delay_ms)
    with contextlib.ExitStack() as stack:
        for relay in relays:
            stack.callback(relay.close)
        processes = []
        for place in ranks:
            environ = {**os.environ, VARIABLE: place.variable()}
            process = subprocess.Popen(
                [sys.executable, *arguments], env=environ, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.kill)
            processes.append(process)
        out, _ = processes[0].communicate(timeout=900)
    return json.loads(out)


def main():
    model, *delays = sys.argv[1:]
    sys.stdout.write("delay ms  predicted  measured tokens/s  predicted again\n")
    for delay_ms in map(float, delays or ("0", "1", "5")):
        predicted, found, again = (
            run(delay_ms, arguments)
            for arguments in (
                [*DOCTOR, json.dumps({"model": model})],
                [*BENCH, "-m", model],
                [*DOCTOR, json.dumps({"model": model})],
            )
        )
        rates = [one["tokens_per_s"] for one in (predicted, again)]
        rate = found["rows"][0]["decode_tokens_per_s"]
        sys.stdout.write(f"{delay_ms:8g}  {rates[0]:9.2f}  {rate:17.2f}  {rates[1]:15.2f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
