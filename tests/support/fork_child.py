"""A process that talks in named sessions, and forks meanwhile; nothing of it may be touched.

    fork_child.py MODEL KV_FOLDER NUM_FORKS

Each kind of child does to what it inherited whatever a program could, and ends well if that is
refused. Between the forks the parent goes on talking; in the end all that was said is there, after
a restart too, and no child that still lives keeps the store from it.
"""

import asyncio
import contextlib
import faulthandler
import gc
import inspect
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from public_methods import public_methods

from edgekv.config import RuntimeConfig, SamplingParams, StoreOptions
from edgekv.errors import ForkedProcess
from edgekv.runtime import AsyncReplyStream, ReplyStream, Runtime

HANGS_AFTER_S = 60


def open_runtime(model: str, folder: str) -> Runtime:
    store = StoreOptions(folder=Path(folder), disk_bytes=64 << 20, free_reserve_bytes=0)
    return Runtime.open(model, config=RuntimeConfig(pool_bytes=1 << 26, store=store))


def params(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


class Parent:
    """Five conversations, one stream that nobody reads to the end, and somebody who never rests."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.app = runtime.app("mail")
        self.sessions = [self.app.session(f"inbox-{i}") for i in range(5)]
        self.said: list[str] = []
        self.stop = threading.Event()
        self.stream = self.app.session("read").stream("Hi", sampling=params(900))
        next(self.stream)
        self.thread = threading.Thread(target=self.chatter, daemon=True)
        self.thread.start()

    def chatter(self) -> None:
        while not self.stop.is_set():
            with self.app.session("chatter") as session:
                session.respond("Go on", sampling=params(20))
                if len(session.messages) > 6:
                    session.clear()

    def say(self, text: str) -> None:
        for session in self.sessions:
            reply = session.respond(text, sampling=params(3))
            assert reply.finish_reason == "length"
        self.said.append(text)

    def check(self, sessions: Any) -> None:
        for session in sessions:
            assert [m.content for m in session.messages][::2] == self.said, session.messages


# --- what children do ---


def is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ForkedProcess, match="forked") as caught:
        call()
    assert "spawn" in caught.value.hint


def call_everything(parent: Parent) -> None:
    for thing in (parent.runtime, parent.app, parent.sessions[0]):
        for _, call in public_methods(thing):
            is_refused(call)
        for name, _ in inspect.getmembers(type(thing), lambda m: isinstance(m, property)):
            getattr(thing, name)  # what memory knew at the fork may be looked at
    parent.check(parent.sessions)


def leave_blocks(parent: Parent) -> None:
    for thing in (parent.runtime, parent.sessions[0]):
        is_refused(lambda: thing.__exit__(None, None, None))  # noqa: B023
        with contextlib.suppress(SystemExit), thing:
            sys.exit(0)


def close_streams(parent: Parent) -> None:
    stream = parent.stream
    is_refused(lambda: next(stream))
    is_refused(lambda: stream.wait(0.1))
    stream.close()
    with stream:
        pass
    asyncio.run(AsyncReplyStream(stream._running).aclose())
    ReplyStream(stream._running).close()


def drop_everything(parent: Parent) -> None:
    parent.__dict__.clear()
    gc.collect()


def open_another(parent: Parent) -> None:
    drop_everything(parent)
    is_refused(lambda: open_runtime(sys.argv[1], sys.argv[2]))


def do_nothing(parent: Parent) -> None:
    pass


KINDS = [call_everything, leave_blocks, close_streams, drop_everything, open_another, do_nothing]


def fork(parent: Parent, kind: Callable[[Parent], None], *, ends: bool) -> None:
    """Fork, and wait; `ends`: as interpreters do, else at once."""
    process_id = os.fork()
    if process_id == 0:
        faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
        try:
            kind(parent)
        except BaseException:  # noqa: BLE001 - the child is not to go on as its parent
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            os._exit(3)
        if ends:
            sys.exit(0)  # through `main`, as from any program
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])
    assert status == 0, f"{kind.__name__} ended with {status}"


def fork_by_multiprocessing(parent: Parent) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=call_everything, args=(parent,))
    process.start()
    process.join(HANGS_AFTER_S)
    assert process.exitcode == 0
    with context.Pool(2) as pool:
        assert pool.map(abs, [-1, 2]) == [1, 2]


def main(model: str, folder: str, num_forks: str) -> None:
    runtime = open_runtime(model, folder)
    parent = Parent(runtime)
    parent.say("begin")
    for number in range(int(num_forks)):
        for kind in KINDS:
            fork(parent, kind, ends=number % 2 == 0)
        fork_by_multiprocessing(parent)
        parent.say(f"turn {number}")
    survivor = os.fork()
    if survivor == 0:
        signal.pause()
    try:
        parent.stop.set()
        parent.thread.join()
        assert not parent.stream.done
        parent.stream.close()
        parent.check(parent.sessions)
        runtime.check_integrity()
        runtime.close()
        with open_runtime(model, folder) as again:
            assert again.keeps_sessions, "a child that lives on has no lock"
            app = again.app("mail")
            parent.check(app.session(f"inbox-{i}") for i in range(5))
            figures = again.store_snapshot()
            assert figures is not None
            assert figures.num_corrupt == figures.num_index_lost == figures.num_records_lost == 0
    finally:
        os.kill(survivor, signal.SIGKILL)
        os.waitpid(survivor, 0)
    print("untouched", flush=True)  # noqa: T201 - for our parent


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, of forks
    main(*sys.argv[1:])
