"""The page: what every app has and does, for the person whose machine it is; never what is said.

Rendered here, and again in parts for its script, which puts them in place every two seconds. Who
may see it is told by `visitors`; all others see how to get in, and nothing of any app.
"""

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from edgekv.chat.events import EndReason
from edgekv.server.access import LIVE_PATH
from edgekv.server.fields import Fault
from edgekv.server.metrics import RECENT_MAX, Metrics
from edgekv.server.model import ServedModel
from edgekv.server.visitors import PASS_MS, Visitors

COOKIE = "edgekv"
PARTS = ("now", "apps", "recent")  # templates, and elements of the page
NUM_REQUESTS_SHOWN = 40
NUM_APPS_SHOWN = 60
_HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
# Everything is on the page itself; the script may ask this server alone.
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Page:
    """The page and who sees it. Owned by the server's loop."""

    def __init__(
        self, model: ServedModel, metrics: Metrics, visitors: Visitors, origin: str | None
    ) -> None:
        """`origin` is where browsers find it, as "http://127.0.0.1:8642"."""
        self._model = model
        self._metrics = metrics
        self._visitors = visitors
        self._origin = origin
        self._started_s = time.time()

    def routes(self) -> list[Route]:
        """What can be asked of it."""
        return [
            Route("/", self._door, methods=["GET"]),
            Route("/edgekv/page", self._invite, methods=["POST"]),
            Route(LIVE_PATH + "{place}", self._page, methods=["GET"]),
            Route(LIVE_PATH + "{place}/figures", self._figures, methods=["GET"]),
        ]

    async def _invite(self, request: Request) -> Response:
        """An address that lets in once; for who is at the socket, and so is this user."""
        if not request.scope["state"]["identity"].is_user:
            raise Fault("forbidden", "who may see all apps asks at the socket: edgekv ps --page")
        if self._origin is None:
            raise Fault("not_found", "no browser reaches this daemon: it listens at no port")
        address = f"{self._origin}/?token={self._visitors.invite()}"
        return JSONResponse({"address": address}, headers=_HEADERS)

    async def _door(self, request: Request) -> Response:
        """In, with such an address; else how to get one."""
        token = request.query_params.get("token")
        if token is None or request.method == "HEAD":
            return _html("door.html", 200, is_late=False)
        admitted = self._visitors.admit(token)
        if admitted is None:
            return _html("door.html", 403, is_late=True)
        path = LIVE_PATH + admitted.place
        response = RedirectResponse(path, status_code=303, headers=_HEADERS)
        response.set_cookie(
            COOKIE,
            admitted.cookie,
            max_age=int(PASS_MS / 1e3),
            path=path,
            httponly=True,
            samesite="strict",
        )
        return response

    async def _page(self, request: Request) -> Response:
        if not self._may_see(request):
            return _html("door.html", 403, is_late=True)
        return _html("page.html", 200, **await self._view())

    async def _figures(self, request: Request) -> Response:
        """The page's parts by name, as HTML, and the time that they are of."""
        if not self._may_see(request):
            raise Fault("forbidden", "nobody sees this without the address that edgekv ps gives")
        view = await self._view()
        parts = {name: _TEMPLATES.get_template(f"{name}.html").render(view) for name in PARTS}
        return JSONResponse({"as_of": view["as_of"], "parts": parts}, headers=_HEADERS)

    def _may_see(self, request: Request) -> bool:
        cookie = request.cookies.get(COOKIE, "")
        return self._visitors.knows(request.path_params["place"], cookie)

    async def _view(self) -> dict[str, Any]:
        """What the template shows."""
        loaded = self._model.loaded
        status = await asyncio.to_thread(self._metrics.status, loaded, None)
        now_s = time.time()
        return view(status) | {
            "model": self._model.name,
            "is_loaded": loaded is not None,
            "now_s": now_s,
            "as_of": f"as of {clock(now_s)}, up {duration(1e3 * (now_s - self._started_s))}",
        }


def view(status: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a daemon's status: who asks now first, and sums."""
    apps = sorted(status["apps"], key=_activity, reverse=True)
    tokens = {
        kind: sum(app["tokens"].get(kind, 0) for app in apps)
        for kind in ("predicted", "repaired", "retracted")
    }
    return {
        "usual_ends": get_args(EndReason),
        "apps": apps[:NUM_APPS_SHOWN],
        "num_more_apps": max(0, len(apps) - NUM_APPS_SHOWN),
        "running": [
            one | {"ttft_ms": None, "tbt_ms": None}
            for one in status["running"][:NUM_REQUESTS_SHOWN]
        ],
        "recent": status["recent"][:NUM_REQUESTS_SHOWN],
        "pool": status.get("pool"),
        "disk": status.get("disk"),
        "num_running": sum(app["num_running"] for app in apps),
        "num_waiting": sum(sum(app["num_waiting"].values()) for app in apps),
        "num_open": sum(app["num_open_sessions"] for app in apps),
        "num_stored": sum(app["num_stored_sessions"] for app in apps),
        "tokens": tokens,
    }


def _activity(app: Mapping[str, Any]) -> tuple[int, int, int]:
    return app["num_running"], app["num_recent"], app["num_open_sessions"]


def bars(values: Sequence[float]) -> str:
    """A path of one bar a value, the newest at the right, in 120 by 24: an SVG's `d`."""
    most = max([1e-9, *values])
    left = 2 * (RECENT_MAX - len(values))
    heights = [max(1.0, 24 * value / most) for value in values]
    return "".join(f"M{left + 2 * i} 24v-{h:.1f}h1.4v{h:.1f}z" for i, h in enumerate(heights))


def duration(ms: float | None) -> str:
    """Milliseconds as people say them."""
    if not ms:
        return "–"
    if ms < 999.5:
        return f"{ms:.0f} ms" if ms >= 9.95 else f"{ms:.1f} ms"
    seconds = ms / 1e3
    for most, unit_s, unit in ((100, 1, "s"), (6000, 60, "min"), (360_000, 3600, "h")):
        if seconds < most:
            return f"{seconds / unit_s:.{0 if seconds >= 10 * unit_s else 1}f} {unit}"
    return f"{seconds / 86400:.0f} d"


def size(num_bytes: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def clock(time_s: float) -> str:
    """The time of day where the daemon is."""
    return time.strftime("%H:%M:%S", time.localtime(time_s))


def percent(part: float, whole: float) -> int:
    """So many hundredths; 0 of nothing."""
    return round(100 * min(1.0, part / whole)) if whole else 0


def _html(name: str, status: int, **view: Any) -> Response:
    nonce = secrets.token_urlsafe(16)
    content = _TEMPLATES.get_template(name).render(nonce=nonce, **view)
    headers = _HEADERS | {"content-security-policy": _POLICY.format(nonce=nonce)}
    return HTMLResponse(content, status_code=status, headers=headers)


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "page"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals |= {"percent": percent}
_TEMPLATES.filters |= {
    "bars": bars,
    "clock": clock,
    "duration": duration,
    "number": lambda number: f"{number:,}",
    "size": size,
}
