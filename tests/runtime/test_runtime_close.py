"""The end of a runtime: it is not to be interrupted, and nothing works behind it."""

import _thread
import signal
import subprocess
import sys
import threading

import pytest
from public_methods import public_methods
from tiny_runtime import sampling

from edgekv.errors import RuntimeClosed
from edgekv.process import uninterrupted
from edgekv.runtime import Runtime

ENDLESS = sampling(900)
# Interrupts itself again and again while it closes: from the engine's last turn on, which is when
# most of the work of closing is done.
INTERRUPTED = """
import signal, sys, threading, time
from edgekv import Runtime, SamplingParams
from edgekv.config import RuntimeConfig
from edgekv.engine.engine import Engine

def interrupt():
    while not done.wait(0.01):
        signal.raise_signal(signal.SIGINT)

done, close = threading.Event(), Engine.close
def slow_close(engine):
    threading.Thread(target=interrupt, daemon=True).start()
    time.sleep(0.2)
    close(engine)
    time.sleep(0.2)
    done.set()
Engine.close = slow_close

def main(model):
    with Runtime.open(model, config=RuntimeConfig(pool_bytes=1 << 26)) as runtime:
        session = runtime.app("mail").session("inbox")
        session.respond("One", sampling=SamplingParams(max_tokens=3, ignore_eos=True))
        for _ in session.stream("Two", sampling=SamplingParams(max_tokens=900, ignore_eos=True)):
            raise KeyboardInterrupt
main(sys.argv[1])
"""


@pytest.mark.slow
def test_ctrl_c_again_and_again_while_it_closes_loses_nothing(tiny_folder):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tiny_folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "KeyboardInterrupt" in done.stderr
    assert done.returncode in (1, -2), done.stderr  # as Python ends of a Ctrl-C; -6 was SIGABRT
    with Runtime.open(str(tiny_folder)) as runtime:
        messages = runtime.app("mail").session("inbox").messages
        [kept] = runtime.app("mail").sessions()
    assert [m.content for m in messages][::2] == ["One", "Two"]
    assert kept.num_tokens > 0, "KV, which is written in the engine's last turn"


def test_what_interrupts_is_raised_when_all_is_done():
    begun, steps = threading.Event(), []

    def work():
        begun.set()
        threading.Event().wait(0.1)
        steps.append("done")

    def interrupt():
        begun.wait()
        _thread.interrupt_main()

    # Else a shell that started the tests in the background decides.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            uninterrupted(work)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert steps == ["done"]


def test_what_the_work_itself_raises_is_raised():
    def fail():
        raise ValueError("it failed")

    with pytest.raises(ValueError, match="it failed"):
        uninterrupted(fail)


def test_where_no_thread_can_begin_it_is_done_all_the_same(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    done = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        uninterrupted(lambda: done.append(1))
    assert done == [1]


def test_every_method_of_what_was_closed_says_so(tiny_folder):
    with Runtime.open(str(tiny_folder)) as runtime:
        app = runtime.app("mail")
        session = app.session("inbox")
        first = session.respond("One", sampling=sampling(3))
    for thing in (runtime, app, session):
        for name, call in public_methods(thing):
            if name == "close":
                call()
                call()
                continue
            with pytest.raises(RuntimeClosed, match="runtime was closed"):
                call()
    assert session.messages[-1].content == first.text, "what was said can still be read"
    assert session.last_reply == first


def test_closing_keeps_what_there_was_of_an_answer_that_somebody_reads(tiny_folder):
    with Runtime.open(str(tiny_folder)) as runtime:
        stream = runtime.app("mail").session("inbox").stream("One", sampling=ENDLESS)
        seen = next(stream).text
        reader = []

        def read():
            with pytest.raises(RuntimeClosed):
                reader.extend(delta.text for delta in stream)

        thread = threading.Thread(target=read)
        thread.start()
    thread.join()
    with Runtime.open(str(tiny_folder)) as runtime:
        asked, said = runtime.app("mail").session("inbox").messages
    assert asked.content == "One"
    assert said.content.startswith(seen + "".join(reader))


def test_a_forgotten_runtime_is_closed_at_exit(tiny_folder):
    script = (
        "import sys\n"
        "from edgekv import Runtime, SamplingParams\n"
        "session = Runtime.open(sys.argv[1]).app('mail').session('inbox')\n"
        "short = SamplingParams(max_tokens=900, ignore_eos=True)\n"
        "for _ in session.stream('One', sampling=short):\n"
        "    break\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tiny_folder)], timeout=300, check=True)
    with Runtime.open(str(tiny_folder)) as runtime:
        assert len(runtime.app("mail").session("inbox").messages) == 2
