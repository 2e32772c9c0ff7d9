"""A rank that has an accident: `python rank_faults.py PLAN`, PLAN being JSON.

    {"model": …, "folder": …, "accident": {"rank": 1, "where": "decode", "nth": 3, "what": "kill"}}

Rank 0 opens a runtime and asks in named sessions, each on a thread of its own, until all have been
answered or have failed; the others follow. All say as JSON, a line each, what happens to them and
when. The accident happens at the nth thing of its kind, in the middle of it.

The first users go on where an earlier life left them, if the plan has what they said `before`.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from tiny_models import random_ids
from tiny_runtime import TIE, greedy_by_hand, sampling

from edgekv.config import RuntimeConfig, StoreOptions
from edgekv.engine import lead
from edgekv.engine.follower_steps import FollowerSteps
from edgekv.engine.lead import Lead
from edgekv.engine.steps import Reader
from edgekv.errors import EdgeKVError
from edgekv.ranks.group import Group
from edgekv.ranks.launched import launched
from edgekv.runtime import Runtime
from edgekv.runtime.ranks import Ranks, follow
from edgekv.store import Store
from edgekv.store.disk_io import Files

NUM_USERS, NUM_KEPT = 8, 2
TURN_TOKENS = (90, 70, 50)
REPLY_TOKENS = 16
TOKEN_BYTES = 2 * 3 * 2 * 16 * 4  # of the tiny llama
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def say(what, **fields):
    sys.stdout.write(json.dumps({"what": what, "at_s": time.monotonic(), **fields}) + "\n")
    sys.stdout.flush()


def turns(user):
    """What a user says, turn by turn, as ids."""
    return [random_ids(size, seed=10 * user + turn) for turn, size in enumerate(TURN_TOKENS)]


def config(folder, num_ranks):
    """A pool of six of the eight sessions."""
    return RuntimeConfig(
        pool_bytes=6 * 256 * TOKEN_BYTES // num_ranks,
        store=StoreOptions(folder=folder, disk_bytes=64 << 20, free_reserve_bytes=0),
    )


def reference(runtime, user):
    """What a user is answered in a process alone, and all but the last answer with it as ids."""
    said, ids = [], []
    for text in turns(user):
        ids += text
        before = list(ids)
        said.append(greedy_by_hand(runtime, ids, REPLY_TOKENS))
        ids += said[-1]
    best = runtime.logits(ids).astype(float)
    best.sort(axis=-1)
    assert (best[:, -1] - best[:, -2]).min() > TIE, f"user {user} is answered by a tie"
    return said, before


# --- accidents ---


class Accident:
    """What happens to this process, and from when on: a signal, a disk that hangs, or an errno."""

    def __init__(self, where, nth, what, delay_ms=0.0):
        self.what, self.delay_ms = what, delay_ms
        self._left = threading.Semaphore(nth - 1)
        getattr(self, f"_in_{where}")()

    def __call__(self):
        """One more of its kind: perhaps this is the one."""
        if self._left.acquire(blocking=False):
            return
        if self.delay_ms:
            threading.Timer(self.delay_ms / 1000, self._happen).start()
        else:
            self._happen()

    def _happen(self):
        say("accident")
        if self.what in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.what])
        elif self.what == "hang":
            threading.Event().wait()
        else:
            raise OSError(getattr(errno, self.what), "injected")

    def _in_prefill(self):
        self._in_steps(lambda rows: max(rows) > 1)

    def _in_decode(self):
        self._in_steps(lambda rows: max(rows) == 1)

    def _in_steps(self, wanted):
        """Once the others were told of the step, or this rank was."""
        run, submit = FollowerSteps.run, Lead.submit

        def following(steps, words):
            reader = Reader(words)
            num_parts = reader.many(3)[2]
            if wanted([reader.part().num_rows for _ in range(num_parts)]):
                self()
            run(steps, words)

        def leading(lead, told, asked, *, cuts_rows):
            submit(lead, told, asked, cuts_rows=cuts_rows)
            if wanted([part.num_rows for part in told.parts]):
                self()

        FollowerSteps.run, Lead.submit = following, leading

    def _in_exchange(self):
        """While the others wait for it."""
        exchange = Group.exchange

        def exchanging(group, words):
            if not self._left.acquire(blocking=False):
                time.sleep(0.05)
                self._happen()
            return exchange(group, words)

        Group.exchange = exchanging

    def _in_logits(self):
        """Behind all layers of a step, while the others wait for this rank's part of its logits."""
        all_gather, run = Group.all_gather, FollowerSteps.run
        withheld = []

        def gathering(group, part):
            if self._left.acquire(blocking=False):
                return all_gather(group, part)
            withheld.append(part)
            return part

        def running(steps, words):
            run(steps, words)
            if withheld:
                self._happen()

        Group.all_gather, FollowerSteps.run = gathering, running

    def _in_swap(self):
        self._in_calls("pwritev", "edgekv-writer")

    def _in_restore(self):
        self._in_calls("preadv", "edgekv-reader")

    def _in_calls(self, name, thread):
        """In a call to the disk, half of it done."""
        call = getattr(Files, name)

        def wrapped(files, fd, buffers, offset):
            if threading.current_thread().name == thread:
                if name == "pwritev":
                    data = b"".join(bytes(memoryview(one).cast("B")) for one in buffers)
                    os.pwrite(fd, data[: len(data) // 2], offset)
                self()
            return call(files, fd, buffers, offset)

        setattr(Files, name, wrapped)


# --- rank 0 ---


def talk(app, user, before):
    """Say what a user says, turn by turn; or the last turn behind all `before` it."""
    said, cached, ids = [], [], []
    texts = turns(user)
    if before:
        texts = [before]
    else:
        app.remove(f"user-{user}")
    try:
        for text in texts:
            with app.session(f"user-{user}") as session:
                ids += text
                said.append([])
                with session.submit_ids(list(ids), sampling(REPLY_TOKENS)) as stream:
                    for delta in stream:
                        said[-1] += delta.token_ids
                ids += stream.reply.token_ids
                cached.append(stream.reply.stats.num_cached_tokens)
                say("suspended", user=user, tokens=session.suspend())
    except EdgeKVError as error:
        say("failed", user=user, kind=type(error).__name__, error=str(error))
    say("talked", user=user, said=said, cached=cached)


def live(plan, num_ranks):
    """Ask until all have been answered, or have failed."""
    try:
        runtime = Runtime.open(plan["model"], config=config(Path(plan["folder"]), num_ranks))
    except EdgeKVError as error:
        say("failed", user=None, kind=type(error).__name__, error=str(error))
        return
    say("opened")
    before = dict(enumerate(plan.get("before", ())))
    threads = [
        threading.Thread(target=talk, args=(runtime.app(f"app-{user % 2}"), user, before.get(user)))
        for user in range(NUM_USERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with contextlib.suppress(EdgeKVError):
        swap = runtime.counters().swap
        say("counters", errors=swap.num_io_errors, outs=swap.num_swap_outs, ins=swap.num_swap_ins)
    runtime.close()
    say("closed")


def tell_of_stores():
    opened = Store.open

    def wrapped(*args, **kwargs):
        store = opened(*args, **kwargs)
        say("store", folder=str(store.folder))
        return store

    Store.open = wrapped


def hear_late(delay_s):
    """Rank 0 learns that another one has ended from MLX first, if that says so."""
    failed = Ranks._failed

    def late(ranks, *args):
        time.sleep(delay_s)
        failed(ranks, *args)

    Ranks._failed = late


def main():
    plan = json.loads(sys.argv[1])
    place = launched()
    rank = 0 if place is None else place.rank
    lead.DISK_S = plan.get("disk_s", lead.DISK_S)
    hear_late(plan.get("deaf_s", 0.0))
    accident = dict(plan.get("accident", {}))
    say("begins", pid=os.getpid())
    tell_of_stores()
    if accident and accident.pop("rank") == rank:
        Accident(**accident)
    if rank:
        return follow(place)
    live(plan, 1 if place is None else place.size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
