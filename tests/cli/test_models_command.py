import json
import sys
import types
from pathlib import Path

import pytest
from command_errors import error_of

from edgekv.cli.main import main
from edgekv.cli.options import DEFAULT_MODEL
from edgekv.errors import ModelNotFound
from edgekv.models import default_model
from edgekv.models.hub import ModelEntry


@pytest.fixture
def hub(monkeypatch):
    module = types.ModuleType("edgekv.models.hub")
    renewed = []

    def renew(reference, *, progress=None, force=False):
        renewed.append((reference, force))
        if reference == "nope":
            raise ModelNotFound("no model 'nope'", hint="edgekv models lists the names")
        progress("fake.gguf", 1, 2_000_000)
        return Path("/models/fake.gguf")

    module.renew = renew
    module.list_models = lambda: [
        ModelEntry(name="small", source="registry", path=Path("/m/small"), size_bytes=98_362_432),
        ModelEntry(name="larger", source="huggingface", path=None, size_bytes=5 * 10**9),
    ]
    monkeypatch.setitem(sys.modules, "edgekv.models.hub", module)
    module.renewed = renewed
    return module


def test_pull_prints_the_path(hub, capsys):
    assert main(["pull", "fake"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "/models/fake.gguf\n"
    assert captured.err == "downloading fake.gguf (2.0 MB)\n"


def test_pull_json(hub, capsys):
    assert main(["pull", "fake", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "fake", "path": "/models/fake.gguf"}


def test_pull_with_force(hub):
    assert main(["pull", "fake", "--force"]) == 0
    assert main(["pull", "fake"]) == 0
    assert hub.renewed == [("fake", True), ("fake", False)]


def test_models_that_are_not_all_here(hub, capsys):
    parts = {"source": "huggingface", "path": None, "size_bytes": 5_000_000}
    hub.list_models = lambda: [ModelEntry(name="o/n", missing=("a.safetensors", "b"), **parts)]
    assert main(["models"]) == 0
    assert capsys.readouterr().out == (
        "o/n     5.0 MB  not all of it: a.safetensors is missing; edgekv pull o/n\n"
    )
    assert main(["models", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["models"]
    assert (row["downloaded"], row["missing"]) == (False, ["a.safetensors", "b"])


def test_pull_of_an_unknown_model(hub, capsys):
    assert main(["pull", "nope"]) == 1
    assert error_of(capsys) == ("error: no model 'nope'", "hint: edgekv models lists the names")


def test_models_table(hub, capsys):
    assert main(["models"]) == 0
    assert capsys.readouterr().out == (
        "small     98.4 MB  /m/small\nlarger     5.0 GB  not downloaded\n"
    )


def test_models_json(hub, capsys):
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert rows[0] == {
        "name": "small",
        "source": "registry",
        "path": "/m/small",
        "size_bytes": 98_362_432,
        "missing": [],
        "downloaded": True,
        "predictors": [],
    }
    assert rows[1]["path"] is None


def test_default_model_is_the_registry_s():
    assert DEFAULT_MODEL == default_model.DEFAULT_MODEL
