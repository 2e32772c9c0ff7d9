"""Before any test module: edgekv must be imported before mlx, so that mlx finds a fast BLAS."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Matrices of tiny models are done before a second thread has woken up; it would only spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import edgekv  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _no_kv_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What outlives a test keeps its KV away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKV_KV_DIR", str(tmp_path_factory.mktemp("shared-kv")))
        yield


@pytest.fixture(autouse=True)
def _own_kv(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the KV of another."""
    root = tmp_path_factory.mktemp("kv")
    monkeypatch.setenv("EDGEKV_KV_DIR", str(root))
    return root


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with layers enough for a predictor."""
    from tiny_models import tiny_config, write_folder

    return write_folder(tmp_path_factory.mktemp("deep"), tiny_config("llama", num_hidden_layers=4))


@pytest.fixture(scope="session")
def predictors(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files by name of predictors for it, see `write_predictors`."""
    from tiny_predictors import write_predictors

    root = tmp_path_factory.mktemp("predictors")
    files = write_predictors(deep, root, "self", "aux", "identity", "thin")
    return {name: str(path) for name, path in files.items()}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Which tests run, and of which coverage is measured: it doubles the time of Python code."""
    if config.pluginmanager.hasplugin("_cov"):
        for item in items:
            if {"slow", "faults"} & {mark.name for mark in item.iter_markers()}:
                item.add_marker("no_cover")
    _leave_out(config, items)


def _leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that take long run where the expression speaks of time, or where they are named.

    `-m "not long"` leaves out minutes, `-m slow` runs everything that is slow, and any expression
    that names neither leaves out minutes and the seconds of each test of faults.
    """
    if any(word in config.option.markexpr for word in ("long", "slow", "faults")):
        return
    if any("::" in argument for argument in config.args):
        return
    late = [item for item in items if {"long", "faults"} & {m.name for m in item.iter_markers()}]
    if late:
        config.hook.pytest_deselected(items=late)
        items[:] = [item for item in items if item not in set(late)]


def pytest_collection_finish() -> None:
    """What collecting made (modules, test items) stays: no garbage collection looks at it again."""
    gc.freeze()
