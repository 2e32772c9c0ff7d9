"""A store that keeps conversations in memory and may be told to fail; KV it has none."""

import itertools
import time
from dataclasses import replace

from edgekv.errors import StoreFull, StoreStale
from edgekv.store.values import StoredSession


class FakeStore:
    """What the runtime needs of `edgekv.store.Store` for conversations."""

    def __init__(self) -> None:
        self._keys = itertools.count(1)
        self.rows: dict[int, StoredSession] = {}
        self.writes: list[tuple[int, str]] = []
        self.scrubbed: list[int] = []  # keys of sessions of which something was taken back
        self.is_full = False
        self.lost = ""
        self.bug: BaseException | None = None

    def find(self, app: str, name: str) -> StoredSession | None:
        return next((r for r in self.rows.values() if (r.app, r.name) == (app, name)), None)

    def session(self, app: str, name: str, *, persistent: bool) -> StoredSession:
        row = self.find(app, name)
        if row is None:
            now = time.time()
            row = StoredSession(
                key=next(self._keys),
                app=app,
                name=name,
                persistent=persistent,
                token_ids=(),
                records=(),
                conversation=None,
                created_s=now,
                used_s=now,
                payload_bytes=0,
            )
            self.rows[row.key] = row
        return row

    def sessions(self) -> list[StoredSession]:
        return sorted(self.rows.values(), key=lambda row: row.used_s, reverse=True)

    def why_lost(self) -> str:
        return self.lost

    def touch(self, key: int) -> None:
        if key in self.rows:
            now = max(time.time(), self.sessions()[0].used_s + 1e-3)
            self.rows[key] = replace(self.rows[key], used_s=now)

    def remove(self, key: int) -> None:
        self.rows.pop(key, None)

    def lookup(self, key: int) -> StoredSession | None:
        return self.rows.get(key)

    def set_conversation(self, key: int, text: str, *, taken_back: bool = False) -> None:
        if self.bug is not None:
            raise self.bug
        if self.is_full:
            raise StoreFull("the disk budget of 1 MiB is reached")
        if key not in self.rows:
            raise StoreStale("the session was removed meanwhile")
        self.writes.append((key, text))
        if taken_back:
            self.scrubbed.append(key)
        self.rows[key] = replace(self.rows[key], conversation=text)
