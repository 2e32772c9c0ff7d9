"""The servers that are played: one that runs somewhere, or one that is started for each play.

edgekv's is `edgekv serve`, with a state folder of its own; the peer is mlx-lm's server, on the same
weights in the same dtype (`peer_folder`), behind the same BLAS, and with as many bytes for kept KV.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import httpx2

from edgekv.bench.serving.client import Endpoint, TargetFailed
from edgekv.bench.serving.traffic import AppTraffic
from edgekv.models.cache import KV_ENV
from edgekv.server.keys import STATE_ENV

_START_S = 180.0
_STOP_S = 30.0
_POLL_S = 0.1
_LOG_CHARS = 400
_GIB = 1 << 30
# edgekv first, so that MLX finds the fast BLAS here as well.
_MLX_LM = "import edgekv, sys; sys.argv[0] = 'mlx_lm.server'; import mlx_lm.server as s; s.main()"


class Target(Protocol):
    """What is played."""

    @property
    def name(self) -> str:
        """By which the report calls it."""
        ...

    def open(
        self, apps: Sequence[AppTraffic], pool_bytes: int | None = None
    ) -> contextlib.AbstractContextManager[Endpoint]:
        """A server that these apps may use; `pool_bytes` of memory for KV, if it can be told."""
        ...


@dataclass(frozen=True)
class Running:
    """A server that somebody else has started, and goes on when the bench is over."""

    endpoint: Endpoint

    @property
    def name(self) -> str:
        """As the command line calls it."""
        return self.endpoint.name

    @contextlib.contextmanager
    def open(self, apps: Sequence[AppTraffic], pool_bytes: int | None = None) -> Iterator[Endpoint]:
        """As it is."""
        del apps, pool_bytes
        yield self.endpoint


@dataclass(frozen=True)
class EdgeKVServe:
    """`edgekv serve`, started for a play with an empty state."""

    model: Path
    scratch: Path
    name: str = "edgekv"

    @contextlib.contextmanager
    def open(self, apps: Sequence[AppTraffic], pool_bytes: int | None = None) -> Iterator[Endpoint]:
        """Apps are made anew, each with a key; raises TargetFailed."""
        with tempfile.TemporaryDirectory(prefix="serve-", dir=self.scratch) as folder:
            state = Path(folder) / "state"
            environment = {**os.environ, KV_ENV: folder, STATE_ENV: str(state)}
            keys = {app.name: _new_key(app, environment) for app in apps}
            port = free_port()
            command = [*_edgekv("serve", "--model", str(self.model)), "--port", str(port)]
            if pool_bytes is not None:
                command += ["--pool-gib", f"{pool_bytes / _GIB:.6f}"]
            url = f"http://127.0.0.1:{port}"
            with _started(self.name, command, environment, f"{url}/healthz"):
                yield Endpoint(name=self.name, url=f"{url}/v1", keys=keys)


@dataclass(frozen=True)
class MlxLmServe:
    """mlx-lm's server, started for a play; `folder` is one that it can read."""

    folder: Path
    name: str = "mlx-lm"

    @contextlib.contextmanager
    def open(self, apps: Sequence[AppTraffic], pool_bytes: int | None = None) -> Iterator[Endpoint]:
        """It knows no apps; raises TargetFailed."""
        del apps
        port = free_port()
        command = [sys.executable, "-c", _MLX_LM, "--model", str(self.folder), "--port", str(port)]
        if pool_bytes is not None:
            command += ["--prompt-cache-bytes", str(pool_bytes)]
        url = f"http://127.0.0.1:{port}"
        with _started(self.name, command, {**os.environ}, f"{url}/health"):
            yield Endpoint(name=self.name, url=f"{url}/v1", model="default_model")


def _edgekv(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "edgekv.cli.main", *arguments]


def _new_key(app: AppTraffic, environment: Mapping[str, str]) -> str:
    """Of an app that is made in the state folder that the environment names."""
    command = _edgekv("apps", "add", app.name, "--priority", app.priority, "--json")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TargetFailed(f"edgekv apps add {app.name}: {done.stderr.strip()[-_LOG_CHARS:]}")
    return str(json.loads(done.stdout)["key"])


def free_port() -> int:
    """A port of the loopback that nobody listens on, a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _started(
    name: str, command: Sequence[str], environment: Mapping[str, str], ready_url: str
) -> Iterator[None]:
    """A server's process, ready in the block and gone behind it."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            _wait_until_ready(name, process, ready_url, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(
    name: str, process: "subprocess.Popen[bytes]", url: str, log: IO[str]
) -> None:
    end_s = time.monotonic() + _START_S
    while time.monotonic() < end_s:
        if process.poll() is not None:
            log.seek(0)
            said = log.read().strip()[-_LOG_CHARS:]
            raise TargetFailed(f"{name} ended with {process.returncode}: {said}")
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(url, timeout=1.0, trust_env=False).status_code == httpx2.codes.OK:
                return
        time.sleep(_POLL_S)
    raise TargetFailed(f"{name} is not ready after {_START_S:.0f} s")
