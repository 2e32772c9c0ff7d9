"""What stands before every request: who asks, whether it may, and that it fits. ASGI middleware.

    web page? → head → who → too many? → body, whole → the application

The application finds who asks in `scope["state"]["identity"]` (None of what anybody may ask), and
the body in one piece: nothing of a request that is refused reaches it.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgekv.clock import Clock, MonotonicClock
from edgekv.server.access import Doors, Identity, check_no_web_page, identify, is_public
from edgekv.server.fields import Fault
from edgekv.server.keys import AppsFile
from edgekv.server.limits import Limits, Rates

# In a scope's state, of connections that are too many (`sockets.GuardedProtocol`).
IS_BEYOND = "is_beyond"

Say = Callable[[Fault, str], bytes]  # a fault, and the path that was asked for, to JSON


class Guard:
    """ASGI middleware. Owned by the daemon's event loop."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        apps: AppsFile,
        say: Say,
        doors: Doors | None = None,
        limits: Limits | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Stand before `app`.

        Raises AppsUnusable: the file of apps cannot be read.
        """
        self._app = app
        self._apps = apps
        self._say = say
        self._doors = doors or Doors()
        self._limits = limits or Limits()
        self._rates = Rates(clock or MonotonicClock())
        self._bodies = _Room(self._limits.bodies_bytes_max)
        apps.entries()  # while there is somebody to be told that it is damaged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have the application do it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        assert scope["type"] == "http", "no other protocol is spoken (sockets.uvicorn_settings)"
        scope.setdefault("state", {})
        with self._bodies.part() as part:
            try:
                scope["state"]["identity"] = self._admit(scope)
                messages = [await self._body(scope, receive, part)]
            except Fault as fault:
                await self._refuse(scope, send, fault)
                return
            except _Gone:
                return

            async def receive_whole() -> Message:  # and forgets it: answers may take minutes
                return messages.pop() if messages else await receive()

            async def send_freely(message: Message) -> None:
                part.give_back()  # who answers has read it
                await send(message)

            await self._app(scope, receive_whole, send_freely)

    def _admit(self, scope: Scope) -> Identity | None:
        """Who asks, by the request's head. Raises Fault."""
        headers = Headers(scope=scope)
        door = self._doors.of(scope)
        check_no_web_page(door, headers)
        self._check_head(scope)
        if scope["state"].get(IS_BEYOND):
            raise Fault("overloaded", "too many connections at once", retry_after_s=1)
        if is_public(scope["method"], scope["path"]):
            return None
        identity = identify(door, headers, self._apps)
        rate = identity.entry.rate_per_min if identity.entry else None
        if rate is not None and scope["method"] == "POST":
            wait_s = self._rates.take(identity.app, rate)
            if wait_s:
                message = f"{identity.app} may ask {rate} times a minute; try in {wait_s} s"
                raise Fault("overloaded", message, retry_after_s=wait_s)
        return identity

    def _check_head(self, scope: Scope) -> None:
        """Also what h11 lets through, which looks at the size of heads that are not whole yet."""
        headers, limits = scope["headers"], self._limits
        num_bytes = sum(len(name) + len(value) for name, value in headers)
        num_bytes += len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if num_bytes > limits.head_bytes_max:
            message = f"the headers have {num_bytes} bytes; {limits.head_bytes_max} are allowed"
            raise Fault("too_large", message)
        if len(headers) > limits.num_headers_max:
            message = f"there are {len(headers)} headers; {limits.num_headers_max} are allowed"
            raise Fault("too_large", message)

    async def _body(self, scope: Scope, receive: Receive, part: "_Part") -> Message:
        """All of a request's body in one message. Raises Fault, _Gone."""
        announced = Headers(scope=scope).get("content-length", "0")
        self._check_body(int(announced) if announced.isdecimal() else 0)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    piece = message.get("body", b"")
                    self._check_body(len(body) + len(piece))
                    part.take(len(piece))
                    body += piece
                    more = message.get("more_body", False)
        except TimeoutError:
            late = f"the body did not come within {self._limits.body_s:g} s"
            raise Fault("invalid", late, code="request_timeout") from None
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    def _check_body(self, num_bytes: int) -> None:
        limit = self._limits.body_bytes_max
        if num_bytes > limit:
            raise Fault("too_large", f"the body has {num_bytes} bytes or more; {limit} are allowed")

    async def _refuse(self, scope: Scope, send: Send, fault: Fault) -> None:
        body = self._say(fault, scope["path"])
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        if fault.retry_after_s is not None:
            headers["retry-after"] = str(fault.retry_after_s)
        if fault.kind == "unauthorized":
            headers["www-authenticate"] = "Bearer"
        # Else the connection stays, and what comes of the body is dropped for a while: closed with
        # bytes unread it would be reset, and the client would see that and not the answer.
        if scope["state"].get(IS_BEYOND) or "expect" in Headers(scope=scope):
            headers["connection"] = "close"
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": fault.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


class _Gone(Exception):
    """The client has gone before its request was whole."""


class _Room:
    """Bytes that all bodies together may take."""

    def __init__(self, bytes_max: int) -> None:
        self.left_bytes = bytes_max

    @contextlib.contextmanager
    def part(self) -> Iterator["_Part"]:
        """One request's part, given back at the end at the latest."""
        part = _Part(self)
        try:
            yield part
        finally:
            part.give_back()


class _Part:
    """What one request's body takes of the room."""

    def __init__(self, room: _Room) -> None:
        self._room = room
        self._bytes = 0

    def take(self, num_bytes: int) -> None:
        """Take more. Raises Fault: there is no more."""
        if num_bytes > self._room.left_bytes:
            raise Fault("overloaded", "too many large requests at once", retry_after_s=1)
        self._room.left_bytes -= num_bytes
        self._bytes += num_bytes

    def give_back(self) -> None:
        """Give all of it back; twice is nothing."""
        self._room.left_bytes += self._bytes
        self._bytes = 0
