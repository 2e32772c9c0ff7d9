"""Who asks: an app's key, or the door that a request came in by; and that no web page asks. Pure.

Three doors. At the port an app shows its key. At the Unix socket, which only processes of one user
can open, it says who it is; it is believed, unless the app is marked as `key_only`. A port that was
opened for one app (`--open`) asks for nothing.

What a browser does at the bidding of some web page never gets in, whatever it shows: pages are told
by their Origin, and a name of theirs that was made to lead here (DNS rebinding) by the Host.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.datastructures import Headers

from edgekv.errors import ConfigError
from edgekv.server.fields import Fault, invalid
from edgekv.server.keys import KEY_PREFIX, AppEntry, AppsFile, check_app_name

APP_HEADER = "x-edgekv-app"
DEFAULT_APP = "default"
# Which conversation a request belongs to, where its sender says; the first of these that is there.
SESSION_HEADERS = ("x-edgekv-session", "thread-id", "x-claude-code-session-id", "x-session-id")
AGENT_HEADER = "x-claude-code-agent-id"
# Clients look whether somebody is there before they know a key (Claude Code).
PUBLIC = frozenset((method, path) for method in ("GET", "HEAD") for path in ("/", "/healthz"))
LIVE_PATH = "/live/"  # below it is the page, which asks for a pass of its own (`visitors`)

_LOOPBACK = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::(\d{1,5}))?", re.IGNORECASE)
_PORT = "80"  # of an authority that names none


@dataclass(frozen=True, kw_only=True)
class Door:
    """Where a request came in.

    Attributes:
        is_socket: A Unix socket, not a port.
        app: Whose keyless port it is; "" if it is none.
    """

    is_socket: bool = False
    app: str = ""


@dataclass(frozen=True, kw_only=True)
class Doors:
    """Which of the server's addresses are not the port that asks for a key.

    Attributes:
        socket_path: The Unix socket's, as it was bound; "" if there is none.
        open_ports: Ports without a key, and whose they are.
    """

    socket_path: str = ""
    open_ports: Mapping[int, str] = field(default_factory=dict)

    def of(self, scope: Mapping[str, Any]) -> Door:
        """The door of an ASGI scope; where nothing is known, the one that asks most."""
        address, port = scope.get("server") or ("", None)
        if port is None:  # uvicorn gives none for a socket, and others for a port's default
            return Door(is_socket=bool(address) and address == self.socket_path)
        return Door(app=self.open_ports.get(port, ""))


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who asks.

    Attributes:
        app: The app's name.
        entry: What the user gave it; None if it has no key, and so the terms of any new app.
        is_user: It came by the Unix socket, so it is this user, who may see all apps.
    """

    app: str
    entry: AppEntry | None = None
    is_user: bool = False

    @property
    def terms(self) -> dict[str, Any]:
        """What it may have, as `Runtime.app` takes it."""
        return {} if self.entry is None else self.entry.terms


def is_public(method: str, path: str) -> bool:
    """Whether anybody may ask this, and whoever asks is no app."""
    return (method, path) in PUBLIC or (method == "GET" and path.startswith(LIVE_PATH))


def check_no_web_page(door: Door, headers: Headers) -> None:
    """Refuse what a browser sends for a page that is not ours. Raises Fault.

    `sec-fetch-mode: cors` alone says nothing: clients that are no browsers send it (Qwen Code).
    """
    host = _once(headers, "host")
    address = _LOOPBACK.fullmatch(host)
    if address is None and not door.is_socket:
        raise Fault("forbidden", "the Host header must be localhost, 127.0.0.1 or [::1]")
    if "origin" in headers:
        scheme, _, rest = _once(headers, "origin").partition("://")
        origin = _LOOPBACK.fullmatch(rest)
        if scheme != "http" or origin is None or address is None:
            raise Fault("forbidden", "web pages may not ask edgekv")
        if (origin[1] or _PORT) != (address[1] or _PORT):
            raise Fault("forbidden", "pages of another port may not ask edgekv")
    if _once(headers, "sec-fetch-site") == "cross-site":
        raise Fault("forbidden", "web pages may not ask edgekv")


def identify(door: Door, headers: Headers, apps: AppsFile) -> Identity:
    """Which app asks. Raises Fault, AppsUnusable.

    A key decides, wherever it is shown. At the socket, SDKs that will not go without a key send
    anything: what is not of the form of ours is as if it were not there.
    """
    if door.app:
        return _by_name(door.app, apps)
    keys = _keys(headers)
    for key in keys:
        if entry := apps.find(key):
            return Identity(app=entry.name, entry=entry, is_user=door.is_socket)
    if not door.is_socket or any(key.startswith(KEY_PREFIX) for key in keys):
        what = "this key is not known" if keys else "a key is missing"
        raise Fault(
            "unauthorized",
            f"{what}: make one with `edgekv apps add NAME`, and send it as "
            "`Authorization: Bearer KEY` or `x-api-key: KEY`",
            code="invalid_api_key",
        )
    return replace(_by_name(_app_header(headers), apps), is_user=True)


def _by_name(name: str, apps: AppsFile) -> Identity:
    entry = apps.entries().get(name)
    if entry is not None and entry.key_only:
        raise Fault(
            "unauthorized", f"the app {name} must show its key here, too", code="invalid_api_key"
        )
    return Identity(app=name, entry=entry)


def _app_header(headers: Headers) -> str:
    if APP_HEADER not in headers:
        return DEFAULT_APP
    try:  # Starlette gives each byte as a character
        return check_app_name(APP_HEADER, _once(headers, APP_HEADER).encode("latin-1").decode())
    except (ConfigError, UnicodeDecodeError):
        raise invalid(APP_HEADER, "the name of an app") from None


def _keys(headers: Headers) -> list[str]:
    """What is shown as a key; Anthropic's clients may send two."""
    scheme, _, bearer = _once(headers, "authorization").partition(" ")
    keys = [bearer.strip()] if scheme.lower() == "bearer" else []
    return [key for key in (*keys, _once(headers, "x-api-key")) if key]


def _once(headers: Headers, name: str) -> str:
    """A header's value, "" if it is not there; two of one name mean nobody knows what."""
    values = headers.getlist(name)
    if len(values) > 1:
        raise Fault("invalid", f"the header {name} comes {len(values)} times", param=name)
    return values[0] if values else ""
