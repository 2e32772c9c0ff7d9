"""`bench switch`, `fairness` and `restore` on a tiny model, from the options to the rows."""

import json
from dataclasses import fields, replace

import pytest
from tiny_models import tiny_config, write_folder

from edgekv.bench.sessions import switch_script
from edgekv.bench.sessions.disturb import Beside, gaps_of, make_figures, run_disturb
from edgekv.bench.sessions.drive import Asked, Driver, num_unanswered
from edgekv.bench.sessions.fairness import FairnessOptions, run_fairness
from edgekv.bench.sessions.mixes import AppLoad, users
from edgekv.bench.sessions.restore import run_restore
from edgekv.bench.sessions.switch import run_switch
from edgekv.bench.sessions.switch_script import MODES, SwitchOptions
from edgekv.bench.workload import TextIds
from edgekv.config import RuntimeConfig, SwapOptions
from edgekv.errors import ConfigError, PromptTooLong
from edgekv.metrics import Stats
from edgekv.runtime import Reply, Runtime

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


NUM_SESSIONS = 8
TO_THE_END = SwitchOptions(
    policies=tuple(MODES),
    sessions=NUM_SESSIONS,
    turns_mean=2.5,
    session_tokens=200,
    arrivals_per_s=1e3,
    think_scale=0.0,
    update_frequency=0.5,
)


def test_every_policy_gives_the_same_answers(folder):
    seen = []
    rows = run_switch(folder, TO_THE_END, watch=lambda *progress: seen.append(progress))
    assert [row["policy"] for row in rows] == ["resident", *MODES]
    assert len({row["outputs_sha256"][0] for row in rows}) == 1
    by_policy = {row["policy"]: row for row in rows}
    for row in rows:
        assert row["failed"] == row["sessions_differing"] == 0
        assert row["unfinished"] == row["unanswered"] == 0
        assert row["num_ttft"] == row["turns"] > NUM_SESSIONS
        assert 0 < row["pool_peak_ratio"] <= 1
        assert row["disk_peak_ratio"] <= 1
        assert row["ratio_vs_naive"]["throughput"] > 0
        assert (row["overhead_vs_resident"] is None) == (row["policy"] == "resident")
    assert by_policy["resident"]["tokens_restored"] == by_policy["resident"]["preemptions"] == 0
    assert by_policy["resident"]["bytes_written"] == 0
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
    options = replace(TO_THE_END, policies=("recompute",), session_tokens=5000)
    with pytest.raises(ConfigError, match="context"):
        run_switch(folder, options)


def test_load_is_a_part_of_a_measured_capacity(folder, monkeypatch):
    monkeypatch.setattr(switch_script, "_CAPACITY_S", 0.5)
    options = SwitchOptions(
        policies=("naive",),
        utilisations=(0.3, 0.6),
        row_turns=12,
        reps=2,
        sessions=6,
        turns_mean=2.5,
        session_tokens=200,
        update_frequency=0.5,
    )
    rows = run_switch(folder, options)
    played = [(row["utilisation"], row["policy"]) for row in rows]
    assert played == [(u, p) for u in (0.3, 0.6) for p in ("resident", "naive")]
    assert len({row["capacity_turns_per_s"] for row in rows}) == 1
    slow, fast = (next(r for r in rows if r["utilisation"] == u) for u in (0.3, 0.6))
    assert slow["window_s"] == pytest.approx(2 * fast["window_s"])
    assert slow["think_scale"] > fast["think_scale"] > 0
    for row in rows:
        assert row["failed"] == row["sessions_differing"] == 0
        assert row["turns"] == row["num_ttft"] > 0
        assert row["utilisation_measured"] > 0
        assert len(row["outputs_sha256"]) == row["reps"] == 2
        assert row["ratio_vs_naive"]["ttft_ms_p50"] > 0
        assert (row["overhead_vs_resident"] is None) == (row["policy"] == "resident")
        assert (row["ttft_ms_p95"] is None) == (row["turns"] < 20)
    json.dumps(rows, allow_nan=False)


def test_a_run_is_fitted_into_its_time(folder):
    seen = []
    options = SwitchOptions(policies=("reuse",), minutes=0.1)
    rows = run_switch(folder, options, watch=lambda *progress: seen.append(progress))
    assert [row["policy"] for row in rows] == ["resident", "reuse"]
    assert seen[0] == ("capacity", 0, 1)
    assert seen[-1][0] == "reuse at 0.6"
    assert all(0 <= done <= total for _, done, total in seen)
    for row in rows:
        assert row["elapsed_s"] < 60 * options.minutes
        assert row["sessions"] in (16, 12, 8)


def test_what_does_not_fit_into_memory_is_refused(folder, monkeypatch):
    monkeypatch.setattr(switch_script, "_MEMORY_SHARE", 1e-9)
    with pytest.raises(ConfigError, match="resident"):
        run_switch(folder, SwitchOptions(policies=("reuse",), minutes=0.05))


def test_fairness_rows(folder):
    seen = []
    options = FairnessOptions(policies=("fcfs", "fair"), seconds=0.3)
    rows = run_fairness(folder, options, watch=lambda *progress: seen.append(progress))
    assert [(row["policy"], row["app"]) for row in rows[:2]] == [
        ("alone", "interactive"),
        ("alone", "background"),
    ]
    assert len(rows) == 5 + 2 * 5
    assert len({(row["unit_tokens"], row["unit_ms"]) for row in rows}) == 1
    for row in rows:
        assert row["requests"] > 0
        assert row["throughput"] > 0
        assert (row["slowdown"] is None) == (row["policy"] == "alone")
    shares = [r["service_share"] for r in rows if (r["policy"], r["mix"]) == ("fair", "equals")]
    # On a fast machine so tiny a model is never backlogged: then nobody has a share.
    assert shares == [None] * 3 or sum(shares) == pytest.approx(1.0)
    assert seen[-1] == ("fair equals", 8, 9)
    json.dumps(rows, allow_nan=False)


def played(runtime, load, driver=None, *, for_ms=None):
    driver = driver or Driver()
    text = TextIds(runtime.tokenizer)
    driver.run(users(load, runtime.app(load.name), driver, text, seed=0), for_ms=for_ms)
    return driver


def test_what_time_cut_off_counts_with_the_time_it_waited(runtime):
    load = AppLoad(name="greedy", num_users=3, prompt_tokens=(20, 30), output_tokens=900)
    driver = played(runtime, load, for_ms=60.0)
    assert len(driver.asked) == 3
    assert all(each.ttft_ms > 0 and not each.whole for each in driver.asked)
    assert num_unanswered(driver.asked) <= 3
    assert not driver.backlogged()
    runtime.check_integrity()
    assert runtime.pool_snapshot().used_bytes == 0


def test_a_request_that_failed_is_not_in_the_record(runtime):
    load = AppLoad(name="too long", num_users=1, prompt_tokens=(5000, 5000), output_tokens=2)
    driver = Driver()
    with pytest.raises(PromptTooLong):
        played(runtime, load, driver)
    assert driver.asked == []


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


def streamed(*gaps_ms, waited_ms=None):
    """A stream whose first token came after 50 ms; cut off after `waited_ms`, if that is given."""
    stats = Stats(**{f.name: 0 for f in fields(Stats)} | {"ttft_ms": 50.0})
    tokens = (1,) * (len(gaps_ms) + 1)
    return Asked(
        who="stream",
        prompt=[],
        reply=Reply(
            text="", token_ids=tokens, finish_reason="length", stats=stats, gaps_ms=gaps_ms
        ),
        num_computed=0,
        submitted_ms=0.0,
        waited_ms=waited_ms or 0.0,
        whole=waited_ms is None,
    )


def test_a_stream_that_gets_nowhere_is_told_by_its_longest_gap():
    alone = [streamed(*[10.0] * 30), streamed(*[20.0] * 30), streamed(*[30.0] * 30)]
    disturbed = [
        streamed(*[20.0] * 30),
        streamed(*[60.0] * 30),
        streamed(5.0, waited_ms=9055.0),
    ]
    assert gaps_of(disturbed[-1]) == [5.0, 9000.0]
    done = {"num_rounds": 5, "num_evaluations": 1, "num_thrown": 2}
    beside = [Beside(**done, num_waiting=7, num_plans=4, plan_ms=6.0)] * 3
    row = make_figures(alone, disturbed, beside, 100.0)
    assert (row["gap_ms_p95_alone"], row["gap_ms_p95_disturbed"]) == (20.0, 60.0)
    assert row["ratio"] == 3.0
    assert row["allowed_ms"] == pytest.approx(110.0)
    assert row["within"]
    assert (row["cut_off"], row["rounds"], row["evaluations"]) == (1, 15, 3)
    assert row["steps_thrown"] == 6
    assert (row["waiting"], row["plan_ms"]) == (7, 1.5)
    row = make_figures(alone[-1:], disturbed[-1:], beside[-1:], 100.0)
    assert row["gap_ms_p95_disturbed"] == 9000.0
    assert not row["within"]


def test_a_stream_that_was_cut_off_before_its_first_token_has_waited_all_the_time():
    cut = streamed(waited_ms=700.0)
    nothing = replace(cut, reply=replace(cut.reply, token_ids=()))
    assert gaps_of(nothing) == [700.0]


def test_disturb_rows(folder):
    seen = []
    row, flood = run_disturb(
        folder,
        reps=2,
        new_tokens=30,
        evaluated_tokens=40,
        num_waiting=200,
        watch=lambda *progress: seen.append(progress),
    )
    assert row["reps"] == 2
    assert row["rounds"] > 0
    assert row["evaluations"] > 0
    assert row["gap_ms_p95_alone"] > 0
    assert [len(each) for each in row["samples"]["alone"]] == [29, 29]
    assert seen[-1] == ("disturb", 9, 9)
    assert (row["beside"], flood["beside"]) == ("callers", "flood")
    assert row["waiting"] == 0
    assert flood["rounds"] > 0
    assert flood["plan_ms"] > 0
    json.dumps([row, flood], allow_nan=False)


def test_what_could_not_be_told_is_refused(folder):
    with pytest.raises(ConfigError, match="new tokens"):
        run_disturb(folder, reps=1, new_tokens=20, evaluated_tokens=40, num_waiting=0)
