"""A process that writes to a store until it is killed: `store_child.py ROOT SEED BUDGET N`.

Each thread works on sessions of its own and says in a log, by one system call each, what it is
about to do and what is done. N > 0 is the number of the store's step (file call, index commit) in
which the process kills itself, in the middle of it; 0 waits for somebody else to do that.
"""

import os
import random
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_store import kv_of, open_store

from edgekv.store.disk_io import Buffer, Files
from edgekv.store.index import Index
from edgekv.store.store import Store

NUM_THREADS = 2
NUM_SESSIONS = 4  # of each thread
TOKENS_MAX = 1500

# A log line: "S" or "D" for started or done, then the operation.
WRITE, CUT, ADOPT, REMOVE, SAY = "write", "cut", "adopt", "remove", "say"


def new_tokens(name: str, nonce: int, num_tokens: int) -> list[int]:
    """What a session says next; whoever knows the nonce knows it too."""
    draw = random.Random(f"{name} {nonce}")
    return [draw.randrange(50_000) for _ in range(num_tokens)]


class Countdown:
    """Kills the process in the middle of its Nth step."""

    def __init__(self, num_steps: int) -> None:
        self._left = num_steps
        self._lock = threading.Lock()

    def is_over(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left == 0


class FatalFiles(Files):
    """Files in one call of which the process dies, a write being half done."""

    def __init__(self, countdown: Countdown) -> None:
        self._countdown = countdown

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        if self._countdown.is_over():
            whole = b"".join(buffers)
            super().pwritev(fd, [whole[: len(whole) // 2]], offset)
            die()
        return super().pwritev(fd, buffers, offset)

    def open(self, path: Path, *, create: bool) -> int:
        fd = super().open(path, create=create)
        if create and self._countdown.is_over():
            die()
        return fd

    def close(self, fd: int) -> None:
        super().close(fd)
        if self._countdown.is_over():
            die()

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        if self._countdown.is_over():
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_commits(countdown: Countdown) -> None:
    """Let the process die before, in or after an index commit."""
    apply, put_session = Index.apply, Index._put_session

    def dying_apply(self: Index, *args: Any, **options: Any) -> None:
        if countdown.is_over():
            die()
        apply(self, *args, **options)
        if countdown.is_over():
            die()

    def dying_put(self: Index, *args: Any) -> None:
        put_session(self, *args)
        if countdown.is_over():
            die()

    Index.apply = dying_apply  # type: ignore[method-assign]
    Index._put_session = dying_put  # type: ignore[method-assign]


class Writer:
    """One thread's sessions and its log."""

    def __init__(self, store: Store, root: Path, number: int, seed: int) -> None:
        self._store = store
        self._random = random.Random(f"{seed} {number}")
        self._log = os.open(root / f"log-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._names = [f"{number}.{index}" for index in range(NUM_SESSIONS)]

    def run(self) -> None:
        while True:
            self._step(self._random.choice(self._names))

    def _step(self, name: str) -> None:
        stored = self._store.session("app", name, persistent=True)
        key, end = stored.key, stored.num_tokens
        dice = self._random.random()
        if dice < 0.06:
            self._say([REMOVE, name], lambda: self._store.remove(key))
        elif dice < 0.12:
            cut = self._random.randrange(end + 1)
            self._say([CUT, name, cut], lambda: self._store.truncate(key, cut))
        elif dice < 0.18:
            donor = self._random.choice([n for n in self._names if n != name])
            found = self._store.find("app", donor)
            if found is not None and found.num_tokens > end:
                count = self._random.randint(end + 1, found.num_tokens)
                run = lambda: self._store.adopt(key, found.key, count)  # noqa: E731
                self._say([ADOPT, name, donor, count], run)
        elif dice < 0.24:
            nonce = self._random.randrange(1 << 30)
            self._say([SAY, name, nonce], lambda: self._store.set_conversation(key, str(nonce)))
        else:
            self._write(name, key, list(stored.token_ids))

    def _write(self, name: str, key: int, ids: list[int]) -> None:
        start = len(ids)
        if start > TOKENS_MAX or (start and self._random.random() < 0.1):
            start = self._random.randrange(start)
        nonce, count = self._random.randrange(1 << 30), self._random.randint(1, 400)
        new = new_tokens(name, nonce, count)
        payload = kv_of(ids[:start] + new, start)
        self._say(
            [WRITE, name, start, nonce, count],
            lambda: self._store.write(key, start, new, [payload]),
        )

    def _say(self, words: Sequence[object], run: Any) -> None:
        line = " ".join(map(str, words))
        os.write(self._log, f"S {line}\n".encode())
        run()
        os.write(self._log, f"D {line}\n".encode())


def main(root: Path, seed: int, disk_bytes: int, num_steps: int) -> None:
    countdown = Countdown(num_steps)
    die_in_commits(countdown)
    store = open_store(root, disk_bytes=disk_bytes, files=FatalFiles(countdown))
    writers = [Writer(store, root, number, seed) for number in range(NUM_THREADS)]
    threads = [threading.Thread(target=writer.run, daemon=True) for writer in writers]
    for thread in threads:
        thread.start()
    os.write(1, b"ready\n")
    for thread in threads:
        thread.join()
    raise AssertionError("a thread ended")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
