"""A process that talks in named sessions until it is killed; the next one goes on with its folder.

    runtime_child.py MODEL KV_FOLDER SCRIPT LOG SEED HOW

SCRIPT is JSON: for each user what is said and what is answered, turn by turn, undisturbed. HOW
says who kills: "time" our parent, "call" we ourselves in the middle of a call to the disk, "commit"
around a commit; "end" is nobody: every user says one more thing, and the runtime is closed.

Before anything else every session is looked at: what it remembers must be the beginning of the
script, the KV that is on disk must be read, and the next answer must be the script's. LOG says what
is promised: a turn that was returned is kept, what was removed or cleared does not come back, and
after a suspension so many tokens are on disk.
"""

import json
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edgekv.config import RuntimeConfig, SamplingParams, StoreOptions, SwapOptions
from edgekv.kv.session_kv import common_prefix
from edgekv.runtime import App, Runtime, Session
from edgekv.store.disk_io import Files
from edgekv.store.index import Index

TOKEN_BYTES = 2 * 3 * 2 * 16 * 4
POOL_BYTES = 8 * 128 * TOKEN_BYTES
REPLY_TOKENS = 12

Turns = list[tuple[str, str]]  # what is said, what is answered


def open_runtime(model: Path, folder: Path | None) -> Runtime:
    """A pool of a few sessions; without a folder, of all, and without a disk."""
    store = StoreOptions(folder=folder, disk_bytes=64 << 20, free_reserve_bytes=0)
    config = RuntimeConfig(
        pool_bytes=POOL_BYTES if folder else 1 << 26,
        store=store,
        swap=SwapOptions(mode="reuse" if folder else "off"),
    )
    return Runtime.open(str(model), config=config)


def respond(session: Session, text: str) -> str:
    params = SamplingParams(max_tokens=REPLY_TOKENS, ignore_eos=True)
    return session.respond(text, sampling=params).text


@dataclass
class Promise:
    """What the next process must find of a user's session."""

    tokens: int = 0  # on disk, at least
    least: int = 0  # turns
    most: int = 1  # one more may have been kept, and the process killed before it could say so

    def after(self, what: str, number: int) -> "Promise":
        """The promise behind a line of the log."""
        match what:
            case "suspended":
                return replace(self, tokens=number)
            case "said":
                return replace(self, least=number, most=number + 1)
            case "forgetting":  # perhaps it has, perhaps not
                return Promise(most=self.most)
        assert what == "forgotten"
        return Promise()


class User:
    """One user of one app."""

    def __init__(self, runtime: Runtime, number: int, turns: Turns, log: int) -> None:
        self.app: App = runtime.app(f"app-{number % 2}")
        self.name = f"user-{number}"
        self.turns = turns
        self._log = log
        self._tokenizer = runtime.tokenizer

    def session(self) -> tuple[Session, int]:
        """Their session, and how many turns it remembers."""
        session = self.app.session(self.name)
        told = [message.content for message in session.messages]
        script = [text for turn in self.turns for text in turn]
        assert told == script[: len(told)], f"{self.name} remembers {told}"
        assert len(told) % 2 == 0
        return session, len(told) // 2

    def look(self, promised: Promise) -> int:
        """Go on after a restart; return how many tokens were read back."""
        session, num_turns = self.session()
        assert session.warning == ""
        kept = session._talk.kept
        stored = () if kept is None else kept.token_ids
        assert len(stored) >= promised.tokens, f"{self.name} has {len(stored)} tokens: {promised}"
        assert promised.least <= num_turns <= promised.most, f"{self.name}: {num_turns}, {promised}"
        if num_turns == len(self.turns):
            return 0
        text, expected = self.turns[num_turns]
        prompt = session._talk.conversation.prompt(self._tokenizer, text).ids
        assert respond(session, text) == expected
        self.log("said", num_turns + 1)
        assert session.last_reply is not None
        stats = session.last_reply.stats
        # What memory has of a common prefix is copied rather than read.
        known = min(common_prefix(stored, prompt), len(prompt) - 1)
        if kept is not None and kept.state_ends:  # it goes on from where there is one
            known = max((end for end in kept.state_ends if end <= known), default=0)
        assert stats.num_cached_tokens >= known
        return stats.num_restored_tokens

    def talk(self, draw: random.Random) -> None:
        """Say the next thing, or begin anew."""
        session, num_turns = self.session()
        if num_turns == len(self.turns):
            self.log("forgetting", 0)
            if draw.random() < 0.5:
                self.app.remove(self.name)
            else:
                session.clear()
            self.log("forgotten", 0)
            return
        text, expected = self.turns[num_turns]
        assert respond(session, text) == expected
        self.log("said", num_turns + 1)
        how = draw.random()
        if how < 0.3:
            self.log("suspended", session.suspend())
        elif how < 0.5:
            session.close()

    def log(self, what: str, num_tokens: int) -> None:
        os.write(self._log, f"{self.name} {what} {num_tokens}\n".encode())


def promises(log: Path) -> dict[str, Promise]:
    """What each user's session must be."""
    found: dict[str, Promise] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        name, what, number = line.split()
        found[name] = found.get(name, Promise()).after(what, int(number))
    return found


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_call(nth: int) -> None:
    """Kill ourselves in the nth call from now on; of a write half is done."""
    count = threading.Semaphore(nth - 1)

    def wrapped(name: str) -> Callable[..., object]:
        call = getattr(Files, name)

        def dying(self: Files, *args: object) -> object:
            if count.acquire(blocking=False):
                return call(self, *args)
            if name == "pwritev":
                fd, buffers, offset = args
                half = [bytes(memoryview(b).cast("B")) for b in buffers]  # type: ignore[attr-defined]
                data = b"".join(half)
                os.pwrite(fd, data[: len(data) // 2], offset)  # type: ignore[arg-type]
            die()
            return None

        return dying

    for name in ("preadv", "pwritev", "close", "unlink", "volume_free_bytes"):
        setattr(Files, name, wrapped(name))


def die_at_commit(nth: int, *, after: bool) -> None:
    count, apply = threading.Semaphore(nth - 1), Index.apply

    def dying(self: Index, *args: object, **kwargs: object) -> None:
        if count.acquire(blocking=False):
            apply(self, *args, **kwargs)  # type: ignore[arg-type]
            return
        if after:
            apply(self, *args, **kwargs)  # type: ignore[arg-type]
        die()

    Index.apply = dying  # type: ignore[assignment, method-assign]


def arm(how: str, draw: random.Random) -> None:
    if how == "call":
        die_in_call(draw.randint(1, 80))
    elif how == "commit":
        die_at_commit(draw.randint(1, 25), after=draw.random() < 0.5)


def talk_for_ever(user: User, seed: int) -> None:
    draw = random.Random(seed)
    try:
        while True:
            user.talk(draw)
    except BaseException:  # noqa: BLE001 - nothing may pass unseen
        traceback.print_exc()
        os._exit(3)


def main(model: str, folder: str, script: str, log_path: str, seed: str, how: str) -> None:
    draw = random.Random(int(seed))
    promised = promises(Path(log_path))
    turns: list[Turns] = json.loads(Path(script).read_text())
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    if draw.random() < 0.3:
        arm(how, draw)
        how = "armed"
    runtime = open_runtime(Path(model), Path(folder))
    users = [User(runtime, number, said, log) for number, said in enumerate(turns)]
    restored = sum(user.look(promised.get(user.name, Promise())) for user in users)
    figures = runtime.store_snapshot()
    assert figures is not None
    assert figures.num_corrupt == figures.num_index_lost == figures.num_records_lost == 0
    assert runtime.counters().swap.num_io_errors == 0
    runtime.check_integrity()
    print(restored, flush=True)  # noqa: T201 - for our parent
    if how == "end":
        runtime.close()
        return
    arm(how, draw)
    for number, user in enumerate(users):
        thread = threading.Thread(target=talk_for_ever, args=(user, int(seed) + number))
        thread.daemon = True
        thread.start()
    threading.Event().wait(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
