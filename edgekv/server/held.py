"""Sessions that clients of the native protocol have open, between their requests.

A session with a name is a place: whoever names it finds it, open or stored, also after a restart.
It stays open here so that its KV stays in memory. One without a name lives here alone. Its client
has a token for it, which nobody can guess, and the model stays loaded for it. All are closed by
their clients, or when nobody has asked for long; and of the stored ones that an app left alone
longest, some are closed before, which loses nothing.
"""

import asyncio
import contextlib
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field

from edgekv.errors import TooManySessions
from edgekv.runtime import App, Session
from edgekv.runtime.reply import in_thread
from edgekv.runtime.talk import closed_error
from edgekv.server.model import ServedModel

KEPT_MAX = 64  # stored sessions of an app that stay open
IDLE_S = 3600.0  # without a request, until a session is closed: its client is gone


@dataclass(frozen=True, kw_only=True)
class Place:
    """By which a client's session is found.

    Attributes:
        app: Whose it is.
        name: Its name.
        token: Of one without a name that anybody gave it; "" of others.
    """

    app: str
    name: str
    token: str = ""


@dataclass(kw_only=True)
class _Held:
    session: Session
    loaded: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    timer: asyncio.TimerHandle | None = None


class HeldSessions:
    """Owned by the server's loop."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._held: OrderedDict[Place, _Held] = OrderedDict()  # used last last
        self._closing: set[asyncio.Task[None]] = set()

    async def open(self, app: App, name: str | None, system: str | None) -> tuple[Place, Session]:
        """Open a session. Raises as `App.session`."""
        if name is None:
            async with contextlib.AsyncExitStack() as loaded:
                await loaded.enter_async_context(self._model.runtime())
                session = await self._opened(app, None, system)
                place = Place(app=app.name, name=session.name, token=secrets.token_urlsafe(16))
                self._held[place] = _Held(session=session, loaded=loaded.pop_all())
                self._set_timer(place)
            return place, session
        place = Place(app=app.name, name=name)
        before = self._held.get(place)
        if before is not None and system not in (None, before.session.system):
            await self.close(place)  # so that it can have this one, if nothing was said in it
        return place, await self._take(app, place, system)

    async def get(self, app: App, place: Place) -> Session:
        """The session of a place. Raises RuntimeClosed: it had no name, and is gone."""
        held = self._held.get(place)
        if held is not None and held.session.app is app and not held.session.closed:
            self._held.move_to_end(place)
            self._set_timer(place)
            return held.session
        if place.token:
            raise closed_error(place.name)
        return await self._take(app, place, None)

    async def close(self, place: Place) -> None:
        """Close a session, unless another client is being answered in it."""
        held = self._held.get(place)
        if held is None or (held.session.busy and not place.token):
            return
        del self._held[place]
        if held.timer is not None:
            held.timer.cancel()
        async with held.loaded:
            await in_thread(held.session.close)

    async def _take(self, app: App, place: Place, system: str | None) -> Session:
        session = await self._opened(app, place.name, system)
        before = self._held.pop(place, None)
        if before is not None and before.timer is not None:
            before.timer.cancel()
        self._held[place] = _Held(session=session)
        self._set_timer(place)
        if len(self._idle(app)) > KEPT_MAX:
            await self.close(self._idle(app)[0])
        return session

    async def _opened(self, app: App, name: str | None, system: str | None) -> Session:
        while True:
            try:
                return await in_thread(lambda: app.session(name, system=system))
            except TooManySessions:  # by more than one where its limit was lowered
                idle = self._idle(app)
                if not idle:
                    raise
                await self.close(idle[0])

    def _idle(self, app: App) -> list[Place]:
        """Sessions of the app that can be closed without loss, the one left alone longest first."""
        return [
            place
            for place, held in self._held.items()
            if place.app == app.name and held.session.kept and not held.session.busy
        ]

    def _set_timer(self, place: Place) -> None:
        held = self._held[place]
        if held.timer is not None:
            held.timer.cancel()
        held.timer = asyncio.get_running_loop().call_later(IDLE_S, self._end, place)

    def _end(self, place: Place) -> None:
        if self._held[place].session.busy:
            self._set_timer(place)
            return
        task = asyncio.get_running_loop().create_task(self.close(place))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
