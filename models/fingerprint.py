"""What KV depends on, as one name: KV is only ever read back by the model that computed it."""

import os
import pathlib

import xxhash

from edgekv.models.folder_files import CONFIG_FILE, find_shards

FORMAT = 1  # raised when edgekv computes or lays out KV differently than before
_HEAD_BYTES = 1 << 20
_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 1024


def weights_fingerprint(path: pathlib.Path, *beside: str | bool) -> str:
    """xxh3-128 in hex of a GGUF file or folder, and of `beside`; the same in every process.

    It is over configuration and weights. Of a weight file it takes the size, the first MiB (tensor
    names, shapes and quantisation) and 1024 samples spread over the rest: whole files would cost
    seconds at each start, and any change of training touches every tensor.

    Raises:
        CheckpointCorrupt, UnsupportedModel: See `find_shards`.
        OSError: A file cannot be read.
    """
    digest = xxhash.xxh3_128(" ".join(map(str, (FORMAT, *beside))).encode())
    for file in [path] if path.is_file() else [path / CONFIG_FILE, *find_shards(path)]:
        _add(digest, file)
    return digest.hexdigest()


def _add(digest: "xxhash.xxh3_128", path: pathlib.Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        digest.update(file.read(_HEAD_BYTES))
        rest = max(0, size - _HEAD_BYTES - _SAMPLE_BYTES)
        for i in range(_NUM_SAMPLES if rest else 0):
            file.seek(_HEAD_BYTES + rest * i // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
