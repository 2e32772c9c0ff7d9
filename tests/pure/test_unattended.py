"""The self-test and benches with nobody there: every step reports, and none takes all the time."""

import json
import os
import sys

import pytest

from edgekv.bench.selftest import unattended
from edgekv.bench.selftest.unattended import Step, main, plan_steps, run_steps

WHOLE_SECONDS_MAX = 480  # a machine may be lent for eight minutes


def step(name, seconds_max=30.0):
    return Step(name=name, arguments=(name,), seconds_max=seconds_max)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A Python in the place of ours: the step's name says what it does."""
    os.mkfifo(tmp_path / "held")
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\n"
        'case "$3" in\n'
        "  good) echo '{\"rows\": []}'; echo talk >&2 ;;\n"
        "  bad) exit 3 ;;\n"
        f"  hangs) sleep 60 >{tmp_path}/held & wait ;;\n"
        "esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def summary(folder):
    return {
        each["name"]: each for each in json.loads((folder / "summary.json").read_text())["steps"]
    }


def test_reports_and_talk_are_files(commands, tmp_path, capsys):
    folder = tmp_path / "a" / "b"
    run_steps([step("good")], folder, 30.0)
    assert json.loads((folder / "good.json").read_text()) == {"rows": []}
    assert (folder / "good.log").read_text() == "talk\n"
    assert summary(folder)["good"]["exit_code"] == 0
    assert capsys.readouterr().out.startswith("good: exit code 0 after ")


def test_what_fails_or_hangs_stops_no_other(commands, tmp_path):
    held = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(held, True)
    run_steps([step("bad"), step("hangs", 1.0), step("good")], tmp_path, 30.0)
    codes = {name: each["exit_code"] for name, each in summary(tmp_path).items()}
    assert codes == {"bad": 3, "hangs": None, "good": 0}
    assert os.read(held, 1) == b"", "what a step starts ends with it, or this waits for a minute"
    os.close(held)


def test_a_step_for_which_no_time_is_left_is_not_begun(commands, tmp_path):
    outcomes = run_steps([step("bad", 0.0), step("good")], tmp_path, 0.0)
    assert [outcome.exit_code for outcome in outcomes] == [None, None]
    assert not (tmp_path / "good.json").exists()


def test_the_plan_fits_and_ends_in_json():
    assert unattended._SECONDS < WHOLE_SECONDS_MAX
    names = [each.name for each in plan_steps(None)]
    assert names[0] == "doctor"
    assert len(set(names)) == len(names)
    for each in plan_steps("some/model"):
        assert "--json" in each.arguments
        assert {"some/model", "synthetic"} & set(each.arguments)


def test_the_exit_code_says_whether_all_went_well(commands, tmp_path, monkeypatch):
    for name, code in (("good", 0), ("bad", 1)):
        monkeypatch.setattr(unattended, "plan_steps", lambda model, name=name: [step(name)])
        assert main([str(tmp_path), "--seconds", "20"]) == code
