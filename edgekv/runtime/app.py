"""Who shares a runtime with others, and opens sessions in it."""

from typing import TYPE_CHECKING

from edgekv.config import PrefillMode, Priority
from edgekv.runtime.keeper import SessionInfo
from edgekv.runtime.session import Session

if TYPE_CHECKING:
    from edgekv.runtime.runtime import Runtime


class App:
    """Who owns sessions: its weight and priority decide its share of compute.

    Cached KV is visible only to the app that made it.

    Attributes:
        name: Its name.
        weight: Its share relative to apps of the same class.
        priority: Its class; "interactive" goes before "background".
        prefill: Whether its prompts' KV is predicted, where neither request nor session says;
            None leaves it to the runtime.
    """

    def __init__(self, runtime: "Runtime", name: str, weight: float, priority: Priority) -> None:
        self._runtime = runtime
        self.name = name
        self.weight = weight
        self.priority: Priority = priority
        self.prefill: PrefillMode | None = None

    def session(self, name: str | None = None, *, system: str | None = None) -> Session:
        """Open a session, or find the open one of this name.

        Args:
            name: Its name within the app; None makes a new one.
            system: System prompt of a new session, or of one in which nothing was said yet.

        Raises:
            TooManySessions: `num_sessions_max` sessions are open.
            ConfigError: The name is empty, too long or no Unicode text, or the session of this
                name has another system prompt.
            StoreError: The store cannot be read.
        """
        return self._runtime._open_session(self, name, system)

    def sessions(self) -> list[SessionInfo]:
        """Its named sessions that are stored, open or not, the one used last first.

        Raises:
            StoreError: The store cannot be read.
        """
        keeper = self._runtime._keeper
        return [] if keeper is None else keeper.sessions(self.name)

    def remove(self, name: str) -> bool:
        """Close the session of this name, and forget what was said in it and its KV.

        Returns:
            Whether there was one.

        Raises:
            StoreError: The store cannot be written.
        """
        return self._runtime._remove_session(self, name)
