"""A model by its reference, opened at once: decoder, tokenizer, fingerprint."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from edgekv.device import DeviceProfile, profile
from edgekv.errors import ModelNotFound
from edgekv.models.cache import Progress
from edgekv.models.checkpoint import Checkpoint
from edgekv.models.decoder import Decoder
from edgekv.models.fingerprint import weights_fingerprint
from edgekv.models.gguf_file import read_header
from edgekv.models.gguf_tensors import GgufCheckpoint
from edgekv.models.hub import resolve
from edgekv.models.safetensors_folder import FolderCheckpoint
from edgekv.models.weights import load_decoder
from edgekv.tokenizer import Tokenizer, load_tokenizer_folder, load_tokenizer_gguf


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model outside any runtime.

    Attributes:
        name: As it was asked for.
        path: Where it is.
        decoder: Its network.
        tokenizer: Its tokenizer.
        fingerprint: Of its weights.
    """

    name: str
    path: Path
    decoder: Decoder
    tokenizer: Tokenizer
    fingerprint: str


def open_model(reference: str, *, progress: Progress | None = None) -> OpenModel:
    """Find, fetch and load a model; uses MLX on the calling thread.

    Args:
        reference: See `resolve`.
        progress: Told of a download.

    Raises:
        ModelError: It cannot be had or is not what it says it is.
    """
    path = resolve(reference, progress=progress)
    device = profile()
    return OpenModel(
        name=reference,
        path=path,
        decoder=open_decoder(path, device),
        tokenizer=open_tokenizer(path),
        fingerprint=weights_fingerprint(path),
    )


def open_decoder(path: Path, device: DeviceProfile) -> Decoder:
    """The network of a file or folder.

    Raises:
        ModelError: It cannot be loaded.
    """
    return load_decoder(checkpoint_for(path, device), device)


def checkpoint_for(path: Path, device: DeviceProfile) -> Checkpoint:
    """A file or folder, opened as the device wants its tensors.

    Raises:
        ModelError: See `open_checkpoint`.
    """
    dtype: mx.Dtype = getattr(mx, device.compute_dtype)
    return open_checkpoint(path, compute_dtype=dtype, keep_quantised=device.keeps_quantised)


def open_checkpoint(path: Path, *, compute_dtype: mx.Dtype, keep_quantised: bool) -> Checkpoint:
    """A folder with `config.json` and safetensors, or a GGUF file, whose headers are checked.

    Args:
        path: Where it is.
        compute_dtype: Of all floats that come out, scales of quantised tensors included.
        keep_quantised: Leave affine-quantised tensors so; otherwise they become floats.

    Raises:
        ModelNotFound: Nothing is there.
        CheckpointCorrupt: A file is missing, truncated or malformed.
        UnsupportedModel: A format, dtype or quantisation that edgekv does not run.
    """
    if not path.exists():
        raise ModelNotFound(f"{path}: no such file or folder", hint="check the path")
    format_ = FolderCheckpoint if path.is_dir() else GgufCheckpoint
    return format_(path, compute_dtype=compute_dtype, keep_quantised=keep_quantised)


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file or folder.

    Raises:
        ModelError: It is missing or malformed.
    """
    if path.is_dir():
        return load_tokenizer_folder(path)
    return load_tokenizer_gguf(read_header(path).metadata, path)
