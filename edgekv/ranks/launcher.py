"""Starts the ranks of a group, here and over ssh, and sees to it that all end.

Rank 0 is the user's: it has the terminal, and its exit status is the launcher's. The others have a
session of their own, so that Ctrl-C does not reach them, and what they say comes on stderr, with
their number. They end when rank 0 has ended, since nobody talks to them any more.
"""

import contextlib
import json
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO

from edgekv.errors import ConfigError
from edgekv.ranks.hosts import Host, Machines, places
from edgekv.ranks.launched import JOINED, VARIABLE, Launched

END_S = 10.0  # for ranks to end by themselves when rank 0 has ended
_BEFORE = ((0.0, signal.SIGTERM), (5.0, signal.SIGKILL))  # rank 0, while ranks were joining
_AFTER = ((3.0, signal.SIGTERM), (30.0, signal.SIGKILL))  # later: who waits is told first
_TOGETHER_S = 0.3  # between what happens together
_LINE_BYTES_MAX = 1 << 16
_SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_SSH_ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Remote:
    """How ranks begin on other machines; None takes what is so here.

    Attributes:
        python: Path of the interpreter there.
        cwd: Working folder there.
    """

    python: str | None = None
    cwd: str | None = None


def launch(
    these: Machines,
    argv: Sequence[str],
    say: Callable[[str], None],
    *,
    remote: Remote | None = None,
    first_port: int | None = None,
    stdout: IO[str] | None = None,
) -> int:
    """Run `python *argv` as every rank until all have ended; return rank 0's exit status.

    Args:
        these: Where.
        argv: Of each rank: "-m", a module, and what follows.
        say: Prints a line, from any thread: what other ranks say, and what becomes of them.
        remote: How ranks begin on other machines.
        first_port: Of those that ranks listen at; None leaves it to `places`.
        stdout: Rank 0's, if it is not this process's own.

    Raises:
        ConfigError: The first host is not this machine, or ranks cannot be started.
    """
    told = places(these, first_port)
    group = _Group(told, say)
    with group.forwarding(), contextlib.closing(group):
        group.start_first(argv, these.environ, stdout)
        for rank, host in list(enumerate(these.hosts))[1:]:
            group.start_other(rank, argv, these.environ, _begin(host, remote or Remote()))
        return group.wait()


def _begin(host: Host, remote: Remote) -> list[str]:
    """The command that begins a rank and reads its order on stdin."""
    if host.is_here:
        return [sys.executable, "-m", "edgekv.ranks.remote"]
    folder = shlex.quote(remote.cwd or os.fspath(Path.cwd()))
    enter = f"cd {folder} && " if remote.cwd else f"cd {folder} 2>/dev/null; "
    python = shlex.quote(remote.python or sys.executable)
    begin = f"{enter}exec {python} -m edgekv.ranks.remote"
    return [*_SSH, *_SSH_ALIVE, host.ssh, begin]


class _Group:
    """The ranks' processes. Owned by the main thread; threads wait for them and read them."""

    def __init__(self, told: Sequence[Launched], say: Callable[[str], None]) -> None:
        self._told = told
        self._say = say
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._readers: dict[int, threading.Thread] = {}
        self._ended: queue.Queue[int] = queue.Queue()
        self._statuses: dict[int, int] = {}  # of those whose end was noticed
        self._line, self._line_of_first = socket.socketpair()
        self._has_joined = False
        self._num_signals = 0

    # --- begin ---

    def start_first(
        self, argv: Sequence[str], environ: Mapping[str, str], stdout: IO[str] | None
    ) -> None:
        """Rank 0, with the user's terminal."""
        fd = self._line_of_first.fileno()
        variable = replace(self._told[0], line=fd).variable()
        process = subprocess.Popen(
            [sys.executable, *argv],
            env={**os.environ, **environ, VARIABLE: variable},
            pass_fds=(fd,),
            stdout=stdout,
        )
        self._line_of_first.close()
        self._add(0, process)

    def start_other(
        self, rank: int, argv: Sequence[str], environ: Mapping[str, str], begin: Sequence[str]
    ) -> None:
        """Another one, out of the terminal's reach. Raises ConfigError."""
        try:
            process = subprocess.Popen(
                begin,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            name = self._told[0].name(rank)
            raise ConfigError(f"{name} cannot be started: {begin[0]}: {error.strerror}") from None
        self._add(rank, process)
        variable = replace(self._told[rank], line=0).variable()
        order = {"argv": [*argv], "environ": {**environ, VARIABLE: variable}}
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and says why
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        reader = threading.Thread(target=self._read, args=(rank, process.stdout), daemon=True)
        reader.start()
        self._readers[rank] = reader

    def _add(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        self._processes[rank] = process

        def reap() -> None:
            process.wait()
            self._ended.put(rank)

        threading.Thread(target=reap, daemon=True).start()

    def _read(self, rank: int, stream: IO[bytes]) -> None:
        """Pass on what a rank says, line by line."""
        while line := stream.readline(_LINE_BYTES_MAX):
            self._say(f"[rank {rank}] {line.decode(errors='replace').rstrip()}")

    @contextlib.contextmanager
    def forwarding(self) -> Iterator[None]:
        """Signals that end a command go to rank 0; Ctrl-C it has from the terminal itself."""
        before = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGINT)}
        ours = [number for number, handler in before.items() if handler != signal.SIG_IGN]
        for number in ours:
            signal.signal(number, self._forward)
        try:
            yield
        finally:
            for number in ours:
                signal.signal(number, before[number])

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        """Over the line at first: a signal to all of a process group has reached rank 0 as well."""
        if number == signal.SIGINT:
            return
        self._num_signals += 1
        with contextlib.suppress(OSError):  # it has ended
            if self._num_signals == 1:
                self._line.send(bytes([number]))
            elif 0 in self._processes:
                self._processes[0].send_signal(number)

    # --- wait, and end ---

    def wait(self) -> int:
        """Until all have ended; kills what does not end.

        Returns:
            Rank 0's exit status; 1 where it was told to end because another one was lost, for
            nobody asked for that.
        """
        is_told = False
        steps: list[tuple[float, signal.Signals]] = []  # when rank 0 is sent what
        while 0 not in self._statuses:
            rank = self._next(steps[0][0] if steps else None)
            if rank is None:
                self._processes[0].send_signal(steps.pop(0)[1])
                is_told = True
            elif rank and self._statuses[rank] and not steps and not self._first_ends():
                self._tell_of(rank)
                now = time.monotonic()
                steps = [(now + s, n) for s, n in (_AFTER if self._all_joined() else _BEFORE)]
        self._end_others()
        return 1 if is_told else _as_shells_do(self._statuses[0])

    def _next(self, until_s: float | None) -> int | None:
        """The next rank that ends; None if none does in time."""
        try:
            timeout_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            rank = self._ended.get(timeout=timeout_s)
        except queue.Empty:
            return None
        self._statuses[rank] = self._processes[rank].returncode
        return rank

    def _first_ends(self) -> bool:
        """Whether rank 0 ends as well: then the other one ended for that."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[0].wait(_TOGETHER_S)
        return self._processes[0].returncode is not None

    def _all_joined(self) -> bool:
        """Whether rank 0 has said so: then it may have something to save, and others hear of it."""
        self._line.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            self._has_joined |= self._line.recv(1) == JOINED
        return self._has_joined

    def _tell_of(self, rank: int) -> None:
        """Say that a rank was lost, behind what it said itself."""
        self._readers[rank].join(_TOGETHER_S)
        status = _as_shells_do(self._statuses[rank])
        self._say(f"{self._told[0].name(rank)} ended with status {status}")

    def _end_others(self) -> None:
        """They have learnt that rank 0 is gone, if they had met it."""
        if not self._all_joined():
            for process in self._processes.values():
                process.terminate()
        until_s = time.monotonic() + END_S
        while len(self._statuses) < len(self._processes) and self._next(until_s) is not None:
            pass

    def close(self) -> None:
        """Kill what is still there; ranks of other machines end with the line to them."""
        for process in self._processes.values():
            process.kill()
            process.wait()
        for reader in self._readers.values():
            reader.join(_TOGETHER_S)
        for process in self._processes.values():
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        self._line.close()
        self._line_of_first.close()


def _as_shells_do(status: int) -> int:
    """128 and the number, of a process that a signal ended."""
    return 128 - status if status < 0 else status
