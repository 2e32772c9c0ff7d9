"""A command that says no before anything runs: one clear error, and what to do about it."""

from collections.abc import Sequence

import pytest

from edgekv.cli.main import main


def assert_refused(arguments: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command; it must say no with this in its error."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert "\nhint: " in captured.err
