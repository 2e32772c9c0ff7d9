"""Opening and closing again and again leaves nothing: threads, descriptors, memory."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from tiny_models import tiny_config, write_folder
from tiny_runtime import eventually, sampling

from edgekv.config import RuntimeConfig, StoreOptions
from edgekv.errors import EdgeKVError
from edgekv.runtime import Runtime

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
A_LITTLE_BYTES = 1 << 16  # a token, a row of logits; the tiny model has more


def native_threads() -> int:
    """MLX's own included."""
    return len(list(Path("/proc/self/task").iterdir()))


def descriptors() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def live_and_use(folder: Path) -> None:
    """A runtime's life: named and unnamed sessions, what MLX does on two streams, evaluation."""
    with Runtime.open(str(folder), config=RuntimeConfig(pool_bytes=1 << 26)) as runtime:
        for name in ("inbox", None):
            session = runtime.app().session(name)
            session.respond("Hi", sampling=sampling(5))
            session.suspend()
            session.clear()
        runtime.logits([1, 2, 3] * 20)


def fail(folder: Path, kv_root: Path) -> None:
    """A life that ends before it began: once the model is loaded, the store cannot be used."""
    options, active_bytes = StoreOptions(folder=kv_root), mx.get_active_memory()
    with pytest.raises(EdgeKVError) as kept:
        Runtime.open(str(folder), config=RuntimeConfig(pool_bytes=1 << 26, store=options))
    assert mx.get_active_memory() < active_bytes + A_LITTLE_BYTES, "who keeps it keeps no weights"
    assert kept.value.hint


def live_often(folder: Path, num_lives: int, num_first: int, kv_root: Path) -> list[int]:
    """Count what is left; return the memory of the process after each life but the first ones."""
    for _ in range(num_first):  # what is made once: pools of libraries, caches of kernels
        live_and_use(folder)
    time.sleep(0.1)  # a thread that was joined is still there for a moment
    threads, fds = native_threads(), descriptors()
    active_bytes = mx.get_active_memory()  # of other tests' runtimes
    resident = []
    for _ in range(num_lives - num_first):
        live_and_use(folder)
        resident.append(resident_bytes())
    for _ in range(10):
        fail(folder, kv_root)
    eventually(lambda: native_threads() <= threads, timeout_s=10.0)
    assert descriptors() <= fds
    assert mx.get_active_memory() < active_bytes + A_LITTLE_BYTES
    return resident


LIFE = """
import sys
from edgekv.config import RuntimeConfig, SamplingParams
from edgekv.runtime import Runtime
with Runtime.open(sys.argv[1], config=RuntimeConfig(pool_bytes=1 << 26)) as runtime:
    runtime.app().session().respond("Hi", sampling=SamplingParams(max_tokens=3))
"""


@pytest.mark.slow
def test_a_process_ends_in_peace(tiny_folder):
    """MLX's threads that nobody ended aborted every second one."""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", LIFE, tiny_folder], capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")


linux = pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux says in /proc")


@linux
@pytest.mark.slow
def test_ten_lives_leave_nothing(tiny_folder, tmp_path):
    (tmp_path / "file").write_text("no folder")
    live_often(tiny_folder, 10, 4, tmp_path / "file")


@linux
@pytest.mark.slow
@pytest.mark.long
def test_a_hundred_lives_leave_nothing(tmp_path):
    """Of a model whose weights, 13 MB, would be seen if one were kept."""
    (tmp_path / "file").write_text("no folder")
    config = tiny_config("llama") | {"intermediate_size": 9600}
    folder = write_folder(tmp_path / "larger", config)
    resident = live_often(folder, 100, 20, tmp_path / "file")
    # Of a dozen lives the least, for pages come and go with the heaps' holes.
    assert min(resident[-12:]) <= 1.05 * min(resident[:12])
