"""A daemon of a tiny model in a thread of the test's process, over real sockets."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.runtime import Runtime
from edgekv.server import daemon
from edgekv.server.keys import AppsFile
from edgekv.server.limits import Limits

APPS = ("mail", "notes")  # those that have a key
MODEL = "tiny"


class RunningDaemon:
    """What listens at `uds` and `base_url`; `stop` and `start` are a restart.

    Attributes:
        make: Opens its runtime.
        options: Of `DaemonOptions`, beside the sockets.
        apps: Who has a key.
        keys: By app.
    """

    def __init__(self, folder: Path, make: Callable[[], Runtime]) -> None:
        self.make = make
        self.uds = folder / "sock"
        self.apps = AppsFile(folder / "apps.json")
        self.keys = {name: self.apps.add(name) for name in APPS}
        self.options: dict[str, object] = {"heartbeat_s": 0.2, "drain_s": 5}
        self.limits: Limits | None = None
        self.failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def base_url(self) -> str:
        """Of the port, where a key is wanted."""
        host, port = self.listening.address
        return f"http://{host}:{port}"

    @property
    def runtime(self) -> Runtime:
        """What answers."""
        runtime = self.server._model.loaded
        assert runtime is not None
        return runtime

    def start(self, **options: object) -> "RunningDaemon":
        """Serve, with these options from now on."""
        self.options |= options
        ready = threading.Event()

        def listens(listening: daemon.Listening) -> None:
            self.listening = listening
            ready.set()

        self._thread = threading.Thread(target=self._run, args=[listens, ready], daemon=True)
        self._thread.start()
        assert ready.wait(60), "it does not begin"
        if self.failure is not None:
            raise self.failure
        return self

    def _run(self, listens: Callable[[daemon.Listening], None], ready: threading.Event) -> None:
        class Server(daemon._Server):
            def __init__(server, *args: object) -> None:  # noqa: N805
                super().__init__(*args)
                self.server = server

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(daemon, "_Server", Server)
            options = daemon.DaemonOptions(port=0, uds=self.uds, **self.options)
            try:
                daemon.serve(
                    MODEL, self.make, options, apps=self.apps, ready=listens, limits=self.limits
                )
            except BaseException as error:  # noqa: BLE001 - `start` or `stop` raises it
                self.failure = error
            finally:
                ready.set()

    def stop(self) -> None:
        """Ask it to end, as SIGTERM does, and wait until it has."""
        if self._thread is not None:
            self.server.should_exit = True
            self._thread.join(60)
            assert not self._thread.is_alive(), "it does not end"
            self._thread = None
        if self.failure is not None:
            raise self.failure
