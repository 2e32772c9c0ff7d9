"""`bench switch`, `fairness` and `restore`: options, reports and exit codes; nothing runs."""

import json

import pytest

from edgekv.bench import plot
from edgekv.bench.sessions import fairness, restore, switch
from edgekv.bench.sessions.app_load import AppRecord
from edgekv.bench.sessions.fairness import Phase, make_mixes
from edgekv.bench.sessions.restore import MODES, Samples
from edgekv.bench.sessions.shares import Moment, shares_of
from edgekv.cli.main import main

TAILS = {f"{what}_ms_{p}": 10.0 for what in ("ttft", "tbt") for p in ("p50", "p95", "p99")}


def switch_row(policy, *, failed=0, differing=0):
    return {
        "policy": policy,
        "model": "tiny",
        "sessions": 4,
        "turns": 9,
        "trace": "random",
        "update_frequency": 0.04,
        **TAILS,
        "throughput": 5.0,
        **dict.fromkeys(("preemptions", "tokens_restored", "tokens_recomputed"), 1),
        **dict.fromkeys(("bytes_read", "bytes_written", "num_ios"), 1 << 20),
        "mean_io_bytes": None,
        "bytes_written_per_new_kv_byte": 1.0,
        "pool_peak_ratio": 1.0,
        "disk_peak_ratio": 0.5,
        "ratio_vs_naive": TAILS | {"throughput": 1.0},
        "ratio_vs_recompute": None,
        "sessions_differing": differing,
        "sessions_differing_by_a_tie": 0,
        "failed": failed,
        "errors": ["EngineFailed: out of luck"] * failed,
        "samples": {"ttft_ms": [1.0, 2.0], "tbt_ms": [1.0]},
    }


@pytest.fixture
def switched(monkeypatch):
    """Calls of `run_switch`, which answers with made-up rows."""
    calls = []

    def run_switch(model, options, *, progress, watch):
        calls.append((model, options))
        watch("naive", 1, 9)
        bad = {"fails": {"failed": 1}, "differs": {"differing": 2}}.get(model, {})
        return [switch_row(policy, **bad) for policy in options.policies]

    monkeypatch.setattr(switch, "run_switch", run_switch)
    return calls


def test_switch_defaults(switched, capsys):
    assert main(["bench", "switch"]) == 0
    ((model, options),) = switched
    assert model == "smollm2-135m"
    assert options.policies == ("recompute", "naive", "groups", "async", "reuse")
    assert (options.trace, options.update_frequency) == ("random", 0.04)
    assert options.pool_fraction == 0.25
    assert (options.shape.num_sessions, options.shape.turns_mean) == (64, 5.5)
    captured = capsys.readouterr()
    assert "TTFT" in captured.out
    assert captured.err == ""


def test_switch_options(switched):
    arguments = ["--policy", "naive, reuse", "--sessions", "8", "--turns", "3", "--seed", "7"]
    arguments += ["--pool-fraction", "0.5", "--trace", "markov", "--update-frequency", "0.02"]
    arguments += ["--session-tokens", "256", "--arrivals-per-s", "2", "--think-scale", "0"]
    assert main(["bench", "switch", "-m", "synthetic", *arguments]) == 0
    ((model, options),) = switched
    assert model == "synthetic"
    assert options.policies == ("naive", "reuse")
    assert (options.trace, options.update_frequency, options.pool_fraction) == ("markov", 0.02, 0.5)
    shape = options.shape
    assert (shape.num_sessions, shape.turns_mean, shape.seed) == (8, 3.0, 7)
    assert (options.session_tokens, shape.arrivals_per_s, shape.think_scale) == (256, 2.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["switch", "--policy", "fastest"], "policy is 'fastest'"),
        (["switch", "--policy", "naive,naive"], "policy is 'naive,naive'"),
        (["switch", "--policy", ""], "policy is ''"),
        (["switch", "--sessions", "0"], "sessions is 0"),
        (["switch", "--turns", "0"], "turns is 0"),
        (["switch", "--pool-fraction", "0"], "pool fraction is 0"),
        (["switch", "--trace", "fair"], "trace is 'fair'"),
        (["switch", "--update-frequency", "2"], "update frequency is 2"),
        (["switch", "--json", "/nonexistent/r.json"], "json is '/nonexistent/r.json'"),
        (["switch", "--plot", "/nonexistent/p.png"], "plot is '/nonexistent/p.png'"),
        (["switch", "--plot", "p.pdf"], "plot is 'p.pdf'"),
        (["fairness", "--policy", "random"], "policy is 'random'"),
        (["fairness", "--seconds", "0"], "seconds is 0"),
        (["restore", "--tokens", "many"], "tokens is 'many'"),
        (["restore", "--tokens", "5"], "tokens is 5"),
    ],
)
def test_absurd_options_are_one_clear_error(switched, capsys, arguments, said):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert "\nhint: " in captured.err
    assert switched == []


def test_switch_writes_a_report_and_a_plot(switched, tmp_path, monkeypatch):
    plots = []
    monkeypatch.setattr(plot, "plot_cdfs", lambda *arguments: plots.append(arguments))
    target = tmp_path / "r.json"
    png = tmp_path / "p.png"
    arguments = ["--policy", "naive,reuse", "--json", str(target), "--plot", str(png)]
    assert main(["bench", "switch", *arguments]) == 0
    report = json.loads(target.read_text())
    assert set(report) == {"machine", "versions", "rows"}
    assert [row["policy"] for row in report["rows"]] == ["naive", "reuse"]
    ((path, title, panels),) = plots
    assert path == png
    assert "smollm2-135m" in title
    assert panels["TTFT, ms"] == {"naive": [1.0, 2.0], "reuse": [1.0, 2.0]}


def test_json_to_stdout_instead_of_the_tables(switched, capsys):
    assert main(["bench", "switch", "--policy", "reuse", "--json", "-"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["policy"] == "reuse"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("fails", "warning: reuse: a request failed: EngineFailed: out of luck\n"),
        ("differs", "warning: reuse: 2 sessions answer otherwise than under reuse; in 0 of them"),
    ],
)
def test_what_went_wrong_is_told_and_the_exit_code_says_so(switched, capsys, model, said):
    assert main(["bench", "switch", "--policy", "reuse", "-m", model]) == 1
    assert said in capsys.readouterr().err


def made_phase(policy, mix, loads):
    names = [load.name for load in loads]
    moments = [
        Moment(at_ms=at, service_ms=dict.fromkeys(names, at / 3), backlogged=frozenset(names))
        for at in (0.0, 3000.0)
    ]
    record = AppRecord(ttft_ms=[10.0, 20.0], gaps_ms=[5.0], num_tokens=300)
    return Phase(
        mix=mix,
        policy=policy,
        loads=loads,
        records=(record,) * len(loads),
        elapsed_ms=3000.0,
        service_ms=dict(moments[-1].service_ms),
        shares=shares_of(moments, dict.fromkeys(names, 1.0), 3000.0),
        budgets={"pool_peak_ratio": 0.5, "disk_peak_ratio": 0.0},
    )


@pytest.fixture
def shared(monkeypatch):
    """Calls of `run_fairness`, which answers with rows of made-up phases."""
    calls = []

    def run_fairness(model, options, *, progress, watch):
        calls.append((model, options))
        mixes = make_mixes(2048, 60.0).items()
        phases = [made_phase("alone", name, (load,)) for name, mix in mixes for load in mix]
        phases += [made_phase(p, name, mix) for p in options.policies for name, mix in mixes]
        return fairness.make_rows(model, phases)

    monkeypatch.setattr(fairness, "run_fairness", run_fairness)
    return calls


def test_fairness(shared, capsys, tmp_path):
    target = tmp_path / "r.json"
    arguments = ["--seconds", "3", "--json", str(target), "--seed", "5"]
    assert main(["bench", "fairness", "-m", "synthetic", *arguments]) == 0
    ((model, options),) = shared
    assert (model, options.policies) == ("synthetic", ("fcfs", "fair"))
    assert (options.seconds, options.seed) == (3.0, 5)
    rows = json.loads(target.read_text())["rows"]
    keys = {(row["policy"], row["app"]) for row in rows}
    assert {("alone", "interactive"), ("fcfs", "background"), ("fair", "many-long")} <= keys
    row = next(r for r in rows if (r["policy"], r["app"]) == ("fair", "few-short"))
    assert set(row) >= {*TAILS, "policy", "app", "priority", "weight", "slowdown", "jain"}
    assert set(row["slowdown"]) == set(TAILS)
    assert row["slowdown"]["ttft_ms_p95"] == pytest.approx(1.0)
    assert row["service_share"] == row["weight_share"] == pytest.approx(1 / 3)
    assert row["service_difference_ms_max"] == 0.0
    assert row["throughput_vs_fcfs"] == pytest.approx(1.0)
    assert next(r for r in rows if r["policy"] == "alone")["slowdown"] is None
    out = capsys.readouterr().out
    assert "equals: service while all are backlogged" in out
    assert "Jain" in out
    assert "…" not in out


def test_fairness_draws_a_curve_for_each_app_and_policy(shared, monkeypatch, tmp_path):
    plots = []
    monkeypatch.setattr(plot, "plot_cdfs", lambda *arguments: plots.append(arguments))
    assert main(["bench", "fairness", "--policy", "fair", "--plot", str(tmp_path / "p.png")]) == 0
    ((_, _, panels),) = plots
    assert "interactive fair" in panels["TTFT, ms"]
    assert "background alone" in panels["TTFT, ms"]


@pytest.fixture
def restored(monkeypatch):
    """Calls of `run_restore`, which answers with made-up rows."""
    calls = []

    def run_restore(model, tokens, *, reps, progress, watch):
        calls.append((model, tokens, reps))
        rows = []
        for length in tokens:
            samples = Samples(tokens=length)
            for i, mode in enumerate(MODES):
                turn = {"ttft_ms": 10.0 * (i + 1), "num_restored_tokens": 9, "token_ids": [1]}
                samples.turns[mode].append(turn)
            if model == "differs":
                samples.turns["swapped"][0] = turn | {"token_ids": [2]}
            rows.append(restore.make_row(model, samples, dropped=True, budgets={}))
        return rows

    monkeypatch.setattr(restore, "run_restore", run_restore)
    return calls


def test_restore(restored, capsys, monkeypatch, tmp_path):
    plots = []
    monkeypatch.setattr(plot, "plot_lines", lambda *arguments: plots.append(arguments))
    arguments = ["--tokens", "256,512", "--reps", "2", "--plot", str(tmp_path / "p.png")]
    assert main(["bench", "restore", *arguments]) == 0
    assert restored == [("smollm2-135m", [256, 512], 2)]
    out = capsys.readouterr().out
    assert "ratio restarted" in out
    assert "…" not in out
    ((_, _, _, _, lines),) = plots
    assert lines["resident"] == [(256, 10.0), (512, 10.0)]
    assert set(lines) == set(MODES)


def test_restore_defaults(restored):
    assert main(["bench", "restore"]) == 0
    assert restored == [("smollm2-135m", [512, 2048, 8192], 3)]


def test_restored_answers_that_differ_are_an_error(restored, capsys):
    assert main(["bench", "restore", "-m", "differs"]) == 1
    assert capsys.readouterr().err == "warning: answers from restored KV differ\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("switch", "an analogue of swapping in vLLM 0.3.3"),
        ("fairness", "counts with the time it has waited"),
        ("restore", "dropped from the page cache"),
    ],
)
def test_help_says_what_is_measured(command, said, capsys):
    assert main(["bench", command, "--help"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
