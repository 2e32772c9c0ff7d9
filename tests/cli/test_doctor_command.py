import json

import pytest
from tiny_models import tiny_config, write_folder
from tiny_predictors import fitted, load, write_predictor

from edgekv import device
from edgekv.bench.selftest import checks
from edgekv.bench.selftest.checks import CheckResult
from edgekv.cli import doctor as doctor_module
from edgekv.cli.main import main
from edgekv.models.default_model import SMOLLM2_135M


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """No model is here."""
    monkeypatch.setenv("EDGEKV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def planned(monkeypatch):
    """What `plan_checks` was asked for; its checks yield what `results` says."""
    calls = []

    def plan_checks(device, cache_dir, model):
        calls.append((cache_dir, model))
        return [(name, lambda r=result: r) for name, result in RESULTS.items()]

    monkeypatch.setattr(checks, "plan_checks", plan_checks)
    return calls


RESULTS = {
    "rope": CheckResult(name="rope", status="pass", detail="fine", figures={"error": 1e-7}),
    "speed": CheckResult(name="speed", status="warn", detail="slow"),
}


def test_facts(cache, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = {line[:14].strip(): line[15:] for line in out.splitlines()}
    assert {"edgekv", "MLX", "Python", "device", "BLAS", "memory", "cache"} <= set(lines)
    assert lines["default model"] == "not downloaded; edgekv pull smollm2-135m"
    assert str(cache) in lines["cache"]


def test_facts_as_json(cache, capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cache_dir"] == str(cache)
    assert facts["cache_free_bytes"] > 0
    assert facts["default_model"] == {"name": "smollm2-135m", "path": None}
    assert facts["machine"]["compute_dtype"] in ("float32", "bfloat16")
    assert facts["versions"]["mlx"]
    assert "checks" not in facts


def test_a_default_model_that_is_damaged_is_not_there(cache, capsys):
    cache.mkdir(parents=True)
    (cache / SMOLLM2_135M.file_name).write_bytes(b"half a file")
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["default_model"]["path"] is None


def test_missing_parts_are_named_with_their_cure():
    facts = {
        "versions": {"edgekv": "1", "mlx": "2", "mlx-lm": None, "python": "3"},
        "machine": {
            "os": "Linux",
            "backend": "cpu",
            "name": "x",
            "num_cpus": 2,
            "compute_dtype": "float32",
            "keeps_quantised": False,
            "blas": "reference",
            "memory_bytes": 8 << 30,
            "pool_bytes": 1 << 30,
        },
        "warning": "warning: OpenBLAS not found; cure: apt-get install libopenblas0-pthread",
        "cache_dir": "/c",
        "cache_free_bytes": 1,
        "default_model": {"name": "m", "path": None},
        "predictors": [{"name": "p", "kind": "self", "depth": 3, "fits": True}],
    }
    lines = dict(doctor_module.fact_lines(facts))
    assert lines["KV predictor"] == "p: from the model's first 3 layers, fits the model"
    assert lines["mlx-lm"].startswith("not installed")
    assert lines["warning"].startswith("OpenBLAS not found; cure: apt-get")


def test_self_test_lines(planned, cache, capsys):
    assert main(["doctor", "--self-test"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-2:] == ["pass  rope: fine", "warn  speed: slow"]
    assert captured.err == ""
    assert planned == [(cache, None)]


def test_self_test_as_json(planned, capsys):
    assert main(["doctor", "--self-test", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [check["status"] for check in report["checks"]] == ["pass", "warn"]
    assert report["checks"][0]["figures"] == {"error": 1e-7}
    assert report["versions"]["edgekv"]


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_check_that_fails_is_the_exit_code(planned, monkeypatch, capsys, arguments):
    broken = CheckResult(name="disk", status="fail", detail="\x1b[31mother bytes\nthan written")
    monkeypatch.setitem(RESULTS, "disk", broken)
    assert main(["doctor", "--self-test", *arguments]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    if not arguments:
        assert out.splitlines()[-1] == "fail  disk: other bytes than written"


def test_a_model_that_is_asked_for_is_checked(planned, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    assert main(["doctor", "--self-test", "--model", str(path)]) == 0
    assert planned[0][1] == (str(path), path)


def test_a_model_that_is_asked_for_and_not_there(planned, capsys):
    assert main(["doctor", "--self-test", "--model", "./nowhere.gguf"]) == 1
    assert "error: './nowhere.gguf'" in capsys.readouterr().err


def test_a_model_without_a_self_test(capsys):
    assert main(["doctor", "--model", "x"]) == 2
    assert "hint: add --self-test" in capsys.readouterr().err


def test_a_predictor_is_checked_against_a_model(tmp_path, capsys):
    folder = write_folder(tmp_path / "model", tiny_config("llama", num_hidden_layers=4))
    other = write_folder(tmp_path / "other", tiny_config("llama", num_hidden_layers=5))
    file = tmp_path / "p.safetensors"
    write_predictor(file, fitted(load(folder), "self", 2), folder)
    assert main(["doctor", "--predictor", str(file), "--model", str(folder)]) == 0
    assert f"{file}: from the model's first 2 layers, fits the model" in capsys.readouterr().out
    assert main(["doctor", "--predictor", str(file), "--model", str(other)]) == 1
    assert "fitted to a base model with fingerprint" in capsys.readouterr().err
    assert main(["doctor", "--predictor", "nobody", "--model", str(folder)]) == 1
    assert f"edgekv fit --base {folder} --self-depth LAYERS -o FILE" in capsys.readouterr().err
    write_predictor(file, fitted(load(folder), "aux", 2), folder)
    aux = ["--aux", str(folder)]
    assert main(["doctor", "--predictor", str(file), "--model", str(folder), *aux]) == 0
    assert "from an auxiliary model's first 2 layers, fits the model" in capsys.readouterr().out


def test_mlx_that_cannot_be_loaded(monkeypatch, capsys):
    def profile():
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr(device, "profile", profile)
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: MLX cannot be loaded: libmlx.so")
    assert "hint: pip install" in captured.err
    assert captured.out == ""
