"""What a rank knows from who started it: who it is, who the others are, and how to join them.

`edgekv launch` starts every rank with one variable in its environment, and holds one end of a line
that closes when the launcher ends, however it ends: a rank that nobody looks after ends too.
"""

import faulthandler
import functools
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from edgekv.errors import ConfigError, EngineFailed

if TYPE_CHECKING:
    from edgekv.ranks.group import Group

VARIABLE = "EDGEKV_LAUNCHED"
JOIN_S = 60.0
LEFT_ALONE_S = 10.0  # a rank's time to end by itself when its launcher is gone
JOINED = b"j"  # what rank 0 says on its line once all have joined
SIZE_MAX = 64


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A rank's place in its group.

    Attributes:
        rank: Its number; 0 is where the user is.
        size: How many there are.
        backend: MLX's: "ring" or "jaccl".
        control: Where rank 0 listens for the others: "10.0.0.1:32323".
        token: What the others show there.
        hosts: Where each rank runs, as people know it.
        mlx_environ: Variables that MLX's backend reads.
        mlx_files: Variables of MLX's that name a file, and what it holds.
        line: Descriptor that closes with the launcher; None of a rank that has none.
    """

    rank: int
    size: int
    backend: str
    control: str
    token: str = field(repr=False)
    hosts: tuple[str, ...]
    mlx_environ: Mapping[str, str] = field(default_factory=dict)
    mlx_files: Mapping[str, str] = field(default_factory=dict)
    line: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.size <= SIZE_MAX:
            raise ConfigError.of("size", self.size, f"from 1 to {SIZE_MAX}")
        if not 0 <= self.rank < self.size:
            raise ConfigError.of("rank", self.rank, f"from 0 to {self.size - 1}")
        if len(self.hosts) != self.size:
            raise ConfigError.of("hosts", self.hosts, f"{self.size} names")
        _ = self.control_address

    @property
    def control_address(self) -> tuple[str, int]:
        """Host and port of `control`."""
        host, _, port = self.control.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ConfigError.of("control", self.control, "an address and a port: 10.0.0.1:32323")
        return host, int(port)

    def name(self, rank: int) -> str:
        """A rank as people know it: "rank 1 (10.0.0.2)"."""
        return f"rank {rank} ({self.hosts[rank]})"

    def variable(self) -> str:
        """The value of the variable from which `launched` reads this."""
        return json.dumps(asdict(self))


@functools.cache
def launched() -> Launched | None:
    """This process's place in a group; None if it was not launched as a rank.

    Read once, and taken out of the environment: what this process starts is no rank.

    Raises:
        ConfigError: The variable is not as the launcher writes it.
    """
    text = os.environ.pop(VARIABLE, None)
    return None if text is None else read(text)


def read(text: str) -> Launched:
    """What `Launched.variable` has written. Raises ConfigError."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise _garbled(f"is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _garbled("is no object")
    try:
        return Launched(**{name: _read(name, value) for name, value in fields.items()})
    except TypeError as error:  # a field is missing, or not known
        raise _garbled(str(error).replace("Launched.__init__()", "is not whole:")) from None


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("rank", "size"), (int,)),
    **dict.fromkeys(("backend", "control", "token"), (str,)),
    **dict.fromkeys(("mlx_environ", "mlx_files"), (dict,)),
    "hosts": (list,),
    "line": (int, type(None)),
}


def _read(name: str, value: Any) -> Any:
    kinds = _KINDS.get(name, (object,))
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if type(value) not in kinds or not all(isinstance(one, str) for one in inner):
        raise _garbled(f"has a {name} of {str(value)[:60]}")
    return tuple(value) if isinstance(value, list) else value


def _garbled(what: str) -> ConfigError:
    return ConfigError(f"{VARIABLE} {what}", hint="edgekv launch sets it; do not set it by hand")


# --- joining ---


def join(launched: Launched, timeout_s: float = JOIN_S) -> "Group":
    """Join the others in MLX's group. Call it on the thread that will compute.

    MLX waits for the others without an end and with the interpreter's lock held, so no thread of
    this process could stop it: all ranks meet before (`Liveness.start`), and if MLX does not find
    them even so, the process ends, with the place where it waited on stderr.

    Raises:
        EngineFailed: MLX cannot reach the others, or has no such backend here.
    """
    import mlx.core as mx

    from edgekv.ranks.group import Group

    with _environ_of_mlx(launched):
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=sys.__stderr__ or 2)
        try:
            raw = mx.distributed.init(strict=True, backend=launched.backend)
        except (RuntimeError, ValueError) as error:
            raise EngineFailed(
                f"{launched.name(launched.rank)} cannot join the others: {error}",
                hint=f"MLX's backend {launched.backend} needs a way between all hosts: "
                f"{', '.join(launched.hosts)}",
            ) from error
        finally:
            faulthandler.cancel_dump_traceback_later()
    if (raw.rank(), raw.size()) != (launched.rank, launched.size):
        raise EngineFailed(
            f"MLX says rank {raw.rank()} of {raw.size()}, "
            f"the launcher {launched.rank} of {launched.size}"
        )
    if launched.rank == 0 and launched.line is not None:
        with suppress(OSError):  # a launcher that is gone ends this process by itself
            os.write(launched.line, JOINED)
    return Group(raw)


@contextmanager
def _environ_of_mlx(launched: Launched) -> Iterator[None]:
    """What MLX reads once, while it reads it: variables and the files that they name."""
    with ExitStack() as stack:
        environ = {"MLX_RANK": str(launched.rank), **launched.mlx_environ}
        for variable, text in launched.mlx_files.items():
            file = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".json"))
            file.write(text)
            file.flush()
            environ[variable] = file.name
        before = {name: os.environ.get(name) for name in environ}
        os.environ.update(environ)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


# --- a launcher that is gone ---


def end_with_launcher(launched: Launched, came: Sequence[int] = ()) -> None:
    """Watch the line to the launcher on a thread: signals come there, and its end.

    Then rank 0 closes what is open and so ends the others, as after SIGTERM; whoever is still there
    a while later ends for certain. `came` has the signals that reached this process itself: those
    sent to a whole process group do not come twice.
    """
    if launched.line is not None:
        threading.Thread(
            target=_watch, args=(launched, launched.line, came), name="edgekv-line", daemon=True
        ).start()


def _watch(launched: Launched, line: int, came: Sequence[int]) -> None:
    with suppress(OSError):
        while number := os.read(line, 1):
            _send_myself(number[0], came)
    if launched.rank == 0:
        _send_myself(signal.SIGTERM, came)
    threading.Event().wait(LEFT_ALONE_S)
    with suppress(OSError):
        os.write(2, f"error: {launched.name(launched.rank)} has lost its launcher\n".encode())
    os._exit(1)


def _send_myself(number: int, came: Sequence[int]) -> None:
    if not came:
        os.kill(os.getpid(), number)
