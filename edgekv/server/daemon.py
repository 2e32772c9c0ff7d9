"""The daemon: its sockets, its model and its end.

One process listens at a Unix socket of this user and at a port of loopback, and serves one model.
SIGTERM and Ctrl-C end it: nobody new is let in, who is being answered has until a deadline, and
what was said and computed is on disk when it is gone.
"""

import contextlib
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from edgekv.config import check_float
from edgekv.errors import ConfigError, ServeError
from edgekv.runtime import Runtime
from edgekv.server.access import Doors
from edgekv.server.answering import HEARTBEAT_S
from edgekv.server.guard import Guard
from edgekv.server.keys import AppsFile
from edgekv.server.keys import socket_path as socket_path
from edgekv.server.limits import Limits
from edgekv.server.metrics import Metrics
from edgekv.server.model import ServedModel
from edgekv.server.service import Service, say_bytes
from edgekv.server.sockets import allow_open_files, unix_socket, uvicorn_settings

PORT = 8642
HOST = "127.0.0.1"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
DRAIN_S = 30
KEEP_ALIVE_S_MAX = 1e9  # 30 years; a timer takes no infinity


@dataclass(frozen=True, kw_only=True)
class DaemonOptions:
    """Where a daemon listens, and how long it waits.

    Attributes:
        host: An address of loopback.
        port: There; 0 takes a free one, None listens at none.
        uds: Path of the Unix socket; None listens at none.
        open_ports: Ports of loopback that ask for no key, and whose they are.
        keep_alive_s: How long the model stays loaded when nobody asks; None for ever.
        heartbeat_s: Between signs of life in a stream.
        drain_s: For answers that run when it is to end.
    """

    host: str = HOST
    port: int | None = PORT
    uds: Path | None = None
    open_ports: Mapping[int, str] | None = None
    keep_alive_s: float | None = None
    heartbeat_s: float = HEARTBEAT_S
    drain_s: int = DRAIN_S

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK:
            raise ConfigError.of("host", self.host, " or ".join(LOOPBACK))
        if self.keep_alive_s is not None:
            check_float("keep_alive", self.keep_alive_s, 0, KEEP_ALIVE_S_MAX)
        if self.port is None and self.uds is None and not self.open_ports:
            raise ConfigError("the daemon would listen nowhere", hint="give it a port or a socket")


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a daemon listens by now."""

    uds: Path | None
    address: tuple[str, int] | None
    open_addresses: Mapping[int, str]  # ports, and whose they are

    @property
    def origin(self) -> str | None:
        """Where browsers and clients with keys find it: "http://127.0.0.1:8642"."""
        if self.address is None:
            return None
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    name: str,
    make: Callable[[], Runtime],
    options: DaemonOptions,
    *,
    apps: AppsFile | None = None,
    ready: Callable[[Listening], None] = lambda _: None,
    limits: Limits | None = None,
) -> None:
    """Serve until a signal comes. Blocks; on the main thread it takes SIGINT and SIGTERM.

    Args:
        name: The model's, as clients see it.
        make: Opens it.
        options: Where, and for how long.
        apps: Who may come in; None takes the user's file of apps.
        ready: Called once it listens, and the model is loaded.
        limits: What clients may take.

    Raises:
        ServeError: It cannot listen there.
        NotKept: What was said last in some sessions could not be saved.
    """
    limits = limits or Limits()
    allow_open_files(limits)
    with contextlib.ExitStack() as stack:
        sockets, listening = _sockets(stack, options)
        model = ServedModel(name, make, options.keep_alive_s)
        service = Service(
            model,
            metrics=Metrics(),
            heartbeat_s=options.heartbeat_s,
            origin=listening.origin,
        )
        guard = Guard(
            service.application(),
            apps=apps or AppsFile(),
            say=say_bytes,
            doors=Doors(
                socket_path="" if options.uds is None else str(options.uds),
                open_ports=listening.open_addresses,
            ),
            limits=limits,
        )
        config = uvicorn.Config(
            guard,
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=options.drain_s,
            **uvicorn_settings(limits),
        )
        _Server(config, model, lambda: ready(listening)).run(sockets=sockets)


class _Server(uvicorn.Server):
    """uvicorn's, which loads the model first, and closes it last."""

    def __init__(
        self, config: uvicorn.Config, model: ServedModel, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._model, self._ready = model, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self._model.card()
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().shutdown(sockets)
        finally:
            await self._model.close()


def _sockets(
    stack: contextlib.ExitStack, options: DaemonOptions
) -> tuple[list[socket.socket], Listening]:
    """All that it listens at. Raises ServeError."""
    sockets, address = [], None
    if options.uds is not None:
        sockets.append(stack.enter_context(unix_socket(options.uds)))
    if options.port is not None:
        sockets.append(stack.enter_context(_port(options.host, options.port)))
        address = sockets[-1].getsockname()[:2]
    for port in options.open_ports or {}:
        sockets.append(stack.enter_context(_port(options.host, port)))
    return sockets, Listening(
        uds=options.uds, address=address, open_addresses=options.open_ports or {}
    )


def _port(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        raise ServeError(
            f"nobody can listen at {host}:{port}: {error.strerror}",
            hint="another daemon may run (edgekv ps); --port chooses another one",
        ) from None
    return listener
