"""The events of several answers in one, and whoever leaves them."""

import asyncio
import contextlib

import pytest

from edgekv.chat.events import Begun
from edgekv.server.answering import EventStream, _merged, unless_gone
from edgekv.server.fields import Fault


class _Stream:
    """Says one thing when it is told to, and then nothing until it is closed."""

    def __init__(self) -> None:
        self.tells, self.is_closed = asyncio.Event(), False

    def __aiter__(self) -> "_Stream":
        return self

    async def __anext__(self) -> Begun:
        await self.tells.wait()
        self.tells.clear()
        return Begun(num_prompt=1)

    async def aclose(self) -> None:
        self.is_closed = True


async def _read_all(stream: _Stream) -> None:
    async with contextlib.aclosing(_merged([stream], 60.0)) as items:  # type: ignore[list-item]
        async for _ in items:
            pass


@pytest.mark.parametrize("num_turns", range(6))
def test_a_reader_that_is_cancelled_while_something_comes_leaves(num_turns):
    async def main() -> bool:
        stream = _Stream()
        reader = asyncio.create_task(_read_all(stream))
        await asyncio.sleep(0.01)
        stream.tells.set()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait({reader}, timeout=1.0)
        was_cancelled = reader.cancelled()
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        return was_cancelled and stream.is_closed

    assert asyncio.run(main())


class _Broken(_Stream):
    async def __anext__(self) -> Begun:
        raise ZeroDivisionError


def test_whatever_breaks_a_stream_reaches_its_reader():
    with pytest.raises(ZeroDivisionError):
        asyncio.run(asyncio.wait_for(_read_all(_Broken()), 5.0))


def test_who_waits_as_the_daemon_ends_is_told():
    class Waiting:
        async def receive(self):
            await asyncio.sleep(60)

    async def main() -> None:
        asking = asyncio.create_task(unless_gone(Waiting(), asyncio.sleep(60)))
        await asyncio.sleep(0.01)
        asking.cancel()  # as a server does whose time to drain is over
        await asking

    with pytest.raises(Fault, match="ending"):
        asyncio.run(main())


def test_a_stream_that_the_end_of_the_daemon_cuts_has_a_last_event():
    sent = []

    async def pieces():
        yield "first"
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    async def receive():
        await asyncio.sleep(60)

    async def main() -> None:
        held = contextlib.AsyncExitStack()
        held.callback(sent.append, "let go")
        stream = EventStream(pieces(), lambda fault: f"({fault.message})", "text/plain", held)
        serving = asyncio.create_task(stream({}, receive, send))
        await asyncio.sleep(0.01)
        serving.cancel()
        await serving

    asyncio.run(main())
    assert [m["body"] for m in sent[1:-1]] == [b"first", b"(the daemon is ending)"]
    assert [m["more_body"] for m in sent[1:-1]] == [True, False]
    assert sent[-1] == "let go"
