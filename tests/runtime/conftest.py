"""One tiny model and one runtime for all tests here; each test has an app of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_plain_speaker
from tiny_runtime import eventually

from edgekv.config import RuntimeConfig, StoreOptions, SwapOptions
from edgekv.runtime import App, Runtime
from edgekv.store import Store, StoredSession


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain_speaker(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def shared_runtime(tiny_folder: Path) -> Iterator[Runtime]:
    with Runtime.open(str(tiny_folder), config=RuntimeConfig(pool_bytes=1 << 26)) as runtime:
        yield runtime


@pytest.fixture
def runtime(shared_runtime: Runtime) -> Iterator[Runtime]:
    """The shared runtime; whatever a test did to it, it must be whole and empty afterwards."""
    yield shared_runtime
    shared_runtime.check_integrity()
    for app in shared_runtime.apps():
        app.close()
    shared_runtime.check_integrity()
    # What a named session still has to write may have to wait for its place in staging.
    eventually(lambda: shared_runtime.pool_snapshot().used_bytes == 0, timeout_s=60.0)


@pytest.fixture
def app(runtime: Runtime, request: pytest.FixtureRequest) -> App:
    return runtime.app(request.node.name[:200])


@pytest.fixture
def open_runtime(tiny_folder: Path) -> Iterator[Callable[..., Runtime]]:
    """Opens runtimes with a config of their own, checks and closes them afterwards."""
    opened = []

    def open_with(**config: object) -> Runtime:
        options = {"pool_bytes": 1 << 26} | config
        runtime = Runtime.open(str(tiny_folder), config=RuntimeConfig(**options))
        opened.append(runtime)
        return runtime

    yield open_with
    for runtime in opened:
        if not runtime._closed:
            runtime.check_integrity()
        runtime.close()


@pytest.fixture
def restart(tiny_folder: Path) -> Iterator[Callable[[], App]]:
    """Opens a runtime once the one before is closed; returns an app of it."""
    runtimes: list[Runtime] = []

    def close() -> None:
        for runtime in runtimes:
            if not runtime._closed:
                runtime.check_integrity()
                runtime.close()
        runtimes.clear()

    def open_again() -> App:
        close()
        runtimes.append(Runtime.open(str(tiny_folder), config=RuntimeConfig(pool_bytes=1 << 26)))
        return runtimes[0].app("mail")

    open_again.close = close  # type: ignore[attr-defined]
    yield open_again
    close()


@pytest.fixture
def kv_folder(_own_kv: Path) -> Path:
    """The root of this test's stores."""
    return _own_kv


@pytest.fixture
def stored(kv_folder: Path) -> Callable[[], dict[str, StoredSession]]:
    """Sessions on disk, by name; a runtime may have them open."""
    return lambda: {
        session.name: session
        for view in Store.open_readonly(kv_folder)
        for session in view.sessions
    }


@pytest.fixture
def reopen(model: str, tmp_path: Path) -> Iterator[Callable[..., Runtime]]:
    """Opens a file's `model` over this test's store, once the runtime before is closed."""
    opened: list[Runtime] = []

    def close() -> None:
        for runtime in opened:
            runtime.check_integrity()
            runtime.close()
        opened.clear()

    def open_again(**options: Any) -> Runtime:
        close()
        # Staging has room for as many groups as are written while others are computed.
        usual = {
            "pool_bytes": 1 << 26,
            "store": StoreOptions(folder=tmp_path / "kv"),
            "swap": SwapOptions(group_bytes=1 << 16),
        }
        opened.append(Runtime.open(model, config=RuntimeConfig(**(usual | options))))
        return opened[0]

    yield open_again
    close()
