"""HTTP to one daemon, on a thread of its own: any thread may ask, and wait, from a loop or not."""

import asyncio
import contextlib
import json
import threading
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx2

from edgekv.chat import wire
from edgekv.config import names_a_file, user_path
from edgekv.errors import ConfigError, DaemonGone, EdgeKVError, RuntimeClosed, ServeError
from edgekv.process import Home
from edgekv.server.keys import socket_path

T = TypeVar("T")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONNECT_S = 10.0  # of a socket or a port of this machine
GOODBYE_S = 2.0  # for what is still to be said when it ends
REQUEST_HEADER = "x-edgekv-request"
_OTHER = "it is no daemon of edgekv's, or one of another version"


class Reader(Protocol):
    """Who gets the lines of an answer, after the first, on the link's thread."""

    def take(self, line: dict[str, Any]) -> bool:
        """Take one in; whether it was the last. Raises ConfigError: it is none."""

    def fail(self, error: EdgeKVError) -> None:
        """There will be no last one."""


class Link:
    """One daemon, by its Unix socket or its port; see `edgekv.server.native` for what is said.

    Nothing is timed out: a daemon that is asked much may let one wait for long, and one that has
    ended ends its connections.
    """

    def __init__(self, where: str | Path | None, key: str | None) -> None:
        """`where` is a path, the URL of a port, or None: the usual socket. Raises ConfigError."""
        self.where, transport = _transport(where)
        self.home = Home(self)
        headers = {} if key is None else {"authorization": f"Bearer {_checked_key(key)}"}
        self._client = httpx2.AsyncClient(
            transport=transport,
            base_url=self.where if transport is None else "http://localhost",
            headers=headers,
            timeout=httpx2.Timeout(None, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=8),
            trust_env=False,
        )
        self._telling: set[asyncio.Task[None]] = set()
        self._reading: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()  # of who asks, and who closes
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(
            target=_run,
            args=[self._loop, self._client, self._telling],
            name="edgekv-link",
            daemon=True,
        )
        thread.start()
        self._end = weakref.finalize(self, _stop, self._loop, thread)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._end.alive

    def close(self) -> None:
        """End it, and what is being answered over it. Closing twice is nothing."""
        if self.home.is_here:
            with self._lock:
                self._end()

    def call(self, method: str, path: str, body: Any = None, *, app: str | None = None) -> Any:
        """Ask for something, and wait for it. Raises what the daemon raises, DaemonGone."""
        return self._wait(self._call(method, path, body, app))

    def post(self, path: str, body: Any, *, app: str) -> None:
        """Tell it something; waits for nothing, and nobody hears what comes of it."""

        def begin() -> None:
            _keep(self._telling, self._loop.create_task(self._told(path, body, app)))

        if not self.closed and self.home.is_here:
            with contextlib.suppress(RuntimeError):  # it is being closed
                self._loop.call_soon_threadsafe(begin)

    def begin(
        self, path: str, body: Any, *, app: str, reader: Reader
    ) -> tuple[str, dict[str, Any]]:
        """Ask for what is answered by lines, and wait until the daemon has taken the request.

        Args:
            path: Of what answers so.
            body: What is asked.
            app: Who asks.
            reader: Gets the answer.

        Returns:
            The request's name at the daemon, and the first line.
        """
        return self._wait(self._begin(path, body, app, reader))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        self.home.check()
        with self._lock:
            if self.closed:
                work.close()
                raise _closed()
            future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:  # by another thread, which closed it
            raise _closed() from None
        except BaseException:
            future.cancel()  # an interrupt's, too
            raise

    async def _call(self, method: str, path: str, body: Any, app: str | None) -> Any:
        request = self._request(method, path, body, app)
        with self._transport_errors():
            response = await self._client.send(request)
        return _checked(response)

    async def _told(self, path: str, body: Any, app: str) -> None:
        with contextlib.suppress(EdgeKVError):
            await self._call("PUT", path, body, app)

    async def _begin(
        self, path: str, body: Any, app: str, reader: Reader
    ) -> tuple[str, dict[str, Any]]:
        request = self._request("POST", path, body, app)
        async with contextlib.AsyncExitStack() as stack:
            with self._transport_errors():
                response = await self._client.send(request, stream=True)
                stack.push_async_callback(response.aclose)
                if response.status_code != httpx2.codes.OK:
                    await response.aread()
                    _checked(response)
                lines = response.aiter_lines()
                first = await _next_line(lines)
            held = stack.pop_all()
        _keep(self._reading, self._loop.create_task(self._read(lines, held, reader)))
        return response.headers[REQUEST_HEADER], first

    async def _read(
        self, lines: AsyncIterator[str], held: contextlib.AsyncExitStack, reader: Reader
    ) -> None:
        """Lines of an answer, up to the last."""
        async with held:
            try:
                with self._transport_errors():
                    while not reader.take(await _next_line(lines)):
                        pass
            except EdgeKVError as error:
                reader.fail(error)
            except asyncio.CancelledError:
                reader.fail(_closed())
                raise

    def _request(self, method: str, path: str, body: Any, app: str | None) -> httpx2.Request:
        headers = {} if app is None else {b"x-edgekv-app": app.encode("utf-8", "replace")}
        content = None if body is None else json.dumps(body).encode()
        return self._client.build_request(method, path, content=content, headers=headers)

    @contextlib.contextmanager
    def _transport_errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            raise DaemonGone(f"no daemon listens at {self.where}") from None
        except (httpx2.TransportError, httpx2.StreamError):
            raise DaemonGone(f"the daemon at {self.where} ended before it had answered") from None


async def _next_line(lines: AsyncIterator[str]) -> dict[str, Any]:
    """The next one that says something."""
    async for line in lines:
        if line:
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    return value
            raise ServeError("the daemon says what no daemon says", hint=_OTHER)
    raise httpx2.ReadError("the stream ended without its last line")


def _checked(response: httpx2.Response) -> Any:
    """An answer's JSON. Raises what it says went wrong."""
    try:
        body = response.json()
        if response.is_success:
            return body
        error = wire.load(EdgeKVError, body["error"])
    except (ValueError, KeyError, TypeError, ConfigError):
        what = f"{response.request.method} {response.request.url.path}"
        raise ServeError(
            f"who listens there says {response.status_code} to {what}", hint=_OTHER
        ) from None
    raise error


def _keep(tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _closed() -> RuntimeClosed:
    return RuntimeClosed("the connection was closed", hint="edgekv.connect opens another")


def _transport(
    where: str | Path | None,
) -> tuple[str, httpx2.AsyncHTTPTransport | None]:
    """Where it is, and how it is spoken to, if that is no port."""
    is_url = False
    if isinstance(where, str) and (is_url := "://" in where):
        with contextlib.suppress(httpx2.InvalidURL):
            url = httpx2.URL(where)
            if url.scheme == "http" and url.host in LOOPBACK:
                return where, None
    if is_url or not (where is None or names_a_file(where)):
        raise ConfigError.of("where", where, "a socket's path, http://127.0.0.1:PORT or None")
    path = socket_path() if where is None else user_path(where)
    return str(path), httpx2.AsyncHTTPTransport(uds=str(path))


def _checked_key(key: object) -> str:
    if not isinstance(key, str) or not key.isascii() or not key.isprintable() or not key:
        raise ConfigError("key is no key", hint="it is what edgekv apps add printed")
    return key


def _run(
    loop: asyncio.AbstractEventLoop, client: httpx2.AsyncClient, telling: set[asyncio.Task[None]]
) -> None:
    """The link's thread; what was to be told is told before it ends."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(_say_goodbye(client, telling))
    finally:
        loop.close()


async def _say_goodbye(client: httpx2.AsyncClient, telling: set[asyncio.Task[None]]) -> None:
    if telling:
        await asyncio.wait(telling, timeout=GOODBYE_S)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.aclose()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():
        thread.join(2 * GOODBYE_S)
