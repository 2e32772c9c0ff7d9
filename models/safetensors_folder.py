"""The tensors of a folder of safetensors files, MLX-quantised ones seen as one tensor each.

So is gpt-oss as published: `experts.gate_up_proj_blocks` and `experts.gate_up_proj_scales` are one
tensor `experts.gate_up_proj` of mode mxfp4, named as where it is of floats.
"""

import math
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from edgekv.device import DeviceProfile
from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.checkpoint import WORD_BITS, Checkpoint, Dense, Quantised, Tensor
from edgekv.models.folder_files import CONFIG_FILE, find_shards, opened, read_json
from edgekv.models.parts import Places
from edgekv.models.quantisation import NO_GLOBAL_SCALE, QuantSpec, parse_quantisation
from edgekv.models.row_reader import StoredMatrix
from edgekv.models.safetensors_file import (
    DTYPE_BYTES,
    FLOAT_DTYPES,
    SafetensorInfo,
    read_header,
)

# All that are read.
_NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1"}
_MLX_DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}

# How codes are stored: their dtype and the suffix of their name; the suffix of the logical name;
# what stands between a module and its parts.
_STYLES = (("U32", ".weight", ".weight", "."), ("U8", "_blocks", "", "_"))
_BLOCK_BYTES = 16  # of a `_blocks` tensor's last axis: the codes of a group, in MLX's order


@dataclass(frozen=True)
class _Packed:
    """A quantised tensor as it is stored."""

    module: str
    joint: str
    codes: str

    def part(self, kind: str) -> str:
        """What its "scales", "biases" or "global_scale" are called, if there are any."""
        return f"{self.module}{self.joint}{kind}"


def _find_packed(infos: Mapping[str, SafetensorInfo]) -> dict[str, _Packed]:
    """The quantised tensors by logical name: codes that have scales."""
    found = {}
    for name, info in infos.items():
        for dtype, suffix, logical, joint in _STYLES:
            packed = _Packed(name.removesuffix(suffix), joint, name)
            if info.dtype == dtype and name.endswith(suffix) and packed.part("scales") in infos:
                found[packed.module + logical] = packed
    return found


class FolderCheckpoint(Checkpoint):
    """A folder with `config.json` and safetensors.

    MLX opens a shard when its first tensor is asked for, and reads a tensor's bytes when the array
    is evaluated.
    """

    kind = "folder"

    def __init__(self, folder: pathlib.Path, device: DeviceProfile) -> None:
        config = read_json(folder / CONFIG_FILE)
        self._quantisation = parse_quantisation(config, str(folder / CONFIG_FILE))
        self._infos: dict[str, SafetensorInfo] = {}
        self._shards: dict[pathlib.Path, dict[str, mx.array]] = {}
        self._unloadable: set[pathlib.Path] = set()  # shards with a tensor that MLX does not know
        files: dict[str, pathlib.Path] = {}
        for path in find_shards(folder):
            header = read_header(path)
            if any(info.dtype not in DTYPE_BYTES for info in header.values()):
                self._unloadable.add(path)
            for name, info in header.items():
                if name in files:
                    raise CheckpointCorrupt(f"{path}: {files[name].name} has {name!r} too")
                self._infos[name], files[name] = info, path
        self._packed = _find_packed(self._infos)
        files |= {name: files[packed.codes] for name, packed in self._packed.items()}
        super().__init__(folder, config, files, device)
        stored = {
            name
            for packed in self._packed.values()
            for name in (packed.codes, packed.part("scales"), packed.part("biases"))
        }
        self.names = self.names - stored | self._packed.keys()

    def _shape(self, name: str) -> tuple[int, ...]:
        packed = self._packed.get(name)
        if packed is None:
            return self._infos[name].shape
        bits = self._spec(packed).bits
        words = self._words_shape(packed.codes)
        return (*words[:-1], words[-1] * WORD_BITS // bits)

    def _load(self, name: str) -> Tensor:
        return self._tensor(name, self._array)

    @property
    def group_size(self) -> int:
        """See `Checkpoint`."""
        specs = self._quantisation.values() if self._keep_quantised else ()
        return max((spec.group_size for spec in specs if spec is not None), default=1)

    def _units(self, name: str) -> tuple[int, bool]:
        packed = self._packed.get(name)
        if packed is None:
            return 1, False
        return self._spec(packed).group_size, self._keep_quantised

    def _load_part(self, name: str, rows: Places, units: Places) -> Tensor:
        shape, (size, _) = self._shape(name), self._units(name)
        num_rows, num_units = math.prod(shape[:-1]), shape[-1] // size

        def read(stored: str) -> mx.array:
            """A matrix of as many rows and units, whatever a unit of this one is."""
            path, info = self._files[stored], self._infos[stored]
            row_bytes = (info.end - info.start) // num_rows
            matrix = StoredMatrix(
                what=f"{path}: tensor {stored!r}",
                start=info.start,
                row_bytes=row_bytes,
                unit_bytes=row_bytes // num_units,
            )
            raw = mx.zeros((len(rows), len(units) * matrix.unit_bytes), mx.uint8)
            mx.eval(raw)
            with opened(path) as file:
                matrix.read(file, rows, units, np.array(raw, copy=False))
            return raw.view(_MLX_DTYPES[info.dtype])

        return self._tensor(name, read)

    def _tensor(self, name: str, read: Callable[[str], mx.array]) -> Tensor:
        """A tensor of what is read of its parts, which are as they are stored or matrices."""
        packed = self._packed.get(name)
        if packed is None:
            return Dense(self._floats(name, read))
        spec, part = self._spec(packed), packed.part
        scales = self._floats(part("scales"), read) if spec.is_affine else read(part("scales"))
        tensor = Quantised(
            read(packed.codes).view(mx.uint32).reshape(*scales.shape[:-1], -1),
            scales,
            self._floats(part("biases"), read) if spec.is_affine else None,
            spec.group_size,
            spec.bits,
            spec.mode,
            self._compute_dtype,
        )
        return tensor if self._keep_quantised else tensor.dequantised()

    def _spec(self, packed: _Packed) -> QuantSpec:
        """How it is quantised, once its parts have been checked to fit that."""
        where = f"{self._files[packed.codes]}: tensor {packed.codes!r}"
        spec = self._quantisation.get(packed.module, self._quantisation.get(""))
        if spec is None:
            raise CheckpointCorrupt(
                f"{where} is quantised, but {self.path / CONFIG_FILE} does not say how"
            )
        if (other := packed.part("global_scale")) in self._infos:
            raise UnsupportedModel(f"{where} has a {other!r}", hint=NO_GLOBAL_SCALE)
        words = self._words_shape(packed.codes)
        columns = words[-1] * WORD_BITS // spec.bits if words else 0
        expected = (*words[:-1], columns // spec.group_size)
        scales, biases = (self._infos.get(packed.part(kind)) for kind in ("scales", "biases"))
        fits = len(words) >= 2 and columns % spec.group_size == 0
        if spec.is_affine:
            needed = f"scales and biases of shape {expected} in floats"
            fits &= all(_is(part, expected, FLOAT_DTYPES) for part in (scales, biases))
        else:
            needed = f"scales of shape {expected} in U8 and no biases"
            fits &= _is(scales, expected, ("U8",)) and biases is None
        if not fits:
            raise CheckpointCorrupt(
                f"{where} of shape {self._infos[packed.codes].shape} with {spec.bits} bits in "
                f"groups of {spec.group_size} (mode {spec.mode}) needs {needed}, "
                f"found {_seen(scales)} and {_seen(biases)}"
            )
        return spec

    def _words_shape(self, codes: str) -> tuple[int, ...]:
        """Of the codes as MLX's words; () where they cannot be that."""
        info = self._infos[codes]
        if info.dtype == "U32":
            return info.shape
        *lead, num_bytes = info.shape or (0,)
        if not lead or num_bytes != _BLOCK_BYTES:
            return ()
        return (*lead[:-1], lead[-1] * _BLOCK_BYTES * 8 // WORD_BITS)

    def _floats(self, name: str, read: Callable[[str], mx.array]) -> mx.array:
        dtype = self._infos[name].dtype
        if dtype not in FLOAT_DTYPES:
            raise UnsupportedModel(
                f"{self._files[name]}: tensor {name!r} has dtype {dtype}",
                hint="supported for weights: "
                + ", ".join(FLOAT_DTYPES)
                + ", what MLX has quantised",
            )
        return read(name).astype(self._compute_dtype)

    def _array(self, name: str) -> mx.array:
        path = self._files[name]
        if path in self._unloadable:
            return _read(path, self._infos[name])
        if name not in self._shards.get(path, ()):
            try:
                # Opened here too: MLX takes descriptor 0, where stdin was closed, for a failure.
                with opened(path):
                    loaded = mx.load(str(path), format="safetensors")
            except (RuntimeError, ValueError) as error:
                raise CheckpointCorrupt(f"{path}: MLX cannot load it: {error}") from error
            assert isinstance(loaded, dict)
            self._shards[path] = loaded
        # Taken out, so that the bytes are freed once the caller has cast or dequantised them.
        return self._shards[path].pop(name)


def _read(path: pathlib.Path, info: SafetensorInfo) -> mx.array:
    """A tensor of floats or of words, without MLX's reader."""
    dtype = _NUMPY_DTYPES[info.dtype]
    with opened(path) as file:
        values = np.fromfile(file, dtype, offset=info.start, count=math.prod(info.shape))
    if values.nbytes != info.end - info.start:
        raise CheckpointCorrupt(f"{path}: the file shrank while it was read")
    array = mx.array(values.reshape(info.shape))
    return array.view(mx.bfloat16) if info.dtype == "BF16" else array


def _is(info: SafetensorInfo | None, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> bool:
    return info is not None and info.shape == shape and info.dtype in dtypes


def _seen(info: SafetensorInfo | None) -> str:
    return "none" if info is None else f"{info.dtype} {info.shape}"
