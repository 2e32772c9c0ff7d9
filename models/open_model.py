"""A model by its reference, opened at once: decoder, tokenizer, fingerprint."""

from dataclasses import dataclass
from pathlib import Path

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
from edgekv.ranks.group import ALONE, Group
from edgekv.tokenizer import Tokenizer, load_tokenizer_folder, load_tokenizer_gguf


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model outside any runtime: its network and tokenizer, and a fingerprint of its weights.

    `name` is what was asked for, `path` where that is; `fingerprint` see `weights_fingerprint`.
    """

    name: str
    path: Path
    decoder: Decoder
    tokenizer: Tokenizer
    fingerprint: str


def open_model(reference: str, *, progress: Progress | None = None) -> OpenModel:
    """Find, fetch and load a model, see `resolve`; uses MLX on the calling thread.

    Raises:
        ModelError: It cannot be had or is not what it says it is.
    """
    path = resolve(reference, progress=progress)
    return OpenModel(
        name=reference,
        path=path,
        decoder=open_decoder(path, profile()),
        tokenizer=open_tokenizer(path),
        fingerprint=weights_fingerprint(path),
    )


def open_decoder(
    path: Path,
    device: DeviceProfile,
    context_max: int | None = None,
    group: Group = ALONE,
) -> Decoder:
    """The network of a file or folder, or a rank's part; ModelError where it cannot be loaded.

    `context_max` is the longest sequence that it will see, if not the model's own: ropes of some
    models depend on it (`edgekv.models.rope_scaling`).
    """
    return load_decoder(open_checkpoint(path, device), device, context_max, group)


def open_checkpoint(path: Path, device: DeviceProfile) -> Checkpoint:
    """A folder with `config.json` and safetensors, or a GGUF file, whose headers are checked.

    Floats come out in the device's compute dtype, quantised tensors as they are where it keeps
    them, otherwise as floats.

    Raises:
        ModelNotFound: Nothing is there.
        CheckpointCorrupt: A file is missing, truncated or malformed.
        UnsupportedModel: A format, dtype or quantisation that edgekv does not run.
    """
    if not path.exists():
        raise ModelNotFound(f"{path}: no such file or folder", hint="check the path")
    return FolderCheckpoint(path, device) if path.is_dir() else GgufCheckpoint(path, device)


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file or folder; ModelError where it is missing or malformed."""
    if path.is_dir():
        return load_tokenizer_folder(path)
    return load_tokenizer_gguf(read_header(path).metadata, path)
