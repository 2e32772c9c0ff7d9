"""`bench switch`, `fairness` and `restore`: options, reports and exit codes; nothing runs."""

import json
from dataclasses import fields, replace

import pytest
from command_errors import error_of

from edgekv.bench import plot
from edgekv.bench.sessions import disturb, fairness, restore, switch
from edgekv.bench.sessions.drive import Asked
from edgekv.bench.sessions.mixes import make_mixes
from edgekv.bench.sessions.restore import MODES
from edgekv.bench.sessions.shares import Moment
from edgekv.cli.main import main
from edgekv.metrics import Stats
from edgekv.runtime import Reply

TAILS = {f"{what}_ms_{p}": 10.0 for what in ("ttft", "tbt") for p in ("p50", "p95", "p99")}


def switch_row(policy, *, utilisation=0.6, failed=0, differing=0):
    return {
        "policy": policy,
        "model": "tiny",
        "utilisation": utilisation,
        "utilisation_measured": 0.5,
        "capacity_turns_per_s": 2.0,
        "window_s": 30.0,
        "tokens_mean": 512,
        "unanswered": 0,
        "overhead_vs_resident": TAILS,
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
        return [
            switch_row(policy, utilisation=u, **bad)
            for u in options.utilisations
            for policy in options.policies
        ]

    monkeypatch.setattr(switch, "run_switch", run_switch)
    return calls


def test_switch_defaults(switched, capsys):
    assert main(["bench", "switch"]) == 0
    ((model, options),) = switched
    assert model == "smollm2-135m"
    assert options.policies == ("recompute", "naive", "groups", "async", "reuse")
    assert (options.trace, options.update_frequency) == ("random", 0.04)
    assert options.pool_fraction == 0.25
    assert (options.utilisations, options.minutes, options.reps) == ((0.6,), 8.0, 1)
    assert (options.sessions, options.turns_mean, options.row_turns) == (None, 5.5, None)
    assert options.arrivals_per_s is options.think_scale is None
    captured = capsys.readouterr()
    assert "TTFT" in captured.out
    assert captured.err == ""


def test_switch_options(switched):
    arguments = ["--policy", "naive, reuse", "--sessions", "8", "--turns", "3", "--seed", "7"]
    arguments += ["--pool-fraction", "0.5", "--trace", "markov", "--update-frequency", "0.02"]
    arguments += ["--session-tokens", "256", "--arrivals-per-s", "2", "--think-scale", "0"]
    arguments += ["--reps", "3"]
    assert main(["bench", "switch", "-m", "synthetic", *arguments]) == 0
    ((model, options),) = switched
    assert model == "synthetic"
    assert options.policies == ("naive", "reuse")
    assert (options.trace, options.update_frequency, options.pool_fraction) == ("markov", 0.02, 0.5)
    assert (options.sessions, options.turns_mean, options.seed) == (8, 3.0, 7)
    assert (options.session_tokens, options.arrivals_per_s, options.think_scale) == (256, 2.0, 0.0)
    assert options.reps == 3


def test_a_quick_switch_and_one_for_claims(switched):
    assert main(["bench", "switch", "--quick", "--utilisation", "0.3,0.9"]) == 0
    assert main(["bench", "switch", "--row-turns", "400"]) == 0
    assert main(["bench", "switch", "--quick", "--minutes", "1.5", "--policy", "async"]) == 0
    quick, long, shorter = (options for _, options in switched)
    assert (quick.minutes, quick.policies) == (2.0, ("naive", "reuse"))
    assert quick.utilisations == (0.3, 0.9)
    assert (long.row_turns, len(long.policies)) == (400, 5)
    assert (shorter.minutes, shorter.policies) == (1.5, ("async",))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["switch", "--policy", "fastest"], "policy is 'fastest'"),
        (["switch", "--policy", "naive,naive"], "policy is 'naive,naive'"),
        (["switch", "--policy", ""], "policy is ''"),
        (["switch", "--sessions", "0"], "sessions is 0"),
        (["switch", "--turns", "0"], "turns is 0"),
        (["switch", "--pool-fraction", "0"], "pool fraction is 0"),
        (["switch", "--utilisation", "0"], "utilisation is 0"),
        (["switch", "--utilisation", "much"], "utilisation is 'much'"),
        (["switch", "--utilisation", "nan"], "utilisation is nan"),
        (["switch", "--utilisation", "0.3,0.3"], "utilisation is '0.3,0.3'"),
        (["switch", "--minutes", "0"], "minutes is 0"),
        (["switch", "--row-turns", "0"], "row turns is 0"),
        (["switch", "--reps", "0"], "reps is 0"),
        (["switch", "--session-tokens", "0"], "session tokens is 0"),
        (["switch", "--quick", "--row-turns", "400"], "--row-turns"),
        (["switch", "--minutes", "3", "--arrivals-per-s", "1"], "--arrivals-per-s"),
        (["switch", "--row-turns", "400", "--arrivals-per-s", "1"], "--arrivals-per-s"),
        (["switch", "--trace", "fair"], "trace is 'fair'"),
        (["switch", "--update-frequency", "2"], "update frequency is 2"),
        (["switch", "--json", "/nonexistent/r.json"], "json is '/nonexistent/r.json'"),
        (["switch", "--plot", "/nonexistent/p.png"], "plot is '/nonexistent/p.png'"),
        (["switch", "--plot", "p.pdf"], "plot is 'p.pdf'"),
        (["fairness", "--policy", "random"], "policy is 'random'"),
        (["fairness", "--seconds", "0"], "seconds is 0"),
        (["fairness", "--seconds", "9", "--quick"], "--seconds"),
        (["fairness", "--minutes", "0"], "minutes is 0"),
        (["disturb", "--reps", "0"], "reps is 0"),
        (["disturb", "--new-tokens", "5"], "new tokens is 5"),
        (["restore", "--tokens", "many"], "tokens is 'many'"),
        (["restore", "--tokens", "5"], "tokens is 5"),
    ],
)
def test_absurd_options_are_one_clear_error(switched, capsys, arguments, said):
    assert main(["bench", *arguments]) == 2
    assert said in "\n".join(error_of(capsys))
    assert switched == []


def test_switch_writes_a_report_and_a_plot(switched, tmp_path, monkeypatch):
    plots = []
    monkeypatch.setattr(plot, "draw", lambda *arguments: plots.append(arguments))
    target = tmp_path / "r.json"
    png = tmp_path / "p.png"
    arguments = ["--policy", "naive,reuse", "--json", str(target), "--plot", str(png)]
    assert main(["bench", "switch", *arguments]) == 0
    report = json.loads(target.read_text())
    assert set(report) == {"machine", "versions", "rows"}
    assert [row["policy"] for row in report["rows"]] == ["naive", "reuse"]
    ((path, title, panels),) = plots
    assert path == png
    assert title == "bench switch · tiny · random trace"
    assert [panel.x_name for panel in panels] == ["TTFT, ms", "time between tokens, ms"]
    curve = [(1.0, 0.5), (2.0, 1.0)]
    assert panels[0].lines == {"naive": curve, "reuse": curve}


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
    stats = Stats(**{f.name: 0 for f in fields(Stats)})
    asked = [
        Asked(
            who=name,
            prompt=[],
            reply=Reply(
                text="",
                token_ids=(1, 2),
                finish_reason="length",
                stats=replace(stats, ttft_ms=ttft_ms),
                gaps_ms=(5.0,),
            ),
            num_computed=150,
            submitted_ms=0.0,
            waited_ms=ttft_ms,
        )
        for name in names
        for ttft_ms in (10.0, 20.0)
    ]
    head = {"model": "tiny", "mix": mix, "policy": policy, "unit_tokens": 1024, "unit_ms": 1500.0}
    return fairness.phase_rows(head, loads, asked, moments, 3000.0)


@pytest.fixture
def shared(monkeypatch):
    """Calls of `run_fairness`, which answers with rows of made-up phases."""
    calls = []

    def run_fairness(model, options, *, progress, watch):
        calls.append((model, options))
        mixes = make_mixes(1024, 1500.0).items()
        phases = [made_phase("alone", name, (load,)) for name, mix in mixes for load in mix]
        phases += [made_phase(p, name, mix) for p in options.policies for name, mix in mixes]
        rows = [row for phase in phases for row in phase]
        fairness.compare(rows)
        return rows

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
    assert {(row["unit_tokens"], row["unit_ms"]) for row in rows} == {(1024, 1500.0)}
    row = next(r for r in rows if (r["policy"], r["app"]) == ("fair", "few-short"))
    assert set(row) >= {*TAILS, "policy", "app", "priority", "weight", "slowdown", "jain"}
    assert set(row["slowdown"]) == set(TAILS)
    assert row["slowdown"]["ttft_ms_p50"] == pytest.approx(1.0)
    assert row["ttft_ms_p95"] is row["slowdown"]["ttft_ms_p95"] is None  # two samples
    assert row["service_share"] == row["weight_share"] == pytest.approx(1 / 3)
    assert row["service_difference_ms_max"] == 0.0
    assert row["throughput_vs_fcfs"] == pytest.approx(1.0)
    assert next(r for r in rows if r["policy"] == "alone")["slowdown"] is None
    out = capsys.readouterr().out
    assert "equals: service while all are backlogged" in out
    assert "Jain" in out
    assert "…" not in out


def test_fairness_defaults(shared):
    for arguments in ([], ["--quick"], ["--minutes", "30"]):
        assert main(["bench", "fairness", *arguments]) == 0
    assert [options.minutes for _, options in shared] == [8.0, 2.0, 30.0]
    assert {options.seconds for _, options in shared} == {None}


def test_fairness_asks_in_proportion_to_a_prefill():
    fast, slow = (make_mixes(tokens, 900.0) for tokens in (1024, 256))
    (interactive, background), _ = fast.values()
    assert interactive.think_ms == 450.0
    assert interactive.prompt_tokens == (64, 128)
    assert background.prompt_tokens == (768, 1280)
    for of_fast, of_slow in zip(fast.values(), slow.values(), strict=True):
        for a, b in zip(of_fast, of_slow, strict=True):
            assert b.prompt_tokens == tuple(n // 4 for n in a.prompt_tokens)
            assert (b.num_users, b.think_ms) == (a.num_users, a.think_ms)


def test_fairness_draws_a_curve_for_each_app_and_policy(shared, monkeypatch, tmp_path):
    plots = []
    monkeypatch.setattr(plot, "draw", lambda *arguments: plots.append(arguments))
    assert main(["bench", "fairness", "--policy", "fair", "--plot", str(tmp_path / "p.png")]) == 0
    ((_, _, panels),) = plots
    assert {"interactive fair", "background alone"} <= set(panels[0].lines)


@pytest.fixture
def restored(monkeypatch):
    """Calls of `run_restore`, which answers with made-up rows."""
    calls = []

    def run_restore(model, tokens, *, reps, progress, watch):
        calls.append((model, tokens, reps))
        rows = []
        for length in tokens:
            turns = {
                mode: [{"ttft_ms": 10.0 * (i + 1), "num_restored_tokens": 9, "token_ids": [1]}]
                for i, mode in enumerate(MODES)
            }
            if model == "differs":
                turns["swapped"][0]["token_ids"] = [2]
            head = {"model": model, "page_cache_dropped": True}
            rows.append(restore.make_row(head, length, turns))
        return rows

    monkeypatch.setattr(restore, "run_restore", run_restore)
    return calls


def test_restore(restored, capsys, monkeypatch, tmp_path):
    plots = []
    monkeypatch.setattr(restore, "draw", lambda *arguments: plots.append(arguments))
    arguments = ["--tokens", "256,512", "--reps", "2", "--plot", str(tmp_path / "p.png")]
    assert main(["bench", "restore", *arguments]) == 0
    assert restored == [("smollm2-135m", [256, 512], 2)]
    out = capsys.readouterr().out
    assert "ratio restarted" in out
    assert "…" not in out
    ((_, _, (panel,)),) = plots
    assert panel.lines["resident"] == [(256, 10.0), (512, 10.0)]
    assert set(panel.lines) == set(MODES)


def test_restore_defaults(restored):
    assert main(["bench", "restore"]) == 0
    assert restored == [("smollm2-135m", [512, 2048, 8192], 3)]


@pytest.mark.parametrize(("disturbed_ms", "code"), [(90.0, 0), (300.0, 1)])
def test_disturb(monkeypatch, capsys, disturbed_ms, code):
    def run_disturb(model, *, reps, new_tokens, evaluated_tokens, num_waiting, progress, watch):
        assert (model, reps, new_tokens, evaluated_tokens) == ("tiny", 2, 64, 2000)
        assert num_waiting == 1000
        figures = {
            "gap_ms_p95_alone": 50.0,
            "gap_ms_p95_disturbed": disturbed_ms,
            "ratio": disturbed_ms / 50.0,
            "tbt_target_ms": 100.0,
            "allowed_ms": 110.0,
            "within": disturbed_ms <= 110.0,
            "reps": reps,
            "beside": "flood",
            "plan_ms": 0.5,
            **dict.fromkeys(("cut_off", "steps_thrown", "rounds", "evaluations", "waiting"), 0),
        }
        return [{"model": model, "evaluated_tokens": 2000, **figures}]

    monkeypatch.setattr(disturb, "run_disturb", run_disturb)
    assert main(["bench", "disturb", "-m", "tiny", "--reps", "2"]) == code
    captured = capsys.readouterr()
    assert "logits of 2000 tokens" in captured.out
    assert ("warning: a gap of 300 ms" in captured.err) == bool(code)


def test_restored_answers_that_differ_are_an_error(restored, capsys):
    assert main(["bench", "restore", "-m", "differs"]) == 1
    assert capsys.readouterr().err == "warning: answers from restored KV differ\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("switch", "an analogue of swapping in vLLM 0.3.3"),
        ("switch", "for claims, ask for 400 and more"),
        ("fairness", "counts with the time it has waited"),
        ("disturb", "register an app, open and close a session and suspend others"),
        ("restore", "dropped from the page cache"),
    ],
)
def test_help_says_what_is_measured(command, said, capsys):
    assert main(["bench", command, "--help"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
