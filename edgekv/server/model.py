"""The model that is served: loaded while somebody needs it, and for a while after that."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from edgekv.chat.formats import can_think
from edgekv.models.config import num_parameters
from edgekv.runtime import Runtime
from edgekv.server.ollama import ModelCard
from edgekv.tokenizer.constraint import GrammarTokens


class ServedModel:
    """A runtime that is opened when it is asked for, and closed when nobody has for long.

    Closing keeps everything: the next request opens it again, and reads KV instead of computing it.
    Owned by the server's loop.
    """

    def __init__(self, name: str, make: Callable[[], Runtime], keep_alive_s: float | None) -> None:
        """`make` opens the runtime; with a `keep_alive_s` of None it is never closed."""
        self.name = name
        self._make = make
        self._keep_alive_s = keep_alive_s
        self._runtime: Runtime | None = None
        self._card: ModelCard | None = None
        self._turn = asyncio.Lock()  # of whoever opens or closes
        self._num_users = 0
        self._timer: asyncio.TimerHandle | None = None
        self.unloads_s: float | None = None  # when it will be closed if nobody asks; Unix time

    @property
    def loaded(self) -> Runtime | None:
        """The runtime, if it is open."""
        return self._runtime

    @contextlib.asynccontextmanager
    async def runtime(self) -> AsyncIterator[Runtime]:
        """The runtime, which stays open as long as somebody is in here."""
        self._num_users += 1
        self._stop_timer()
        try:
            async with self._turn:
                if self._runtime is None:
                    self._runtime = await asyncio.to_thread(self._opened)
                runtime = self._runtime
            yield runtime
        finally:
            self._num_users -= 1
            if not self._num_users and self._keep_alive_s is not None:
                self._set_timer(self._keep_alive_s)

    def _opened(self) -> Runtime:
        runtime = self._make()
        GrammarTokens.of(runtime.tokenizer)  # seconds, which nobody's first schema should wait for
        return runtime

    async def card(self) -> ModelCard:
        """What it is."""
        if self._card is None:
            async with self.runtime() as runtime:
                self._card = card_of(self.name, runtime)
        return self._card

    async def close(self) -> None:
        """Close the runtime; what was said and computed is on disk then."""
        self._stop_timer()
        async with self._turn:
            runtime, self._runtime = self._runtime, None
            if runtime is not None:
                await asyncio.to_thread(runtime.close)

    def _set_timer(self, seconds: float) -> None:
        self._stop_timer()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, lambda: loop.create_task(self._unload()))
        self.unloads_s = time.time() + seconds

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.unloads_s = None

    async def _unload(self) -> None:
        if not self._num_users:
            await self.close()


def card_of(name: str, runtime: Runtime) -> ModelCard:
    """What clients want to know of a runtime's model."""
    config = runtime.decoder_config
    files = [runtime.path] if runtime.path.is_file() else list(runtime.path.glob("*.safetensors"))
    stats = [file.stat() for file in files]
    size = sum(stat.st_size for stat in stats)
    template = runtime.tokenizer.chat_template
    count = num_parameters(config)
    return ModelCard(
        name=name,
        family=config.family,
        context_max=runtime.context_max,
        num_parameters=count,
        quantization=f"~{round(8 * size / count)}-bit" if size else "unknown",
        size_bytes=size,
        digest=runtime.tokenizer.fingerprint,
        modified_s=int(max((stat.st_mtime for stat in stats), default=0)),
        can_think=template is not None and can_think(template.source),
    )
