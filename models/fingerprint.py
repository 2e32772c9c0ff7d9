"""What a model is, as one name: of all its bytes for KV, of samples for predictors.

KV is only ever read back by the model that computed it, so `kv_fingerprint` covers every byte. What
a file came to is remembered beside its size, times and inode: the second time costs a `stat`.
"""

import os
import pathlib
import time

import xxhash

from edgekv.models.folder_files import CONFIG_FILE, find_shards
from edgekv.models.remembered import recall, remember

FORMAT = 2  # raised when edgekv computes, lays out or names KV differently than before
_RELEASE = f"w{FORMAT}"  # ends the fingerprints of this release; earlier ones end in hex
_HEAD_BYTES = 1 << 20
_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 1024
_CHUNK_BYTES = 4 << 20
_SETTLED_NS = 2_000_000_000  # a file that changed later than that may change again unseen

_Remembered = dict[str, list[int | str]]  # by path: size, mtime and ctime in ns, inode, fingerprint


def weights_fingerprint(path: pathlib.Path) -> str:
    """xxh3-128 in hex of a GGUF file's or folder's samples: what a predictor was fitted to.

    It is over configuration and weights. Of a weight file it takes the size, the first MiB (tensor
    names, shapes and quantisation) and 1024 samples spread over the rest: any change of training
    touches every tensor, and what is predicted is approximate anyway.

    Raises:
        CheckpointCorrupt, UnsupportedModel: See `find_shards`.
        OSError: A file cannot be read.
    """
    digest = xxhash.xxh3_128(b"1")
    for file in _files(path):
        _add_samples(digest, file)
    return digest.hexdigest()


def kv_fingerprint(path: pathlib.Path, *beside: str | bool, memory: pathlib.Path) -> str:
    """What KV depends on: all bytes of configuration and weights, and `beside`.

    The same in every process; raises as `weights_fingerprint` does. `memory` is a file in which it
    is remembered what files came to; where it cannot be written, they are read again.

    Returns:
        xxh3-128 in hex, and two characters that say how it was made.
    """
    digest = xxhash.xxh3_128(" ".join(map(str, (FORMAT, *beside))).encode())
    found = recall(memory)
    remembered = {place: stamp for place, stamp in found.items() if _makes_sense(stamp)}
    known = dict(remembered)
    for file in _files(path):
        digest.update(_whole(file, known).encode())
    if known != remembered:
        remember(memory, known)
    return digest.hexdigest() + _RELEASE


def is_of_this_release(fingerprint: str) -> bool:
    """Whether `kv_fingerprint` made it; those of earlier releases were made otherwise."""
    return fingerprint.endswith(_RELEASE)


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return [path] if path.is_file() else [path / CONFIG_FILE, *find_shards(path)]


def _add_samples(digest: "xxhash.xxh3_128", path: pathlib.Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        digest.update(file.read(_HEAD_BYTES))
        rest = max(0, size - _HEAD_BYTES - _SAMPLE_BYTES)
        for i in range(_NUM_SAMPLES if rest else 0):
            file.seek(_HEAD_BYTES + rest * i // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))


# --- whole files, and what is remembered of them ---


def _whole(path: pathlib.Path, known: _Remembered) -> str:
    """xxh3-128 in hex of a file; `known` is asked, and told."""
    place = str(path.resolve())
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        # Who copies over a file may set its mtime back; nobody can do that to its ctime.
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        if (before := known.get(place)) and before[:-1] == stamp:
            return str(before[-1])
        digest, chunk = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES))
        while num_bytes := file.readinto(chunk):  # mapped, a drive's error would be a SIGBUS
            digest.update(chunk[:num_bytes])
    known.pop(place, None)  # the newest are last
    if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
        known[place] = [*stamp, digest.hexdigest()]
    return digest.hexdigest()


def _makes_sense(stamp: object) -> bool:
    match stamp:
        case [int(), int(), int(), int(), str(digest)]:
            return len(digest) == 32
    return False
