"""A runtime that nobody refers to any more is closed: threads, store and memory are given back."""

import gc
import subprocess
import sys
import threading

import mlx.core as mx
import pytest
from tiny_runtime import eventually, sampling

from edgekv.config import RuntimeConfig, StoreOptions
from edgekv.process import wait_for_dropped
from edgekv.runtime import Runtime


@pytest.fixture
def opened(tiny_folder, tmp_path):
    def open_again():
        config = RuntimeConfig(pool_bytes=1 << 24, store=StoreOptions(folder=tmp_path / "kv"))
        return Runtime.open(str(tiny_folder), config=config)

    return open_again


def drop(things):
    things.clear()
    gc.collect()


def test_its_threads_end_its_memory_is_free_and_its_store_another_s(opened):
    gc.collect()
    wait_for_dropped()
    threads, active_bytes = set(threading.enumerate()), mx.get_active_memory()
    held = [opened()]
    held[0].app("mail", weight=2).session("inbox").respond("One", sampling=sampling(3))
    with pytest.warns(ResourceWarning, match="was dropped, and not closed"):
        drop(held)
    gc.collect()  # a warning referred to what it was about
    eventually(lambda: set(threading.enumerate()) <= threads)
    assert mx.get_active_memory() <= active_bytes
    with opened() as again:
        assert again.keeps_sessions
        assert len(again.app("mail").session("inbox").messages) == 2


def test_who_opens_another_waits_for_its_store_and_what_was_said_last_is_there(opened):
    held = [opened().app().session("inbox").stream("One", sampling=sampling(900))]
    text = next(held[0]).text
    with pytest.warns(ResourceWarning):
        drop(held)
    with opened() as again:
        assert again.keeps_sessions
        assert again.app().session("inbox").messages[1].content.startswith(text)


def test_the_engine_s_own_thread_may_be_the_one_that_notices(opened):
    held = [opened()]
    engine = held[0]._engine
    with pytest.warns(ResourceWarning):
        engine.inbox.call(lambda: drop(held))
    eventually(lambda: not engine.thread.is_alive())


@pytest.mark.parametrize("holder", ["app", "session", "stream"])
def test_it_is_there_while_somebody_has_something_of_it(opened, holder):
    held = [opened().app()]
    engine = held[0]._runtime._engine
    if holder != "app":
        held[0] = held[0].session("inbox")
    if holder == "stream":
        held[0] = held[0].stream("One", sampling=sampling(5))
    gc.collect()
    wait_for_dropped()
    assert engine.thread.is_alive()
    if holder == "stream":
        list(held[0])
        assert held[0].reply.finish_reason == "length"
    with pytest.warns(ResourceWarning):
        drop(held)
    eventually(lambda: not engine.thread.is_alive())


SCRIPT = """
import gc, sys
from edgekv.config import RuntimeConfig, SamplingParams, StoreOptions
from edgekv.runtime import Runtime
model, folder, how = sys.argv[1:]
config = RuntimeConfig(pool_bytes=1 << 24, store=StoreOptions(folder=folder))
runtime = Runtime.open(model, config=config)
session = runtime.app().session("inbox")
session.respond("One", sampling=SamplingParams(max_tokens=40, ignore_eos=True))
if how == "dropped":
    del session, runtime
    gc.collect()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["open", "dropped"])
def test_the_interpreter_ends_behind_what_is_open_and_what_was_dropped(
    opened, tiny_folder, tmp_path, how
):
    script = [sys.executable, "-c", SCRIPT, str(tiny_folder), str(tmp_path / "kv"), how]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with opened() as runtime:
        reply = runtime.app().session("inbox").respond("Two", sampling=sampling(1))
        assert reply.stats.num_restored_tokens >= 40
