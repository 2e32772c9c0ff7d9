"""The README's programs, as they stand there, on the default model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)

pytestmark = [pytest.mark.model, pytest.mark.slow]


def run(program: str, cwd: Path) -> str:
    """In a process of its own, as a reader would."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=cwd,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_has_programs() -> None:
    assert len(PROGRAMS) == 4


def test_the_first_program_answers_and_reuses_kv(tmp_path: Path) -> None:
    first, second = run(PROGRAMS[0], tmp_path).splitlines()
    assert "Paris" in first
    *_, num_cached_tokens, ttft_ms = second.split()
    assert int(num_cached_tokens) > 20
    assert float(ttft_ms) > 0


def test_the_second_program_greets_everybody(tmp_path: Path) -> None:
    output = run(PROGRAMS[1], tmp_path).lower()
    assert len(output.splitlines()) >= 3
    assert "editor" in output


def test_the_third_program_predicts(tmp_path: Path) -> None:
    *texts, figures = run(PROGRAMS[2], tmp_path).splitlines()
    num_predicted, num_confirmed, num_retracted = map(int, figures.split())
    assert texts
    assert num_predicted > 300
    assert num_confirmed + num_retracted <= 16  # as many as a gate lets through


def test_the_fourth_program_has_a_typed_answer(tmp_path: Path) -> None:
    assert re.fullmatch(r"City\(name='.+', population=\d+\)\n", run(PROGRAMS[3], tmp_path))
