"""`bench switch`, `fairness` and `restore` on a tiny model, from the options to the rows."""

import json

import pytest
from tiny_models import tiny_config, write_folder

from edgekv.bench.sessions.app_load import AppLoad, AppRecord, LoadedApp
from edgekv.bench.sessions.conversations import ConversationShape
from edgekv.bench.sessions.drive import Driver
from edgekv.bench.sessions.fairness import FairnessOptions, run_fairness
from edgekv.bench.sessions.restore import run_restore
from edgekv.bench.sessions.switch import MODES, SwitchOptions, run_switch
from edgekv.bench.workload import TextIds
from edgekv.config import RuntimeConfig, SwapOptions
from edgekv.errors import ConfigError, PromptTooLong
from edgekv.runtime import Runtime

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("model"), tiny_config("llama")))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where scratch folders are made."""
    monkeypatch.setenv("EDGEKV_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    if (tmp_path / "cache").exists():
        assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture(scope="module")
def runtime(folder):
    config = RuntimeConfig(pool_bytes=1 << 24, swap=SwapOptions(mode="off"))
    with Runtime.open(folder, config=config) as runtime:
        yield runtime


SHAPE = ConversationShape(
    num_sessions=8,
    turns_mean=2.5,
    arrivals_per_s=1e3,
    think_scale=0.0,
)


def test_every_policy_gives_the_same_answers(folder):
    seen = []
    options = SwitchOptions(
        policies=tuple(MODES), shape=SHAPE, session_tokens=200, update_frequency=0.5
    )
    rows = run_switch(folder, options, watch=lambda *progress: seen.append(progress))
    assert [row["policy"] for row in rows] == list(MODES)
    assert len({row["outputs_sha256"] for row in rows}) == 1
    by_policy = {row["policy"]: row for row in rows}
    for row in rows:
        assert row["failed"] == row["sessions_differing"] == 0
        assert row["num_ttft"] == row["turns"] > SHAPE.num_sessions
        assert 0 < row["pool_peak_ratio"] <= 1
        assert row["disk_peak_ratio"] <= 1
        assert row["ratio_vs_naive"]["throughput"] > 0
    # Who meets whom depends on the machine's speed; somebody always does.
    assert sum(row["preemptions"] for row in rows) > 0
    assert by_policy["recompute"]["tokens_recomputed"] > 0
    assert by_policy["recompute"]["bytes_written"] == 0
    for policy in ("naive", "groups", "async", "reuse"):
        assert by_policy[policy]["tokens_restored"] > 0
        assert by_policy[policy]["bytes_read"] > 0
    assert by_policy["naive"]["mean_io_bytes"] < by_policy["groups"]["mean_io_bytes"]
    num_turns = rows[0]["turns"]
    assert ("reuse", num_turns, num_turns) in seen
    json.dumps(rows, allow_nan=False)


def test_conversations_are_cut_to_the_models_context(folder):
    shape = ConversationShape(num_sessions=1)
    options = SwitchOptions(policies=("recompute",), shape=shape, session_tokens=5000)
    with pytest.raises(ConfigError, match="context"):
        run_switch(folder, options)


def test_fairness_rows(folder):
    seen = []
    options = FairnessOptions(policies=("fcfs", "fair"), seconds=0.3)
    rows = run_fairness(folder, options, watch=lambda *progress: seen.append(progress))
    assert [(row["policy"], row["app"]) for row in rows[:2]] == [
        ("alone", "interactive"),
        ("alone", "background"),
    ]
    assert len(rows) == 5 + 2 * 5
    for row in rows:
        assert row["requests"] > 0
        assert row["throughput"] > 0
        assert (row["slowdown"] is None) == (row["policy"] == "alone")
    shares = [r["service_share"] for r in rows if (r["policy"], r["mix"]) == ("fair", "equals")]
    # On a fast machine so tiny a model is never backlogged: then nobody has a share.
    assert shares == [None] * 3 or sum(shares) == pytest.approx(1.0)
    assert seen[-1] == ("fair equals", 8, 9)
    json.dumps(rows, allow_nan=False)


def test_what_time_cut_off_counts_with_the_time_it_waited(runtime):
    load = AppLoad(
        name="greedy",
        priority="interactive",
        num_users=3,
        prompt_tokens=(20, 30),
        output_tokens=900,
    )
    driver = Driver()
    app = LoadedApp(load, runtime, driver, TextIds(runtime.tokenizer), seed=0)
    driver.run(app.users(), for_ms=60.0)
    assert len(app.record.ttft_ms) == 3
    assert all(ttft > 0 for ttft in app.record.ttft_ms)
    assert app.record.num_unanswered <= 3
    assert not app.backlogged
    runtime.check_integrity()
    assert runtime.pool_snapshot().used_bytes == 0


def test_a_request_that_failed_is_not_in_the_record(runtime):
    load = AppLoad(
        name="too long",
        priority="interactive",
        num_users=1,
        prompt_tokens=(5000, 5000),
        output_tokens=2,
    )
    driver = Driver()
    app = LoadedApp(load, runtime, driver, TextIds(runtime.tokenizer), seed=0)
    with pytest.raises(PromptTooLong):
        driver.run(app.users())
    assert app.record == AppRecord()


def test_restore_rows(folder):
    (row,) = run_restore(folder, [300], reps=1)
    assert row["tokens"] == 300
    known = 300 - row["turn_tokens"] - 8
    for mode in ("swapped", "restarted"):  # or more, if both turns begin alike
        assert known <= row[f"tokens_restored_{mode}"] < known + row["turn_tokens"]
    assert row["answers_differing"] == 0
    assert min(row[f"ttft_ms_{mode}"] for mode in ("resident", "swapped", "restarted")) > 0
    assert row["ratio_resident"] > 0
    json.dumps(row, allow_nan=False)


def test_restore_refuses_what_exceeds_the_context(folder):
    with pytest.raises(ConfigError, match="tokens is 2000"):
        run_restore(folder, [2000], reps=1)
