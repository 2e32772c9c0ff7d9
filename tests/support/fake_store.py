"""A store that keeps conversations in memory and may be told to fail; KV it has none."""

import time
from dataclasses import replace

from edgekv.errors import StoreFull
from edgekv.store.values import StoredSession


class FakeStore:
    """What the runtime needs of `edgekv.store.Store` for conversations."""

    def __init__(self) -> None:
        self.rows: dict[int, StoredSession] = {}
        self.writes: list[tuple[int, str]] = []
        self.is_full = False

    def find(self, app: str, name: str) -> StoredSession | None:
        return next((r for r in self.rows.values() if (r.app, r.name) == (app, name)), None)

    def session(self, app: str, name: str, *, persistent: bool) -> StoredSession:
        row = self.find(app, name)
        if row is None:
            now = time.time()
            row = StoredSession(
                key=len(self.rows) + 1,
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

    def set_conversation(self, key: int, text: str) -> None:
        if self.is_full:
            raise StoreFull("the disk budget of 1 MiB is reached")
        self.writes.append((key, text))
        self.rows[key] = replace(self.rows[key], conversation=text)


class Jobs:
    """An I/O thread that works when the test says so."""

    def __init__(self) -> None:
        self.waiting: list = []
        self.refuses = False

    def submit(self, job) -> bool:
        if self.refuses:
            return False
        self.waiting.append(job)
        return True

    def run(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()
