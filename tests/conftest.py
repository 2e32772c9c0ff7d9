"""Before any test module: edgekv must be imported before mlx, so that mlx finds a fast BLAS."""

import gc

import edgekv  # noqa: F401


def pytest_collection_finish() -> None:
    """What collecting made (modules, test items) stays: no garbage collection looks at it again."""
    gc.freeze()
