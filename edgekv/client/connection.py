"""`edgekv.connect`: a daemon in the place of a runtime."""

from pathlib import Path
from typing import Any, Self, Unpack

from edgekv.client.app import App
from edgekv.client.link import Link
from edgekv.config import PrefillMode
from edgekv.errors import ConfigError
from edgekv.runtime.app import Terms, check_name

DEFAULT_APP = "default"


class Connection:
    """A daemon, as its clients see it. Close it, or use it as a context manager.

    Attributes:
        model_name: What it serves.
        path: Of that model.
        context_max: Longest session in tokens.
        predicts: Whether it has a KV predictor.
        keeps_sessions: Whether named sessions outlive it.
        prefill: Whether prompts' KV is predicted, where nobody says.
    """

    def __init__(self, link: Link, app: str | None) -> None:
        """Made by `connect`. Raises what the daemon raises, DaemonGone."""
        self._link = link
        told = self._hello(app)
        self._usual_app = str(told["app"])
        self.model_name = str(told["model"])
        self.path = Path(told["path"])
        self.context_max = int(told["context_max"])
        self.predicts = bool(told["predicts"])
        self.keeps_sessions = bool(told["keeps_sessions"])
        self.prefill: PrefillMode = told["prefill"]
        self._apps: dict[str, App] = {}

    def app(self, name: str | None = None, **terms: Unpack[Terms]) -> App:
        """The app of this name; None is the one that the connection was opened for.

        Args:
            name: Its name.
            terms: See `App.update`.

        Raises:
            ConfigError: The name is not allowed, or the key is another app's; or the terms are.
            ServeError: The app must show its key.
            DaemonGone: The daemon has ended.
        """
        name = self._usual_app if name is None else name
        check_name("app name", name)
        told = self._hello(name)
        app = self._apps.get(name)
        if app is None or app.closed:
            app = self._apps[name] = App(self._link, told)
        app.update(**terms)
        return app

    def status(self) -> dict[str, Any]:
        """What goes on at the daemon, for people: what `edgekv ps` shows."""
        status: dict[str, Any] = self._link.call("GET", "/edgekv/status", app=self._usual_app)
        return status

    def close(self) -> None:
        """End what was asked over it and not answered, and its sessions without a name.

        Closing twice is nothing.
        """
        if not self._link.closed and self._link.home.is_here:
            for app in self._apps.values():
                app.close()
            self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _hello(self, app: str | None) -> dict[str, Any]:
        told: dict[str, Any] = self._link.call("GET", "/edgekv/hello", app=app)
        if app not in (None, told["app"]):
            raise ConfigError(
                f"this key is of the app {told['app']!r}, and no other's",
                hint="connect with the other app's key",
            )
        return told


def connect(
    where: str | Path | None = None, *, app: str = DEFAULT_APP, key: str | None = None
) -> Connection:
    """Use the model that a daemon (`edgekv serve`) has loaded, in place of `Runtime.open`.

    Args:
        where: The path of its Unix socket, or http://127.0.0.1:PORT; None is the usual socket.
        app: Who asks. With a key it is the key's.
        key: The app's, where the daemon asks for one: at a port, or of apps that are `--key-only`.

    Raises:
        DaemonGone: No daemon listens there.
        ConfigError: An argument is not what it should be, or the key is another app's.
        ServeError: The daemon refuses who asks, or it is none of edgekv's.
    """
    check_name("app", app)
    link = Link(where, key)
    try:
        return Connection(link, None if app == DEFAULT_APP else app)
    except BaseException:
        link.close()
        raise
