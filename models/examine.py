"""What a model's configuration and headers say: whether it loads, and how big it is."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace

import mlx.core as mx

from edgekv.device import DeviceProfile
from edgekv.errors import CheckpointCorrupt, ModelError, TokenizerError, UnsupportedModel
from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.decoder import Decoder
from edgekv.models.families import parse_config
from edgekv.models.folder_files import CONFIG_FILE, read_json
from edgekv.models.hollow_copy import ModelFiles
from edgekv.models.hub import headers_of
from edgekv.models.linear import DenseLinear
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
            found = replace(found, stored=_stored(checkpoint))
        config, names = parse_checkpoint(checkpoint)
        found = replace(found, config=config)
        # A head that is stored where it is tied is taken to be the table once more.
        has_head = f"{names.head}.weight" in checkpoint.names and not config.tied_head
        decoder = build_unread(checkpoint, device)
        found = replace(found, memory_bytes=_memory_bytes(decoder, has_head, device))
        if path.is_file() or files.hollow_below is None:  # a hollow folder has no tokenizer
            open_tokenizer(path)
    except REFUSALS as error:
        return _by_configuration(replace(found, refusal=files.told(error)), files)
    return found


def _by_configuration(found: Examined, files: ModelFiles) -> Examined:
    """With what the configuration of a folder says whose weights are missing or damaged.

    A model that would not load with them either is refused for that.
    """
    source = files.path / CONFIG_FILE
    if found.config is not None or not source.is_file():
        return found
    try:
        return replace(found, config=parse_config(Fields(read_json(source), str(source))))
    except UnsupportedModel as error:
        return replace(found, refusal=files.told(error))
    except CheckpointCorrupt:
        return found


def _stored(checkpoint: UnreadCheckpoint) -> dict[str, Stored]:
    counts: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for name in checkpoint.names:
        kind, own_bytes = checkpoint.stored(name)
        counts[kind] += math.prod(checkpoint.shape(name))
        num_bytes[kind] += own_bytes
    return {
        kind: Stored(num_parameters=counts[kind], num_bytes=total)
        for kind, total in num_bytes.most_common()
    }


def _memory_bytes(decoder: Decoder, has_head: bool, device: DeviceProfile) -> int:
    """What the device will keep of an unread decoder's weights.

    A head that is the embedding's table takes none, unless matrices are kept transposed.
    """
    arrays = {id(array): array.nbytes for array in _arrays(decoder.weights)}
    head = decoder.weights.head
    if not has_head and isinstance(head, DenseLinear):
        is_copy = device.measures_few_rows and find_few_rows().transposed
        arrays[id(head.matrix)] *= is_copy
    return sum(arrays.values())


def _arrays(weights: object) -> Iterator[mx.array]:
    """All arrays in dataclasses, tuples and lists."""
    if isinstance(weights, mx.array):
        yield weights
    elif is_dataclass(weights):
        for field in fields(weights):
            yield from _arrays(getattr(weights, field.name))
    elif isinstance(weights, list | tuple):
        for part in weights:
            yield from _arrays(part)
