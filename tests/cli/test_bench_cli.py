import json

import pytest
from command_errors import error_of

from edgekv.bench.speed import scenarios
from edgekv.bench.speed.measure import Outcome, SideRun
from edgekv.bench.speed.scenarios import make_row
from edgekv.bench.workload import ragged_lengths
from edgekv.cli.main import main


def sample(ms):
    line = (ms, 2 * ms, 3 * ms)
    return SideRun(
        num_prompt_tokens=100,
        ttft_ms=(ms,),
        warm_ttft_ms=(1.0,),
        cold_ms=(line,),
        decode_ms=(line,),
        peak_memory_bytes=1 << 20,
        tokens=((1, 2),),
    )


@pytest.fixture
def ran(monkeypatch):
    """Calls of `run_scenario`, which answers with made-up rows; `failed` runs among them."""
    calls = []

    def run_scenario(scenario, model, workloads, *, peer, progress, watch):
        calls.append((scenario, model, workloads, peer))
        watch("ttft 1/1", 1, 4)
        theirs = [sample(25.0)] if peer else []
        outcome = Outcome(turns=[[sample(10.0), *theirs]])
        if model == "fails":
            outcome.failed, outcome.errors = 1, ["EngineFailed: out of luck"]
        return [make_row(scenario, model, w, peer, outcome) for w in workloads]

    monkeypatch.setattr(scenarios, "run_scenario", run_scenario)
    return calls


def test_ttft_defaults(ran, capsys):
    assert main(["bench", "ttft"]) == 0
    ((scenario, model, workloads, peer),) = ran
    assert (scenario, model, peer) == ("ttft", "smollm2-135m", None)
    assert [w.lengths for w in workloads] == [(128,), (512,), (1024,)]
    assert {w.reps for w in workloads} == {5}
    captured = capsys.readouterr()
    assert "prefill tok/s" in captured.out
    assert captured.err == ""  # no bar without a terminal


def test_ttft_options(ran):
    arguments = ["--prompt-tokens", "64,96", "--reps", "2", "-m", "tiny", "--peer", "mlx-lm"]
    assert main(["bench", "ttft", *arguments]) == 0
    ((_, model, workloads, peer),) = ran
    assert (model, peer) == ("tiny", "mlx-lm")
    assert [(w.lengths, w.reps) for w in workloads] == [((64,), 2), ((96,), 2)]


def test_decode_defaults(ran, capsys):
    assert main(["bench", "decode"]) == 0
    ((scenario, _, workloads, _),) = ran
    assert scenario == "decode"
    assert [w.lengths for w in workloads] == [(128,) * n for n in (1, 2, 4, 8)]
    assert {(w.new_tokens, w.reps) for w in workloads} == {(64, 5)}
    assert "TBT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "lengths"),
    [
        (["--sessions", "1,3", "--prompt-tokens", "9"], [(9,), (9, 9, 9)]),
        (["--sessions", "8", "--ragged", "64:1024"], [ragged_lengths(64, 1024, 8)]),
        (["--lengths", "2048,128,128"], [(2048, 128, 128)]),
    ],
)
def test_decode_options(ran, arguments, lengths):
    assert main(["bench", "decode", "--new-tokens", "32", *arguments]) == 0
    ((_, _, workloads, _),) = ran
    assert [w.lengths for w in workloads] == lengths
    assert {w.new_tokens for w in workloads} == {32}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ttft", "--prompt-tokens", "abc"], "prompt-tokens is 'abc'"),
        (["ttft", "--prompt-tokens", ""], "prompt-tokens is ''"),
        (["ttft", "--prompt-tokens", "0"], "prompt tokens is 0"),
        (["ttft", "--prompt-tokens=-3"], "prompt tokens is -3"),
        (["ttft", "--reps", "0"], "reps is 0"),
        (["decode", "--sessions", "0"], "sessions is 0"),
        (["decode", "--sessions", "9999"], "sessions is 9999"),
        (["decode", "--new-tokens", "1"], "new tokens is 1"),
        (["decode", "--ragged", "64"], "ragged is '64'"),
        (["decode", "--ragged", "9:3"], "ragged is 3"),
        (["decode", "--lengths", "5,6", "--ragged", "1:2"], "--lengths names 2 sessions"),
        (["ttft", "--json", "/nonexistent/report.json"], "json is '/nonexistent/report.json'"),
        (["ttft", "--reps", "many"], "invalid value"),
    ],
)
def test_absurd_options_are_one_clear_error(ran, capsys, arguments, said):
    assert main(["bench", *arguments]) == 2
    assert said in "\n".join(error_of(capsys))
    assert ran == []


def test_json_to_a_file_beside_the_table(ran, capsys, tmp_path):
    target = tmp_path / "report.json"
    assert main(["bench", "ttft", "--peer", "mlx-lm", "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    assert set(report) == {"machine", "versions", "rows"}
    assert report["versions"]["mlx"]
    assert report["machine"]["backend"] in ("cpu", "metal")
    assert report["rows"][0]["ratio"] == pytest.approx(2.5)
    assert "ratio" in capsys.readouterr().out


def test_json_to_stdout_instead_of_the_table(ran, capsys):
    assert main(["bench", "decode", "--sessions", "2", "--json", "-"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["sessions"] == 2


def test_failures_are_told_and_the_exit_code_says_so(ran, capsys):
    assert main(["bench", "ttft", "-m", "fails", "--prompt-tokens", "8,9"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "warning: a run failed: EngineFailed: out of luck\n"
    assert "failed" in captured.out


def test_an_unknown_peer(capsys):
    assert main(["bench", "ttft", "--peer", "ollama"]) == 2
    said = capsys.readouterr().err
    assert said == "error: peer is 'ollama'\n\nhint: peer must be mlx-lm or all-rows\n"


@pytest.mark.parametrize("command", ["ttft", "decode"])
def test_help_says_what_is_measured(command, capsys):
    assert main(["bench", command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "ratio: " in text
    assert "median over pairs that run in turn" in text
    if command == "decode":
        assert "Cold: all prompts are submitted at once" in text
        assert "BatchGenerator" in text
