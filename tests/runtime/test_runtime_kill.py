"""`kill -9` at any moment: what was said and committed is there, and what follows is the same.

A child (`runtime_child`) talks in named sessions until it is killed, by us after a random time or
by itself in the middle of a call or commit; the next child looks at everything first. All rounds of
a test go on with the same folder.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import runtime_child
from runtime_child import REPLY_TOKENS, open_runtime
from tiny_families import FAMILY_CONFIGS, write_family
from tiny_runtime import answer, sampling

NUM_USERS = 5
NUM_TURNS = 4
MARGIN = 1e-3  # between the likeliest token and the next: no shape of a step changes that
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "asks")


def plain(runtime, history, draw):
    """A next turn that is no close call: (what is said, what is answered, the history after it)."""
    while True:
        text = " ".join(draw.choices(WORDS, k=draw.randint(2, 6)))
        prompt = history.prompt(runtime.tokenizer, text)
        with runtime.app().session() as session:
            reply = answer(session, prompt.ids, sampling(REPLY_TOKENS))
        logits = runtime.logits([*prompt.ids, *reply.token_ids])[len(prompt.ids) - 1 : -1]
        logits.sort(axis=-1)
        if (logits[:, -1] - logits[:, -2]).min() > MARGIN and reply.text.strip():
            return text, reply


@pytest.fixture(scope="module", params=["KV alone", "states"])
def model(request, tiny_folder: Path, tmp_path_factory) -> Path:
    if request.param == "KV alone":
        return tiny_folder
    return write_family(tmp_path_factory.mktemp("models") / "states", FAMILY_CONFIGS["qwen3_5"])


@pytest.fixture(scope="module")
def script(model: Path, tmp_path_factory) -> Path:
    """What every user says and is answered, undisturbed."""
    path = tmp_path_factory.mktemp("script") / "script.json"
    turns = []
    with open_runtime(model, None) as runtime:
        for user in range(NUM_USERS):
            draw = random.Random(user)
            said = []
            with runtime.app(f"app-{user}").session() as session:
                for _ in range(NUM_TURNS):
                    text, reply = plain(runtime, session._talk.conversation, draw)
                    assert runtime_child.respond(session, text) == reply.text
                    said.append((text, reply.text))
            turns.append(said)
    path.write_text(json.dumps(turns))
    return path


def run_child(model: Path, script: Path, folder: Path, seed: int, how: str) -> int:
    """One life; returns how many tokens were read back before it talked on, -1 if it died first."""
    draw = random.Random(seed)
    child = subprocess.Popen(
        [
            sys.executable,
            runtime_child.__file__,
            *map(str, (model, folder / "kv", script, folder / "log", seed, how)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    if how == "time" and draw.random() < 0.3:  # while it opens the folder, or looks at it
        line = ""
        seconds = draw.uniform(0.0, 1.5)
    else:
        line = child.stdout.readline()
        seconds = draw.uniform(0.0, 0.5) if how == "time" else 100.0
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
    out, errors = child.communicate()
    assert child.returncode == (0 if how == "end" else -signal.SIGKILL), errors
    return int(line or out or -1)


def kill_often(model: Path, script: Path, folder: Path, seeds: range) -> None:
    restored = []
    for seed in seeds:
        how = ("time", "call", "commit")[seed % 3]
        restored.append(run_child(model, script, folder, seed, how))
        print(f"seed {seed}, killed by {how}, {restored[-1]} tokens were read")  # noqa: T201
    restored.append(run_child(model, script, folder, 0, "end"))
    assert sum(number > 0 for number in restored) >= max(1, len(seeds) // 4)


@pytest.mark.slow
@pytest.mark.faults
def test_killed_a_few_times(model, script, tmp_path):
    kill_often(model, script, tmp_path, range(6))


@pytest.mark.slow
@pytest.mark.long
def test_killed_two_hundred_times(model, script, tmp_path):
    kill_often(model, script, tmp_path, range(1000, 1200))
