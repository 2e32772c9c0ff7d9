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

from mlx._distributed_utils.common import Host, Hostfile

from edgekv.errors import ConfigError
from edgekv.ranks.launched import SIZE_MAX, Launched

PORT = 32323  # mlx.launch's first one
BACKENDS = ("ring", "jaccl")
_HERE = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines of a group, one for each rank; the first is this one.

    Attributes:
        backend: MLX's way between them.
        hosts: Name for ssh, addresses and RDMA devices of each.
        environ: Variables that the hostfile sets on all.
    """

    backend: str
    hosts: tuple[Host, ...]
    environ: Mapping[str, str]

    @property
    def is_local(self) -> bool:
        """Whether no rank is on another machine."""
        return all(is_here(host) for host in self.hosts)


def is_here(host: Host) -> bool:
    """Whether a rank beside the first is a process of this machine, too."""
    return host.ssh_hostname in (_HERE, "localhost")


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
    try:
        take = Hostfile.from_list if hostfile is None else Hostfile.from_file
        read = take(hosts if hostfile is None else str(hostfile))  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ConfigError(str(error), hint="mlx.distributed_config writes hostfiles") from None
    where = "hosts" if hostfile is None else str(hostfile)
    backend = backend or read.backend or "ring"
    if backend not in BACKENDS:
        raise ConfigError.of("backend", backend, " or ".join(BACKENDS))
    _check_hosts(where, read.hosts)
    if backend == "jaccl":
        _check_rdma(where, read.hosts)
    return Machines(backend=backend, hosts=tuple(read.hosts), environ=_environ(where, read.envs))


def _check_hosts(where: str, hosts: Sequence[Host]) -> None:
    if not 2 <= len(hosts) <= SIZE_MAX:
        raise ConfigError.of(where, f"a list of {len(hosts)}", f"from 2 to {SIZE_MAX} hosts")
    for host in hosts:
        if not isinstance(host.ssh_hostname, str) or host.ssh_hostname.startswith("-"):
            raise ConfigError.of(f"{where}: ssh", host.ssh_hostname, "a host's name")
        if not isinstance(host.ips, list) or not host.ips:
            raise ConfigError.of(f"{where}: ips of {host.ssh_hostname}", host.ips, _ADDRESS)
        for address in host.ips:
            if not _is_address(address):
                raise ConfigError.of(f"{where}: ips of {host.ssh_hostname}", address, _ADDRESS)


_ADDRESS = "an IPv4 address of one machine, at which it listens: 10.0.0.1"


def _is_address(text: object) -> bool:
    try:
        address = ipaddress.IPv4Address(str(text))
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_multicast)


def _check_rdma(where: str, hosts: Sequence[Host]) -> None:
    """One RDMA device from each host to each other one, as jaccl's mesh wants it."""
    for rank, host in enumerate(hosts):
        devices = host.rdma
        if (
            not isinstance(devices, list)
            or len(devices) != len(hosts)
            or [to for to, device in enumerate(devices) if not device] != [rank]
        ):
            raise ConfigError.of(
                f"{where}: rdma of {host.ssh_hostname}",
                devices,
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
    if first_port is None and these.is_local:
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
