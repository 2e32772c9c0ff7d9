"""What lies between ranks changes when something is said, not what."""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import subprocess

import pytest
from delaying_relay import DelayingRelay
from rank_world import assert_said, free_ports, places, said_by
from tiny_models import tiny_config, write_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("model") / "a", tiny_config("llama")))


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    return said_by([None], tmp_path_factory.mktemp("alone"), [model])


@pytest.mark.slow
@pytest.mark.parametrize("delay_ms", [1, pytest.param(5, marks=pytest.mark.long)])
def test_a_slow_way(delay_ms, model, alone, tmp_path):
    """Each rank reaches the other through a relay, which delays what it hands on."""
    first, second = free_ports(2)
    with contextlib.ExitStack() as stack:
        to_first, to_second = (DelayingRelay(port, delay_ms / 1e3) for port in (first, second))
        for relay in (to_first, to_second):
            stack.callback(relay.close)
        seen = [[first, to_second.port], [to_first.port, second]]
        ranks = [
            dataclasses.replace(
                place,
                mlx_files={"MLX_HOSTFILE": json.dumps([[f"127.0.0.1:{port}"] for port in ports])},
            )
            for place, ports in zip(places(), seen, strict=True)
        ]
        said = said_by(ranks, tmp_path, [model])
    assert_said(said[model], alone[model])


def _ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def namespaces():
    """Two network namespaces and a cable between them: their names, and their addresses."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces are root's to make, with iproute2")
    tag = secrets.token_hex(3)
    names = [f"ekv-{tag}-{side}" for side in "ab"]
    links = [f"ekv{tag}{side}" for side in "ab"]
    addresses = ["10.213.77.1", "10.213.77.2"]
    made = []
    try:
        for name in names:
            try:
                _ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr}")
            made.append(name)
        _ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for name, link, address in zip(names, links, addresses, strict=True):
            _ip("link", "set", link, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names, addresses
    finally:
        for name in made:
            _ip("netns", "del", name)


@pytest.mark.slow
def test_two_machines(namespaces, model, alone, tmp_path):
    """Each rank sees the other over a cable alone."""
    names, addresses = namespaces
    control, *ring = free_ports(3)
    hosts = json.dumps([[f"{a}:{port}"] for a, port in zip(addresses, ring, strict=True)])
    ranks = places(
        control=f"{addresses[0]}:{control}",
        hosts=tuple(addresses),
        mlx_files={"MLX_HOSTFILE": hosts},
    )
    prefix = lambda rank: ("ip", "netns", "exec", names[rank])  # noqa: E731
    said = said_by(ranks, tmp_path, [model], prefix)
    assert_said(said[model], alone[model])
