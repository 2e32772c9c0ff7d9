"""Where simulated engines keep their files."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def world_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In memory where there is such a place: SQLite waits for the drive when it is closed."""
    monkeypatch.setattr("edgekv.engine.request.ADMISSION_RESERVE_TOKENS", 16)
    if not MEMORY.is_dir():
        yield tmp_path / "kv"
        return
    folder = Path(tempfile.mkdtemp(dir=MEMORY))
    yield folder / "kv"
    shutil.rmtree(folder)
