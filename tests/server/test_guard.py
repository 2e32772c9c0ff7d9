"""The guard, before a small application, over real sockets of a real uvicorn."""

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx2
import pytest
import uvicorn

from edgekv.errors import AppsUnusable
from edgekv.server.access import Doors
from edgekv.server.guard import Guard
from edgekv.server.keys import AppsFile
from edgekv.server.limits import Limits
from edgekv.server.sockets import unix_socket, uvicorn_settings

pytestmark = pytest.mark.slow  # uvicorn alone takes 0.2 s to begin and end

HEAD = "Host: localhost\r\n"


class Application:
    """Says what it got; `/stream` never ends, `/flood` writes as fast as it can."""

    def __init__(self):
        self.asked = []
        self.gone = 0

    async def __call__(self, scope, receive, send):
        message = await receive()
        assert not message["more_body"]
        self.asked.append(scope["path"])
        identity = scope["state"]["identity"]
        app = identity.app if identity else None
        said = json.dumps({"app": app, "num_bytes": len(message["body"])}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        stays = scope["path"] in ("/stream", "/flood")
        await send({"type": "http.response.body", "body": said, "more_body": stays})
        if scope["path"] == "/stream":
            assert (await receive())["type"] == "http.disconnect"
            self.gone += 1
        while scope["path"] == "/flood":
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
            await asyncio.sleep(0)
            if self.gone:
                return


class Daemon:
    """What listens at a port, another that is open for `xcode`, and a socket."""

    def __init__(self, folder, limits):
        self.application = Application()
        self.apps = AppsFile(folder / "apps.json")
        self.key = self.apps.add("mail")
        self.socket_path = folder / "s" / "sock"
        self.limits = limits
        self.uid_of = None

    @contextlib.asynccontextmanager
    async def runs(self):
        with unix_socket(self.socket_path) as at_socket, port() as tcp, port() as keyless:
            self.port, self.open_port = (s.getsockname()[1] for s in (tcp, keyless))
            self.guard = Guard(
                self.application,
                apps=self.apps,
                say=lambda fault, path: json.dumps([path, fault.message, fault.code]).encode(),
                doors=Doors(
                    socket_path=str(self.socket_path), open_ports={self.open_port: "xcode"}
                ),
                limits=self.limits,
            )
            settings = uvicorn_settings(self.limits)
            if self.uid_of is not None:
                settings["http"].uid_of = staticmethod(self.uid_of)
            settings |= {"lifespan": "off", "log_level": "critical", "timeout_graceful_shutdown": 1}
            config = uvicorn.Config(self.guard, **settings)
            self.server = uvicorn.Server(config)
            running = asyncio.create_task(self.server.serve([tcp, keyless, at_socket]))
            while not self.server.started:
                await asyncio.sleep(0.01)
            try:
                yield self
            finally:
                self.server.should_exit = True
                await running

    @contextlib.asynccontextmanager
    async def nothing_stays(self):
        """Files, tasks, connections, timers and room for bodies are as they were before."""
        before = self._held()
        yield
        async with asyncio.timeout(5):
            while self._held() != before:
                await asyncio.sleep(0.01)

    def _held(self):
        state = self.server.server_state
        loop = asyncio.get_running_loop()
        timers = loop._scheduled  # of connections; what waits here and in uvicorn is shorter
        return (
            len([*Path("/dev/fd").iterdir()]),
            len(asyncio.all_tasks()),
            len(state.connections),
            len(state.tasks),
            self.guard._bodies.left_bytes,
            sum(not timer.cancelled() and timer.when() > loop.time() + 10 for timer in timers),
        )

    @property
    def bearer(self):
        return f"Authorization: Bearer {self.key}\r\n"


@contextlib.contextmanager
def port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener


class Client:
    """A connection whose every byte the test decides."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, daemon, *, at_socket=False):
        if at_socket:
            pair = await asyncio.open_unix_connection(str(daemon.socket_path))
        else:
            pair = await asyncio.open_connection("127.0.0.1", daemon.port)
        try:
            yield cls(*pair)
        finally:
            pair[1].close()
            with contextlib.suppress(OSError):
                await pair[1].wait_closed()

    def send(self, text):
        self.writer.write(text.encode() if isinstance(text, str) else text)

    async def answer(self):
        """Status, headers and body of the next answer."""
        async with asyncio.timeout(10):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            status, *lines = head.strip().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            if "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                size = int(await self.reader.readline(), 16)
                body = await self.reader.readexactly(size)
                await self.reader.readuntil(b"0\r\n\r\n")
            return int(status.split()[1]), headers, json.loads(body)

    async def is_ended(self):
        """Whether the server ends the connection, without another byte."""
        async with asyncio.timeout(5):
            try:
                return await self.reader.read() == b""
            except ConnectionResetError:
                return True


@pytest.fixture
def play(tmp_path):
    """Run a coroutine function with a daemon that has these limits."""

    def run(script, *, uid_of=None, **limits):
        async def whole():
            daemon = Daemon(tmp_path, Limits(**limits))
            daemon.uid_of = uid_of
            async with daemon.runs(), daemon.nothing_stays():
                await script(daemon)

        asyncio.run(whole())

    return run


def post(daemon, body=b"{}", *, path="/v1/messages", more=""):
    head = f"POST {path} HTTP/1.1\r\n{HEAD}{daemon.bearer}{more}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


# --- who ---


def test_who_asks_is_told_to_the_application(play):
    async def script(daemon):
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{daemon.port}") as client:
            sent = {"headers": {"x-api-key": daemon.key}, "content": b"12345"}
            assert (await client.post("/x", **sent)).json() == {"app": "mail", "num_bytes": 5}
            answer = await client.post("/x", content=b"1")
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["content-type"] == "application/json"
            assert answer.json()[::2] == ["/x", "invalid_api_key"]
            public = (("HEAD", "/"), ("GET", "/"), ("GET", "/live/x"), ("GET", "/healthz"))
            for method, path in public:
                assert (await client.request(method, path)).status_code == 200
            for method, path in (("GET", "/v1/models"), ("POST", "/"), ("POST", "/live/x")):
                assert (await client.request(method, path)).status_code == 401
            daemon.apps.revoke("mail")
            assert (await client.post("/x", **sent)).status_code == 401
        async with httpx2.AsyncClient(base_url=f"http://localhost:{daemon.open_port}") as client:
            assert (await client.post("/x")).json()["app"] == "xcode"
        transport = httpx2.AsyncHTTPTransport(uds=str(daemon.socket_path))
        async with httpx2.AsyncClient(base_url="http://localhost", transport=transport) as client:
            assert (await client.post("/x")).json()["app"] == "default"
            named = {"X-EdgeKV-App": "notes"}
            assert (await client.post("/x", headers=named)).json()["app"] == "notes"

    play(script)


def test_without_sockets_it_does_the_same(tmp_path):
    async def script():
        daemon = Daemon(tmp_path, Limits())
        guard = Guard(daemon.application, apps=daemon.apps, say=lambda fault, path: b"{}")
        transport = httpx2.ASGITransport(guard)
        async with httpx2.AsyncClient(base_url="http://localhost", transport=transport) as client:
            assert (await client.post("/x")).status_code == 401
            sent = {"Authorization": f"Bearer {daemon.key}"}
            assert (await client.post("/x", headers=sent, content=b"1")).json()["num_bytes"] == 1

    asyncio.run(script())


def test_a_damaged_file_of_apps_is_told_at_the_start(tmp_path):
    daemon = Daemon(tmp_path, Limits())
    daemon.apps.path.write_text("{")
    with pytest.raises(AppsUnusable, match="damaged"):
        Guard(daemon.application, apps=AppsFile(daemon.apps.path), say=lambda *_: b"")


def test_pages_of_the_web_get_nothing(play):
    async def script(daemon):
        for door in (daemon.port, daemon.open_port):
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{door}") as client:
                for header in (
                    {"Host": "evil.example"},
                    {"Origin": "http://evil.example"},
                    {"Sec-Fetch-Site": "cross-site"},
                ):
                    sent = {"x-api-key": daemon.key} | header
                    for method, path in (("POST", "/x"), ("OPTIONS", "/x"), ("HEAD", "/")):
                        answer = await client.request(method, path, headers=sent)
                        assert answer.status_code == 403
                        assert "access-control-allow-origin" not in answer.headers
        assert daemon.application.asked == []

    play(script)


def test_another_user_is_not_heard_at_the_socket(play):
    async def script(daemon):
        async with Client.of(daemon, at_socket=True) as client:
            client.send(f"GET /healthz HTTP/1.1\r\n{HEAD}\r\n")
            assert await client.is_ended()
        async with Client.of(daemon) as client:
            client.send(post(daemon))
            assert (await client.answer())[0] == 200
        assert daemon.application.asked == ["/v1/messages"]

    play(script, uid_of=lambda connection: os.geteuid() + 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_real_other_user_is_not_heard_at_the_socket(play):
    code = (
        "import os, socket, sys\n"
        "os.setuid(int(sys.argv[2]))\n"
        "with socket.socket(socket.AF_UNIX) as s:\n"
        "    s.settimeout(5); s.connect(sys.argv[1])\n"
        "    try:\n"
        "        s.sendall(b'GET /healthz HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n')\n"
        "        print(s.recv(100))\n"
        "    except OSError:\n"
        "        print(b'')\n"
    )

    async def script(daemon):
        daemon.socket_path.chmod(0o666)
        for folder in daemon.socket_path.parents[:2]:
            folder.chmod(0o711)
        for user, heard in ((0, True), (65534, False)):
            command = [sys.executable, "-I", "-S", "-c", code, str(daemon.socket_path), str(user)]
            options = {"stdout": subprocess.PIPE, "text": True, "check": True}
            done = await asyncio.to_thread(subprocess.run, command, **options)
            assert ("200 OK" in done.stdout, done.stdout == "b''\n") == (heard, not heard)

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:

        async def whole():
            daemon = Daemon(Path(folder), Limits())
            async with daemon.runs():
                await script(daemon)

        asyncio.run(whole())


# --- how much ---


def test_a_large_body_is_refused_before_it_comes(play):
    async def script(daemon):
        async with Client.of(daemon) as client:
            more = f"{HEAD}{daemon.bearer}Content-Length: 1001\r\n\r\n"
            client.send(f"POST /x HTTP/1.1\r\n{more}")
            status, _, said = await client.answer()
            assert status == 413
            assert "1001 bytes" in said[1]
            client.send(bytes(1001))  # it is dropped, and the connection goes on
            client.send(post(daemon, bytes(1000)))
            status, _, said = await client.answer()
            assert (status, said["num_bytes"]) == (200, 1000)
        assert daemon.application.asked == ["/v1/messages"]

    play(script, body_bytes_max=1000)


def test_a_body_of_unknown_length_is_counted_as_it_comes(play):
    async def script(daemon):
        async with Client.of(daemon) as client:
            more = f"{HEAD}{daemon.bearer}Transfer-Encoding: chunked\r\n\r\n"
            client.send(f"POST /x HTTP/1.1\r\n{more}")
            for _ in range(10):
                client.send(b"64\r\n" + bytes(100) + b"\r\n")
                await asyncio.sleep(0)
            await asyncio.sleep(0.1)
            assert client.reader._buffer == b"", "1,000 bytes are no reason yet"
            client.send(b"1\r\nx\r\n")
            assert (await client.answer())[0] == 413
            client.send(b"0\r\n\r\n" + post(daemon))
            assert (await client.answer())[0] == 200

    play(script, body_bytes_max=1000)


@pytest.mark.parametrize("length", ["-1", "1e3", "x", "9" * 30, "1, 2"])
def test_lengths_that_are_none(play, length):
    async def script(daemon):
        async with Client.of(daemon) as client:
            more = f"{HEAD}{daemon.bearer}Content-Length: {length}\r\n\r\n"
            client.send(f"POST /x HTTP/1.1\r\n{more}")
            head = await client.reader.readuntil(b"\r\n")
            assert head.split()[1] in (b"400", b"413")
        assert daemon.application.asked == []

    play(script)


def test_who_is_refused_sees_the_answer_and_no_reset(play):
    async def script(daemon):
        url = f"http://127.0.0.1:{daemon.port}/x"
        async with httpx2.AsyncClient() as client:
            for _ in range(3):
                answer = await client.post(url, content=bytes(20 << 20))
                assert answer.status_code == 401
        assert daemon.guard._bodies.left_bytes == daemon.limits.bodies_bytes_max

    play(script)


def test_who_waits_to_be_told_to_go_on_is_told_no(play):
    async def script(daemon):
        async with Client.of(daemon) as client:
            more = f"{HEAD}Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"
            client.send(f"POST /x HTTP/1.1\r\n{more}")
            status, headers, _ = await client.answer()
            assert (status, headers["connection"]) == (401, "close")
            assert await client.is_ended()
        async with Client.of(daemon) as client:
            client.send(f"POST /x HTTP/1.1\r\n{daemon.bearer}{more}")
            assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
            client.send(b"12345")
            status, _, said = await client.answer()
            assert (status, said["num_bytes"]) == (200, 5)

    play(script)


@pytest.mark.parametrize(
    ("more", "statuses"),
    [
        ("X-Long: " + "x" * 5000 + "\r\n", {413}),
        ("X-Long: " + "x" * 500_000 + "\r\n", {400, 413}),
        ("".join(f"X-{i}: 1\r\n" for i in range(40)), {413}),
        ("X-Bad\r\n", {400}),
        ("Host: localhost\r\n", {400}),
    ],
    ids=["long", "very long", "many", "malformed", "two hosts"],
)
def test_heads_that_are_too_much(play, more, statuses):
    async def script(daemon):
        async with Client.of(daemon) as client:
            client.send(f"GET /healthz HTTP/1.1\r\n{HEAD}{more}\r\n")
            line = await client.reader.readuntil(b"\r\n")
            assert int(line.split()[1]) in statuses
        async with Client.of(daemon) as client:
            client.send(f"GET /healthz?{'x' * 5000} HTTP/1.1\r\n{HEAD}\r\n")
            assert (await client.answer())[0] == 413
        assert daemon.application.asked == []

    play(script, head_bytes_max=4000, num_headers_max=32)


def test_a_head_that_never_ends_takes_no_memory(play):
    async def script(daemon):
        async with Client.of(daemon) as client:
            client.send(f"GET /healthz HTTP/1.1\r\n{HEAD}X-Long: ")
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    client.send(bytes([120]) * 1000)
                    await client.writer.drain()
            assert client.reader._buffer.startswith(b"HTTP/1.1 400") or await client.is_ended()

    play(script)


def test_bodies_of_all_together(play):
    async def script(daemon):
        async with contextlib.AsyncExitStack() as stack:
            head = f"POST /x HTTP/1.1\r\n{HEAD}{daemon.bearer}Content-Length: 900\r\n\r\n"
            waiting = [await stack.enter_async_context(Client.of(daemon)) for _ in range(2)]
            for client in waiting:
                client.send(head.encode() + bytes(800))
            while daemon.guard._bodies.left_bytes > 400:
                await asyncio.sleep(0.01)
            another = await stack.enter_async_context(Client.of(daemon))
            another.send(head.encode() + bytes(900))
            status, headers, _ = await another.answer()
            assert (status, headers["retry-after"]) == (429, "1")
            for client in waiting:
                client.send(bytes(100))
                assert (await client.answer())[0] == 200
            another.send(head.encode() + bytes(900))
            assert (await another.answer())[0] == 200

    play(script, bodies_bytes_max=2000)


def test_an_answer_that_streams_holds_no_room(play):
    async def script(daemon):
        async with Client.of(daemon) as client:
            client.send(post(daemon, bytes(900), path="/stream"))
            await client.reader.readuntil(b"900")
            assert daemon.guard._bodies.left_bytes == 1000

    play(script, bodies_bytes_max=1000)


def test_an_apps_requests_a_minute(play):
    async def script(daemon):
        daemon.apps.change("mail", rate_per_min=2)
        async with Client.of(daemon) as client:
            statuses = []
            for _ in range(3):
                client.send(post(daemon))
                status, headers, _ = await client.answer()
                statuses.append(status)
            assert statuses == [200, 200, 429]
            assert 25 <= int(headers["retry-after"]) <= 30
            client.send(f"GET /v1/models HTTP/1.1\r\n{HEAD}{daemon.bearer}\r\n")
            assert (await client.answer())[0] == 200, "looking is free"
        daemon.apps.change("mail", rate_per_min=None)
        async with Client.of(daemon) as client:
            client.send(post(daemon))
            assert (await client.answer())[0] == 200

    play(script)


# --- how long ---


def test_a_body_that_does_not_come(play):
    async def script(daemon):
        async with Client.of(daemon) as client:
            client.send(post(daemon, bytes(100))[:-1])
            status, _, said = await client.answer()
            assert (status, said[2]) == (400, "request_timeout")
            assert await client.is_ended(), "what is left of it is not waited for without end"
        assert daemon.application.asked == []

    play(script, body_s=0.2, head_s=0.2, keep_alive_s=1)


def test_a_body_that_comes_slowly(play):
    async def script(daemon):
        async with Client.of(daemon) as client:
            client.send(post(daemon, bytes(1000))[:-1000])
            answer = asyncio.create_task(client.answer())
            while not answer.done():
                client.send(b"x")
                await asyncio.sleep(0.02)
            assert answer.result()[0] == 400
            async with asyncio.timeout(5):
                with contextlib.suppress(OSError):
                    while not client.reader.at_eof():
                        client.send(b"x")
                        await client.writer.drain()
                        await asyncio.sleep(0.02)

    play(script, body_s=0.2, head_s=0.3)


@pytest.mark.parametrize("first", ["", "GET /healthz HTTP/1.1\r\n", "answered"])
def test_a_head_that_comes_slowly(play, first):
    async def script(daemon):
        async with Client.of(daemon) as client:
            if first == "answered":
                client.send(post(daemon))
                assert (await client.answer())[0] == 200
            else:
                client.send(first)
            ended = asyncio.create_task(client.is_ended())
            started_s = asyncio.get_running_loop().time()
            while not ended.done():
                client.send("X" if first != "GET" else "X: 1\r\n")
                await asyncio.sleep(0.02)
            assert ended.result()
            assert asyncio.get_running_loop().time() - started_s < 3

    play(script, head_s=0.2)


def test_who_says_nothing_is_not_waited_for(play):
    async def script(daemon):
        async with Client.of(daemon) as client:
            assert await client.is_ended()

    play(script, head_s=0.2)


def test_an_answer_may_take_longer_than_any_of_this(play):
    async def script(daemon):
        async with Client.of(daemon) as client:
            client.send(post(daemon, path="/stream"))
            await client.reader.readuntil(b"mail")
            await asyncio.sleep(0.5)
            assert daemon.application.gone == 0
            assert not client.reader.at_eof()

    play(script, head_s=0.1, body_s=0.1, unread_s=0.1, keep_alive_s=0)


def test_who_does_not_read_is_let_go(play):
    async def script(daemon):
        async with Client.of(daemon) as client:
            client.writer.transport.pause_reading()
            client.send(post(daemon, path="/flood"))
            async with asyncio.timeout(10):
                while not daemon.server.server_state.tasks:
                    await asyncio.sleep(0.01)
                while daemon.server.server_state.connections:
                    await asyncio.sleep(0.01)
            daemon.application.gone = 1

    play(script, unread_s=0.3)


# --- how many, and those that vanish ---


def test_two_hundred_at_once(play):
    async def script(daemon):
        async def one(number):
            async with Client.of(daemon, at_socket=number % 2 == 0) as client:
                client.send(post(daemon, bytes(number)))
                status, _, said = await client.answer()
                return status, said["num_bytes"]

        answers = await asyncio.gather(*(one(number) for number in range(200)))
        assert answers == [(200, number) for number in range(200)]

    play(script)


def test_too_many_are_told_to_come_again(play):
    async def script(daemon):
        async with contextlib.AsyncExitStack() as stack:

            async def come():
                return await stack.enter_async_context(Client.of(daemon))

            for _ in range(3):
                client = await come()
                client.send(post(daemon, path="/stream"))
                await client.reader.readuntil(b"mail")
            for _ in range(2):
                client = await come()
                client.send(post(daemon))
                status, headers, _ = await client.answer()
                assert (status, headers["retry-after"]) == (429, "1")
                assert await client.is_ended()
            idle = [await come() for _ in range(3)]
            beyond = await come()
            assert await beyond.is_ended(), "more than twice as many get no answer"
            assert not any(client.reader.at_eof() for client in idle)
        async with Client.of(daemon) as client:
            async with asyncio.timeout(5):
                while len(daemon.server.server_state.connections) > 1:
                    await asyncio.sleep(0.01)
        async with Client.of(daemon) as client:
            client.send(post(daemon))
            assert (await client.answer())[0] == 200

    play(script, num_connections_max=3)


def test_who_vanishes_is_noticed(play):
    async def script(daemon):
        async with daemon.nothing_stays():
            for cut in (1, 10, 100, len(post(daemon, bytes(50))) - 1):
                async with Client.of(daemon) as client:
                    client.send(post(daemon, bytes(50))[:cut])
                    await client.writer.drain()
        assert daemon.application.asked == []
        async with daemon.nothing_stays(), Client.of(daemon) as client:
            client.send(post(daemon, path="/stream"))
            await client.reader.readuntil(b"mail")
        assert daemon.application.gone == 1

    play(script)


def test_who_resets_is_noticed(play):
    async def script(daemon):
        for path, after in (("/stream", b"mail"), ("/x", b"0\r\n\r\n")):
            async with daemon.nothing_stays(), Client.of(daemon) as client:
                client.send(post(daemon, path=path))
                await client.reader.readuntil(after)
                connection = client.writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.writer.transport.abort()
        assert daemon.application.gone == 1

    play(script)


@pytest.mark.parametrize("at_socket", [False, True])
def test_who_closes_its_half_counts_as_gone(play, at_socket):
    async def script(daemon):
        for sent in (b"", b"GET /heal", post(daemon, path="/stream"), post(daemon)[:-1]):
            async with daemon.nothing_stays(), Client.of(daemon, at_socket=at_socket) as client:
                client.send(sent)
                await asyncio.sleep(0.05)
                client.writer.write_eof()
                async with asyncio.timeout(5):
                    await client.reader.read()
        assert daemon.application.gone == 1

    play(script)


def test_what_is_no_http(play):
    async def script(daemon):
        for sent in (b"\x16\x03\x01\x02\x00", b"\r\n" * 10 + b"x\r\n\r\n", bytes(1000)):
            async with Client.of(daemon) as client:
                client.send(sent)
                assert (await client.reader.readuntil(b"\r\n")).split()[1] == b"400"
                assert (await client.reader.read()).endswith(b"request received.")
        async with Client.of(daemon) as client:
            upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            client.send(f"GET /v1/responses HTTP/1.1\r\n{HEAD}{upgrade}\r\n")
            assert (await client.answer())[0] == 401, "as any other request"

    play(script)
