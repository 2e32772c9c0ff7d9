"""Agents, two turns each, against a daemon of a real model, without any network but loopback.

Those that are on PATH are run:

    npm install -g @openai/codex @anthropic-ai/claude-code opencode-ai @github/copilot
    EDGEKV_TEST_MODEL=qwen2.5-coder-0.5b.gguf pytest -m long -n 0 tests/server/test_agents.py

What the model says is forced (`recorded.answer`), for small ones call tools without end. A prompt
has up to 19,000 tokens; a slow computer prefills them for longer than clients wait in silence.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import loopback
import pytest
from recorded import CALLED, LAST, answer
from running_daemon import RunningDaemon
from scripted_model import scripted

from edgekv.runtime import Runtime

MODEL = os.environ.get("EDGEKV_TEST_MODEL", "")
BASE_URL = "http://127.0.0.1:8642"
TURN_S = 3600.0

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL, reason="EDGEKV_TEST_MODEL names no model"),
    pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's"),
]


@dataclass(frozen=True, kw_only=True)
class Agent:
    """How an agent is run; KEY stands for the app's key.

    Attributes:
        first: Its command that says hi.
        second: The one that goes on.
        variables: Of the environment.
        files: In the home folder.
    """

    first: str
    second: str
    variables: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


_CLAUDE = {
    "ANTHROPIC_BASE_URL": BASE_URL,
    "ANTHROPIC_AUTH_TOKEN": "KEY",
    "ANTHROPIC_MODEL": "edgekv",
    "IS_SANDBOX": "1",  # else it would not leave out asking for permissions as root
}
_CODEX = f"""\
model = "edgekv"
model_provider = "edgekv"
approval_policy = "never"
sandbox_mode = "danger-full-access"

[model_providers.edgekv]
name = "edgekv"
base_url = "{BASE_URL}/v1"
env_key = "EDGEKV_API_KEY"
"""
_OPENCODE = {
    "model": "edgekv/edgekv",
    "autoupdate": False,
    "provider": {
        "edgekv": {
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": f"{BASE_URL}/v1", "apiKey": "{env:EDGEKV_API_KEY}"},
            "models": {"edgekv": {"limit": {"context": 32768, "output": 4096}}},
        }
    },
}
AGENTS = {
    "claude-bare": Agent(
        first="claude --bare --dangerously-skip-permissions -p",
        second="claude --bare --dangerously-skip-permissions -c -p",
        variables=_CLAUDE,
    ),
    "opencode": Agent(
        first="opencode run",
        second="opencode run -c",
        variables={"EDGEKV_API_KEY": "KEY"},
        files={".config/opencode/opencode.json": json.dumps(_OPENCODE)},
    ),
    "codex": Agent(
        first="codex exec --skip-git-repo-check",
        second="codex exec --skip-git-repo-check resume --last",
        variables={"EDGEKV_API_KEY": "KEY"},
        files={".codex/config.toml": _CODEX},
    ),
    "copilot": Agent(
        first="copilot --allow-all-tools -p",
        second="copilot --allow-all-tools --continue -p",
        variables={
            "COPILOT_PROVIDER_BASE_URL": f"{BASE_URL}/v1",
            "COPILOT_PROVIDER_API_KEY": "KEY",
            "COPILOT_MODEL": "edgekv",
            "COPILOT_OFFLINE": "true",
        },
    ),
    "claude": Agent(
        first="claude --dangerously-skip-permissions -p",
        second="claude --dangerously-skip-permissions -c -p",
        variables=_CLAUDE,
    ),
}


@pytest.fixture
def real_daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    daemon = RunningDaemon(tmp_path, lambda: Runtime.open(MODEL, pool_gib=2))
    yield daemon.start(heartbeat_s=10.0)
    daemon.stop()


def run(command: list[str], agent: Agent, daemon: RunningDaemon, home: Path) -> str:
    """What it prints, with nothing of this process's environment but the path."""
    variables = {k: v.replace("KEY", daemon.keys["notes"]) for k, v in agent.variables.items()}
    for name, text in agent.files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    alone = ["unshare", "-rn", sys.executable, loopback.__file__, "8642", str(daemon.uds)]
    done = subprocess.run(
        [*alone, *command],
        cwd=home,
        env={"HOME": str(home), "PATH": os.environ["PATH"], "TERM": "dumb"} | variables,
        capture_output=True,
        text=True,
        timeout=TURN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", AGENTS)
def test_two_turns_are_answered_once_and_the_second_computes_what_is_new(
    real_daemon, tmp_path, name
):
    agent, home = AGENTS[name], tmp_path / "home"
    if shutil.which(agent.first.split()[0]) is None:
        pytest.skip(f"{name} is not installed")
    home.mkdir()
    with scripted(answer) as asked:
        assert CALLED in run([*agent.first.split(), "Say hi."], agent, real_daemon, home)
        assert LAST in run([*agent.second.split(), "Now say bye."], agent, real_daemon, home)
    assert len(set(asked)) == len(asked), "something was asked again"
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(real_daemon.uds))) as client:
        recent = client.get("http://localhost/edgekv/status").json()["recent"]
    large = sorted(r["num_prompt"] for r in recent)[len(recent) // 2]
    turns = sorted(
        (r for r in recent if r["num_prompt"] > large / 2), key=lambda r: r["num_prompt"]
    )
    assert {r["reason"] for r in turns} == {"stop", "tool_calls"}
    for before, after in itertools.pairwise(turns):
        assert after["num_cached"] >= 0.9 * before["num_prompt"]
