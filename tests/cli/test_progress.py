import io
import logging
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from manual_clock import ManualClock

from edgekv.cli.options import fetching
from edgekv.cli.progress import (
    PREFILL_DELAY_MS,
    DownloadProgress,
    Eta,
    PrefillBar,
    SayWarnings,
    StatusLine,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(terminal):
    """What the last line shows after everything that was written."""
    shown = []
    column = 0
    for char in terminal.getvalue():
        if char == "\r":
            column = 0
            continue
        shown[column : column + 1] = char
        column += 1
    return "".join(shown).rstrip()


@pytest.fixture
def terminal():
    return Terminal()


def test_status_line_leaves_no_trace(terminal):
    with StatusLine(terminal) as line:
        line.draw("a long text")
        line.draw("short")
        assert screen(terminal) == "short"
    assert screen(terminal) == ""
    assert "\x1b" not in terminal.getvalue()
    assert "\n" not in terminal.getvalue()


def test_what_is_said_beside_a_status_line_has_a_line_of_its_own(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    log = logging.getLogger("edgekv.test")
    monkeypatch.setattr(log, "handlers", [SayWarnings()])
    monkeypatch.setattr(log, "propagate", False)
    with StatusLine(sys.stderr) as line:
        line.draw("loading fake …")
        log.warning("the disk is \x1b[31mslow")
        assert terminal.getvalue().split("\r")[-1] == "warning: the disk is slow\n"
        sys.stderr.write("half a line")
        line.draw("loading fake …")
        assert terminal.getvalue().endswith("half a line")
        sys.stderr.write(", whole\n")
        line.draw("loading fake …")
        assert terminal.getvalue().endswith(", whole\n\rloading fake …")
        assert sys.stderr.isatty()
    assert sys.stderr is terminal
    assert screen(terminal).endswith("half a line, whole")


def test_status_line_never_wraps(terminal):
    StatusLine(terminal).draw("x" * 500)
    assert len(screen(terminal)) == 79


def test_nothing_is_drawn_off_a_terminal():
    file = io.StringIO()
    with StatusLine(file) as line:
        line.draw("progress")
    assert file.getvalue() == ""


def test_prefill_bar_waits_then_shows_tokens_and_eta(terminal):
    clock = ManualClock()
    bar = PrefillBar(StatusLine(terminal), clock)
    bar.update(100, 1100)
    clock.advance(PREFILL_DELAY_MS - 1)
    bar.update(200, 1100)
    assert screen(terminal) == ""
    clock.advance(PREFILL_DELAY_MS + 1)
    bar.update(600, 1100)
    assert "600/1100 tokens · 1 s left" in screen(terminal)


def test_prefill_bar_before_its_length_is_known(terminal):
    clock = ManualClock()
    bar = PrefillBar(StatusLine(terminal), clock)
    clock.advance(1000)
    bar.update(0, 0)
    assert screen(terminal) == ""


def test_eta_does_not_count_what_was_cached():
    eta = Eta()
    assert eta.left(900, 1000, 0) == ""
    assert eta.left(900, 1000, 500) == ""
    assert eta.left(950, 1000, 1000) == " · 1 s left"
    assert eta.left(1000, 1000, 2000) == ""


def test_four_tokens_are_no_pace():
    eta = Eta()
    assert [eta.left(done, 1004, 1000 * index) for index, done in enumerate((0, 4, 4))] == [""] * 3
    assert eta.left(502, 1004, 5000) == " · 5 s left"


def test_download_on_a_terminal(terminal, capsys):
    clock = ManualClock()
    progress = DownloadProgress(StatusLine(terminal), clock)
    progress.announce("loading fake …")
    assert screen(terminal) == "loading fake …"
    progress("fake.gguf", 0, 98_000_000)
    clock.advance(1000)
    progress("fake.gguf", 49_000_000, 98_000_000)
    assert (
        screen(terminal)
        == f"downloading fake.gguf {'█' * 12}{'░' * 12} 49.0 MB of 98.0 MB · 1 s left"
    )
    progress("fake.gguf", 50_000_000, 98_000_000)
    assert "49.0 MB" in screen(terminal), "a report too soon for the eye is not drawn"
    progress("tokenizer.json", 2_000_000, None)
    assert screen(terminal) == "downloading tokenizer.json 2.0 MB"
    progress("fake.gguf (another process downloads it)", 0, None)
    assert screen(terminal) == "downloading fake.gguf (another process downloads it)"
    assert capsys.readouterr().err == ""


def test_download_elsewhere_says_one_line_each(capsys):
    progress = DownloadProgress(StatusLine(io.StringIO()), ManualClock())
    progress.announce("loading")
    for done in range(3):
        progress("fake.gguf", done, 98_000_000)
    progress("bad\x1b[2Jname", 1, None)
    said = capsys.readouterr().err.splitlines()
    assert said == ["downloading fake.gguf (98.0 MB)", "downloading badname"]


def test_an_interrupt_ends_the_workers_too(capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with fetching() as progress:
            progress("fake.gguf", 1, 2)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with ThreadPoolExecutor() as workers:
                worker = workers.submit(progress, "fake.gguf", 2, 2)
            assert isinstance(worker.exception(), KeyboardInterrupt)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_elsewhere_what_goes_on_is_said_once_a_minute(capsys):
    clock = ManualClock()
    progress = DownloadProgress(StatusLine(io.StringIO()), clock)
    progress.announce("loading")
    for second in range(150):
        clock.advance(1000)
        progress.announce(f"running text {second}")
    assert capsys.readouterr().err.splitlines() == ["running text 59", "running text 119"]
