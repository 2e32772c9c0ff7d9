"""Run a command that reaches a daemon's Unix socket at a port, and nothing else.

    unshare -rn python loopback.py PORT SOCKET COMMAND…

In a network namespace of its own a port of loopback is nobody else's, and there is no way out.
"""

import asyncio
import os
import sys


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def _run(port: int, socket: str, command: list[str]) -> int:
    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_there = await asyncio.open_unix_connection(socket)
        await asyncio.gather(_copy(reader, to_there), _copy(there, writer))

    up = await asyncio.create_subprocess_exec("ip", "link", "set", "lo", "up")
    assert await up.wait() == 0
    async with await asyncio.start_server(forward, "127.0.0.1", port):
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
        return await process.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(_run(int(sys.argv[1]), os.fspath(sys.argv[2]), sys.argv[3:])))
