"""The one shape of a command's errors."""

import pytest


def error_of(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What happened and what to do about it, of which nothing else stands on the terminal."""
    captured = capsys.readouterr()
    assert captured.out == ""
    first, blank, last = captured.err.splitlines()
    assert first.startswith("error: ")
    assert blank == ""
    assert last.startswith("hint: ")
    return first, last
