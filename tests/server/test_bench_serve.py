"""`edgekv bench serve` as a whole: on scripted servers, and on servers that it starts."""

import json
import os
import sys
from pathlib import Path

import mock_openai
import pytest
from command_errors import error_of
from mock_openai import Behaviour, serving

from edgekv.bench.serving import serve as bench
from edgekv.bench.serving import targets
from edgekv.bench.serving.client import Endpoint, TargetFailed
from edgekv.bench.serving.serve import ServeOptions, run_serve
from edgekv.bench.serving.targets import EdgeKVServe
from edgekv.bench.serving.traffic import AppTraffic, Scenario, read_scenario
from edgekv.cli.main import main

pytestmark = pytest.mark.slow

APPS = """
[[apps]]
name = "editor"
key = "editor-key"
share = 3
prompt_tokens = [40, 60]
output_tokens = 3

[[apps]]
name = "chat"
kind = "conversations"
key = "chat-key"
users = 3
session_tokens = 200
"""


def takes(seconds):
    return lambda body: Behaviour(headers_s=seconds, gap_s=0.1 * seconds)


@pytest.fixture
def apps(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(APPS)
    return path


def as_sent(mock, since):
    """What a server was sent, in an order that does not depend on who was quicker."""
    return sorted(json.dumps(seen.body["messages"]) for seen in mock.seen[since:])


def test_two_servers_are_sent_the_same_and_compared(apps, tmp_path, capsys):
    report, picture = tmp_path / "report.json", tmp_path / "ttft.png"
    with serving(takes(0.05)) as quick, serving(takes(0.25)) as slow:
        command = ["bench", "serve", "--apps", str(apps), "--duration", "2", "--utilisation", "0.3"]
        command += ["--target", f"quick={quick.url}", "--target", f"slow={slow.url}"]
        assert main([*command, "--json", str(report), "--plot", str(picture)]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert [(row["target"], row["app"]) for row in rows] == [
        *(("quick", "editor"), ("quick", "chat")),
        *(("slow", "editor"), ("slow", "chat")),
    ]
    for row in rows:
        assert (row["scenario"], row["model"]) == ("mine", "mock-model")
        assert row["answered"] == row["requests"] > 0
        assert row["rate_per_s"] == pytest.approx(0.3 * row["capacity_per_s"])
        assert row["ttft_ms_p50"] >= (50.0 if row["target"] == "quick" else 250.0)
    editor, _ = (row["ratio"] for row in rows[2:])
    assert 2.0 < editor["ttft_ms_p50"] < 6.0
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "mine · " in out
    assert "slow" in out
    # Single requests and first turns are the same texts; later turns may be cut by the window.
    firsts = [
        {text for text in as_sent(mock, 0) if text.count('"role"') == 1} for mock in (quick, slow)
    ]
    assert firsts[1] <= firsts[0], "the second was only sent what the first was sent"
    assert len(firsts[1]) >= rows[0]["requests"]
    assert {seen.key for seen in slow.seen} == {"editor-key", "chat-key", None} - {None}


def test_the_usual_workloads_follow_what_the_target_can_do(capsys):
    """Prompts take time by their length here, so a unit is what fits the window forty times."""

    def by_length(body):
        return Behaviour(headers_s=1e-5 * sum(len(m["content"]) for m in body["messages"]))

    with serving(by_length) as mock:
        assert main(["bench", "serve", "--duration", "2", "--target", mock.url, "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["scenario"], row["app"]) for row in rows] == [
        ("prefill", "interactive"),
        ("prefill", "background"),
        ("turns", "chat"),
    ]
    short, long, chat = rows
    assert short["requests"] > long["requests"] > 0
    assert long["prompt_tokens"] / long["answered"] > 3 * short["prompt_tokens"] / short["answered"]
    assert chat["answered"] > 0
    assert all(row["ratio"] is None for row in rows)


def test_a_server_that_goes_on_is_not_sent_what_it_has_seen(apps):
    """Its KV of the run before would answer instead of it."""
    options = {"scenario": read_scenario(apps), "duration_s": 1.0, "rate": 10.0}
    with serving() as mock:
        target = Endpoint(name="mock", url=f"{mock.url}/v1")
        for _ in range(2):
            run_serve("unused", ServeOptions(targets=(target,), **options))
    firsts = [seen.texts[0][:20] for seen in mock.seen if len(seen.texts) == 1]
    assert len(firsts) > 20
    assert len(set(firsts)) == len(firsts)


def test_failures_are_counted_and_make_it_fail(apps, tmp_path, capsys):
    numbers = iter(range(10_000))

    def sometimes(body):
        return Behaviour(status=500 if next(numbers) % 4 == 3 and "open" in mode else 200)

    mode = []
    with serving(sometimes) as mock:
        command = ["bench", "serve", "--apps", str(apps), "--duration", "2", "--rate", "10"]
        monkey = pytest.MonkeyPatch()
        play = bench.Player.play_open

        async def flaky(self, *arguments, **options):
            mode.append("open")
            return await play(self, *arguments, **options)

        monkey.setattr(bench.Player, "play_open", flaky)
        try:
            report = tmp_path / "report.json"
            assert main([*command, "--target", f"mock={mock.url}", "--json", str(report)]) == 1
        finally:
            monkey.undo()
    rows = json.loads(report.read_text())["rows"]
    assert sum(row["failed"] for row in rows) > 0
    assert {kind for row in rows for kind in row["faults"]} == {"HTTP 500"}
    assert rows[0]["capacity_per_s"] is None
    assert rows[0]["rate_per_s"] == 10.0
    assert "mock: HTTP 500, " in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_an_error(apps, capsys):
    with serving(lambda body: Behaviour(status=401)) as mock:
        command = ["bench", "serve", "--apps", str(apps), "--target", mock.url]
        assert main(command) == 1
    assert "HTTP 401" in error_of(capsys)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", "1", "--utilisation", "0.5"), "--rate is instead of --utilisation"),
        (("--rate", "0"), "rate is 0"),
        (("--utilisation", "0"), "utilisation is 0"),
        (("--duration", "0.1"), "duration is 0.1"),
        (("--pool-fraction", "0"), "pool fraction is 0"),
        (("--kind", "anthropic"), "kind is 'anthropic'"),
        (("--peer", "ollama"), "peer is 'ollama'"),
        (("--target", "x"), "target is 'x'"),
        (("--target", "a=http://h:1", "--target", "a=http://h:2"), "target is 'a'"),
        (("--target", "mlx-lm=http://h:1", "--peer", "mlx-lm"), "target is 'mlx-lm'"),
        (("--apps", "/no/such.toml"), "apps /no/such.toml"),
        (("--plot", "x.pdf", "--target", "http://h:1"), "plot is 'x.pdf'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_are_wrong(arguments, message, capsys):
    assert main(["bench", "serve", *arguments]) == 2
    assert message in error_of(capsys)[0]


# --- servers that are started ---

# As much of `edgekv` as the bench uses: apps have keys in the state folder, and need them.
EDGEKV = """
import json, os, pathlib, signal, sys
sys.path.insert(0, {support!r})
state = pathlib.Path(os.environ["EDGEKV_KV_DIR"])
command, *rest = sys.argv[1:]
if command == "apps":
    assert rest[0] == "add" and rest[4:] == ["--json"] and rest[2] == "--priority", rest
    (state / rest[1]).write_text(rest[3])
    print(json.dumps({{"name": rest[1], "key": "key of " + rest[1]}}))
    sys.exit()
options = dict(zip(rest[::2], rest[1::2]), pid=os.getpid())
pathlib.Path({told!r}).open("a").write(json.dumps(options) + "\\n")
if {broken!r}:
    sys.exit("the model is broken")
import uvicorn
from mock_openai import Behaviour, MockOpenAI
from starlette.responses import JSONResponse
from starlette.routing import Route
def behave(body):
    known = mock.seen[-1].key.removeprefix("key of ")
    return Behaviour(headers_s=0.02, status=200 if (state / known).exists() else 401)
mock = MockOpenAI(behave, ["it"])
app = mock.app()
app.routes.append(Route("/healthz", lambda request: JSONResponse({{}})))
uvicorn.run(app, port=int(options["--port"]), log_level="critical")
"""


@pytest.fixture
def fake_edgekv(tmp_path, monkeypatch):
    """Stands in for the command; returns where it notes its options."""

    def install(broken=False):
        support = str(Path(mock_openai.__file__).parent)
        told = tmp_path / "told.jsonl"
        script = tmp_path / "edgekv.py"
        script.write_text(EDGEKV.format(support=support, told=str(told), broken=broken))
        monkeypatch.setattr(
            targets, "_edgekv", lambda *arguments: [sys.executable, str(script), *arguments]
        )
        return told

    return install


def test_edgekv_is_started_with_apps_and_a_pool(fake_edgekv, deep):
    told = fake_edgekv()
    scenario = Scenario(
        name="mine",
        apps=(
            AppTraffic(name="editor", prompt_tokens=(20, 30), output_tokens=(3, 3)),
            AppTraffic(name="chat", kind="conversations", users=4, session_tokens=100),
        ),
    )
    options = ServeOptions(scenario=scenario, duration_s=2.0, rate=8.0)
    rows = run_serve(str(deep), options)
    assert [(row["target"], row["model"]) for row in rows] == [("edgekv", str(deep))] * 2
    assert all(row["answered"] == row["requests"] > 0 for row in rows)
    measured, played = map(json.loads, told.read_text().splitlines())
    assert measured["--model"] == played["--model"] == str(deep)
    assert "--pool-gib" not in measured, "what it can do alone is measured in its own pool"
    assert 0 < float(played["--pool-gib"]) < 1.0
    for each in (measured, played):
        with pytest.raises(ProcessLookupError):  # nobody is left
            os.kill(each["pid"], 0)


def test_a_server_that_ends_says_why(fake_edgekv, deep, tmp_path):
    fake_edgekv(broken=True)
    with (
        pytest.raises(TargetFailed, match="edgekv ended with 1: the model is broken"),
        EdgeKVServe(deep, tmp_path).open([AppTraffic(name="a")]),
    ):
        pass
    assert list(tmp_path.glob("serve-*")) == []


def test_an_app_that_cannot_be_made(monkeypatch, deep, tmp_path):
    no = "import sys; sys.exit('no such command')"
    monkeypatch.setattr(targets, "_edgekv", lambda *arguments: [sys.executable, "-c", no])
    with (
        pytest.raises(TargetFailed, match="apps add a: no such command"),
        EdgeKVServe(deep, tmp_path).open([AppTraffic(name="a")]),
    ):
        pass
