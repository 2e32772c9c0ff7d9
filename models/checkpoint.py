"""A checkpoint on disk, whatever its format: a configuration and tensors loaded by name."""

import pathlib
from dataclasses import dataclass
from typing import Literal, Protocol

import mlx.core as mx

from edgekv.errors import CheckpointCorrupt, ModelNotFound
from edgekv.models.folder_files import CONFIG_FILE, read_json
from edgekv.models.gguf_tensors import GgufTensors
from edgekv.models.quant_spec import QuantSpec
from edgekv.models.safetensors_folder import FolderTensors
from edgekv.models.tensors import Dense, Quantised, Tensor, concat_rows

__all__ = [
    "Checkpoint",
    "Dense",
    "QuantSpec",
    "Quantised",
    "Tensor",
    "TensorSource",
    "concat_rows",
    "open_checkpoint",
]


class TensorSource(Protocol):
    """What a format must offer; names passed in are among `names`."""

    @property
    def names(self) -> frozenset[str]:
        """Logical tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape, (out, in) for a linear layer."""
        ...

    def file_of(self, name: str) -> pathlib.Path:
        """The file that holds the tensor."""
        ...

    def load(self, name: str) -> Tensor:
        """Load one tensor."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """An opened model; headers are checked, tensors are loaded as they are taken.

    Attributes:
        path: The folder or the GGUF file.
        kind: Its format.
        config: `config.json`, or the GGUF metadata as plain values.
        names: Logical tensors: "model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight".
        source: Where tensors come from.
    """

    path: pathlib.Path
    kind: Literal["folder", "gguf"]
    config: dict[str, object]
    names: frozenset[str]
    source: TensorSource

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical (dequantised) shape of a tensor, (out, in) for a linear layer.

        Raises:
            CheckpointCorrupt: There is no such tensor.
        """
        if name not in self.names:
            raise CheckpointCorrupt(
                f"{self.path}: tensor {name!r} is missing",
                hint="the checkpoint is incomplete, or not of the kind that its config says",
            )
        return self.source.shape(name)

    def take(self, name: str, *, shape: tuple[int, ...] | None = None) -> Tensor:
        """Load one tensor.

        Args:
            name: One of `names`.
            shape: The logical shape that it must have.

        Raises:
            CheckpointCorrupt: It is missing, malformed or of another shape.
            UnsupportedModel: Its dtype or quantisation is not supported.
        """
        found = self.shape(name)
        if shape is not None and found != shape:
            raise CheckpointCorrupt(
                f"{self.source.file_of(name)}: tensor {name!r} has shape {found}, expected {shape}",
                hint="the file and the configuration are not of the same model; fetch both again",
            )
        return self.source.load(name)


def open_checkpoint(
    path: pathlib.Path, *, compute_dtype: mx.Dtype, keep_quantised: bool
) -> Checkpoint:
    """Open a folder or a GGUF file and check its headers.

    Args:
        path: A folder with `config.json` and safetensors, or a GGUF file.
        compute_dtype: Of all floats that come out, scales of quantised tensors included.
        keep_quantised: Leave affine-quantised tensors so; otherwise they become floats.

    Raises:
        ModelNotFound: Nothing is there.
        CheckpointCorrupt: A file is missing, truncated or malformed.
        UnsupportedModel: A format, dtype or quantisation that edgekv does not run.
    """
    if path.is_dir():
        config = read_json(path / CONFIG_FILE)
        folder = FolderTensors.open(
            path, config, compute_dtype=compute_dtype, keep_quantised=keep_quantised
        )
        return Checkpoint(
            path=path, kind="folder", config=config, names=folder.names, source=folder
        )
    if not path.exists():
        raise ModelNotFound(f"{path}: no such file or folder", hint="check the path")
    gguf = GgufTensors.open(path, compute_dtype=compute_dtype, keep_quantised=keep_quantised)
    return Checkpoint(
        path=path, kind="gguf", config=gguf.header.metadata, names=gguf.names, source=gguf
    )
