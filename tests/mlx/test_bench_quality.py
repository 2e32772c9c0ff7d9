"""`bench quality` and `bench ttft --prefill` on a tiny model."""

import json

import pytest

from edgekv.bench.prediction import ttft as ttft_predicted
from edgekv.bench.prediction.quality import plot_rows, print_rows, run_quality
from edgekv.bench.prediction.quality_text import QualityOptions
from edgekv.bench.prediction.quality_ways import open_subjects
from edgekv.bench.prediction.ttft import print_predicted, run_predicted
from edgekv.bench.workload import Workload
from edgekv.cli.main import main
from edgekv.errors import ConfigError, PredictorNotFound

pytestmark = pytest.mark.slow

OPTIONS = QualityOptions(context=200, continuation=16, samples=1, window=16)


def measure(folder, predictor, aux=None):
    rows = run_quality(*open_subjects(str(folder), [predictor], aux), OPTIONS)
    return {row["prefill"]: row for row in rows}


def test_rows_of_a_predictor(deep, predictors, tmp_path, capsys):
    rows = measure(deep, predictors["self"])
    assert list(rows) == [
        "exact",
        "no context",
        "truncated",
        "predicted, no sinks, no window",
        "predicted, sinks",
        "predicted, sinks + window",
        "predicted, looked twice",
        "after repair",
    ]
    exact, repaired = rows["exact"], rows["after repair"]
    once, twice = rows["predicted, sinks + window"], rows["predicted, looked twice"]
    assert once["flops_ratio"] < twice["flops_ratio"]
    assert once["text_nll"] != twice["text_nll"]
    assert repaired["needle_nll"] == pytest.approx(exact["needle_nll"], abs=1e-4)
    assert exact["text_agree"] == exact["first8_agree"] == exact["copy_agree"] == 1.0
    assert repaired["text_nll"] == pytest.approx(exact["text_nll"], abs=1e-4)
    assert repaired["copy_nll"] == pytest.approx(exact["copy_nll"], abs=1e-4)
    assert 0 < rows["predicted, sinks + window"]["flops_ratio"] < 1
    assert rows["truncated"]["text_gap_recovered"] in (None, 0.0)
    print_rows(list(rows.values()))
    assert "after repair" in capsys.readouterr().out
    plot_rows(list(rows.values()), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    json.dumps(list(rows.values()), allow_nan=False)


def test_an_identical_auxiliary_loses_nothing(deep, predictors):
    rows = measure(deep, predictors["identity"], str(deep))
    for name in ("auxiliary alone", "predicted, sinks + window", "predicted, looked twice"):
        assert rows[name]["text_nll"] == pytest.approx(rows["exact"]["text_nll"], abs=1e-4)
        assert rows[name]["needle_nll"] == pytest.approx(rows["exact"]["needle_nll"], abs=1e-4)
        assert rows[name]["text_agree"] > 0.95


def test_several_predictors_share_the_baselines(deep, predictors, tmp_path, capsys):
    names = [predictors["self"], predictors["identity"]]
    rows = run_quality(*open_subjects(str(deep), names, str(deep)), OPTIONS)
    assert [row["predictor"] for row in rows if row["prefill"] in ("exact", "no context")] == [
        "",
        "",
    ]
    truncated = [row for row in rows if row["prefill"] == "truncated"]
    assert [row["predictor"] for row in truncated] == ["self.safetensors", "identity.safetensors"]
    assert truncated[0]["flops_ratio"] < truncated[1]["flops_ratio"]
    # Each has a baseline of its own, and what is shared none.
    assert [row["text_gap_recovered"] for row in rows[:2]] == [None, None]
    predicted = [row for row in rows if row["prefill"] == "predicted, sinks + window"]
    for ours, baseline in zip(predicted, truncated, strict=True):
        for kind in ("text", "copy"):
            lost, theirs = (r[f"{kind}_nll"] - rows[0][f"{kind}_nll"] for r in (ours, baseline))
            expected = pytest.approx(1 - lost / theirs) if theirs > 0 else None
            assert ours[f"{kind}_gap_recovered"] == expected
    assert all(row["prefill_ms"] > 0 for row in rows)
    print_rows(rows)
    out = capsys.readouterr().out
    assert out.count("no context") == out.count("after repair") == 2
    plot_rows(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_an_auxiliary_alone(deep):
    rows = run_quality(*open_subjects(str(deep), [], str(deep)), OPTIONS)
    assert [row["prefill"] for row in rows] == ["exact", "no context", "auxiliary alone"]
    assert rows[2]["text_nll"] == pytest.approx(rows[0]["text_nll"], abs=1e-4)


def test_what_is_missing_is_named(deep, predictors):
    with pytest.raises(ConfigError, match="auxiliary"):
        open_subjects(str(deep), [predictors["identity"]], None)
    with pytest.raises(PredictorNotFound, match="none"):
        open_subjects(str(deep), ["none"], None)


def test_text_that_is_too_short(deep, predictors, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    options = QualityOptions(samples=1, texts=(tmp_path / "short.txt",))
    with pytest.raises(ConfigError, match=r"short\.txt"):
        run_quality(*open_subjects(str(deep), [predictors["self"]], None), options)


def test_more_text_than_the_models_context(deep, predictors):
    options = QualityOptions(context=1000, continuation=100, samples=1)
    with pytest.raises(ConfigError, match="1100 tokens; the model's context is 1024"):
        run_quality(*open_subjects(str(deep), [predictors["self"]], None), options)


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_measured(
    deep, predictors, monkeypatch
):
    monkeypatch.setattr(ttft_predicted, "run_quality", pytest.fail)
    workload = Workload(lengths=(1200,), new_tokens=4, reps=1)
    with pytest.raises(ConfigError, match="1024"):
        run_predicted(str(deep), [workload], ("predict",), predictor=predictors["self"])


def test_options_that_would_be_ignored_are_refused(deep, capsys):
    for option in (["--predictor", "nosuch"], ["--aux", "nosuch"]):
        assert main(["bench", "ttft", "-m", str(deep), *option]) == 2
        assert "predicted prefill" in capsys.readouterr().err
    assert main(["chat", "hi", "-m", str(deep), "--aux", "nosuch"]) == 2
    assert "--aux" in capsys.readouterr().err


def test_repair_behind_answers(deep, predictors, tmp_path, capsys):
    target = tmp_path / "repair.json"
    arguments = ["bench", "repair", "-m", str(deep), "--predictor", predictors["self"]]
    sizes = ["--prompt-tokens", "100,300", "--new-tokens", "200", "--reps", "2"]
    assert main([*arguments, *sizes, "--json", str(target)]) == 0
    assert capsys.readouterr().out.count(" of 2") == 2
    rows = json.loads(target.read_text())["rows"]
    assert [row["prompt_tokens"] for row in rows] == [100, 300]
    for row in rows:
        assert (row["predictor"], row["reps"], len(row["samples"])) == ("self.safetensors", 2, 2)
        assert row["ratio"] > 0
        prompt = row["prompt_tokens"] - 4
        repaired = [sample["predicted"]["num_repaired_tokens"] for sample in row["samples"]]
        behind = [number - prompt for number in repaired if number >= prompt]
        assert row["caught_up"] == len(behind)
        assert row["tokens_behind_max"] == max(behind, default=None)
        for sample in row["samples"]:
            assert sample["predicted"]["num_predicted_tokens"] == row["prompt_tokens"] - 36
            assert sample["exact"]["num_predicted_tokens"] == 0
    for wrong in (["--repair", "off"], ["--prompt-tokens", "36"], ["--new-tokens", "1"]):
        assert main([*arguments, *wrong]) == 2
        assert "error:" in capsys.readouterr().err


@pytest.mark.faults
def test_predicted_ttft_comes_with_its_quality(deep, predictors, capsys):
    rows = run_predicted(
        str(deep),
        [Workload(lengths=(200,), new_tokens=4, reps=1)],
        ("predict", "auto"),
        predictor=predictors["self"],
    )
    assert [row["prefill"] for row in rows] == ["predict", "auto"]
    for row in rows:
        assert row["ttft_ratio_vs_exact"] > 0
        assert 0 <= row["quality"]["text_agree"] <= 1
        assert row["failed"] == 0
    print_predicted(rows)
    assert "approximate" in capsys.readouterr().out


def test_from_the_command_line(deep, predictors, tmp_path, capsys):
    arguments = ["--base", str(deep), "--predictor", predictors["self"], "--samples", "1"]
    sizes = ["--context", "200", "--continuation", "16", "--window", "8"]
    assert main(["bench", "quality", *arguments, *sizes, "--json", str(tmp_path / "q.json")]) == 0
    rows = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert {row["scenario"] for row in rows} == {"quality"}
    capsys.readouterr()
