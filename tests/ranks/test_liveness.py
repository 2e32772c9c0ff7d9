"""Ranks over real sockets: who comes, who is refused, who ends, stops and is stuck."""

import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import time

import pytest
from rank_world import places

pytestmark = [pytest.mark.slow, pytest.mark.faults]
needs_ss = pytest.mark.skipif(shutil.which("ss") is None, reason="needs iproute2's ss")


def joined(ranks):
    """All have come: their process ids."""
    said = [rank.says() for rank in ranks]
    assert [line.split()[:2] for line in said] == [["joined", str(n)] for n in range(len(ranks))]
    return [int(line.split()[2]) for line in said]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_join_and_sum(start, size):
    ranks = start("gather", size)
    total = float(sum(range(1, size + 1)))
    for number, rank in enumerate(ranks):
        assert rank.says() == f"sum {total} {number} {size}"
        assert rank.says() == "closed"
        assert rank.ends() == (0, "")


def test_a_rank_that_is_killed_is_named_at_once(start):
    ranks = start("stay", 3)
    joined(ranks)
    begin = time.monotonic()
    ranks[1].process.kill()
    assert ranks[0].says() == "failure 1 rank 1 (127.0.0.1) ended"
    assert time.monotonic() - begin < 3
    status, said = ranks[2].ends()
    assert status == 1
    assert said == "error: rank 2 (127.0.0.1) ends: rank 0 (127.0.0.1) ended\n"


def test_a_rank_that_is_stopped_is_named_within_its_bound(start):
    ranks = start("stay")
    joined(ranks)
    begin = time.monotonic()
    ranks[1].process.send_signal(signal.SIGSTOP)
    assert ranks[0].says() == "failure 1 rank 1 (127.0.0.1) has not answered for 5 s"
    assert 4 < time.monotonic() - begin < 10


def test_a_rank_0_that_was_stopped_blames_nobody(start):
    ranks = start("stay")
    joined(ranks)
    ranks[0].process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    ranks[0].process.send_signal(signal.SIGCONT)
    time.sleep(2)
    assert [rank.process.poll() for rank in ranks] == [None, None]


def test_an_engine_thread_that_is_stuck_is_named(start):
    ranks = start("stick", 3, STUCK_S="1.5")
    assert ranks[0].says() == (
        "failure 2 rank 2 (127.0.0.1) has been restoring for 1.5 s (exchange 5)"
    )


def test_who_gives_up_says_why(start):
    ranks = start("give_up", 3)
    said = [ranks[0].says(), ranks[0].says()]
    assert "failure 1 rank 1 (127.0.0.1) has failed: a file is damaged" in said
    assert ranks[2].ends()[0] == 1


def test_no_rank_outlives_rank_0(start):
    ranks = start("stay", 3)
    joined(ranks)
    ranks[0].process.kill()
    for rank in ranks[1:]:
        status, said = rank.ends(5)
        assert status == 1
        assert "rank 0 (127.0.0.1) ended" in said


def test_a_rank_that_rank_0_could_not_tell_ends_quietly(start):
    ranks = start("overstay")
    assert ranks[0].ends()[0] == 0
    assert ranks[1].says().startswith("joined")
    assert ranks[1].ends(15) == (0, "")


# --- who comes ---


def test_another_launch_has_another_token(start):
    mine, other = places()
    ranks = start("stay", places=[mine, dataclasses.replace(other, token="guessed")], JOIN_S="4")
    refused = "rank 0 (127.0.0.1) refuses rank 1: the token is another launch's"
    assert ranks[1].says() == f"error EngineFailed {refused}"
    assert ranks[0].says() == "error EngineFailed rank 1 (127.0.0.1) did not come within 4 s"


def test_other_versions_are_refused_and_both_are_named(start):
    ranks = start("old")
    for rank in ranks:
        said = rank.says()
        assert "rank 1 (127.0.0.1) runs edgekv" in said
        assert "with MLX 0.31.0, rank 0 edgekv" in said
    assert "ConfigError" in said or "EngineFailed" in said


def test_a_rank_without_rank_0_does_not_wait_for_ever(start):
    place = places()[1]
    (rank,) = start("stay", places=[place], JOIN_S="1")
    said = rank.says()
    assert said.startswith("error EngineFailed rank 0 (127.0.0.1) cannot be reached at")
    assert place.control in said


def test_strangers_do_not_keep_ranks_out(start):
    first, second = places()
    (rank_0,) = start("gather", places=[first])
    strangers, said = [], [b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 5000, b"[]\n"]
    while len(strangers) < 80:
        try:
            strangers.append(socket.create_connection(first.control_address, timeout=1))
        except ConnectionRefusedError:
            time.sleep(0.05)
            continue
        strangers[-1].sendall(said[len(strangers) % 4])
    (rank_1,) = start("gather", places=[second])
    assert rank_0.says() == "sum 3.0 0 2"
    assert rank_1.says() == "sum 3.0 1 2"
    for one in strangers:
        one.close()


@needs_ss
def test_nothing_listens_beyond_the_addresses_that_were_given(start):
    here = places(2)
    (rank_0,) = start("gather", places=here[:1])
    seen = set()
    deadline = time.monotonic() + 20
    while not (seen := listening(rank_0.process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert seen == {here[0].control}
    ranks = [rank_0, *start("gather", places=here[1:])]
    while any(rank.process.poll() is None for rank in ranks):
        seen |= {address for rank in ranks for address in listening(rank.process.pid)}
    ring = json.loads(here[0].mlx_files["MLX_HOSTFILE"])
    assert seen <= {here[0].control, *(address for node in ring for address in node)}
    assert ranks[0].says().startswith("sum ")


@needs_ss
def test_nobody_listens_once_all_have_come(start):
    ranks = start("stay")
    joined(ranks)
    assert [listening(rank.process.pid) for rank in ranks] == [set(), set()]


def listening(pid):
    """Addresses where a process listens, as the system says."""
    said = subprocess.run(["ss", "-Hltnp"], check=True, capture_output=True, text=True).stdout
    return {line.split()[3] for line in said.splitlines() if f"pid={pid}," in line}
