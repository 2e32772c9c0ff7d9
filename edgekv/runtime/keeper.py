"""From the thread that read a reply to the store: conversations on their way to disk."""

import threading
from collections.abc import Callable

from edgekv.errors import EdgeKVError
from edgekv.runtime.conversation import Conversation
from edgekv.runtime.persistence import dump


class ConversationKeeper:
    """Brings conversations to the store: the newest of each session, one write at a time.

    Owned by the runtime; any thread may call it. A write that fails leaves the conversation here,
    where the session's next turn takes it along and a session that is opened again finds it.

    Args:
        write: Stores the text of the session with this key; called on an I/O thread.
        submit: Queues a job for an I/O thread.
    """

    def __init__(
        self,
        write: Callable[[int, str], None],
        submit: Callable[[Callable[[], None]], None],
    ) -> None:
        self._write = write
        self._submit = submit
        self._lock = threading.Lock()  # guards what follows
        self._unwritten: dict[int, Conversation] = {}
        self._queued: set[int] = set()
        self._failures: dict[int, str] = {}

    def save(self, key: int, conversation: Conversation) -> None:
        """Queue a write; returns at once, and never fails."""
        with self._lock:
            self._unwritten[key] = conversation
            if key in self._queued:
                return
            self._queued.add(key)
        try:
            self._submit(lambda: self._run(key))
        except EdgeKVError as error:  # the runtime is closing
            self._give_up(key, error)

    def unwritten(self, key: int) -> Conversation | None:
        """What the store does not have yet."""
        with self._lock:
            return self._unwritten.get(key)

    def failure(self, key: int) -> str:
        """Why the last write failed; "" if it did not."""
        with self._lock:
            return self._failures.get(key, "")

    def forget(self, key: int) -> None:
        """The session is removed: nothing more is written of it but what is being written now."""
        with self._lock:
            self._unwritten.pop(key, None)
            self._failures.pop(key, None)

    def _run(self, key: int) -> None:
        """Write until the store has the newest. On an I/O thread, one at a time for each key."""
        while (conversation := self._next(key)) is not None:
            try:
                self._write(key, dump(conversation))
            except (EdgeKVError, OSError) as error:
                self._give_up(key, error)
                raise  # whoever runs the jobs counts it
            with self._lock:
                self._failures.pop(key, None)
                if self._unwritten.get(key) is conversation:
                    del self._unwritten[key]

    def _next(self, key: int) -> Conversation | None:
        with self._lock:
            conversation = self._unwritten.get(key)
            if conversation is None:
                self._queued.discard(key)
            return conversation

    def _give_up(self, key: int, error: EdgeKVError | OSError) -> None:
        with self._lock:
            self._queued.discard(key)
            self._failures[key] = str(error)
