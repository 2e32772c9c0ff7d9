"""A runtime that answers from a script, so that the command line is tested without a model."""

import os
import signal
import sys
import time
import types
from dataclasses import dataclass, field

import pytest

from edgekv.config import RuntimeConfig, Sampling
from edgekv.errors import EdgeKVError
from edgekv.metrics import Stats
from edgekv.runtime.keeper import SessionInfo


@dataclass
class FakeDelta:
    text: str
    provisional: bool = False
    retract: int = 0


@dataclass
class FakeReply:
    text: str
    finish_reason: str
    stats: Stats


class Interrupt:
    """A script step: the user presses Ctrl-C while nothing comes."""


class Wait:
    """A script step: a poll that times out."""


class FakeStream:
    def __init__(self, script, finish_reason):
        self._script = list(script)
        self._finish_reason = finish_reason
        self._text = ""
        self.prefill_progress = (3, 10)
        self.done = False
        self.reply = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def wait(self, timeout_s=None):
        if not self._script:
            self._end(self._finish_reason)
            return None
        step = self._script.pop(0)
        if isinstance(step, EdgeKVError):
            raise step
        if isinstance(step, Interrupt):
            os.kill(os.getpid(), signal.SIGINT)
            return None
        if isinstance(step, Wait):
            return None
        if callable(step):
            step()
            return None
        delta = FakeDelta(step) if isinstance(step, str) else step
        self._text = self._text[: len(self._text) - delta.retract] + delta.text
        return delta

    def close(self):
        if isinstance(next(iter(self._script), None), EdgeKVError):
            self.done = True  # it failed before it could be cancelled
        elif not self.done:
            self._end("cancelled")

    def _end(self, reason):
        self.done = True
        self.reply = FakeReply(self._text, reason, fake_stats())


@dataclass
class FakeSession:
    runtime: "FakeRuntime"
    name: str
    system: str | None
    kept: bool
    app: "FakeApp"
    messages: list = field(default_factory=list)
    warning: str = ""
    cleared: int = 0
    closed: bool = False

    def stream(self, text, *, sampling=None, confirmed=False):
        self.runtime.asked.append(text)
        self.runtime.sampling.append(sampling)
        self.messages += [text, "answer"]
        script = self.runtime.scripts.pop(0) if self.runtime.scripts else ["ok"]
        if isinstance(script, EdgeKVError):
            raise script
        return FakeStream(script, self.runtime.finish_reason)

    def clear(self, *, system=None):
        self.cleared += 1
        self.messages = []
        self.system = self.system if system is None else system

    def close(self):
        self.closed = True


@dataclass
class FakeRuntime:
    """`scripts` holds one entry per request: what its stream does, or the error it raises."""

    scripts: list = field(default_factory=list)
    finish_reason: str = "stop"
    model_name: str = "fake"
    context_max: int = 2048
    asked: list[str] = field(default_factory=list)
    sampling: list = field(default_factory=list)
    sessions: list[FakeSession] = field(default_factory=list)
    opened: list = field(default_factory=list)
    downloads: bool = False
    open_error: EdgeKVError | None = None
    store_error: EdgeKVError | None = None
    session_error: EdgeKVError | None = None
    warning: str = ""
    stored: list = field(default_factory=list)
    keeps_sessions: bool = True
    disk_bytes: int | None = None
    closed: bool = False
    predicts: bool = False
    config: RuntimeConfig = field(default_factory=RuntimeConfig)

    def open(self, model, *, pool_gib=None, config=None, progress=None):
        self.opened.append((model, pool_gib))
        self.config = config
        self.disk_bytes = config.store.disk_bytes
        if self.downloads:
            progress("fake.gguf", 0, 98_362_432)
            progress("fake.gguf", 98_362_432, 98_362_432)
        if self.open_error is not None:
            raise self.open_error
        if self.store_error is not None and self.disk_bytes > 0:
            raise self.store_error
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    @property
    def prefill(self):
        return self.config.prediction.prefill

    def app(self, name):
        assert name == "chat"
        return FakeApp(self)


@dataclass
class FakeApp:
    runtime: FakeRuntime
    prefill: str | None = None

    def session(self, name=None, *, system=None):
        if self.runtime.session_error is not None:
            raise self.runtime.session_error
        for session in self.runtime.sessions:
            if session.name == name:
                return session
        number = len(self.runtime.sessions)
        session = FakeSession(
            self.runtime,
            name or f"session-{number}",
            system,
            kept=name is not None and self.runtime.keeps_sessions,
            app=self,
        )
        session.warning = self.runtime.warning
        self.runtime.sessions.append(session)
        return session

    def sessions(self):
        return self.runtime.stored


def info(name, *, num_messages=2, is_begun=True, age_s=0.0):
    """A stored session, used so long ago."""
    return SessionInfo(
        name=name,
        num_messages=num_messages,
        num_tokens=100,
        payload_bytes=1_000_000,
        created_s=time.time() - 1e6,
        used_s=time.time() - age_s,
        is_begun=is_begun,
    )


@pytest.fixture(autouse=True)
def _no_daemon_of_the_user(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGEKV_STATE_DIR", str(tmp_path_factory.mktemp("state")))


@pytest.fixture
def stored_info():
    return info


def fake_stats(**changes):
    figures = {
        "ttft_ms": 412.3,
        "ttft_confirmed_ms": 412.3,
        "queue_ms": 0.2,
        "prefill_ms": 410.0,
        "prefill_mode": "exact",
        "num_prompt_tokens": 18,
        "num_cached_tokens": 14,
        "num_restored_tokens": 0,
        "restore_ms": 0.0,
        "num_preemptions": 0,
        "num_output_tokens": 5,
        "decode_tokens_per_s": 41.23,
        "tbt_p50_ms": 24.0,
        "num_predicted_tokens": 0,
        "num_repaired_tokens": 0,
        "repair_agreement": None,
        "num_confirmed_tokens": 0,
        "num_retracted_tokens": 0,
        "num_forced_tokens": 0,
        "num_rows_cut": 0,
        "kv_bytes": 1 << 20,
        "tbt_max_ms": 38.4,
        "peak_memory_bytes": 900_000_000,
        "sampling": Sampling(),
    }
    return Stats(**(figures | changes))


@pytest.fixture
def stats():
    return fake_stats


@pytest.fixture
def stream_class():
    return FakeStream


@pytest.fixture
def steps():
    return types.SimpleNamespace(interrupt=Interrupt(), wait=Wait())


@pytest.fixture
def runtime(monkeypatch):
    """The runtime that the command opens."""
    fake = FakeRuntime()
    module = types.ModuleType("edgekv.runtime")
    module.Runtime = fake
    monkeypatch.setitem(sys.modules, "edgekv.runtime", module)
    return fake
