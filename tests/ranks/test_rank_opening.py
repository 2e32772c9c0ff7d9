"""What cannot be opened on several ranks: why is said, by name, and the ranks go on."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import rank_opens
from rank_world import places
from tiny_models import tiny_config, write_folder

from edgekv.ranks.launched import VARIABLE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_folder(folder / "one", tiny_config("llama"))
    write_folder(folder / "other", tiny_config("llama"), seed=1)
    odd = tiny_config("llama", num_attention_heads=9, num_key_value_heads=3, hidden_size=144)
    write_folder(folder / "odd", odd)
    shutil.copytree(folder / "one", folder / "gone")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """See `rank_opens`."""
    ranks = [
        subprocess.Popen(
            [sys.executable, rank_opens.__file__, str(folder)],
            env={**os.environ, VARIABLE: place.variable()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in places()
    ]
    try:
        said = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return json.loads(said[0][0])


def test_several_ranks_have_one_runtime_at_a_time(found):
    assert found["a second one"] == {
        "error": "ConfigError: the ranks work for another runtime of this process",
        "hint": "close it first: several ranks have one model at a time",
    }
    assert len(found["after it"]["said"]) == 4


def test_what_cannot_be_cut_is_refused_with_its_sizes(found):
    refused = found["odd"]
    assert refused["error"].endswith("9 heads and 3 key-value heads cannot be cut for 2 ranks")
    assert refused["hint"] == "3 ranks can"


def test_other_files_under_the_same_name_are_refused(found):
    refused = found["other"]
    assert refused["error"].startswith("EngineFailed: rank 1 has something else than rank 0: ")
    assert "the same model files" in refused["hint"]


def test_a_model_that_one_rank_lacks_is_refused_by_name(found):
    refused = found["gone"]["error"]
    assert refused.startswith("EngineFailed: rank 1 could not load the model: ")
    assert "nowhere" in refused


def test_ranks_go_on_after_what_they_refused(found):
    assert found["in the end"] == found["after it"]


def test_the_command_says_one_error_and_all_ranks_end(folder):
    command = [sys.executable, "-m", "edgekv.cli.main", "launch", "--local", "2", "--"]
    done = subprocess.run(
        [*command, "chat", "-m", str(folder / "odd"), "hello"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: {folder / 'odd'}: 9 heads and 3 key-value heads cannot be cut for 2 ranks",
        "",
        "hint: 3 ranks can",
    ]
