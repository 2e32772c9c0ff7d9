"""`edgekv launch` and `edgekv doctor --local`, whole, over a tiny model."""

import json
import os
import subprocess
import sys

import pytest
from tiny_models import tiny_config, write_folder

from edgekv.cli.doctor_ranks import rank_lines
from edgekv.ranks.launched import VARIABLE

pytestmark = pytest.mark.slow

EDGEKV = [sys.executable, "-m", "edgekv.cli.main"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config("qwen2", num_attention_heads=4, num_key_value_heads=2)
    return str(write_folder(tmp_path_factory.mktemp("model"), config))


@pytest.fixture
def run(tmp_path):
    def run(*arguments, stdin="", **environ):
        places = {"EDGEKV_CACHE_DIR": str(tmp_path / "cache"), "EDGEKV_STATE_DIR": str(tmp_path)}
        return subprocess.run(
            [*EDGEKV, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **places, **environ},
        )

    return run


def test_a_chat_on_two_ranks_answers_as_on_one(run, model):
    chat = ("chat", "-m", model, "--max-tokens", "8", "--temperature", "0", "--json")
    alone = run(*chat, "--local", stdin="abc")
    both = run("launch", "--local", "2", "--", *chat, stdin="abc")
    assert (both.returncode, both.stderr) == (alone.returncode, alone.stderr)
    assert both.returncode == 0
    assert json.loads(both.stdout)["text"] == json.loads(alone.stdout)["text"]


def test_the_exit_status_of_a_command_that_fails_is_its_own(run):
    done = run("launch", "--local", "2", "--", "chat", "-m", "no/such.gguf", "hello")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--", "chat"], "which machines?"),
        (["--local", "2"], "missing argument"),
        (["--local", "2", "--", "launch", "--local", "2", "--", "chat"], "launches no ranks"),
        (["--hosts", "127.0.0.1,0.0.0.0", "--", "chat"], "0.0.0.0"),
    ],
)
def test_what_cannot_be_launched(run, arguments, said):
    done = run("launch", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "hint: " in done.stderr


def test_a_garbled_environment_is_an_error(run):
    done = run("ps", **{VARIABLE: "{"})
    assert done.returncode == 2
    assert VARIABLE in done.stderr


def test_the_doctor_measures_ranks_and_their_parts_of_a_model(run, model):
    done = run("doctor", "--local", "2", "-m", model, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)["ranks"]
    assert facts["hosts"] == ["127.0.0.1", "127.0.0.1"]
    assert [one["rows"] for one in facts["sums"]] == [1, 2, 4, 8, 256, 512]
    for one in facts["sums"]:
        assert one["bytes"] == one["rows"] * facts["shape"]["hidden_size"] * 4
        assert 0 < one["median_s"] <= one["worst_s"]
    layers = facts["shape"]["num_layers"]
    assert facts["num_collectives"] == 2 * layers + 3  # embedding, logits, orders
    assert facts["part_s"] > 0
    assert 0 < 1 / facts["tokens_per_s"] - facts["step_s"] < facts["decode_waits_s"]  # the orders
    lines = rank_lines(facts)
    assert lines[0] == ("ranks", "2 (127.0.0.1, 127.0.0.1), ring")
    assert lines[1][1].startswith("  1 row  of ")
    assert lines[-1][0] == "predicted"


def test_the_doctor_says_at_most_where_nothing_was_computed(run):
    done = run("doctor", "--local", "2")
    assert done.returncode == 0
    last = done.stdout.splitlines()[-1]
    assert last.startswith("at most ")
    assert "tokens/s, if nothing had to be computed" in last


def test_a_doctor_whose_ranks_cannot_load_the_model_says_so(run, tmp_path):
    config = tiny_config("qwen2", num_attention_heads=3, num_key_value_heads=3, hidden_size=96)
    folder = write_folder(tmp_path / "model", config)
    done = run("doctor", "--local", "2", "-m", str(folder))
    assert done.returncode == 1
    assert "3 heads" in done.stderr
    assert "error: the ranks could not be measured" in done.stderr
