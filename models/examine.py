"""What a model's configuration and headers say: whether it loads, and how big it is."""

import contextlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgekv.device import DeviceProfile
from edgekv.errors import CheckpointCorrupt, ModelError, TokenizerError, UnsupportedModel
from edgekv.models import gguf_file, safetensors_file
from edgekv.models.checkpoint import Checkpoint
from edgekv.models.config import DecoderConfig
from edgekv.models.families.base import TensorNames
from edgekv.models.folder_files import find_shards
from edgekv.models.hollow_copy import ModelFiles
from edgekv.models.hub import headers_of
from edgekv.models.open_model import open_tokenizer
from edgekv.models.split import find_few_rows
from edgekv.models.unread import UnreadCheckpoint, build_unread, open_unread
from edgekv.models.weights import parse_checkpoint

# What is wrong with a model itself, and not with the way to it.
REFUSALS = (UnsupportedModel, CheckpointCorrupt, TokenizerError)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Weights of one type on disk."""

    num_parameters: int
    num_bytes: int  # with the scales and biases of those that are quantised


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What is known of a model; of one that does not load, perhaps little."""

    refusal: ModelError | None = None  # why it does not load
    stored: Mapping[str, Stored] | None = None  # by type, "BF16", "4-bit" or "Q4_K", largest first
    config: DecoderConfig | None = None
    memory_bytes: int | None = None  # of the weights, as the device keeps them


def examine_model(reference: str, device: DeviceProfile, *, offline: bool = False) -> Examined:
    """Look at the headers of a model wherever it is; see `headers_of`.

    Raises:
        ModelNotFound, DownloadError: It cannot be had; nothing is known of it.
    """
    try:
        with headers_of(reference, offline=offline) as files:
            return examine(files, device)
    except REFUSALS as error:
        return Examined(refusal=error)


def examine(files: ModelFiles, device: DeviceProfile) -> Examined:
    """Look at the headers of a folder or GGUF file, which may be a hollow copy."""
    found, path = Examined(), files.path
    try:
        checkpoint = open_unread(path, device)
        with contextlib.suppress(CheckpointCorrupt):  # perhaps of a tensor that nobody needs
            found = replace(found, stored=_stored(path, checkpoint))
        config, names = parse_checkpoint(checkpoint)
        found = replace(found, config=config)
        build_unread(checkpoint, device)
        found = replace(found, memory_bytes=_memory_bytes(checkpoint, config, names, device))
        if path.is_file() or files.hollow_below is None:  # a hollow folder has no tokenizer
            open_tokenizer(path)
    except REFUSALS as error:
        return replace(found, refusal=files.told(error))
    return found


def _stored(path: Path, checkpoint: Checkpoint) -> dict[str, Stored]:
    on_disk = _on_disk(path)
    parts: Counter[str] = Counter()  # bytes of scales and biases, by the weights they belong to
    for name in on_disk.keys() - checkpoint.names:
        parts[f"{name.rpartition('.')[0]}.weight"] += on_disk[name][1]
    counts: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for name in checkpoint.names:
        (kind, own_bytes), count = on_disk[name], math.prod(checkpoint.shape(name))
        if name in parts:
            kind = f"{8 * own_bytes // count}-bit"
        counts[kind] += count
        num_bytes[kind] += own_bytes + parts[name]
    return {
        kind: Stored(num_parameters=counts[kind], num_bytes=total)
        for kind, total in num_bytes.most_common()
    }


def _on_disk(path: Path) -> dict[str, tuple[str, int]]:
    """Type and bytes of every tensor in the files."""
    if path.is_file():
        tensors = gguf_file.read_header(path).tensors
        return {name: (info.type.name, info.end - info.start) for name, info in tensors.items()}
    return {
        name: (info.dtype, info.end - info.start)
        for shard in find_shards(path)
        for name, info in safetensors_file.read_header(shard).items()
    }


def _memory_bytes(
    checkpoint: UnreadCheckpoint, config: DecoderConfig, names: TensorNames, device: DeviceProfile
) -> int:
    """What the device will keep of the tensors that the decoder took.

    A head that is tied is the embedding's table, also where it is stored a second time; it is a
    copy where matrices are kept transposed.
    """
    taken, head = dict(checkpoint.taken), f"{names.head}.weight"
    table_bytes = taken[f"{names.embedding}.weight"]
    if config.tied_head:
        taken.pop(head, None)
    is_copy = head not in taken and device.measures_few_rows and find_few_rows().transposed
    return sum(taken.values()) + (table_bytes if is_copy else 0)
