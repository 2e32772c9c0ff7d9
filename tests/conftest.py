"""Before any test module: edgekv must be imported before mlx, so that mlx finds a fast BLAS."""

import gc
from pathlib import Path

import pytest

import edgekv  # noqa: F401


@pytest.fixture(autouse=True)
def _own_kv(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the KV of another, or of the user."""
    root = tmp_path_factory.mktemp("kv")
    monkeypatch.setenv("EDGEKV_KV_DIR", str(root))
    return root


def pytest_collection_finish() -> None:
    """What collecting made (modules, test items) stays: no garbage collection looks at it again."""
    gc.freeze()
