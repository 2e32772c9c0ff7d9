import subprocess
import sys
from pathlib import Path

import pytest
from command_errors import error_of

from edgekv import __version__
from edgekv.cli.main import main

HEAVY = ("mlx", "numpy", "tokenizers", "prompt_toolkit", "huggingface_hub", "jinja2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["chat", "--help"],
        ["sessions", "--help"],
        ["bench", "--help"],
        ["doctor", "--help"],
        ["--version"],
    ],
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys, edgekv.cli.main as m\n"
        f"assert m.main({arguments!r}) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"edgekv {__version__}\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_stdout_that_takes_nothing():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edgekv.cli.main", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    first, *_ = done.stderr.splitlines()
    assert first == "error: stdout takes no data: No space left on device"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_no_command_shows_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for command in ("chat", "pull", "models", "doctor", "sessions", "bench"):
        assert command in out


def test_group_without_a_command_shows_its_help(capsys):
    assert main(["bench"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Usage: edgekv bench")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["chta"], "'chta'", "edgekv --help"),
        (["chat", "--nope"], "--nope", "edgekv chat --help"),
        (["chat", "--top-k", "x"], "--top-k", "edgekv chat --help"),
        (["chat", "a", "b"], "unexpected extra argument", "edgekv chat --help"),
        (["chat", "--top-k", "-1", "hi"], "top_k is -1", "whole number"),
        (["chat", "--temperature", "nan", "hi"], "temperature is nan", "number from 0"),
        (["chat", "--top-p", "2", "hi"], "top_p is 2.0", "number from 0 to 1"),
        (["chat", "--max-tokens", "0", "hi"], "max_tokens is 0", "whole number from 1"),
        (["chat", "--seed", "-5", "hi"], "seed is -5", "whole number from 0"),
        (["chat", "--stop", "", "hi"], "stop is ''", "1 to 1024 characters"),
    ],
)
def test_bad_usage_has_the_one_shape(arguments, message, hint, capsys):
    assert main(arguments) == 2
    said, what_to_do = error_of(capsys)
    assert message in said
    assert hint in what_to_do
