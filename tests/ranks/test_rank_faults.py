"""Ranks that are killed, stopped, or have trouble with their disks: who is told what, and when.

What is played, and how accidents happen, is `rank_faults`.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_faults
from rank_faults import NUM_KEPT, NUM_USERS, REPLY_TOKENS, reference
from rank_world import places
from tiny_models import tiny_config, write_folder

from edgekv.config import RuntimeConfig, SwapOptions
from edgekv.ranks.launched import VARIABLE
from edgekv.runtime import Runtime

BOUND_S = 10.0  # from an accident to the end of everything
NTH = {"prefill": (4, 15), "decode": (3, 60), "swap": (1, 20), "restore": (1, 8)}  # first, last

pytestmark = pytest.mark.slow


class Life:
    """Two ranks from their beginning to their end."""

    def __init__(self, root, **plan):
        """`root` is where their output goes."""
        self.outs = [root / f"out-{rank}" for rank in range(2)]
        self.processes = []
        for place, out in zip(places(), self.outs, strict=True):
            with out.open("w") as stdout, Path(f"{out}.err").open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, rank_faults.__file__, json.dumps(plan)],
                        env={**os.environ, VARIABLE: place.variable()},
                        stdin=subprocess.DEVNULL,
                        stdout=stdout,
                        stderr=stderr,
                    )
                )

    def wait(self, *ranks, timeout_s=300):
        """Until these ranks have ended; when each did."""
        deadline, ended = time.monotonic() + timeout_s, {}
        while len(ended) < len(ranks):
            for rank in ranks:
                if self.processes[rank].poll() is not None:
                    ended.setdefault(rank, time.monotonic())
            assert time.monotonic() < deadline, f"only {list(ended)} ended:\n{self.errors()}"
            time.sleep(0.02)
        return ended

    def said(self, rank, what):
        """Lines of one kind."""
        lines = [json.loads(line) for line in self.outs[rank].read_text().splitlines()]
        return [line for line in lines if line["what"] == what]

    def accident_s(self, rank):
        """When it happened to a rank; None if it did not."""
        return next((line["at_s"] for line in self.said(rank, "accident")), None)

    def errors(self, *ranks):
        """What all said on stderr, or some."""
        outs = [self.outs[rank] for rank in ranks] or self.outs
        return "\n".join(Path(f"{out}.err").read_text() for out in outs)

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()


class World:
    """One life after the other on the same disks, and what each must find."""

    def __init__(self, model, expected, root):
        self.expected = expected
        self.root = root
        self._plan = {"model": str(model), "folder": str(root / "kv")}
        self.promised = dict.fromkeys(range(NUM_KEPT), 0)  # tokens on disk of who is kept, at least
        self._lives = []

    def begin(self, **plan):
        before = [before for _, before in self.expected[:NUM_KEPT]] if self._lives else []
        self._lives.append(Life(self.root, **self._plan, before=before, **plan))
        return self._lives[-1]

    def live(self, **plan):
        """A life that ends well, or by an accident that has to happen on rank 1."""
        life = self.begin(**plan)
        life.wait(0, 1)
        self.check(life)
        return life

    def check(self, life):
        """All that was answered is right, and what was on disk was used; remember what is now."""
        again = len(self._lives) > 1
        for line in life.said(0, "talked"):
            user, said = line["user"], line["said"]
            answers = self.expected[user][0]
            is_kept = again and user < NUM_KEPT
            whole = (answers[-1:] if is_kept else answers)[: len(said)]
            if said:  # the last may have been interrupted
                whole[-1] = whole[-1][: len(said[-1])]
            assert said == whole, f"user {user}"
            if line["cached"] and is_kept:
                known = min(self.promised[user], len(self.expected[user][1]) - 1)
                assert line["cached"][0] >= known
        for line in life.said(0, "suspended"):
            if line["user"] < NUM_KEPT:
                self.promised[line["user"]] = line["tokens"]

    def check_all_answered(self, life):
        assert life.said(0, "failed") == []
        talked = life.said(0, "talked")
        assert len(talked) == NUM_USERS
        assert all(len(said) == REPLY_TOKENS for line in talked for said in line["said"])
        assert [process.returncode for process in life.processes] == [0, 0], life.errors()

    def close(self):
        for life in self._lives:
            life.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"), tiny_config("llama"))


@pytest.fixture(scope="module")
def expected(model):
    """By user, see `reference`."""
    config = RuntimeConfig(pool_bytes=1 << 26, swap=SwapOptions(mode="off"))
    with Runtime.open(str(model), config=config) as runtime:
        return [reference(runtime, user) for user in range(NUM_USERS)]


@pytest.fixture
def world(model, expected, tmp_path):
    world = World(model, expected, tmp_path)
    yield world
    world.close()


def check_told(life, since_s, ended, names="rank 1"):
    """All callers of rank 0 were told soon who failed, and the processes are gone."""
    failed = life.said(0, "failed")
    assert failed
    for line in failed:
        assert line["kind"] == "EngineFailed"
        assert names in line["error"]
        assert line["at_s"] - since_s < BOUND_S
    opened = life.said(0, "opened")
    assert len(life.said(0, "talked")) == (NUM_USERS if opened else 0)
    assert len(life.said(0, "closed")) == len(opened)
    # 1 if its engine thread still waits for what does not come
    assert life.processes[0].returncode in {0, 1}, life.errors()
    assert "Traceback" not in life.errors(0)
    assert max(ended.values()) - since_s < BOUND_S


def kill(world, rank, where, nth, delay_ms=0.0, **plan):
    """A life that ends with a rank that is killed; whether it got that far."""
    accident = {"rank": rank, "where": where, "nth": nth, "what": "kill", "delay_ms": delay_ms}
    life = world.begin(accident=accident, **plan)
    ended = life.wait(0, 1)
    world.check(life)
    since_s = life.accident_s(rank)
    if since_s is None:
        world.check_all_answered(life)
        return False
    assert life.processes[rank].returncode == -signal.SIGKILL
    if rank:
        check_told(life, since_s, ended, "rank 1 (127.0.0.1) ended")
    else:
        assert life.processes[1].returncode == 1, life.errors()
        assert ended[1] - since_s < BOUND_S
    return True


def kill_often(world, draw, kills):
    num_happened = 0
    for rank, where in kills:
        delay_ms = draw.choice((0.0, draw.uniform(0.0, 3.0)))
        happened = kill(world, rank, where, draw.randint(*NTH[where]), delay_ms)
        print(f"rank {rank} in {where}, {delay_ms:.1f} ms: {happened}")  # noqa: T201
        num_happened += happened
    last = world.live()
    world.check_all_answered(last)
    cached = {line["user"]: line["cached"][0] for line in last.said(0, "talked")}
    assert all(cached[user] > 0 for user in world.promised if world.promised[user])
    assert num_happened >= 0.8 * len(kills)


KILLS = [(rank, where) for where in NTH for rank in (1, 0)]


def test_a_rank_that_is_killed_is_named_and_a_restart_restores(world):
    world.check_all_answered(world.live())
    assert all(world.promised.values())
    kill_often(world, random.Random(0), [(1, "decode"), (0, "restore")])


@pytest.mark.parametrize(("where", "nth"), [("logits", 6), ("logits", 20), ("exchange", 40)])
def test_what_a_killed_rank_did_not_say_is_believed_by_nobody(where, nth, world):
    """MLX's ring goes on with what it has, and it depends on how it is read who learns that."""
    assert kill(world, 1, where, nth, deaf_s=1.0)


@pytest.mark.faults
def test_killed_in_every_phase(world):
    kill_often(world, random.Random(1), KILLS)


@pytest.mark.long
def test_killed_forty_times(world):
    kill_often(world, random.Random(2), KILLS * 5)


def test_a_rank_that_is_stopped_is_named_and_ends_once_it_goes_on(world):
    life = world.begin(accident={"rank": 1, "where": "decode", "nth": 20, "what": "stop"})
    ended = life.wait(0)
    check_told(life, life.accident_s(1), ended)
    life.processes[1].send_signal(signal.SIGCONT)
    since_s = time.monotonic()
    assert life.wait(1)[1] - since_s < BOUND_S
    assert life.processes[1].returncode == 1


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["swap", "restore"])
def test_a_rank_whose_disk_hangs_is_named(where, rank, world):
    accident = {"rank": rank, "where": where, "nth": 4, "what": "hang"}
    life = world.begin(accident=accident, disk_s=2.0)
    ended = life.wait(0, 1)
    check_told(life, life.accident_s(rank), ended, f"the disk of rank {rank} has not answered")


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["ENOSPC", "EIO"])
def test_a_disk_that_takes_nothing_costs_no_answer(what, rank, world):
    accident = {"rank": rank, "where": "swap", "nth": 4, "what": what}
    life = world.live(accident=accident)
    assert life.accident_s(rank)
    world.check_all_answered(life)
    (counted,) = life.said(0, "counters")
    assert counted["errors"] > 0


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_gives_nothing_costs_no_answer(rank, world):
    life = world.live(accident={"rank": rank, "where": "restore", "nth": 1, "what": "EIO"})
    world.check_all_answered(life)
    (counted,) = life.said(0, "counters")
    assert counted["errors"] > 0


def flip(path):
    """Another bit in the middle of a record."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("rank", "damage"),
    [
        (1, Path.unlink),
        pytest.param(1, flip, marks=pytest.mark.faults),
        pytest.param(0, flip, marks=pytest.mark.faults),
    ],
)
def test_what_one_rank_has_lost_is_a_miss_everywhere_once(rank, damage, world):
    (first,) = world.live().said(rank, "store")
    for record in Path(first["folder"]).glob("kv/**/*"):
        if record.is_file():
            damage(record)
    before, world.promised = world.promised, dict.fromkeys(world.promised, 0)
    life = world.live()
    world.check_all_answered(life)
    kept = {line["user"]: line["cached"][0] for line in life.said(0, "talked")}
    assert [kept[user] for user in before] == [0, 0]
    assert all(world.promised.values())  # both have it again
    world.check_all_answered(world.live())
