"""edgekv's own protocol, for clients that are edgekv: all of the embedding API, over HTTP.

    GET   /edgekv/hello                what is served, and who asks
    POST  /edgekv/complete             {"asked": Completion, "aside": …}, or {place, "asked": …}
    POST  /edgekv/session/ask          {place, "text": …, "sampling": …, "raw": …, …}
    POST  /edgekv/session/prewarm      {place, "text": …}
    PUT   /edgekv/session/OPERATION    open, look, clear, suspend, close, list, knows, remove
    PUT   /edgekv/cancel               {"request": …}, and its stream goes on to its end

The place of a session is {"name": …, "token": …}, see `held`. What is POSTed computes, and counts
against the app's rate. It is answered by lines of JSON (`edgekv.chat.wire`), empty ones among them
while nothing happens:

    Begun  Progress*  (an event of `edgekv.chat.events`)*  Finished | Failed        of a completion
    Begun  Progress*  Delta*                               Reply    | Failed        of a turn

What cannot be answered is {"error": an error as it is written there}, so that the client raises it.
"""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgekv import __version__
from edgekv.chat import wire
from edgekv.chat.events import Begun, Failed, Finished, Progress, Usage
from edgekv.chat.values import ChatMessage, Completion
from edgekv.config import SamplingParams
from edgekv.engine.outbox import Delta
from edgekv.errors import (
    EdgeKVError,
    EngineFailed,
    PromptTooLong,
    QueueFull,
    RequestError,
    RuntimeClosed,
    ServeError,
)
from edgekv.runtime import App, AsyncReplyStream, Reply, Runtime, Session
from edgekv.runtime.completions import AsyncCompletionStream, abegin
from edgekv.runtime.reply import in_thread
from edgekv.server.answering import EventStream, Json, loaded_body, unless_gone
from edgekv.server.faults import fault_of
from edgekv.server.fields import Fault, FaultKind, Fields
from edgekv.server.held import HeldSessions, Place
from edgekv.server.metrics import Counting, Metrics
from edgekv.server.model import ServedModel
from edgekv.tokenizer.grammar import Grammar

PREFIX = "/edgekv/"
MEDIA_TYPE = "application/x-ndjson"
REQUEST_HEADER = "x-edgekv-request"
PROGRESS_S = 0.1  # between looks at how far a prompt got

AppOf = Callable[[Runtime, Request], App]
Stream = AsyncReplyStream | AsyncCompletionStream

# Of what the guard refuses, which knows no error of ours.
_KINDS: dict[FaultKind, type[EdgeKVError]] = {
    "invalid": RequestError,
    "context": PromptTooLong,
    "unauthorized": ServeError,
    "forbidden": ServeError,
    "not_found": ServeError,
    "too_large": RequestError,
    "overloaded": QueueFull,
    "internal": EngineFailed,
    "unavailable": RuntimeClosed,
}


def say(fault: Fault) -> dict[str, Any]:
    """A fault as this protocol says it."""
    return {"error": wire.dump(_KINDS[fault.kind](fault.message))}


@dataclass(kw_only=True)
class _Asked:
    """A request that is answered by lines: what is told, and how it is taken back."""

    stream: Stream
    told: AsyncGenerator[Any, None]
    counting: Counting
    request_id: str = field(default_factory=lambda: secrets.token_hex(16))


class Native:
    """The routes of the protocol. Owned by the server's loop."""

    def __init__(
        self, model: ServedModel, app_of: AppOf, metrics: Metrics, heartbeat_s: float
    ) -> None:
        self._model = model
        self._app_of = app_of
        self._metrics = metrics
        self._heartbeat_s = heartbeat_s
        self._sessions = HeldSessions(model)
        self._running: dict[tuple[str, str], Stream] = {}  # by app and request

    def routes(self) -> list[Route]:
        """All of them."""
        session = f"{PREFIX}session/"
        handlers: list[tuple[str, str, Callable[[App, Fields], Coroutine[Any, Any, Any]]]] = [
            ("PUT", f"{session}open", self._open),
            ("PUT", f"{session}look", self._look),
            ("PUT", f"{session}clear", self._clear),
            ("PUT", f"{session}suspend", self._suspend),
            ("PUT", f"{session}close", self._close),
            ("PUT", f"{session}list", self._list),
            ("PUT", f"{session}knows", self._knows),
            ("PUT", f"{session}remove", self._remove),
            ("POST", f"{session}prewarm", self._prewarm),
            ("PUT", f"{PREFIX}cancel", self._cancel),
            ("GET", f"{PREFIX}hello", self._hello),
        ]
        routes = [Route(path, self._plain(run), methods=[method]) for method, path, run in handlers]
        streams = {f"{PREFIX}complete": self._complete, f"{session}ask": self._ask}
        routes += [Route(p, self._streaming(run), methods=["POST"]) for p, run in streams.items()]
        return routes

    def _plain(
        self, run: Callable[[App, Fields], Coroutine[Any, Any, Any]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """One answer, unless the client goes away before."""

        async def answer(request: Request) -> Response:
            try:
                body = Fields(loaded_body(await request.body() or b"{}"))
                async with self._model.runtime() as runtime:
                    work = run(self._app_of(runtime, request), body)
                    return Json(await unless_gone(request, work))
            except EdgeKVError as error:
                return _error(error)

        return answer

    def _streaming(
        self, begin: Callable[[App, Fields, Counting], Awaitable[_Asked]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Lines, until the client is gone."""

        async def answer(request: Request) -> Response:
            try:
                body = Fields(loaded_body(await request.body()))
                async with contextlib.AsyncExitStack() as stack:
                    runtime = await stack.enter_async_context(self._model.runtime())
                    app = self._app_of(runtime, request)
                    asked = await self._begin(app, body, begin, stack)
                    lines = _lines(asked, self._heartbeat_s)
                    response = EventStream(lines, _last_line, MEDIA_TYPE, stack.pop_all())
                    response.headers[REQUEST_HEADER] = asked.request_id
                    return response
            except EdgeKVError as error:
                return _error(error)

        return answer

    async def _begin(
        self,
        app: App,
        body: Fields,
        begin: Callable[[App, Fields, Counting], Awaitable[_Asked]],
        stack: contextlib.AsyncExitStack,
    ) -> _Asked:
        counting = stack.enter_context(self._metrics.request(app.name, secrets.token_hex(16)))
        try:
            asked = await begin(app, body, counting)
        except EdgeKVError as error:
            counting.failed(error)
            raise
        stack.push_async_callback(asked.stream.aclose)
        key = app.name, asked.request_id
        self._running[key] = asked.stream
        stack.callback(self._running.pop, key)
        return asked

    # --- what computes ---

    async def _complete(self, app: App, body: Fields, counting: Counting) -> _Asked:
        asked = wire.load(Completion, body.raw("asked"), "asked")
        if body.has("name"):
            session = await self._session(app, body)
            stream = AsyncCompletionStream(await abegin(lambda: session._begin(asked)))
        else:
            stream = await app.astream(asked, aside=body.flag("aside"))
        return _Asked(stream=stream, told=_events(stream), counting=counting)

    async def _ask(self, app: App, body: Fields, counting: Counting) -> _Asked:
        session = await self._session(app, body)
        sampling = wire.load(SamplingParams | None, body.raw("sampling"), "sampling")
        stream = await session.astream(
            body.text("text"),
            sampling=sampling,
            raw=body.flag("raw"),
            prefill=body.raw("prefill"),
            confirmed=body.flag("confirmed"),
            grammar=wire.load(Grammar | None, body.raw("grammar"), "grammar"),
        )
        return _Asked(stream=stream, told=_deltas(stream), counting=counting)

    async def _prewarm(self, app: App, body: Fields) -> dict[str, Any]:
        session = await self._session(app, body)
        await session.aprewarm(body.raw("text"))
        return {}

    async def _cancel(self, app: App, body: Fields) -> dict[str, Any]:
        stream = self._running.get((app.name, body.text("request")))
        if stream is not None:
            stream.cancel()
        return {}

    # --- sessions ---

    async def _session(self, app: App, body: Fields) -> Session:
        return await self._sessions.get(app, self._place(app, body))

    @staticmethod
    def _place(app: App, body: Fields) -> Place:
        return Place(app=app.name, name=body.text("name"), token=body.text("token", ""))

    async def _open(self, app: App, body: Fields) -> dict[str, Any]:
        name = wire.load(str | None, body.raw("name"), "name")
        system = wire.load(str | None, body.raw("system"), "system")
        place, session = await self._sessions.open(app, name, system)
        return {"name": session.name, "token": place.token}

    async def _look(self, app: App, body: Fields) -> dict[str, Any]:
        session = await self._session(app, body)
        return await in_thread(lambda: _facts(session))

    async def _clear(self, app: App, body: Fields) -> dict[str, Any]:
        session, system = await self._session(app, body), body.raw("system")
        await in_thread(lambda: session.clear(system=system))
        return {}

    async def _suspend(self, app: App, body: Fields) -> dict[str, Any]:
        session = await self._session(app, body)
        return {"num_tokens": await in_thread(session.suspend)}

    async def _close(self, app: App, body: Fields) -> dict[str, Any]:
        """Also its facts, as the last thing that its client sees of it."""
        session = await self._session(app, body)
        facts = await in_thread(lambda: _facts(session))
        await self._sessions.close(self._place(app, body))
        return facts

    async def _list(self, app: App, _body: Fields) -> dict[str, Any]:
        return {"sessions": wire.dump(await in_thread(app.sessions))}

    async def _knows(self, app: App, body: Fields) -> dict[str, Any]:
        name = body.text("name")
        return {"known": await in_thread(lambda: app.knows(name))}

    async def _remove(self, app: App, body: Fields) -> dict[str, Any]:
        name = body.text("name")
        return {"removed": await in_thread(lambda: app.remove(name))}

    # --- the daemon ---

    async def _hello(self, app: App, _body: Fields) -> dict[str, Any]:
        async with self._model.runtime() as runtime:
            return {
                "version": __version__,
                "model": self._model.name,
                "path": str(runtime.path),
                "context_max": runtime.context_max,
                "predicts": runtime.predicts,
                "keeps_sessions": runtime.keeps_sessions,
                "prefill": runtime.prefill,
                "app": app.name,
                "priority": app.priority,
                "weight": app.weight,
                "pinned_bytes": app.pinned_bytes,
            }


def _facts(session: Session) -> dict[str, Any]:
    facts = {
        "messages": session.messages,
        "last_reply": session.last_reply,
        "system": session.system,
        "kept": session.kept,
        "warning": session.warning,
        "busy": session.busy,
    }
    return {name: wire.dump(value) for name, value in facts.items()}


# --- lines ---


async def _events(stream: AsyncCompletionStream) -> AsyncGenerator[Any, None]:
    async for event in stream:
        yield event


async def _deltas(stream: AsyncReplyStream) -> AsyncGenerator[Any, None]:
    """Deltas and the reply, after what others took in who waited for the end of this request."""
    yield Begun(num_prompt=stream.prefill_progress[1])
    told, num_ids, num_logprobs = "", 0, 0
    async for delta in stream:
        told = told[: len(told) - delta.retract] + delta.text
        num_ids, num_logprobs = num_ids + len(delta.token_ids), num_logprobs + len(delta.logprobs)
        yield delta
    reply = stream.reply
    assert reply is not None
    if told != reply.text or num_ids < len(reply.token_ids):
        yield Delta(
            text=reply.text,
            retract=len(told),
            token_ids=reply.token_ids[num_ids:],
            logprobs=reply.logprobs[num_logprobs:],
        )
    yield reply


async def _lines(asked: _Asked, heartbeat_s: float) -> AsyncGenerator[str, None]:
    """What happens, a line each; at last what failed."""
    async with contextlib.aclosing(_noticed(asked, heartbeat_s)) as noticed:
        try:
            async for value in noticed:
                if isinstance(value, Reply):
                    asked.counting.saw(_as_event(value))
                elif isinstance(value, Finished):
                    asked.counting.saw(value)
                yield "\n" if value is None else _line(value)
        except EdgeKVError as error:
            asked.counting.failed(error)
            yield _line(Failed(error=error))


async def _noticed(asked: _Asked, heartbeat_s: float) -> AsyncGenerator[Any, None]:
    """What is told, and progress beside it; None when nothing happened for a while."""
    progress, silent_since_s = (0, 0), time.monotonic()
    coming: asyncio.Task[Any] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(asked.told, _END))
            await asyncio.wait({coming}, timeout=min(PROGRESS_S, heartbeat_s))
            if coming.done():
                value, coming = coming.result(), None
                if value is _END:
                    return
            elif asked.stream.prefill_progress != progress:
                progress = asked.stream.prefill_progress
                value = Progress(num_done=progress[0], num_prompt=progress[1])
            elif time.monotonic() - silent_since_s >= heartbeat_s:
                value = None
            else:
                continue
            silent_since_s = time.monotonic()
            yield value
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await asked.told.aclose()


_END: Any = object()


def _last_line(fault: Fault) -> str:
    return _line(Failed(error=_KINDS[fault.kind](fault.message)))


def _line(value: object) -> str:
    return json.dumps(wire.dump(value)) + "\n"


def _as_event(reply: Reply) -> Finished:
    """A turn's end as that of a completion, to be counted."""
    stats = reply.stats
    usage = Usage(
        num_prompt=stats.num_prompt_tokens,
        num_cached=stats.num_cached_tokens,
        num_output=stats.num_output_tokens,
    )
    message = ChatMessage(role="assistant")
    return Finished(reason=reply.finish_reason, message=message, usage=usage, stats=stats)


def _error(error: EdgeKVError) -> Response:
    fault = fault_of(error)
    headers = {} if fault.retry_after_s is None else {"retry-after": str(fault.retry_after_s)}
    return Json({"error": wire.dump(error)}, status_code=fault.status, headers=headers)
