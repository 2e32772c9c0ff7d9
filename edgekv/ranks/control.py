"""The control connections: one from each rank to rank 0, small lines of JSON, no tensors.

Rank 0 listens at one address while the others come, and at none from then on. Who comes shows the
launch's token and the versions that it runs; all are let go on at once, when the last is there.
"""

import contextlib
import hmac
import json
import selectors
import socket
import time
from importlib.metadata import version
from typing import Any, NoReturn

from edgekv import __version__
from edgekv.errors import ConfigError, EngineFailed
from edgekv.ranks.launched import Launched

_LINE_BYTES_MAX = 4096
_STRANGERS_MAX = 64  # connections that have not shown the token yet
_RETRY_S = 0.1

Message = dict[str, Any]


class Gone(Exception):
    """The other end is closed, or does not keep to the protocol."""


class Peer:
    """One connection, never blocking. Owned by one thread, but for `send` and `end`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._unread = b""
        self._kept: list[Message] = []

    def fileno(self) -> int:
        """The socket's descriptor, for selectors."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send a line. Raises Gone, also where so much is unread that it would have to wait."""
        data = json.dumps(message).encode() + b"\n"
        try:
            is_sent = self._socket.send(data) == len(data)
        except OSError:
            is_sent = False
        if not is_sent:
            raise Gone

    def receive(self) -> list[Message]:
        """The lines that have come whole. Raises Gone once there are no more."""
        messages, self._kept = self._kept, []
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return messages
        except OSError:
            data = b""
        if not (data or messages):
            raise Gone
        *lines, self._unread = (self._unread + data).split(b"\n")
        if len(self._unread) > _LINE_BYTES_MAX:
            raise Gone
        try:
            messages += [json.loads(line) for line in lines]
        except ValueError:
            raise Gone from None
        if not all(isinstance(message, dict) for message in messages):
            raise Gone
        return messages

    def keep(self, messages: list[Message]) -> None:
        """Lines that were received too early; they come again, before the next."""
        self._kept = messages

    def end(self) -> None:
        """Say that nothing more comes; what the other end says is still received. Any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close it, at once."""
        self._socket.close()


def versions() -> Message:
    """What has to be the same on all ranks before they can talk about the rest."""
    return {"edgekv": __version__, "mlx": version("mlx")}


# --- rank 0 ---


def gather(launched: Launched, timeout_s: float) -> dict[int, Peer]:
    """Wait for all other ranks; return the connection of each.

    Raises:
        EngineFailed: Some did not come in time.
        ConfigError: One runs another version, or nobody can listen at the control address.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(launched))
        peers = _Gathering(launched, listener)
        stack.callback(peers.close)
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while peers.missing:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    names = ", ".join(map(launched.name, peers.missing))
                    raise EngineFailed(f"{names} did not come within {timeout_s:g} s")
                for key, _ in selector.select(left_s):
                    peers.take(key.fileobj, selector)
        return peers.let_go()


def _listen(launched: Launched) -> socket.socket:
    host, port = launched.control_address
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_STRANGERS_MAX)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"rank 0 cannot listen at {launched.control}: {error.strerror}",
            hint="the first host must be this machine, and its port free",
        ) from None
    return listener


class _Gathering:
    """Who has come so far: strangers, and ranks that have shown the token."""

    def __init__(self, launched: Launched, listener: socket.socket) -> None:
        self._launched, self._listener = launched, listener
        self._strangers: list[Peer] = []
        self._ranks: dict[int, Peer] = {}

    @property
    def missing(self) -> list[int]:
        """Ranks that have not come."""
        return [rank for rank in range(1, self._launched.size) if rank not in self._ranks]

    def take(self, source: object, selector: selectors.BaseSelector) -> None:
        """Somebody comes, or one who is there says something."""
        if not isinstance(source, Peer):
            with contextlib.suppress(OSError):  # it has gone already
                self._strangers.append(Peer(self._listener.accept()[0]))
                selector.register(self._strangers[-1], selectors.EVENT_READ)
            if len(self._strangers) > _STRANGERS_MAX:
                self._drop(self._strangers[0], selector)
            return
        try:
            for message in source.receive():
                self._hello(source, message)
        except Gone:
            self._drop(source, selector)

    def _hello(self, peer: Peer, message: Message) -> None:
        token, rank = message.get("token"), message.get("rank")
        if not isinstance(token, str) or not hmac.compare_digest(
            token.encode(), self._launched.token.encode()
        ):
            _refuse(peer, "the token is another launch's")
        if rank not in self.missing:
            _refuse(peer, f"rank {rank} is not waited for")
        if (theirs := message.get("versions")) != (ours := versions()):
            said = f"{self._launched.name(rank)} runs {_said(theirs)}, rank 0 {_said(ours)}"
            with contextlib.suppress(Gone):
                _refuse(peer, said)
            raise ConfigError(said, hint="install the same versions on all machines")
        self._strangers.remove(peer)
        self._ranks[rank] = peer

    def _drop(self, peer: Peer, selector: selectors.BaseSelector) -> None:
        """Forget a connection; a rank that ended may come again."""
        selector.unregister(peer)
        peer.close()
        self._strangers = [one for one in self._strangers if one is not peer]
        self._ranks = {rank: one for rank, one in self._ranks.items() if one is not peer}

    def let_go(self) -> dict[int, Peer]:
        """All are there: tell them, and hand them out."""
        for rank, peer in self._ranks.items():
            try:
                peer.send({"go": True})
            except Gone:
                raise EngineFailed(f"{self._launched.name(rank)} ended as it joined") from None
        ranks, self._ranks = self._ranks, {}
        return ranks

    def close(self) -> None:
        """Close what was not handed out."""
        for peer in (*self._strangers, *self._ranks.values()):
            peer.close()


def _refuse(peer: Peer, why: str) -> NoReturn:
    peer.send({"refused": why})
    raise Gone


def _said(theirs: object) -> str:
    if not isinstance(theirs, dict):
        return "no known version"
    return f"edgekv {theirs.get('edgekv')} with MLX {theirs.get('mlx')}"


# --- the others ---


def attend(launched: Launched, timeout_s: float) -> Peer:
    """Go to rank 0 and wait until all are there.

    While nobody listens there rank 0 has not come so far: it may fetch the model. That is waited
    for without an end where a launcher sees to it that no rank outlives it.

    Raises:
        EngineFailed: It is not there, refuses, or ends; or another one does not come in time.
    """
    with contextlib.ExitStack() as stack:
        peer = _connect(launched, timeout_s)
        stack.callback(peer.close)
        deadline, first = time.monotonic() + timeout_s, launched.name(0)
        try:
            peer.send({"token": launched.token, "rank": launched.rank, "versions": versions()})
            message, *more = _first(peer, deadline)
        except TimeoutError:
            raise EngineFailed(f"not all ranks came to {first} within {timeout_s:g} s") from None
        except Gone:
            raise EngineFailed(f"{first} ended before all had come") from None
        if "refused" in message:
            raise EngineFailed(f"{first} refuses rank {launched.rank}: {message['refused']}")
        peer.keep(more)
        stack.pop_all()
        return peer


def _connect(launched: Launched, timeout_s: float) -> Peer:
    deadline = time.monotonic() + timeout_s
    while (left_s := deadline - time.monotonic()) > 0:
        try:
            return Peer(socket.create_connection(launched.control_address, timeout=left_s))
        except OSError as error:
            reason = error.strerror or str(error)
            if isinstance(error, ConnectionRefusedError) and launched.line is not None:
                deadline = time.monotonic() + timeout_s
        time.sleep(min(_RETRY_S, left_s))
    raise EngineFailed(
        f"{launched.name(0)} cannot be reached at {launched.control} within {timeout_s:g} s: "
        f"{reason}"
    )


def _first(peer: Peer, deadline: float) -> list[Message]:
    """What comes first, and what came with it. Raises TimeoutError."""
    with selectors.DefaultSelector() as selector:
        selector.register(peer, selectors.EVENT_READ)
        while (left_s := deadline - time.monotonic()) > 0:
            if selector.select(left_s) and (messages := peer.receive()):
                return messages
    raise TimeoutError
