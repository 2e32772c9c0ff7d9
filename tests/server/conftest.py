"""One tiny model; daemons that serve it, each with sockets, apps and a store of its own.

`EDGEKV_TEST_MODEL=PATH` has clients talk to that model instead, which takes longer.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_daemon import RunningDaemon
from tiny_models import write_plain_speaker

from edgekv.config import RuntimeConfig
from edgekv.runtime import Runtime


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if served := os.environ.get("EDGEKV_TEST_MODEL"):
        return Path(served)
    return write_plain_speaker(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def idle_daemon(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningDaemon]:
    """A daemon that a test starts when it has set it up."""
    config = RuntimeConfig(pool_bytes=1 << 26)
    daemon = RunningDaemon(
        tmp_path_factory.mktemp("daemon"), lambda: Runtime.open(str(tiny_folder), config=config)
    )
    yield daemon
    daemon.stop()


@pytest.fixture
def daemon(idle_daemon: RunningDaemon) -> RunningDaemon:
    return idle_daemon.start()
