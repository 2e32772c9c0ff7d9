"""The files of a Hugging Face or MLX model folder: which are its weights, found without MLX."""

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Collection, Iterator
from typing import BinaryIO

from edgekv.errors import CheckpointCorrupt, UnsupportedModel

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
JSON_BYTES_MAX = 64 << 20

_NUMBERED = re.compile(r"([^/]+)-(\d{1,9})-of-(\d{1,9})\.safetensors")
_NUM_SHARDS_MAX = 10_000
_LFS_POINTER = b"version https://git-lfs"


def find_shards(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a checkpoint folder, in name order.

    Raises:
        CheckpointCorrupt: None is there, or one that the index names is missing.
        UnsupportedModel: The folder holds PyTorch weights only, or several models.
    """
    with _readable(folder):
        names = {path.name for path in folder.iterdir() if path.is_file()}
    shards = weight_names(names, lambda: read_json(folder / INDEX_FILE), str(folder))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        more = f", and {len(missing) - 1} more," if len(missing) > 1 else ""
        verb = "are" if more else "is"
        raise CheckpointCorrupt(f"{folder}: shard {missing[0]}{more} {verb} missing")
    return [folder / name for name in shards]


def weight_names(
    names: Collection[str], read_index: Callable[[], dict[str, object]], where: str
) -> list[str]:
    """Which files hold the weights of a model, in name order; some may be missing.

    What the index names, whatever that is. One file beside an index is a left-over, unless nothing
    that the index names is there: then the index is. Without an index, shards by their numbers.

    Args:
        names: The files that are there.
        read_index: Reads `model.safetensors.index.json`; called only where that is there.
        where: The folder or repository, for errors.

    Raises:
        CheckpointCorrupt: There are none, or the index is malformed.
        UnsupportedModel: There are PyTorch weights only, or shards of several models.
    """
    if INDEX_FILE in names:
        shards = _of_index(read_index(), f"{where}/{INDEX_FILE}")
        if SINGLE_FILE not in names or any(shard in names for shard in shards):
            return shards
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    numbered = _numbered(names, where)
    if numbered:
        return numbered
    if any(name.endswith((".bin", ".pth")) for name in names):
        raise UnsupportedModel(
            f"{where} holds PyTorch weights only", hint="supported: safetensors and GGUF"
        )
    raise CheckpointCorrupt(f"{where} has neither {SINGLE_FILE}, {INDEX_FILE} nor numbered shards")


def _of_index(index: dict[str, object], source: str) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointCorrupt(f"{source}: no weight_map")
    files = set()
    for file in weight_map.values():
        if not isinstance(file, str) or not _stays_inside(file):
            raise CheckpointCorrupt(f"{source}: {file!r} is not a file of this folder")
        files.add(file)
    return sorted(files)


def _stays_inside(file: str) -> bool:
    """A folder's index must not lead out of it."""
    parts = file.split("/")
    return "\0" not in file and not any(part in ("", ".", "..") for part in parts)


def _numbered(names: Collection[str], where: str) -> list[str]:
    """All shards of the set that is there, `model-…` before others; empty if there is none."""
    sets: dict[tuple[str, str], int] = {}  # digits of a number, by what its name begins and ends in
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            sets[match[1], match[3]] = len(match[2])
    chosen = [one for one in sets if one[0] == "model"] or list(sets)
    if not chosen:
        return []
    (prefix, total), *others = chosen
    if others or not 0 < int(total) <= _NUM_SHARDS_MAX:
        found = ", ".join(sorted(f"{a}-…-of-{b}.safetensors" for a, b in chosen))
        raise UnsupportedModel(
            f"{where} has no {INDEX_FILE} that chooses between {found}",
            hint="leave one model in the folder",
        )
    width = sets[prefix, total]
    return [
        f"{prefix}-{number:0{width}d}-of-{total}.safetensors" for number in range(1, int(total) + 1)
    ]


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to read from; CheckpointCorrupt where the system cannot open or read it."""
    with _readable(path), path.open("rb") as file:
        yield file


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointCorrupt(f"{path} cannot be read: {error.strerror or error}") from error


def stand_in(start: bytes) -> str | None:
    """What a file is that only stands in for the one that should be there, by its first bytes."""
    if start.startswith(_LFS_POINTER):
        return "a pointer of Git LFS, not the file: run `git lfs pull` in its folder"
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page, not the file: a proxy or a network's login page answered for it"
    return None


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
        what = stand_in(raw) or f"not valid JSON: {str(error)[:120]}"
        raise CheckpointCorrupt(f"{path} is {what}") from error
    if not isinstance(value, dict):
        raise CheckpointCorrupt(f"{path} is not a JSON object")
    return value
