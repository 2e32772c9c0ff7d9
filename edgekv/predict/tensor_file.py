"""Safetensors files, read and written whole, by MLX: it knows its own dtypes and reads lazily."""

import secrets
from pathlib import Path
from typing import Any

import mlx.core as mx

from edgekv.errors import ConfigError

SUFFIX = ".safetensors"


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
    half = _half_of(path)
    try:
        mx.save_safetensors(str(half), tensors, metadata)
        half.replace(path)
    except RuntimeError as error:  # what MLX makes of a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        half.unlink(missing_ok=True)


def check_writable(path: Path, beside: str = "") -> None:
    """Make sure that a file can be written, before minutes are spent; leaves nothing behind.

    `beside` is the longest that its name is extended by, for what is written beside it.

    Raises:
        ConfigError: It cannot.
    """
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise ConfigError.of("out", str(path), "a file in a folder that exists")
    probe = _half_of(path.with_name(path.name + beside))
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", hint="pass another -o"
        ) from error


def _half_of(path: Path) -> Path:
    """A name under which a file is written before it is whole; nobody else has the same."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.half{SUFFIX}")
