"""What agents sent to `edgekv serve`, recorded, sent again to a tiny model that says the same."""

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from chat_templates import QWEN3
from recorded import FOLDER, answer, load
from running_daemon import RunningDaemon
from scripted_model import Script, scripted
from tiny_models import tiny_config, write_folder

from edgekv.chat.values import Completion
from edgekv.config import RuntimeConfig
from edgekv.engine import request as engine_request
from edgekv.runtime import Runtime

RECORDINGS = sorted(FOLDER.glob("*.json"))
FINAL = {
    "messages": ("message_stop",),
    "responses": ("response.completed", "response.incomplete"),
    "completions": ("[DONE]",),
}


@pytest.fixture(scope="module")
def agents_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads what agents send, and writes calls as Qwen does."""
    config = tiny_config("llama", num_hidden_layers=1, max_position_embeddings=1 << 16)
    folder = write_folder(tmp_path_factory.mktemp("models") / "agents", config)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": QWEN3}))
    return folder


@pytest.fixture
def agents_daemon(agents_folder: Path, tmp_path: Path) -> Iterator[RunningDaemon]:
    config = RuntimeConfig(pool_bytes=1 << 27)
    daemon = RunningDaemon(tmp_path, lambda: Runtime.open(str(agents_folder), config=config))
    yield daemon.start()
    daemon.stop()


def payloads(text: str) -> list[str]:
    """The data of all events of a stream."""
    return [line[6:] for line in text.splitlines() if line.startswith("data: ")]


def usage(events: list[str]) -> tuple[int, int, int]:
    """Tokens of the prompt, those that were cached, and of the answer, as the API says it."""
    found = (0, 0, 0)
    for event in events:
        value = json.loads(event) if event != "[DONE]" else {}
        told = value.get("usage") or value.get("response", {}).get("usage") or {}
        match told:
            case {"cache_read_input_tokens": cached, "input_tokens": new, "output_tokens": said}:
                found = cached + new, cached, said
            case {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": cached},
                "output_tokens": said,
            } | {
                "prompt_tokens": prompt,
                "prompt_tokens_details": {"cached_tokens": cached},
                "completion_tokens": said,
            }:
                found = prompt, cached, said
    return found


def ask(client: httpx2.Client, request: dict[str, Any]) -> tuple[int, int, int]:
    """Ask it, and see that the answer is whole; its usage."""
    reply = client.post(request["path"], json=request["body"], headers=request["headers"])
    assert reply.status_code == 200, reply.text
    events = payloads(reply.text)
    api = request["path"].partition("?")[0].rpartition("/")[2]
    last = events[-1] if events[-1] == "[DONE]" else json.loads(events[-1])["type"]
    assert last in FINAL[api]
    return usage(events)


def replay(daemon: RunningDaemon, path: Path, script: Script) -> list[tuple[int, int, int]]:
    """Ask all of a recording; the usages of its large requests."""
    used, beside = [], []
    with (
        scripted(script),
        ThreadPoolExecutor() as pool,
        httpx2.Client(base_url=daemon.base_url, timeout=300) as client,
    ):
        client.headers["authorization"] = f"Bearer {daemon.keys['notes']}"
        for request in load(path)["requests"]:
            if request["body"].get("tools"):
                used.append(ask(client, request))
            else:  # the small request for a title, which agents send beside the large one
                # The tiny model may not end a string.
                request["body"] |= {"max_tokens": 64, "max_output_tokens": 64}
                beside.append(pool.submit(ask, client, request))
        assert all(small.result()[0] > 0 for small in beside)
    return used


def thoughtful(asked: Completion) -> str:
    """The same answers, with thoughts, which templates leave out when a new question came."""
    return f"<think>\nHm, {len(asked.messages)} messages.\n</think>\n\n{answer(asked)}"


@pytest.mark.slow
@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_a_recorded_conversation_is_answered_and_only_what_is_new_is_computed(
    agents_daemon, monkeypatch, path
):
    # Of the last tokens that a grammar forces no KV is there, and all of a script is forced.
    monkeypatch.setattr(engine_request, "FORCED_MAX", 0)
    used = replay(agents_daemon, path, thoughtful if "thinking" in path.stem else answer)
    assert len(used) == 3  # a call, its result, and a second turn
    for (prompt, _, said), (_, cached, _) in itertools.pairwise(used):
        assert cached >= prompt + said - 1  # of the answer's last token nothing is computed
