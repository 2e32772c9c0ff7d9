"""When a bug of ours stops the engine, everybody who waits is told, and nobody hangs."""

import asyncio
import json
import threading
from functools import partial

import numpy as np
import pytest
from tiny_models import tiny_config, write_folder
from tiny_runtime import eventually, sampling

from edgekv.config import RuntimeConfig
from edgekv.engine.loop import Loop
from edgekv.engine.runner import Runner
from edgekv.errors import (
    CapacityError,
    CheckpointCorrupt,
    EngineFailed,
    ModelError,
    UnsupportedModel,
)
from edgekv.runtime import Runtime


class Broken(Exception):
    """Not an error that edgekv raises on purpose."""


@pytest.fixture
def breakable(tiny_folder, monkeypatch):
    """A runtime of its own, and an event that makes its next step raise."""
    broken, submit = threading.Event(), Runner.submit

    def maybe_raise(self, step, now_ms):
        if broken.is_set():
            raise Broken("no step today")
        submit(self, step, now_ms)

    monkeypatch.setattr(Runner, "submit", maybe_raise)
    with Runtime.open(str(tiny_folder), config=RuntimeConfig(pool_bytes=1 << 26)) as runtime:
        yield runtime, broken


def test_all_waiters_are_told_what_happened(breakable):
    runtime, broken = breakable
    streams = [runtime.app().session().stream("Hi", sampling=sampling(900)) for _ in range(3)]
    for stream in streams:
        next(stream)
    broken.set()
    for stream in streams:
        with pytest.raises(EngineFailed, match="Broken: no step today") as caught:
            list(stream)
        assert isinstance(caught.value.__cause__, Broken)
        assert "report" in caught.value.hint
        assert stream.done


def test_who_had_ended_and_was_not_told_is_told_what_happened(breakable, monkeypatch):
    """Between an answer's end and the moment when that is told the engine may fail."""
    runtime, broken = breakable
    leave = Loop._leave

    def breaks(self, request, reason):
        leave(self, request, reason)
        broken.set()

    monkeypatch.setattr(Loop, "_leave", breaks)
    app = runtime.app()
    long = app.session().stream("Hi", sampling=sampling(900))
    next(long)
    short = app.session().stream("Hi", sampling=sampling(3))
    for stream in (short, long):
        with pytest.raises(EngineFailed, match="no step today"):
            list(iter(partial(stream.wait, 30.0), None))


def test_async_waiters_are_told(breakable):
    runtime, broken = breakable

    async def main():
        waiting = asyncio.gather(
            *(runtime.app().session().arespond("Hi", sampling=sampling(900)) for _ in range(3)),
            return_exceptions=True,
        )
        while runtime._engine.inbox.num_unfinished < 3:
            await asyncio.sleep(0.001)
        broken.set()
        return await waiting

    assert [type(outcome) for outcome in asyncio.run(main())] == [EngineFailed] * 3


def test_whatever_is_asked_of_a_failed_engine_fails_the_same(breakable):
    runtime, broken = breakable
    session = runtime.app().session()
    broken.set()
    for call in (
        lambda: session.respond("Hi"),
        lambda: session.respond("Hi"),
        lambda: session.prewarm("Hi"),
        runtime.pool_snapshot,
        runtime.check_integrity,
        lambda: runtime.logits([5]),
        lambda: asyncio.run(session.arespond("Hi")),
    ):
        with pytest.raises(EngineFailed):
            call()
    session.close()


def test_closing_a_failed_runtime_ends_its_thread(breakable):
    runtime, broken = breakable
    broken.set()
    with pytest.raises(EngineFailed):
        runtime.app().session().respond("Hi")
    runtime.close()
    assert not runtime._engine.thread.is_alive()


def test_a_failed_assertion_of_integrity_reaches_the_caller_and_stops_nobody(tiny_folder):
    with Runtime.open(str(tiny_folder)) as runtime, runtime.app().session() as session:
        session.respond("Hi", sampling=sampling(3))
        owned = runtime._engine.loop.ledger.pool._owned
        lost = dict(owned)
        owned.clear()
        with pytest.raises(AssertionError):
            runtime.check_integrity()
        owned.update(lost)
        runtime.check_integrity()
        assert session.respond("Again", sampling=sampling(3)).text


# --- models that cannot be opened ---


def engine_threads():
    return [t for t in threading.enumerate() if t.name == "edgekv-engine"]


def broken_folders(tmp_path):
    config = tiny_config("llama")
    unknown = write_folder(tmp_path / "unknown", config | {"model_type": "martian"})
    truncated = write_folder(tmp_path / "truncated", config)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    misshaped = write_folder(tmp_path / "misshaped", config)
    changed = config | {"intermediate_size": 95}
    (misshaped / "config.json").write_text(json.dumps(changed))
    tokenless = write_folder(tmp_path / "tokenless", config, tokenizer=False)
    return {
        unknown: UnsupportedModel,
        truncated: CheckpointCorrupt,
        misshaped: CheckpointCorrupt,
        tokenless: ModelError,
    }


def test_a_model_that_cannot_be_loaded_leaves_no_thread(tmp_path):
    before = len(engine_threads())
    for folder, error in broken_folders(tmp_path).items():
        with pytest.raises(error) as caught:
            Runtime.open(str(folder))
        assert caught.value.hint
    eventually(lambda: len(engine_threads()) == before)


def test_a_text_whose_logits_do_not_fit_the_memory_is_refused(runtime, monkeypatch):
    def refuse(*_, **__):
        raise MemoryError("Unable to allocate 32 GiB")

    with monkeypatch.context() as full:
        full.setattr(np, "empty", refuse)
        with pytest.raises(CapacityError, match="32 GiB"):
            runtime.logits([1, 2, 3])
    assert runtime.logits([1, 2, 3]).shape[0] == 3
