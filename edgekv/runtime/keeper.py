"""Named sessions' conversations between the runtime and the store."""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

from edgekv.errors import EdgeKVError
from edgekv.runtime.conversation import Conversation, dump, load, opening, stored_messages
from edgekv.store import Store


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    """A named session as it is stored.

    Attributes:
        name: Its name within its app.
        num_messages: The system prompt included; None if they cannot be read.
        num_tokens: Tokens whose KV is on disk.
        payload_bytes: Of that KV; what it shares with other sessions is counted in each.
        created_s: Unix time.
        used_s: Unix time of its last turn.
        is_begun: Something was said or set in it once.
    """

    name: str
    num_messages: int | None
    num_tokens: int
    payload_bytes: int
    created_s: float
    used_s: float
    is_begun: bool


class ConversationKeeper:
    """Brings conversations to the store: the newest of each session, one write at a time.

    Owned by the runtime; any thread may call it. A write that fails leaves the conversation here,
    where the session's next turn takes it along, a session that is opened again finds it, and
    `flush` tries once more. `submit` queues a job for an I/O thread; False if the queue is full.
    """

    def __init__(
        self, store: Store, submit: Callable[[Callable[[], None]], bool], *, vocab_size: int
    ) -> None:
        self._store = store
        self._submit = submit
        self._vocab_size = vocab_size
        self._lock = threading.Lock()  # guards what follows
        self._unwritten: dict[int, Conversation] = {}
        self._queued: set[int] = set()
        self._failures: dict[int, str] = {}

    def open(self, app: str, name: str, system: str | None) -> tuple[Conversation, "KeptSession"]:
        """What a named session begins with, and where it is kept from now on. Reads the store."""
        key = self._store.session(app, name, persistent=True).key
        with self._lock:
            unwritten = self._unwritten.get(key)
        # Read now: what was still unwritten before may have been written before that look.
        stored = self._store.session(app, name, persistent=True)
        conversation, damage = unwritten or Conversation(), ""
        if unwritten is None and stored.conversation is not None:
            conversation, damage = load(stored.conversation, vocab_size=self._vocab_size)
        kept = KeptSession(
            keeper=self, key=stored.key, damage=damage, token_ids=tuple(stored.token_ids)
        )
        return opening(name, system, conversation), kept

    def knows(self, app: str, name: str) -> bool:
        """Whether a session of this name is stored."""
        return self._store.find(app, name) is not None

    def sessions(self, app: str) -> list[SessionInfo]:
        """The app's named sessions, the one used last first. Reads the store."""
        with self._lock:  # before the store is read: what is written meanwhile is found there
            unwritten = {key: said.messages for key, said in self._unwritten.items()}
        infos = []
        for stored in self._store.sessions():
            if stored.app != app or not stored.persistent:
                continue
            messages = unwritten.get(stored.key, stored_messages(stored.conversation))
            infos.append(
                SessionInfo(
                    name=stored.name,
                    num_messages=None if messages is None else len(messages),
                    num_tokens=stored.num_tokens,
                    payload_bytes=stored.payload_bytes,
                    created_s=stored.created_s,
                    used_s=stored.used_s,
                    is_begun=stored.conversation is not None or stored.key in unwritten,
                )
            )
        return infos

    def remove(self, app: str, name: str) -> bool:
        """Forget a session, what was said and its KV; False if it is not stored."""
        stored = self._store.find(app, name)
        if stored is None:
            return False
        with self._lock:
            self._unwritten.pop(stored.key, None)
            self._failures.pop(stored.key, None)
        self._store.remove(stored.key)
        return True

    def save(self, key: int, conversation: Conversation) -> None:
        """Queue a write; returns at once, and never fails."""
        self._store.touch(key)  # here: jobs of several sessions may change places
        with self._lock:
            self._unwritten[key] = conversation
            if key in self._queued:
                return
            self._queued.add(key)
        try:
            queued = self._submit(lambda: self._run(key))
        except EdgeKVError:  # the runtime is closing, and flushes
            queued = False
        if not queued:
            with self._lock:
                self._queued.discard(key)

    def flush(self) -> None:
        """Write what is left, on this thread, now that no I/O thread does."""
        with self._lock:
            keys = list(self._unwritten)
        for key in keys:
            with contextlib.suppress(EdgeKVError, OSError):  # `KeptSession.warning` has it
                self._run(key)

    def _run(self, key: int) -> None:
        """Write until the store has the newest. One at a time for each key."""
        while True:
            with self._lock:
                conversation = self._unwritten.get(key)
                if conversation is None:
                    self._queued.discard(key)
                    return
            failure = "an unexpected error"
            try:
                self._store.set_conversation(key, dump(conversation))
                failure = ""
            except (EdgeKVError, OSError) as error:
                failure = str(error)
                raise  # whoever runs the jobs counts it
            finally:
                self._note(key, conversation, failure)

    def _note(self, key: int, conversation: Conversation, failure: str) -> None:
        with self._lock:
            if failure:
                self._queued.discard(key)
                self._failures[key] = failure
                return
            self._failures.pop(key, None)
            if self._unwritten.get(key) is conversation:
                del self._unwritten[key]


@dataclass(frozen=True, kw_only=True)
class KeptSession:
    """One session's place at the keeper.

    Attributes:
        keeper: Who brings its conversation to the store.
        key: The session's key in the store.
        damage: What could not be read when it was opened; "" if it was whole.
        token_ids: Tokens whose KV was on disk when it was opened.
    """

    keeper: ConversationKeeper
    key: int
    damage: str = ""
    token_ids: tuple[int, ...] = ()

    def save(self, conversation: Conversation) -> None:
        """Keep this from now on; returns at once."""
        self.keeper.save(self.key, conversation)

    def touch(self) -> None:
        """The session is used now."""
        self.keeper._store.touch(self.key)

    @property
    def warning(self) -> str:
        """What its user should know, as one line; "" if all is well."""
        failure = self.keeper._failures.get(self.key)
        return f"its last turns are not kept: {failure}" if failure else self.damage
