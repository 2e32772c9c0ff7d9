"""Where the ranks run, and what each of them is told: from addresses, or a hostfile of mlx.launch.

Pure but for free ports: of this machine they are asked for, elsewhere they follow `PORT`, one
after the other, so that a firewall can know them.
"""

import contextlib
import ipaddress
import json
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekv.errors import ConfigError
from edgekv.ranks.launched import SIZE_MAX, Launched

PORT = 32323  # mlx.launch's first one
BACKENDS = ("ring", "jaccl")
_HERE = "127.0.0.1"
_ADDRESS = "IPv4 addresses of one machine, at which it listens: 10.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine: its name for ssh, its addresses, and its RDMA device to each other host."""

    ssh: str
    ips: Sequence[str]
    rdma: Sequence[object] = ()

    @property
    def is_here(self) -> bool:
        """Whether a rank beside the first is a process of this machine, too."""
        return self.ssh in (_HERE, "localhost")


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines of a group, one for each rank; the first is this one.

    Attributes:
        backend: MLX's way between them.
        hosts: All of them.
        environ: Variables that the hostfile sets on all.
    """

    backend: str
    hosts: Sequence[Host]
    environ: Mapping[str, str]


def machines(
    *,
    local: int | None = None,
    hosts: str | None = None,
    hostfile: Path | None = None,
    backend: str | None = None,
) -> Machines:
    """The machines that a user names in one of three ways. Raises ConfigError."""
    if sum(way is not None for way in (local, hosts, hostfile)) != 1:
        raise ConfigError(
            "which machines?", hint="one of --local N, --hosts ADDRESS,ADDRESS and --hostfile FILE"
        )
    if local is not None:
        if not 2 <= local <= SIZE_MAX:
            raise ConfigError.of("local", local, f"from 2 to {SIZE_MAX} ranks")
        hosts = ",".join([_HERE] * local)
    where = "hosts" if hostfile is None else str(hostfile)
    if hostfile is not None:
        fields = _read(hostfile)
    else:
        fields = {"hosts": [{"ssh": name, "ips": [name]} for name in (hosts or "").split(",")]}
    backend = backend or fields.get("backend") or "ring"
    if backend not in BACKENDS:
        raise ConfigError.of(f"{where}: backend", backend, " or ".join(BACKENDS))
    found = _hosts(where, fields.get("hosts"))
    if backend == "jaccl":
        _check_rdma(where, found)
    return Machines(backend=backend, hosts=found, environ=_environ(where, fields.get("envs") or []))


def _read(path: Path) -> dict[str, Any]:
    """A hostfile's object; of one that is a list of hosts, the object that it stands for."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint=_WRITES) from None
    if isinstance(fields, list):
        return {"hosts": fields}
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} is no hostfile", hint=_WRITES)
    return fields


_WRITES = "mlx.distributed_config writes hostfiles"


def _hosts(where: str, listed: object) -> list[Host]:
    if not isinstance(listed, list) or not 2 <= len(listed) <= SIZE_MAX:
        raise ConfigError.of(f"{where}: hosts", listed, f"a list of 2 to {SIZE_MAX} hosts")
    return [_host(where, fields) for fields in listed]


def _host(where: str, fields: object) -> Host:
    if not isinstance(fields, dict):
        raise ConfigError.of(f"{where}: host", fields, 'an object: {"ssh": …, "ips": […]}')
    ssh, ips, rdma = fields.get("ssh"), fields.get("ips"), fields.get("rdma", [])
    if not isinstance(ssh, str) or not ssh or ssh.startswith("-"):
        raise ConfigError.of(f"{where}: ssh", ssh, "a host's name")
    if not isinstance(ips, list) or not ips or not all(map(_is_address, ips)):
        raise ConfigError.of(f"{where}: ips of {ssh}", ips, _ADDRESS)
    if not isinstance(rdma, list):
        raise ConfigError.of(f"{where}: rdma of {ssh}", rdma, "a list of devices")
    return Host(ssh=ssh, ips=ips, rdma=rdma)


def _is_address(text: object) -> bool:
    """Whether it is one machine's: whoever binds to 0.0.0.0 listens to everybody."""
    try:
        address = ipaddress.IPv4Address(text if isinstance(text, str) else "")
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_multicast)


def _check_rdma(where: str, hosts: Sequence[Host]) -> None:
    """One RDMA device from each host to each other one, as jaccl's mesh wants it."""
    for rank, host in enumerate(hosts):
        missing = [to for to, device in enumerate(host.rdma) if not device]
        if len(host.rdma) != len(hosts) or missing != [rank]:
            raise ConfigError.of(
                f"{where}: rdma of {host.ssh}",
                host.rdma,
                f"{len(hosts)} devices, of which the own one is null",
            )


def _environ(where: str, envs: object) -> dict[str, str]:
    if not isinstance(envs, list) or not all(isinstance(e, str) and "=" in e for e in envs):
        raise ConfigError.of(f"{where}: envs", envs, 'a list of "NAME=value"')
    return dict(env.split("=", 1) for env in envs)


# --- what each rank is told ---


def places(these: Machines, first_port: int | None = None) -> list[Launched]:
    """The place of each rank: where it listens, and whom it knows. Raises ConfigError."""
    first = these.hosts[0].ips[0]
    _check_first(first)
    sizes = [1, *([len(host.ips) for host in these.hosts] if these.backend == "ring" else [1])]
    count = sum(sizes)
    if first_port is None and all(host.is_here for host in these.hosts):
        ports = _free_ports(first, count)
    else:
        start = first_port or PORT
        if not 0 < start <= (1 << 16) - count:
            raise ConfigError.of("port", start, f"from 1 to {(1 << 16) - count}")
        ports = list(range(start, start + count))
    control, *rest = ports
    environ, files = _of_mlx(these, rest)
    first_place = Launched(
        rank=0,
        size=len(these.hosts),
        backend=these.backend,
        control=f"{first}:{control}",
        token=secrets.token_hex(16),
        hosts=tuple(host.ips[0] for host in these.hosts),
        mlx_environ=environ,
        mlx_files=files,
    )
    return [replace(first_place, rank=rank) for rank in range(first_place.size)]


def _of_mlx(these: Machines, ports: list[int]) -> tuple[dict[str, str], dict[str, str]]:
    """Variables of MLX's backend, and those that name a file, with what it holds."""
    if these.backend == "jaccl":
        coordinator = f"{these.hosts[0].ips[0]}:{ports[0]}"
        devices = json.dumps([host.rdma for host in these.hosts])
        return {"MLX_JACCL_COORDINATOR": coordinator}, {"MLX_IBV_DEVICES": devices}
    left = iter(ports)
    ring = [[f"{address}:{next(left)}" for address in host.ips] for host in these.hosts]
    return {}, {"MLX_HOSTFILE": json.dumps(ring)}


def _check_first(address: str) -> None:
    """Make sure that the first host is this machine. Raises ConfigError."""
    try:
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError as error:
        raise ConfigError(
            f"the first host, {address}, is not this machine: {error.strerror}",
            hint="name this machine's own address first",
        ) from None


def _free_ports(address: str, count: int) -> list[int]:
    """Ports that nobody listens at now; all different, for they are held together."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((address, 0))
        return [probe.getsockname()[1] for probe in probes]
