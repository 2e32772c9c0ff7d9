"""The self-test and short benches with nobody there, for a machine that is lent for minutes.

    python -m edgekv.bench.selftest.unattended FOLDER [--model MODEL] [--seconds 450]

Each step's report goes to `FOLDER/<step>.json`, what it said on the way to `<step>.log`, and how
all went to `summary.json`. A step that takes longer than its share is ended, and the others go on.
Without a network or a model the first two still run.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgekv.bench.figures import Stopwatch

_SECONDS = 450.0  # in all: less than eight minutes, with starts and ends


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of edgekv, whose stdout is its report as JSON."""

    name: str
    arguments: tuple[str, ...]
    seconds_max: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a step went."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    exit_code: int | None  # None: it was ended, or there was no time left to begin


def plan_steps(model: str | None) -> list[Step]:
    """What runs, the most telling first; the benches on this model, or on the default one."""
    chosen = () if model is None else ("--model", model)
    restore = ("bench", "restore", "--model", "synthetic", "--tokens", "512,2048", "--reps", "2")
    ttft = ("bench", "ttft", "--prompt-tokens", "128,512", "--reps", "2")
    decode = ("bench", "decode", "--sessions", "1,8", "--new-tokens", "32", "--reps", "2")
    return [
        Step(
            name="doctor", arguments=("doctor", "--self-test", *chosen, "--json"), seconds_max=150
        ),
        Step(name="restore", arguments=(*restore, "--json", "-"), seconds_max=100),
        Step(name="ttft", arguments=(*ttft, *chosen, "--json", "-"), seconds_max=150),
        Step(name="decode", arguments=(*decode, *chosen, "--json", "-"), seconds_max=150),
    ]


def run_step(step: Step, folder: Path, seconds_left: float) -> Outcome:
    """Run a step, or end it when its time is over; its children end with it."""
    watch = Stopwatch()
    exit_code: int | None = None
    seconds = min(step.seconds_max, seconds_left)
    if seconds > 0:
        with (
            (folder / f"{step.name}.json").open("wb") as report,
            (folder / f"{step.name}.log").open("wb") as log,
        ):
            command = [sys.executable, "-m", "edgekv.cli.main", *step.arguments]
            process = subprocess.Popen(command, stdout=report, stderr=log, start_new_session=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                exit_code = process.wait(seconds)
            if exit_code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(
        name=step.name,
        arguments=step.arguments,
        seconds=round(1e-3 * watch.ms(), 1),
        exit_code=exit_code,
    )


def run_steps(steps: Sequence[Step], folder: Path, seconds: float) -> list[Outcome]:
    """Run all steps in so many seconds together; the summary is up to date after each."""
    folder.mkdir(parents=True, exist_ok=True)
    watch, outcomes = Stopwatch(), list[Outcome]()
    for step in steps:
        outcome = run_step(step, folder, seconds - 1e-3 * watch.ms())
        outcomes.append(outcome)
        summary = {"steps": [asdict(each) for each in outcomes]}
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        ended = "ended" if outcome.exit_code is None else f"exit code {outcome.exit_code}"
        sys.stdout.write(f"{step.name}: {ended} after {outcome.seconds} s\n")
        sys.stdout.flush()
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; 0 if every step succeeded."""
    parser = argparse.ArgumentParser(prog="python -m edgekv.bench.selftest.unattended")
    parser.add_argument("folder", type=Path, help="where the reports go")
    parser.add_argument("--model", help="of the checks and benches (default: the default model)")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for all steps together")
    chosen = parser.parse_args(arguments)
    outcomes = run_steps(plan_steps(chosen.model), chosen.folder, chosen.seconds)
    return 0 if all(outcome.exit_code == 0 for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
