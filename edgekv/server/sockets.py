"""The Unix socket, and connections: who the peer is, and an end to those that stand still."""

import asyncio
import contextlib
import logging
import os
import resource
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgekv.errors import SocketUnusable
from edgekv.server.guard import IS_BEYOND
from edgekv.server.limits import Limits

_PATH_BYTES_MAX = 103  # macOS's 104 with the NUL at the end; Linux has four more
_BACKLOG = 512
_log = logging.getLogger(__name__)


# --- the socket ---


@contextlib.contextmanager
def unix_socket(path: Path) -> Iterator[socket.socket]:
    """A socket that listens at `path`, for this user alone; its file goes at the end.

    It is never open to others, not for a moment, and nobody else can put another in its place;
    `GuardedProtocol` asks the system who is there all the same. A lock beside it says that it is
    in use: of two daemons that begin at once neither takes the other's socket for a stale one.

    Raises:
        SocketUnusable: Somebody listens there already, or it cannot be made there.
    """
    num_bytes = len(os.fsencode(path))
    if num_bytes > _PATH_BYTES_MAX:
        raise SocketUnusable(f"{path} has {num_bytes} bytes, and a socket's path {_PATH_BYTES_MAX}")
    with contextlib.ExitStack() as stack:
        try:
            _prepare_folder(path.parent)
            stack.enter_context(filelock.FileLock(f"{path}.lock", timeout=0, mode=0o600))
            _remove_stale(path)
            listener = stack.enter_context(contextlib.closing(_listen(path)))
            stack.callback(_unlink, path, path.lstat())
        except filelock.Timeout:
            raise _in_use(path) from None
        except OSError as error:
            raise SocketUnusable(f"no socket can be made at {path}: {error.strerror}") from None
        yield listener


def _prepare_folder(folder: Path) -> None:
    """Make the folder, private; one that is there must be ours, and nobody else may write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise SocketUnusable(f"{folder} belongs to another user")
    if status.st_mode & 0o022:
        raise SocketUnusable(f"other users may write to {folder} (mode {status.st_mode & 0o777:o})")


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens at, which a daemon left that was killed."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise SocketUnusable(f"{path} is there, and is no socket")
    if status.st_uid != os.geteuid():
        raise SocketUnusable(f"{path} belongs to another user")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
        except (TimeoutError, BlockingIOError):  # its backlog is full
            raise _in_use(path) from None
        else:
            raise _in_use(path)


def _in_use(path: Path) -> SocketUnusable:
    return SocketUnusable(
        f"somebody listens at {path} already",
        hint="use the daemon that runs, end it, or choose another path with --uds",
    )


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        # Of all threads for a moment: files that they make meanwhile are private, and no worse.
        mask = os.umask(0o077)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(mask)
        path.chmod(0o600)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _unlink(path: Path, ours: os.stat_result) -> None:
    """Remove the socket's file, unless somebody put another one there."""
    with contextlib.suppress(OSError):
        if os.path.samestat(path.lstat(), ours):
            path.unlink()


# --- connections ---


def peer_uid(connection: Any) -> int:
    """The user at the other end of a Unix socket, as the system says. Raises OSError."""
    if hasattr(socket, "SO_PEERCRED"):  # Linux: process, user, group
        size = struct.calcsize("3i")
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(struct.unpack("=iII", peer)[1])
    sol_local, local_peercred = 0, 1  # macOS's sys/un.h; version, user, then groups: xucred
    peer = connection.getsockopt(sol_local, local_peercred, 76)
    return int(struct.unpack_from("=II", peer)[1])


class GuardedProtocol(H11Protocol):
    """uvicorn's connection, with limits that it lacks. Owned by the event loop.

    It is closed if another user is at the other end, if no request comes in time, or if nothing is
    read of what is sent. Of connections that are too many the guard refuses the requests.
    """

    limits = Limits()
    uid_of = staticmethod(peer_uid)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody has come."""
        limits = self.limits
        self._no_head = _Alarm(self.loop, limits.head_s, transport.abort)
        self._unread = _Alarm(self.loop, limits.unread_s, transport.abort)
        is_own_user = self._is_own_user(transport)
        if not is_own_user or len(self.connections) >= 2 * limits.num_connections_max:
            self.transport = transport
            transport.abort()
            return
        if len(self.connections) >= limits.num_connections_max:
            self.app_state = {**self.app_state, IS_BEYOND: True}
        super().connection_made(transport)
        self._no_head.set()

    def data_received(self, data: bytes) -> None:
        """Something has come; once it is a whole head, nothing of a head is waited for."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._no_head.stop()
        else:  # of the next request, or the rest of one that was refused
            self._no_head.set()

    def pause_writing(self) -> None:
        """The client does not read as fast as is written."""
        super().pause_writing()
        self._unread.set()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._unread.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        super().connection_lost(exc)
        self._no_head.stop()
        self._unread.stop()
        self._unset_keepalive_if_required()  # which uvicorn does only where the client closed

    def _is_own_user(self, transport: asyncio.Transport) -> bool:
        connection = transport.get_extra_info("socket")
        if connection is None or connection.family != socket.AF_UNIX:
            return True
        try:
            user = self.uid_of(connection)
        except OSError:  # it has gone already
            return False
        if user != os.geteuid():
            _log.warning("refused a connection of user %d at the socket", user)
        return user == os.geteuid()


class _Alarm:
    """Calls something after a while unless it is stopped before; set again, it goes on waiting."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, ring: Callable[[], object]
    ) -> None:
        self._loop, self._seconds, self._ring = loop, seconds, ring
        self._timer: asyncio.TimerHandle | None = None

    def set(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._ring)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def uvicorn_settings(limits: Limits) -> dict[str, Any]:
    """What uvicorn has to know, beside application and sockets, for the limits to hold."""
    return {
        "http": type("Protocol", (GuardedProtocol,), {"limits": limits}),
        "ws": "none",
        "h11_max_incomplete_event_size": limits.head_bytes_max,
        "timeout_keep_alive": limits.keep_alive_s,
        "proxy_headers": False,  # nobody may say of itself where it comes from
        "server_header": False,
        "access_log": False,  # the daemon has its own, one line a request
        "backlog": _BACKLOG,
    }


def allow_open_files(limits: Limits) -> None:
    """Have the system allow as many open files as connections need: macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * limits.num_connections_max + 512  # and those of models, stores and this process
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
