"""Which session of an app answers a conversation that its caller has.

The caller sends all that was said, each time. The session answers that knows most of it, so that
only what is new is computed:

    what it said before, all of it, is said again, and more      it goes on
    its last question is asked again                             it answers that again
    something else was said on the way, or it is busy            another one: KV it has in common
                                                                 is copied or read, see `Ledger`

Sessions have names made of the conversation's beginning (and of the caller's key), so that they are
found again after a restart.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import xxhash

from edgekv.chat.values import ChatMessage, Completion
from edgekv.errors import TooManySessions

if TYPE_CHECKING:
    from edgekv.runtime.app import App
    from edgekv.runtime.session import Session

PREFIX = "completions/"
OPEN_MAX = 64  # sessions of an app that stay open; others are read when they are asked for
STORED_MAX = 256  # of an app that are kept
BRANCHES_MAX = 16  # sessions that begin alike


class Branches:
    """Sessions of one app that answer completions. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows; the app's own disk is read inside
        self._open: OrderedDict[str, Session] = OrderedDict()  # by name, the one used last last
        self._taken: set[Session] = set()  # by completions that have not begun yet
        self._num_made = 0

    @contextmanager
    def session(self, app: "App", asked: Completion) -> Iterator["Session"]:
        """The session that answers; nobody else gets it before it does. Raises as `App.session`."""
        with self._lock:
            session = self._chosen(app, asked)
            self._taken.add(session)
        try:
            yield session
        finally:
            with self._lock:
                self._taken.discard(session)

    def close_idle(self) -> None:
        """Close those that are not answering: what they said is stored."""
        with self._lock:
            while self._close_oldest():
                pass

    def _chosen(self, app: "App", asked: Completion) -> "Session":
        root, best, at_best, free = _root(asked), None, 0, ""
        for branch in range(BRANCHES_MAX):
            name = f"{root}.{branch}" if branch else root
            session = self._opened(app, name)
            if session is None:
                free = name
                break
            if self._is_busy(session):
                continue
            fits = _fits(session, asked.messages)
            if fits > at_best or best is None:
                best, at_best = session, fits
        if at_best == 0 and free:
            best = self._open[free] = self._made(app, free)
            self._make_room(app)
        if best is None:  # all that begin alike are busy
            return self._made(app, None)
        self._open.move_to_end(best.name)
        return best

    def _opened(self, app: "App", name: str) -> "Session | None":
        """The session of this name, if there is one, open or stored."""
        session = self._open.get(name)
        if session is not None and session.app is app and not session.closed:
            return session
        if not app.knows(name):
            return None
        session = self._open[name] = self._made(app, name)
        return session

    def _made(self, app: "App", name: str | None) -> "Session":
        """Open one, if need be in place of some that were not used for long."""
        while True:
            try:
                return app.session(name)
            except TooManySessions:  # by more than one where its limit was lowered
                if not self._close_oldest():
                    raise

    def _make_room(self, app: "App") -> None:
        """Close what was not used for long, and forget what was not used for longer."""
        while len(self._open) > OPEN_MAX and self._close_oldest():
            pass
        self._num_made += 1
        if self._num_made % OPEN_MAX == 0:
            ours = [info.name for info in app.sessions() if info.name.startswith(PREFIX)]
            for name in ours[STORED_MAX:]:
                if name not in self._open:
                    app.remove(name)

    def _close_oldest(self) -> bool:
        """Close the one that was not used for longest; False if all are answering."""
        idle = (name for name, session in self._open.items() if not self._is_busy(session))
        name = next(idle, None)
        if name is None:
            return False
        self._open.pop(name).close()
        return True

    def _is_busy(self, session: "Session") -> bool:
        return session in self._taken or session.busy


def _root(asked: Completion) -> str:
    """The name of sessions that begin as this one does: up to what the user said first."""
    begun = [] if asked.prompt is None else [asked.prompt[:512]]
    for message in asked.messages:
        begun += [message.role, message.content.strip()]
        if message.role == "user":
            break
    digest = xxhash.xxh3_64_hexdigest("\0".join(begun).encode("utf-8", "replace"))
    key = asked.session_key
    if len(key) > 128 or not key.isprintable():
        key = xxhash.xxh3_128_hexdigest(key.encode("utf-8", "replace"))
    return f"{PREFIX}{key}/{digest}"


def _fits(session: "Session", messages: Sequence[ChatMessage]) -> int:
    """How well a session can answer a conversation: 0 if that branches off what was said in it."""
    conversation = session._talk.conversation
    num_same, num_said = conversation.num_same(messages), len(conversation.messages)
    if num_same == num_said:
        return 2 + num_same
    return 1 + num_same if num_same == len(messages) == num_said - 1 else 0
