"""Folders of benchmarks: gone after the block, and what a killed one left, before the next."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from edgekv.bench import scratch
from edgekv.errors import ConfigError
from edgekv.models import cache

RUNS = (
    "from edgekv.bench.scratch import scratch_model\n"
    "with scratch_model('synthetic', None) as (path, folder):\n"
    "    print(folder, flush=True); input()"
)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKV_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_what_a_killed_benchmark_left_goes_and_what_runs_stays(root):
    running, killed = (
        subprocess.Popen(
            [sys.executable, "-c", RUNS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    )
    folders = [process.stdout.readline().strip() for process in (running, killed)]
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert all(map(os.path.exists, folders))
    with scratch.scratch_model("synthetic", None) as (_, folder):
        assert list(map(os.path.exists, folders)) == [True, False]
        assert folder.is_dir()
    running.communicate("\n", timeout=60)
    assert list(root.iterdir()) == []


def test_folders_that_nobody_locked_go_when_they_are_old(root):
    for name, age_s in (("bench-new", 0), ("bench-old", 30 * 86_400), ("models", 30 * 86_400)):
        (root / name).mkdir()
        past = root.stat().st_mtime - age_s
        os.utime(root / name, (past, past))
    scratch.remove_leftovers(root)
    assert sorted(path.name for path in root.iterdir()) == ["bench-new", "models"]


def no_home(_app):
    raise RuntimeError("could not determine the home directory")


@pytest.mark.parametrize("found", [lambda app: Path("~/.cache") / app, no_home])
def test_without_a_home_there_is_no_cache_in_the_current_folder(monkeypatch, found):
    monkeypatch.delenv("EDGEKV_CACHE_DIR")
    monkeypatch.delenv("EDGEKV_KV_DIR")
    monkeypatch.setattr(platformdirs, "user_cache_path", found)
    for place in (cache.models_dir, cache.kv_dir):
        with pytest.raises(ConfigError, match="no home folder") as caught:
            place()
        assert "EDGEKV_CACHE_DIR" in caught.value.hint
