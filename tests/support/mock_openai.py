"""A server that speaks chat completions and does what a script says: waits, fails, ends early."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Ending = Literal["whole", "cut", "no finish", "no done", "error event", "malformed", "never"]


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How one request is answered."""

    status: int = 200
    headers_s: float = 0.0  # before the headers
    first_s: float = 0.0  # from the opening event to the first text
    gap_s: float = 0.0  # between texts
    num_texts: int = 3
    ending: Ending = "whole"


@dataclass(frozen=True)
class Seen:
    """A request that came."""

    at_s: float
    key: str | None
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        return [message["content"] for message in self.body["messages"]]


class MockOpenAI:
    """Listens on `url` as long as `serving` lasts."""

    def __init__(self, behave: Callable[[dict[str, Any]], Behaviour], models: list[str]) -> None:
        self.url = ""
        self.seen: list[Seen] = []
        self.num_gone = 0  # clients that left before the end
        self._behave = behave
        self._models = models

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._list_models),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
            ]
        )

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": name} for name in self._models]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        headers = dict(request.headers)
        key = headers.get("authorization", "").removeprefix("Bearer ") or None
        self.seen.append(Seen(time.monotonic(), key, headers, body))
        behaviour = self._behave(body)
        await asyncio.sleep(behaviour.headers_s)
        if behaviour.status != 200:
            return JSONResponse({"error": {"message": "no"}}, status_code=behaviour.status)
        return StreamingResponse(self._stream(body, behaviour), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], behaviour: Behaviour) -> AsyncIterator[str]:
        try:
            yield ": a comment\n\n"
            yield _event(choices=[{"delta": {"role": "assistant", "content": ""}}])
            await asyncio.sleep(behaviour.first_s)
            for number in range(behaviour.num_texts):
                if number:
                    await asyncio.sleep(behaviour.gap_s)
                yield _event(choices=[{"delta": {"content": f"word{number} "}}])
        except asyncio.CancelledError:
            self.num_gone += 1
            raise
        for part in _end(body, behaviour):
            yield part
        if behaviour.ending == "never":
            await asyncio.sleep(60.0)
        if behaviour.ending == "cut":
            raise ConnectionResetError


def _end(body: dict[str, Any], behaviour: Behaviour) -> Iterator[str]:
    num_chars = sum(len(message["content"]) for message in body["messages"])
    usage = {
        "prompt_tokens": 10 + num_chars // 4,
        "completion_tokens": behaviour.num_texts,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    match behaviour.ending:
        case "never" | "cut":
            return
        case "error event":
            yield _event(error={"type": "overloaded", "message": "no"})
        case "malformed":
            yield "data: {not json\n\n"
    if behaviour.ending != "no finish":
        yield _event(choices=[{"delta": {}, "finish_reason": "length"}])
    yield _event(choices=[], usage=usage)
    if behaviour.ending != "no done":
        yield "data: [DONE]\n\n"


def _event(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


@contextmanager
def serving(
    behave: Callable[[dict[str, Any]], Behaviour] = lambda body: Behaviour(),
    models: list[str] | None = None,
) -> Iterator[MockOpenAI]:
    """A server in a thread, which answers each request as `behave` says of its body."""
    mock = MockOpenAI(behave, models or ["mock-model"])
    config = uvicorn.Config(mock.app(), port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        mock.url = f"http://127.0.0.1:{port}"
        yield mock
    finally:
        server.should_exit = True
        thread.join(10.0)
        assert not thread.is_alive()
