"""A forked child has its parent's memory and none of its threads: it may touch nothing."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_runtime import sampling

from edgekv import process
from edgekv.config import RuntimeConfig, SwapOptions
from edgekv.device import works_after_fork
from edgekv.errors import ForkedProcess
from edgekv.runtime import Runtime
from edgekv.runtime import runtime as runtime_module

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of Python 3.12

SCRIPT = Path(__file__).parents[1] / "support" / "fork_child.py"


def play(tiny_folder, kv_folder, num_forks):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tiny_folder), str(kv_folder), str(num_forks)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"},
    )
    assert done.stdout.strip() == "untouched", done.stderr
    assert done.returncode == 0
    return done


@pytest.mark.slow
def test_children_of_each_kind_touch_nothing(tiny_folder, tmp_path):
    play(tiny_folder, tmp_path, 1)


@pytest.mark.long
@pytest.mark.slow
def test_ten_children_of_each_kind_touch_nothing(tiny_folder, tmp_path):
    play(tiny_folder, tmp_path, 10)


def test_no_step_runs_while_its_process_forks(runtime, app):
    """BLAS ends its threads at a fork: a step that they compute would never end."""
    loop = runtime._engine.loop
    with app.session().stream("Hi", sampling=sampling(400)) as stream:
        for _ in range(50):  # at any place of a turn
            next(stream)
            resume = runtime._engine.rest(60.0)
            try:
                num_steps = loop.ledger.counted.num_steps
                assert loop._running is None
                threading.Event().wait(0.001)
                assert loop.ledger.counted.num_steps == num_steps
            finally:
                resume()
        list(stream)
    assert len(stream.reply.token_ids) == 400


def test_a_fork_waits_until_a_model_is_loaded(tiny_folder, monkeypatch):
    """Loading computes products, too: both threads would wait for ever."""
    loads, go_on = threading.Event(), threading.Event()
    load = runtime_module.load

    def slowly(*args):
        loads.set()
        go_on.wait()
        return load(*args)

    def fork():
        child = os.fork()
        if child == 0:
            os._exit(0)
        return os.waitpid(child, 0)[1]

    monkeypatch.setattr(runtime_module, "load", slowly)
    config = RuntimeConfig(pool_bytes=1 << 24, swap=SwapOptions(mode="off"))
    with ThreadPoolExecutor(2) as pool:
        opening = pool.submit(Runtime.open, str(tiny_folder), config=config)
        loads.wait()
        forking = pool.submit(fork)
        try:
            with pytest.raises(TimeoutError):
                forking.result(timeout=0.2)
        finally:
            go_on.set()
        assert forking.result() == 0
        with opening.result() as runtime:
            session = runtime.app().session()
            assert session.respond("Hi", sampling=sampling(2)).finish_reason == "length"


def test_a_fork_that_is_interrupted_leaves_an_engine_that_goes_on(runtime, app, monkeypatch):
    wait = threading.Event.wait

    def interrupted(event, timeout=None):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return wait(event, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runtime._engine.rest(60.0)
    assert app.session().respond("Hi", sampling=sampling(2)).finish_reason == "length"


def test_a_forked_process_is_told_that_it_has_no_engine(runtime, app, monkeypatch):
    session = app.session()
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        for ask in (lambda: session.respond("Hi"), runtime.pool_snapshot, runtime.close):
            with pytest.raises(ForkedProcess, match="forked") as caught:
                ask()
            assert "spawn" in caught.value.hint
    assert session.respond("Hi").stats.num_prompt_tokens > 0


@pytest.mark.slow
def test_a_child_of_who_never_used_mlx_may_open_a_runtime(tiny_folder):
    """As workers do whose parent has imported edgekv, and MLX with it."""
    script = (
        "import os, sys, faulthandler\n"
        "from edgekv import Runtime, SamplingParams\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    faulthandler.dump_traceback_later(60, exit=True)\n"
        "    with Runtime.open(sys.argv[1], pool_gib=0.05) as runtime:\n"
        "        session = runtime.app().session('inbox')\n"
        "        reply = session.respond('Hi', sampling=SamplingParams(max_tokens=3))\n"
        "        print(reply.stats.num_prompt_tokens > 0, runtime.keeps_sessions)\n"
        "    sys.exit(0)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["True", "True"]), done.stderr


def test_a_child_of_who_used_mlx_is_told_at_once(runtime, tiny_folder, monkeypatch):
    used = monkeypatch.setattr
    used(process, "forked_with_mlx", True)
    for usable, error in ((False, ForkedProcess), (True, None)):
        used(runtime_module, "works_after_fork", lambda usable=usable: usable)
        if error is None:
            Runtime.open(str(tiny_folder)).close()
            continue
        with pytest.raises(error, match="MLX"):
            Runtime.open(str(tiny_folder))
    assert not works_after_fork(), "this process has computed"


def test_a_childs_lock_files_are_closed_and_its_parents_are_not(tmp_path):
    fd = process.open_locked(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    child = os.fork()
    if child == 0:
        try:
            os.fstat(fd)
        except OSError:
            process.close_locked(fd)  # nothing: it may be another file's number by now
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.fstat(fd)
    process.close_locked(fd)
    with pytest.raises(OSError):
        os.fstat(fd)
