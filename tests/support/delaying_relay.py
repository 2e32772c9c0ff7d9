"""A relay of TCP connections that hands on what it gets a while later, in both directions."""

import asyncio
import contextlib
import threading


class DelayingRelay:
    """Listens on a port of loopback and connects to a target; on a thread of its own."""

    def __init__(self, target_port, delay_s):
        self.port = 0
        self._target_port, self._delay_s = target_port, delay_s
        self._ready = threading.Event()
        self._loop = None
        self._end = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _main(self):
        asyncio.run(self._run())

    async def _run(self):
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()

    async def _serve(self, reader, writer):
        for _ in range(600):  # who is relayed to may not listen yet
            try:
                there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
                break
            except OSError:
                await asyncio.sleep(0.1)
        with (
            contextlib.closing(writer),
            contextlib.closing(back),
            # Cancelled when the relay is closed, of which asyncio would print a traceback.
            contextlib.suppress(asyncio.CancelledError, ConnectionError),
        ):
            await asyncio.gather(self._hand_on(reader, back), self._hand_on(there, writer))

    async def _hand_on(self, reader, writer):
        """Each piece leaves `delay_s` after it came, whatever is on the way before it."""
        pieces = asyncio.Queue()

        async def send():
            while (piece := await pieces.get()) is not None:
                due_s, data = piece
                await asyncio.sleep(max(0.0, due_s - self._loop.time()))
                writer.write(data)
                await writer.drain()
            writer.write_eof()

        sender = asyncio.ensure_future(send())
        try:
            while data := await reader.read(1 << 16):
                pieces.put_nowait((self._loop.time() + self._delay_s, data))
        finally:
            pieces.put_nowait(None)
            await sender

    def close(self):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
