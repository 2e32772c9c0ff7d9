"""The launcher and its ranks, all of them processes: what is said, what comes in, how all end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from terminal import Terminal

LAUNCHER = Path(__file__).parents[1] / "support" / "launch_child.py"

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture
def launch():
    """Begin a launcher; it and its ranks are gone at the end."""
    begun = []

    def begin(where, what, **options):
        process = subprocess.Popen(
            [sys.executable, str(LAUNCHER), where, what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
        begun.append(process)
        return process

    yield begin
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for_end(pid, timeout_s):
    """Wait until a process that is no child of ours is gone."""
    deadline = time.monotonic() + timeout_s
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def pids_of(process, size):
    """Of ranks that stay: rank 0 says its own on stdout, the others theirs on stderr."""
    pids = {0: int(process.stdout.readline().split()[2])}
    while len(pids) < size:
        rank, pid = re.fullmatch(
            r"\[rank (\d)\] joined \1 (\d+)\n", process.stderr.readline()
        ).groups()
        pids[int(rank)] = int(pid)
    return pids


def test_rank_0_has_stdin_stdout_and_the_exit_status_and_the_others_a_prefix(launch):
    process = launch("3", "echo")
    out, err = process.communicate("one\ntwo\nexit 7\n", timeout=60)
    assert out == "echo one\necho two\necho exit 7\n"
    assert sorted(err.splitlines()) == [
        "[rank 1] a figure",
        "[rank 1] stdin is a terminal: False",
        "[rank 2] a figure",
        "[rank 2] stdin is a terminal: False",
    ]
    assert process.returncode == 7


def test_a_rank_that_ends_before_it_has_joined_ends_all(launch):
    process = launch("3", "die_early")
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 15
    assert err.splitlines()[:2] == [
        "[rank 1] no such model",
        "rank 1 (127.0.0.1) ended with status 1",
    ]
    assert process.returncode == 1


def test_a_rank_that_is_killed_later_is_told_of_by_rank_0(launch):
    process = launch("3", "stay")
    pids = pids_of(process, 3)
    os.kill(pids[2], signal.SIGKILL)
    out, _ = process.communicate(timeout=30)
    assert out == "failure 2 rank 2 (127.0.0.1) ended\n"
    assert process.returncode == 3
    wait_for_end(pids[1], 1)


def test_sigterm_goes_to_rank_0_which_ends_all(launch):
    process = launch("2", "interrupted")
    pids = pids_of(process, 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "took SIGTERM\n"
    assert not any(map(is_alive, pids.values()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_process_group_comes_once(launch, number):
    process = launch("2", "interrupted")
    pids_of(process, 2)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert err == f"took {number.name}\n"


def test_all_end_with_a_launcher_that_is_killed(launch):
    process = launch("3", "stay")
    pids = pids_of(process, 3)
    process.kill()
    for pid in pids.values():
        wait_for_end(pid, 15)


def test_a_rank_that_does_not_end_is_killed(launch):
    process = launch("2", "linger")
    begin = time.monotonic()
    _, err = process.communicate(timeout=40)
    assert process.returncode == 5
    assert time.monotonic() - begin < 20
    assert not is_alive(int(re.search(r"lingers (\d+)", err)[1]))


def test_ctrl_c_on_the_terminal_reaches_rank_0_alone():
    terminal = Terminal([sys.executable, str(LAUNCHER), "2", "interrupted"])
    try:
        said = terminal.wait_for("joined 0")
        said += terminal.wait_for("\n")
        if "joined 1" not in said:
            terminal.wait_for("joined 1")
        for _ in range(2):
            terminal.type("\x03")
            before = terminal.wait_for("took SIGINT")
            assert "[rank" not in before
        os.kill(terminal.pid, signal.SIGTERM)
        assert "[rank" not in terminal.wait_for("took SIGTERM")
        assert terminal.exit_code() == 128 + signal.SIGTERM
    finally:
        terminal.close()


# --- ssh ---


@pytest.fixture
def fake_ssh(tmp_path, monkeypatch):
    """An ssh that runs the command here, and keeps what it was called with."""
    script = tmp_path / "ssh"
    log = tmp_path / "log"
    script.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >> {log}\nfor last; do :; done\nexec sh -c "$last"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return log


def test_ranks_elsewhere_begin_over_ssh_without_secrets_on_the_command_line(launch, fake_ssh):
    out, err = launch("127.0.0.1,127.0.0.2", "echo").communicate("one\n", timeout=60)
    assert out == "echo one\n"
    assert "[rank 1] a figure" in err
    called = fake_ssh.read_text().splitlines()
    assert "BatchMode=yes" in called
    assert called[-2] == "127.0.0.2"
    assert called[-1].startswith("cd ")
    assert called[-1].endswith(f"exec {sys.executable} -m edgekv.ranks.remote")


def test_a_host_that_ssh_does_not_reach_ends_all(launch, fake_ssh):
    (fake_ssh.parent / "ssh").write_text("#!/bin/sh\necho Permission denied >&2; exit 255\n")
    process = launch("127.0.0.1,127.0.0.2", "stay")
    _, err = process.communicate(timeout=30)
    assert "[rank 1] Permission denied\nrank 1 (127.0.0.2) ended with status 255\n" in err
    assert process.returncode == 1
