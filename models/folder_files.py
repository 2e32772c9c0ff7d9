"""The files of a Hugging Face or MLX model folder: what must be there, found without MLX."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

from edgekv.errors import CheckpointCorrupt, UnsupportedModel

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
JSON_BYTES_MAX = 64 << 20


def find_shards(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a checkpoint folder, in name order.

    Raises:
        CheckpointCorrupt: None is there, or one that the index names is missing.
        UnsupportedModel: The folder holds PyTorch weights only.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
            raise UnsupportedModel(
                f"{folder} holds PyTorch weights only", hint="supported: safetensors and GGUF"
            )
        raise CheckpointCorrupt(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}",
            hint="a partly downloaded model? fetch it again",
        )
    index = read_json(folder / INDEX_FILE)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointCorrupt(f"{folder / INDEX_FILE}: no weight_map")
    shards = []
    for file in sorted({str(file) for file in weight_map.values()}):
        path = folder / file
        if pathlib.PurePath(file).name != file:  # a folder's index must not lead out of it
            raise CheckpointCorrupt(f"{folder / INDEX_FILE}: {file!r} is not a file name")
        if not path.is_file():
            raise CheckpointCorrupt(
                f"{folder}: shard {file} is missing", hint="fetch the model again"
            )
        shards.append(path)
    return shards


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to read from; CheckpointCorrupt where the system cannot open or read it."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise CheckpointCorrupt(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(path: pathlib.Path) -> dict[str, object]:
    """Read a JSON object of bounded size.

    Raises:
        CheckpointCorrupt: Missing, unreadable, too large, not JSON, or not an object.
    """
    with opened(path) as file:
        raw = file.read(JSON_BYTES_MAX + 1)
    if len(raw) > JSON_BYTES_MAX:
        raise CheckpointCorrupt(f"{path} exceeds {JSON_BYTES_MAX} bytes")
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(f"{path} is not valid JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise CheckpointCorrupt(f"{path} is not a JSON object")
    return value
