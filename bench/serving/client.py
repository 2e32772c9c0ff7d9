"""An app that talks to a server: streamed chat completions over HTTP, as any client's."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

import httpx2

from edgekv.bench.figures import Stopwatch
from edgekv.bench.serving.stream import TIMED_OUT, Answer, StreamReader
from edgekv.bench.serving.traffic import AppTraffic
from edgekv.errors import ConfigError, EdgeKVError

Message = Mapping[str, str]
_MODELS_TIMEOUT_S = 60.0


class TargetFailed(EdgeKVError):
    """A server did not start, or does not answer at all."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a server listens."""

    name: str  # of the target, as it is called in the report
    url: str  # up to and with /v1
    model: str = ""  # what requests ask for; "" asks the server which one it has
    keys: Mapping[str, str] = field(default_factory=dict)  # by app, where it has no key of its own


def parse_target(text: str) -> Endpoint:
    """`NAME=URL`, `URL` or either with `#MODEL` behind it; URL may leave out `/v1`.

    Raises ConfigError: It is something else.
    """
    name, separator, rest = text.partition("=")
    if not separator or "/" in name:
        name, rest = "", text
    parts = urlsplit(rest)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ConfigError.of("target", text, "NAME=http://HOST:PORT, perhaps with #MODEL")
    path = parts.path.rstrip("/")
    return Endpoint(
        name=name or parts.netloc,
        url=f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else f'{path}/v1'}",
        model=parts.fragment,
    )


class Client:
    """Sends for several apps; use it as an async context manager.

    Every request has a connection if it needs one: a client that waits for its own connections
    would measure itself.
    """

    def __init__(self, endpoint: Endpoint, apps: Sequence[AppTraffic]) -> None:
        self._endpoint = endpoint
        self.model = endpoint.model  # as requests name it, known inside the block
        self._headers = {app.name: _headers(app, endpoint.keys) for app in apps}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=32)
        # Of this machine's proxy settings nothing is wanted between two processes on it.
        self._http = httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False)

    async def __aenter__(self) -> Self:
        try:
            self.model = self.model or await self._only_model()
        except EdgeKVError:
            await self._http.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def _only_model(self) -> str:
        url = f"{self._endpoint.url}/models"
        headers = next(iter(self._headers.values()))
        try:
            response = await self._http.get(url, headers=headers, timeout=_MODELS_TIMEOUT_S)
            response.raise_for_status()
            names = [str(model["id"]) for model in response.json()["data"]]
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise TargetFailed(
                f"{url}: {type(error).__name__}: {error}", hint="is the server running there?"
            ) from error
        if len(names) != 1:
            raise ConfigError(
                f"{self._endpoint.name} has {len(names)} models",
                hint=f"name one: --target {self._endpoint.name}={self._endpoint.url}#MODEL",
            )
        return names[0]

    async def ask(
        self, app: str, messages: Sequence[Message], max_tokens: int, timeout_s: float
    ) -> Answer:
        """Ask greedily for at most so many tokens; the answer says what went wrong, if anything."""
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        watch, reader, headers_ms, fault = Stopwatch(), StreamReader(), None, None
        url = f"{self._endpoint.url}/chat/completions"
        try:
            async with (
                asyncio.timeout(max(0.0, timeout_s)),
                self._http.stream("POST", url, json=body, headers=self._headers[app]) as response,
            ):
                headers_ms = watch.ms()
                if response.status_code == httpx2.codes.OK:
                    async for line in response.aiter_lines():
                        reader.take(line, watch.ms())
                else:
                    fault = f"HTTP {response.status_code}"
        except TimeoutError:
            fault = TIMED_OUT
        except httpx2.HTTPError as error:
            fault = None if reader.done else type(error).__name__
        return reader.answer(watch.ms(), headers_ms=headers_ms, fault=fault)


def _headers(app: AppTraffic, keys: Mapping[str, str]) -> dict[str, str]:
    headers: dict[str, str] = {"X-EdgeKV-Priority": app.priority}
    if key := keys.get(app.name, app.key):
        headers["Authorization"] = f"Bearer {key}"
    return headers
