"""Sessions on several ranks say what they say on one process: packed, preempted, restored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rank_world import places
from tiny_families import FAMILY_CONFIGS, write_family
from tiny_models import tiny_config, write_folder
from tiny_predictors import write_predictors
from tiny_runtime import TIE

from edgekv.ranks.launched import VARIABLE

PLAY = Path(__file__).parents[1] / "support" / "rank_play.py"
FAMILIES = ("qwen3_moe", "gpt_oss", "gemma4, shared", "glm4_moe_lite", "lfm2", "qwen3_5")
KINDS = ("dense", *FAMILIES, "predicted by itself", "predicted by another")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What is played, by kind: see `rank_play`."""
    root = tmp_path_factory.mktemp("models")
    deep = write_folder(root / "deep", tiny_config("llama", num_hidden_layers=4))
    files = write_predictors(deep, root, "self", "aux")
    found = {"dense": str(write_folder(root / "llama", tiny_config("llama")))}
    for kind in FAMILIES:
        found[kind] = str(write_family(root / kind.replace(", ", "-"), FAMILY_CONFIGS[kind]))
    found["predicted by itself"] = f"{deep},{files['self']}"
    found["predicted by another"] = f"{deep},{files['aux']},{deep}"
    return found


def said_by(num_ranks, folder, models):
    """What was answered, by model."""
    folder.mkdir()
    command = [sys.executable, str(PLAY), str(folder), *models]
    environs = [os.environ]
    if num_ranks > 1:
        environs = [{**os.environ, VARIABLE: place.variable()} for place in places(num_ranks)]
    ranks = [
        subprocess.Popen(
            command,
            env=environ,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for environ in environs
    ]
    try:
        out, errors = ranks[0].communicate(timeout=1200)
        assert ranks[0].returncode == 0, errors[-2000:]
        for rank in ranks[1:]:
            _, errors = rank.communicate(timeout=60)
            assert rank.returncode == 0, errors[-2000:]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return json.loads(out)


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    return said_by(1, tmp_path_factory.mktemp("alone") / "kv", models.values())


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def together(models, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together") / "kv"
    return said_by(request.param, folder, models.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_say_what_one_process_says(kind, models, alone, together):
    expected, said = alone[models[kind]], together[models[kind]]
    assert expected["moved"] == [True, 0]
    assert expected["predicted"] == ("predicted" in kind)
    assert expected["kept"][2] > 200  # tokens that were restored
    assert said.keys() == expected.keys()
    for what, value in expected.items():
        if what == "logits" or what.endswith("logprobs"):
            assert said[what] == pytest.approx(value, abs=TIE), what
        else:
            assert said[what] == value, what
