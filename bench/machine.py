"""Where it was measured: versions, device, memory. Facts for reports and for `edgekv doctor`."""

import importlib.metadata
import os
import platform
from dataclasses import asdict
from typing import Any

from edgekv import __version__
from edgekv.device import profile, system_name


def versions() -> dict[str, str | None]:
    """Versions of what decides speed; None where something is not installed."""
    return {
        "edgekv": __version__,
        "mlx": _version("mlx"),
        "mlx-lm": _version("mlx-lm"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The machine and the device on it (imports MLX)."""
    return {
        "os": system_name(),
        "num_cpus": os.cpu_count(),
        # A busy machine measures itself: ratios survive that, absolute figures do not.
        "load_average_1min": round(os.getloadavg()[0], 2),
        **asdict(profile()),
    }
