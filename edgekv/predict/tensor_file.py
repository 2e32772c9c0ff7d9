"""Safetensors files, read and written whole."""

from pathlib import Path
from typing import Any

import mlx.core as mx

SUFFIX = ".safetensors"


def half_of(path: Path) -> Path:
    """The name under which a file is written before it is whole."""
    return path.with_name(f".{path.name}.half{SUFFIX}")


def load_safetensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Tensors and metadata of a file.

    Raises:
        RuntimeError, OSError: It cannot be read.
    """
    loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    tensors, metadata = loaded
    return dict(tensors), dict(metadata)


def write_safetensors(path: Path, tensors: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write a file; under its final name there is the whole file or what was there before.

    Raises:
        OSError: It cannot be written.
    """
    half = half_of(path)
    try:
        mx.save_safetensors(str(half), tensors, metadata)
        half.replace(path)
    except RuntimeError as error:  # what MLX makes of a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        half.unlink(missing_ok=True)
