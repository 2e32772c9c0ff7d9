"""Sessions on several ranks say what they say on one process: packed, preempted, restored."""

import pytest
from rank_world import assert_said, places, said_by
from tiny_families import FAMILY_CONFIGS, write_family
from tiny_models import tiny_config, write_folder
from tiny_predictors import write_predictors

FAMILIES = ("qwen3_moe", "gpt_oss", "gemma4, shared", "glm4_moe_lite", "lfm2", "qwen3_5")
KINDS = (
    "dense",
    *FAMILIES,
    "predicted by itself",
    "predicted by thin layers",
    "predicted by another",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What is played, by kind: see `rank_play`."""
    root = tmp_path_factory.mktemp("models")
    deep = write_folder(root / "deep", tiny_config("llama", num_hidden_layers=4))
    files = write_predictors(deep, root, "self", "aux", "thin")
    found = {"dense": str(write_folder(root / "llama", tiny_config("llama")))}
    for kind in FAMILIES:
        found[kind] = str(write_family(root / kind.replace(", ", "-"), FAMILY_CONFIGS[kind]))
    found["predicted by itself"] = f"{deep},{files['self']}"
    found["predicted by thin layers"] = f"{deep},{files['thin']}"
    found["predicted by another"] = f"{deep},{files['aux']},{deep}"
    return found


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    return said_by([None], tmp_path_factory.mktemp("alone"), models.values())


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def together(models, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    return said_by(places(request.param), folder, models.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_say_what_one_process_says(kind, models, alone, together):
    expected, said = alone[models[kind]], together[models[kind]]
    assert (expected["num_swap_outs"] and said["num_swap_outs"]) or kind == "lfm2"  # has room
    assert expected["predicted"] == ("predicted" in kind)
    assert expected["kept"][2] > 200  # tokens that were restored
    assert_said(said, expected)
