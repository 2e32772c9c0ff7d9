"""A daemon's HTTP side before a runtime that only has figures: for tests of what is shown."""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2

from edgekv.chat.events import Begun, Finished, TextDelta, Usage
from edgekv.chat.values import ChatMessage
from edgekv.config import Sampling
from edgekv.engine.ledger import EngineCounters
from edgekv.engine.swap import SwapCounters
from edgekv.kv.layout import PoolSnapshot
from edgekv.metrics import AppUsage, Stats
from edgekv.server.access import Doors
from edgekv.server.guard import Guard
from edgekv.server.keys import AppsFile
from edgekv.server.metrics import Metrics
from edgekv.server.model import ServedModel
from edgekv.server.service import Service, say_bytes
from edgekv.store import StoreSnapshot

GIB = 1 << 30
ORIGIN = "http://127.0.0.1:8642"
SAID = "what nobody else may read"


class FigureRuntime:
    """As much of a runtime as its figures."""

    def __init__(self, **usage: AppUsage) -> None:
        self.by_app = usage
        self.service_ms: dict[str, float] = {}
        self.error: Exception | None = None

    def usage(self):
        if self.error is not None:
            raise self.error
        return dict(self.by_app)

    def counters(self):
        return EngineCounters(swap=SwapCounters(num_swap_outs=3), service_ms=self.service_ms)

    def pool_snapshot(self):
        return PoolSnapshot(
            budget_bytes=4 * GIB, used_bytes=GIB, free_bytes=GIB // 2, peak_bytes=3 * GIB
        )

    def store_snapshot(self):
        return StoreSnapshot(
            budget_bytes=20 * GIB, root_bytes=5 * GIB, total_written_bytes=12 * GIB, num_sessions=9
        )


def usage(waiting=0, running=0, **figures) -> AppUsage:
    return AppUsage(
        num_waiting=Counter(interactive=waiting),
        num_running=Counter(interactive=running),
        **figures,
    )


def stats(**figures) -> Stats:
    known = dict.fromkeys(Stats.__annotations__, 0)
    known |= {"prefill_mode": "exact", "sampling": Sampling(), "repair_agreement": None}
    return Stats(**{**known, "ttft_ms": None, "ttft_confirmed_ms": None, **figures})


def finished(reason="stop", **figures) -> Finished:
    told = stats(**figures)
    return Finished(
        reason=reason,
        message=ChatMessage(role="assistant", content=SAID),
        usage=Usage(
            num_prompt=told.num_prompt_tokens,
            num_cached=told.num_cached_tokens,
            num_output=told.num_output_tokens,
        ),
        stats=told,
    )


def play(metrics: Metrics, app: str, **figures) -> None:
    """A request of an app, from its beginning to its end."""
    with metrics.request(app, "0" * 32) as counting:
        counting.saw(Begun(num_prompt=figures.get("num_prompt_tokens", 0)))
        counting.saw(TextDelta(text=SAID))
        counting.saw(finished(**figures))


SOCKET = "/run/edgekv.sock"


class World:
    """A service behind its guard, asked without sockets as if over one or over a port."""

    def __init__(self, folder, runtime=None, origin=ORIGIN) -> None:
        self.metrics = Metrics()
        self.apps = AppsFile(folder / "apps.json")
        self.model = ServedModel("tiny", lambda: None, None)
        self.model._runtime = runtime
        service = Service(self.model, metrics=self.metrics, heartbeat_s=10.0, origin=origin)
        doors = Doors(socket_path=SOCKET)
        self.guard = Guard(service.application(), apps=self.apps, say=say_bytes, doors=doors)

    def ask(self, method, url, *, socket=False, **options) -> httpx2.Response:
        async def application(scope, receive, send):
            server = (SOCKET, None) if socket else scope["server"]
            await self.guard({**scope, "server": server, "state": {}}, receive, send)

        async def asked():
            transport = httpx2.ASGITransport(app=application)
            async with httpx2.AsyncClient(transport=transport, base_url=ORIGIN) as client:
                return await client.request(method, url, **options)

        with ThreadPoolExecutor(1) as thread:  # where no loop runs
            return thread.submit(asyncio.run, asked()).result()

    def get(self, url, **options) -> httpx2.Response:
        return self.ask("GET", url, **options)

    def with_key(self, name, url) -> httpx2.Response:
        """Asked by an app at the port."""
        key = self.apps.add(name) if name not in self.apps.entries() else self._keys[name]
        self._keys = getattr(self, "_keys", {}) | {name: key}
        return self.get(url, headers={"authorization": f"Bearer {key}"})

    def invited(self) -> str:
        """The address that the socket gives."""
        answer = self.ask("POST", "/edgekv/page", socket=True)
        assert answer.status_code == 200
        return answer.json()["address"]

    def entered(self) -> SimpleNamespace:
        """What a browser has that came in: where the page is, and the cookie."""
        answer = self.get(self.invited())
        assert answer.status_code == 303
        return SimpleNamespace(
            path=answer.headers["location"],
            cookie=answer.headers["set-cookie"],
            headers={"cookie": answer.headers["set-cookie"].partition(";")[0]},
        )
