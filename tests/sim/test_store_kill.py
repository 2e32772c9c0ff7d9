"""`kill -9` at any moment leaves a committed prefix of every session.

A child writes to a store and logs what it begins and what is done. It is killed, by us after a
random time or by itself in the middle of a random step; then the store must hold what the log says,
and every record must be whole. All rounds of a test go on with the same store.
"""

import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import store_child
from store_child import ADOPT, CUT, NUM_THREADS, REMOVE, SAY, WRITE, new_tokens
from tiny_store import MIB, open_store, verify_all

SUPPORT = Path(store_child.__file__).parent
ROOMY = 64 * MIB
SCARCE = 4 * MIB


@dataclass
class Told:
    """What a session may be, for all that its log says; the last is what it is when all is well."""

    tokens: list[list[int]] = field(default_factory=lambda: [[]])
    said: list[str | None] = field(default_factory=lambda: [None])


def apply_log(told: dict[str, Told], lines: list[list[str]]) -> None:
    """Follow a thread's log. A cut or an adoption is committed with whatever is committed next."""
    for index, (mark, kind, name, *words) in enumerate(lines):
        if mark == "D":
            continue
        done = index + 1 < len(lines)
        state = told.setdefault(name, Told())
        now = state.tokens[-1]
        if kind == REMOVE:
            state.tokens = [[]] if done else [*state.tokens, []]
            state.said = [None] if done else [*state.said, None]
        elif kind == SAY:
            state.said = [words[0]] if done else [*state.said, words[0]]
            state.tokens = state.tokens[-1:] if done else state.tokens
        elif kind == CUT:
            state.tokens = [*state.tokens, now[: int(words[0])]]
        elif kind == ADOPT:
            state.tokens = [*state.tokens, told[words[0]].tokens[-1][: int(words[1])]]
        else:
            assert kind == WRITE
            start, nonce, count = map(int, words)
            assert start <= len(now)
            new = now[:start] + new_tokens(name, nonce, count)
            state.tokens = [new] if done else [*state.tokens, now[:start], new]


def run_and_kill(root: Path, seed: int, disk_bytes: int) -> str:
    """One life of the child; says how it ended."""
    draw = random.Random(seed)
    num_steps = draw.choice([0, draw.randint(1, 40), draw.randint(1, 400)])
    for number in range(NUM_THREADS):
        (root / f"log-{number}").unlink(missing_ok=True)
    child = subprocess.Popen(
        [
            sys.executable,
            store_child.__file__,
            str(root),
            str(seed),
            str(disk_bytes),
            str(num_steps),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SUPPORT)},
    )
    assert child.stdout is not None
    child.stdout.readline()
    try:
        child.wait(10 if num_steps else draw.uniform(0.0, 0.3))
    except subprocess.TimeoutExpired:
        child.kill()
    _, errors = child.communicate()
    assert child.returncode == -signal.SIGKILL, errors
    return f"step {num_steps}" if num_steps else "time"


def check(root: Path, told: dict[str, Told], disk_bytes: int, *, evicts: bool) -> int:
    """Compare the store with what was told; from now on that is what it holds."""
    for number in range(NUM_THREADS):
        log = root / f"log-{number}"
        text = log.read_text() if log.exists() else ""
        apply_log(told, [line.split() for line in text.splitlines()])
    with open_store(root, disk_bytes=disk_bytes) as store:
        figures = store.snapshot()
        assert figures.num_index_lost == figures.num_records_lost == figures.num_corrupt == 0
        verify_all(store)
        sessions = {session.name: session for session in store.sessions()}
        # One that was just made may have been committed with what another thread wrote.
        assert all(sessions[name].num_tokens == 0 for name in sessions.keys() - told.keys())
        for name, state in told.items():
            found = sessions.get(name)
            ids = [] if found is None else list(found.token_ids)
            if evicts:
                assert any(known[: len(ids)] == ids for known in state.tokens), name
            else:
                assert ids in state.tokens, name
            said = None if found is None else found.conversation
            assert said in state.said, name
            told[name] = Told([ids], [said])
    return figures.num_records


def kill_often(root: Path, seeds: range, disk_bytes: int) -> None:
    told: dict[str, Told] = {}
    most = 0
    for seed in seeds:
        how = run_and_kill(root, seed, disk_bytes)
        print(f"seed {seed}, killed by {how}")  # noqa: T201 - seen when it fails
        num_records = check(root, told, disk_bytes, evicts=disk_bytes == SCARCE)
        most = max(most, num_records)
    assert most > 5


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("disk_bytes", [ROOMY, SCARCE], ids=["roomy", "scarce"])
def test_killed_a_few_times(tmp_path: Path, disk_bytes: int) -> None:
    kill_often(tmp_path, range(8), disk_bytes)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("disk_bytes", [ROOMY, SCARCE], ids=["roomy", "scarce"])
def test_killed_two_hundred_times(tmp_path: Path, disk_bytes: int) -> None:
    kill_often(tmp_path, range(1000, 1200), disk_bytes)
