import os
import pty
import select
import sys
import termios

import pytest

from edgekv.cli.progress import ignore_typing


@pytest.fixture
def terminal(monkeypatch):
    """The keyboard's end of a pseudo-terminal whose other end is stdin."""
    keyboard, screen = pty.openpty()
    with os.fdopen(screen) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield keyboard
    os.close(keyboard)


def echoes():
    return bool(termios.tcgetattr(sys.stdin.fileno())[3] & termios.ECHO)


def test_typing_is_neither_shown_nor_kept(terminal):
    assert echoes()
    with ignore_typing():
        assert not echoes()
        os.write(terminal, b"/exit\n")
        select.select([sys.stdin], [], [], 10)  # the kernel delivers it in its own time
    assert echoes()
    os.write(terminal, b"hello\n")
    assert sys.stdin.readline() == "hello\n"


def test_echo_comes_back_after_an_error(terminal):
    with pytest.raises(KeyboardInterrupt), ignore_typing():
        raise KeyboardInterrupt
    assert echoes()


def test_a_terminal_that_goes_away_during_a_reply(monkeypatch):
    keyboard, screen = pty.openpty()
    with os.fdopen(screen) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with ignore_typing():
            os.close(keyboard)
            with pytest.raises(termios.error):
                termios.tcsetattr(screen, termios.TCSANOW, [0, 0, 0, 0, 0, 0, []])
        with ignore_typing():
            pass


def test_nothing_to_do_without_a_terminal(monkeypatch, tmp_path):
    path = tmp_path / "empty"
    path.touch()
    with path.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with ignore_typing():
            assert stdin.read() == ""
