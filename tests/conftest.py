"""Before any test module: edgekv must be imported before mlx, so that mlx finds a fast BLAS."""

import edgekv  # noqa: F401
