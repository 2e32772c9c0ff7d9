"""One model's KV on SSD: the façade over index, extents and segment file."""

from collections.abc import Sequence
from pathlib import Path

from edgekv.store.values import RecordRef, StoredSession, StoreSnapshot

Buffer = memoryview | bytearray | bytes


class Store:
    """KV of one model's sessions; owns its folder by a lock. Calls may come from any thread."""

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        model: str,
        fingerprint: str,
        token_bytes: int,
        disk_bytes: int,
        free_reserve_bytes: int,
    ) -> "Store":
        """Open or create `<root>/<fingerprint[:32]>/`. Raises StoreBusy, StoreUnusable."""
        raise NotImplementedError

    def session(self, app: str, name: str, *, persistent: bool) -> StoredSession:
        """Find or create. Memory only, but for the conversation's text."""
        raise NotImplementedError

    def find(self, app: str, name: str) -> StoredSession | None:
        """The session of that name, or None."""
        raise NotImplementedError

    def sessions(self) -> list[StoredSession]:
        """All sessions, the one used last first."""
        raise NotImplementedError

    def match(
        self, app: str, token_ids: Sequence[int], *, but_not: int | None = None
    ) -> tuple[int, int]:
        """(key, leading tokens that this session of the app has stored); (0, 0) if none. Memory."""
        raise NotImplementedError

    def adopt(self, key: int, donor: int, num_tokens: int) -> int:
        """Link the donor's first records as this session's; returns its stored end. Memory."""
        raise NotImplementedError

    def write(
        self,
        key: int,
        start: int,
        token_ids: Sequence[int],
        payload: Sequence[Buffer],
        *,
        vectored: bool = True,
    ) -> RecordRef:
        """Store KV of tokens [start, start + len(token_ids)).

        Raises StoreFull, StoreStale (cut or removed meanwhile), StoreUnusable (index), OSError.
        """
        raise NotImplementedError

    def truncate(self, key: int, num_tokens: int) -> None:
        """Forget the tokens from `num_tokens` on. Memory; on disk with the next commit."""
        raise NotImplementedError

    def read(self, ref: RecordRef, into: Sequence[Buffer], *, vectored: bool = True) -> None:
        """Fill `into` with the whole payload. Raises RecordCorrupt, StoreStale, OSError."""
        raise NotImplementedError

    def quarantine(self, key: int, start: int) -> None:
        """After RecordCorrupt: drop the record at `start`, from all who share it."""
        raise NotImplementedError

    def set_conversation(self, key: int, text: str) -> None:
        """Commits. Raises StoreFull, StoreUnusable."""
        raise NotImplementedError

    def touch(self, key: int) -> None:
        """The session was used now. Memory; on disk with the next commit."""
        raise NotImplementedError

    def remove(self, key: int) -> None:
        """Forget the session and its KV; commits if it is persistent."""
        raise NotImplementedError

    def pin(self, key: int) -> None:
        """Do not evict this session until `unpin`; pins are counted."""
        raise NotImplementedError

    def unpin(self, key: int) -> None:
        """Undo one `pin`."""
        raise NotImplementedError

    def snapshot(self) -> StoreSnapshot:
        """Figures of this moment."""
        raise NotImplementedError

    def flush(self) -> None:
        """Commit what only memory knows yet."""
        raise NotImplementedError

    def check_integrity(self) -> None:
        """Assert that index, extents, budget and memory agree."""
        raise NotImplementedError

    def close(self) -> None:
        """Forget sessions that do not persist, commit, give the folder back."""
        raise NotImplementedError
