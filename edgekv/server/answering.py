"""One request from its JSON to the last byte of its answer, whatever the dialect.

What is wrong with a request is said before anything was sent; from then on a stream is kept alive
by its dialect's heartbeats, also while it queues, and always ends with the dialect's last event.
Who is gone is noticed at once: their request is taken back, which ends it at the next chunk.
"""

import asyncio
import contextlib
import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from edgekv.chat.events import Event, Finished
from edgekv.chat.values import Completion
from edgekv.config import PREFILL_MODES, PRIORITIES
from edgekv.errors import EdgeKVError, RuntimeClosed
from edgekv.runtime import App, Runtime
from edgekv.runtime.completions import AsyncCompletionStream
from edgekv.server.access import AGENT_HEADER, SESSION_HEADERS
from edgekv.server.dialect import About, Asked, Dialect, Writer
from edgekv.server.faults import fault_of
from edgekv.server.fields import Fault, Fields, invalid
from edgekv.server.metrics import Counting, Metrics
from edgekv.server.model import ServedModel

T = TypeVar("T")

HEARTBEAT_S = 10.0  # clients give up after 300 s without a sign
BESIDE_BYTES_MIN = 1 << 18  # a body from which on reading it would hold others up

Item = tuple[int, Event | None]  # None: nothing happened for a while


class Answering:
    """Answers of a model's apps. Owned by the server's loop."""

    def __init__(self, metrics: Metrics, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._metrics = metrics
        self._heartbeat_s = heartbeat_s
        self._running: dict[object, AsyncCompletionStream] = {}  # of named conversations, by what

    async def answer(
        self,
        request: Request,
        model: ServedModel,
        app_of: Callable[[Runtime, Request], App],
        dialect: Dialect,
        asked: Asked,
    ) -> Response:
        """Answer what is asked. Raises Fault before anything was sent."""
        asked = replace(asked, model=asked.model or model.name)
        about = About(request_id=secrets.token_hex(16), created_s=int(time.time()))
        async with contextlib.AsyncExitStack() as stack:
            app = app_of(await stack.enter_async_context(model.runtime()), request)
            counting = stack.enter_context(self._metrics.request(app.name, about.request_id))
            streams = await self._begin(app, asked, counting)
            for stream in streams:
                stack.push_async_callback(stream.aclose)
            items = _merged(streams, self._heartbeat_s)
            if asked.stream:
                writer = dialect.writer(asked, about)
                pieces = self._written(writer, items, counting)
                return EventStream(pieces, writer.fail, dialect.media_type, stack.pop_all())
            ends = await unless_gone(request, _ends(items, counting, len(streams)))
            return Json(dialect.whole(asked, about, ends))

    async def _begin(
        self, app: App, asked: Asked, counting: Counting
    ) -> list[AsyncCompletionStream]:
        """Ask each of the answers; all or none."""
        streams: list[AsyncCompletionStream] = []
        try:
            for index in range(asked.num_answers):
                completion = asked.completion
                seed = completion.sampling.seed
                if index and seed is not None:
                    completion = completion.with_sampling(seed=(seed + index) % (1 << 64))
                streams.append(await self._begin_one(app, completion, aside=index > 0))
        except BaseException as error:
            for stream in streams:
                await stream.aclose()
            if isinstance(error, EdgeKVError):
                counting.failed(error)
                raise fault_of(error) from error
            raise
        return streams

    async def _begin_one(
        self, app: App, completion: Completion, *, aside: bool
    ) -> AsyncCompletionStream:
        """Ask it. The same, asked in a named conversation while it still runs, is a retry."""
        if aside or not completion.session_key:
            return await app.astream(completion, aside=aside)
        key = (app.name, completion)
        if (before := self._running.pop(key, None)) is not None:
            await before.aclose()
        stream = self._running[key] = await app.astream(completion)
        if len(self._running) > 64:
            self._running = {k: s for k, s in self._running.items() if s.finished is None}
        return stream

    async def _written(
        self, writer: Writer, items: AsyncGenerator[Item, None], counting: Counting
    ) -> AsyncGenerator[str, None]:
        """The answer's events as text of the dialect."""
        yield writer.begin()
        try:
            async with contextlib.aclosing(items):  # whoever leaves here leaves there
                async for choice, event in items:
                    counting.saw(event)
                    if isinstance(event, Finished) and event.reason == "cancelled":
                        raise _cancelled()  # no API has a word for it among its good ends
                    yield writer.heartbeat() if event is None else writer.event(event, choice)
        except EdgeKVError as error:
            counting.failed(error)
            yield writer.fail(fault_of(error))
        else:
            yield writer.end()


async def fields_of(request: Request) -> Fields:
    """A request's body; a long one is read beside the loop. Raises Fault."""
    body = await request.body()
    beside = len(body) >= BESIDE_BYTES_MIN
    return Fields(await asyncio.to_thread(loaded_body, body) if beside else loaded_body(body))


async def read(
    request: Request, dialect: Dialect, fields: Fields, aside: Mapping[str, Any]
) -> Asked:
    """What a request asks, by its body and by what was `said_aside`. Raises Fault."""
    beside, parse = len(await request.body()) >= BESIDE_BYTES_MIN, dialect.parse
    asked = await asyncio.to_thread(parse, fields) if beside else parse(fields)
    return replace(asked, completion=replace(asked.completion, **aside))


class Json(JSONResponse):
    """An answer that may say again what its client sent, which may be no Unicode text."""

    def render(self, content: Any) -> bytes:
        """Its bytes; a lone surrogate becomes a question mark, as in streams."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


def loaded_body(body: bytes) -> Any:
    """A body's JSON. Raises Fault."""
    try:
        return json.loads(body, parse_constant=_finite, parse_float=_finite)
    except UnicodeDecodeError:
        raise Fault("invalid", "the body is not UTF-8") from None
    except RecursionError:
        raise Fault("invalid", "the body is nested too deeply") from None
    except ValueError as error:
        raise Fault("invalid", f"the body is no JSON: {error}") from None


def _finite(text: str) -> float:
    """A number of JSON, which has neither NaN nor infinity: no answer could say them again."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def said_aside(request: Request, body: Fields) -> dict[str, Any]:
    """Fields of a completion that headers say, or fields of ours in the body (`extra_body`).

    Raises Fault.
    """
    headers = request.headers
    own = body.mapping("edgekv") or Fields({}, "edgekv")
    named = [headers[name] for name in SESSION_HEADERS if headers.get(name)]
    cached = body.text("prompt_cache_key", "")
    key = own.text("session", "") or (named[0] if named else cached)
    if AGENT_HEADER in headers:
        key += f"/{headers[AGENT_HEADER]}"
    return {
        "session_key": key,
        "priority": _chosen(request, own, "priority", PRIORITIES),
        "prefill": _chosen(request, own, "prefill", PREFILL_MODES),
    }


def _chosen(request: Request, own: Fields, name: str, allowed: Sequence[str]) -> Any:
    """The header's, or else the body's."""
    header = f"x-edgekv-{name}"
    said = {header: request.headers.get(header) or None, own.path(name): own.raw(name)}
    for where, value in said.items():
        if value not in (None, *allowed):
            raise invalid(where, " or ".join(allowed))
    return next((value for value in said.values() if value is not None), None)


async def _merged(
    streams: Sequence[AsyncCompletionStream], heartbeat_s: float
) -> AsyncGenerator[Item, None]:
    """What happens in all of them, in order; whoever leaves takes all of them back."""
    queue: asyncio.Queue[Item | Exception] = asyncio.Queue()

    async def pump(choice: int, stream: AsyncCompletionStream) -> None:
        try:
            async for event in stream:
                queue.put_nowait((choice, event))
        except Exception as error:  # noqa: BLE001 - whoever waits hears of it, whatever it is
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    num_running = len(tasks)
    try:
        while num_running:
            try:
                # wait_for loses a cancellation that comes with an item, before Python 3.12.
                async with asyncio.timeout(heartbeat_s):
                    item = await queue.get()
            except TimeoutError:
                yield 0, None
                continue
            if isinstance(item, Exception):
                raise item
            if isinstance(item[1], Finished):
                num_running -= 1
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _ends(
    items: AsyncGenerator[Item, None], counting: Counting, num_answers: int
) -> list[Finished]:
    """How each of the answers ended. Raises Fault."""
    ends: dict[int, Finished] = {}
    try:
        async with contextlib.aclosing(items) as open_items:
            async for choice, event in open_items:
                counting.saw(event)
                if isinstance(event, Finished):
                    ends[choice] = event
    except EdgeKVError as error:
        counting.failed(error)
        raise fault_of(error) from error
    if any(end.reason == "cancelled" for end in ends.values()):
        raise fault_of(_cancelled())
    return [ends[choice] for choice in range(num_answers)]


def _cancelled() -> RuntimeClosed:
    return RuntimeClosed("the request was cancelled: the same was asked again, or its app closed")


def _ending() -> Fault:
    return Fault("unavailable", "the daemon is ending")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What comes of it, unless the client goes away before: then it is cancelled.

    Raises:
        Fault: The client is gone, and nobody will read this; or the daemon ends, and waits no more.
    """
    try:
        done = await _first(work, gone(request.receive))
    except asyncio.CancelledError:
        raise _ending() from None
    if done is None:
        raise Fault("unavailable", "the client went away")
    return done[0]


async def gone(receive: Receive) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(work: Awaitable[T], other: Awaitable[None]) -> tuple[T] | None:
    """What comes of the work, if that ends first; the other one is cancelled, and waited for."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(other)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return (tasks[0].result(),) if tasks[0].done() else None  # type: ignore[return-value]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Pieces of text as they come, until the client is gone.

    Starlette's own cancels who writes again and again until it ends; ours has to wait for the
    engine, once.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[str, None],
        fail: Callable[[Fault], str],
        media_type: str,
        held: contextlib.AsyncExitStack,
    ) -> None:
        """`fail` writes why no piece comes any more; `held` is let go of at the end."""
        super().__init__(
            media_type=media_type,
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        del self.headers["content-length"]
        self._pieces = pieces
        self._fail = fail
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send them."""
        start = {"status": self.status_code, "headers": self.raw_headers}
        async with self._held:
            await send({"type": "http.response.start", **start})
            try:
                await _first(self._send(send), gone(receive))
            except asyncio.CancelledError:  # the daemon ends, and waits no more
                await _send_piece(send, self._fail(_ending()), is_last=True)

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._pieces) as pieces:
            async for piece in pieces:
                if piece:
                    await _send_piece(send, piece)
        await _send_piece(send, "", is_last=True)


async def _send_piece(send: Send, piece: str, *, is_last: bool = False) -> None:
    body = piece.encode("utf-8", "replace")
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})
