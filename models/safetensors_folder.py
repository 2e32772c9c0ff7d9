"""The tensors of a folder of safetensors files, MLX-quantised ones seen as one tensor each."""

import math
import pathlib
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from edgekv.device import DeviceProfile
from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.checkpoint import WORD_BITS, Checkpoint, Dense, Quantised, Tensor
from edgekv.models.folder_files import CONFIG_FILE, find_shards, opened, read_json
from edgekv.models.safetensors_file import (
    DTYPE_BYTES,
    FLOAT_DTYPES,
    SafetensorInfo,
    read_header,
)

_WEIGHT, _SCALES, _BIASES = ".weight", ".scales", ".biases"
_NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4"}  # all that is read


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
        super().__init__(folder, config, files, device)
        self.names -= {  # parts of logical tensors: scales and biases belong to their weight
            f"{module}{suffix}"
            for module in map(_module_of, self._infos)
            if self._is_quantised(module)
            for suffix in (_SCALES, _BIASES)
        }

    def _shape(self, name: str) -> tuple[int, ...]:
        if not self._is_quantised(_module_of(name)):
            return self._infos[name].shape
        _, bits = self._check_triple(name)
        words = self._infos[name].shape
        return (*words[:-1], words[-1] * WORD_BITS // bits)

    def _load(self, name: str) -> Tensor:
        module = _module_of(name)
        if not self._is_quantised(module):
            return Dense(self._floats(name))
        spec = self._check_triple(name)
        triple = Quantised(
            self._array(name),
            self._floats(module + _SCALES),
            self._floats(module + _BIASES),
            *spec,
        )
        return triple if self._keep_quantised else triple.dequantised()

    def _is_quantised(self, module: str) -> bool:
        weight = self._infos.get(module + _WEIGHT)
        return weight is not None and weight.dtype == "U32" and module + _SCALES in self._infos

    def _check_triple(self, name: str) -> "QuantSpec":
        module = _module_of(name)
        spec = self._quantisation.get(module, self._quantisation.get(""))
        if spec is None:
            raise CheckpointCorrupt(
                f"{self._files[name]}: tensor {name!r} is quantised, "
                f"but {self.path / CONFIG_FILE} does not say how"
            )
        words, scales, biases = (
            self._infos[part].shape if part in self._infos else None
            for part in (name, module + _SCALES, module + _BIASES)
        )
        assert words is not None
        group_size, bits = spec
        columns = words[-1] * WORD_BITS // bits if words else 0
        expected = (*words[:-1], columns // group_size)
        if len(words) < 2 or columns % group_size or not scales == biases == expected:
            raise CheckpointCorrupt(
                f"{self._files[name]}: tensor {name!r} of shape {words} with {bits} bits in "
                f"groups of {group_size} needs scales and biases of shape {expected}, "
                f"found {scales} and {biases}"
            )
        return spec

    def _floats(self, name: str) -> mx.array:
        dtype = self._infos[name].dtype
        if dtype not in FLOAT_DTYPES:
            raise UnsupportedModel(
                f"{self._files[name]}: tensor {name!r} has dtype {dtype}",
                hint="supported for weights: " + ", ".join(FLOAT_DTYPES) + ", MLX affine triples",
            )
        return self._array(name).astype(self._compute_dtype)

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


def _module_of(name: str) -> str:
    return name.removesuffix(_WEIGHT)


# --- what `config.json` says about quantisation: MLX's affine scheme, or a refusal ---

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

_HINT = "supported: MLX affine quantisation ('quantization' in config.json), GGUF, or none"


# Weights of a row that share a scale and a bias, and bits of a code.
QuantSpec = tuple[int, int]


def parse_quantisation(config: Mapping[str, object], source: str) -> dict[str, QuantSpec | None]:
    """Quantisation by module path, "model.layers.3.mlp.down_proj"; that of others under "".

    None is a module of floats; a checkpoint of floats says nothing, and yields nothing.

    Raises:
        UnsupportedModel: GPTQ, AWQ, bitsandbytes, fp8, or an MLX mode other than affine.
        CheckpointCorrupt: Malformed; `source`, the file's name, is in the message.
    """
    fields = config.get("quantization")
    if fields is None:
        fields = config.get("quantization_config")  # older MLX converters; else another scheme
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise CheckpointCorrupt(f"{source}: quantization is not an object")
    method = fields.get("quant_method")
    if method is not None:
        raise UnsupportedModel(f"{source}: quantised by {method!r}", hint=_HINT)
    default = _spec(fields, source, "quantization")
    specs: dict[str, QuantSpec | None] = {"": default}
    for name, value in fields.items():
        if isinstance(value, bool):
            specs[name] = default if value else None
        elif isinstance(value, dict):
            specs[name] = _spec(value, source, name)
    return specs


def _spec(fields: Mapping[str, object], source: str, name: str) -> QuantSpec:
    mode = fields.get("mode", "affine")
    if mode != "affine":
        raise UnsupportedModel(f"{source}: {name} has quantisation mode {mode!r}", hint=_HINT)
    group_size, bits = fields.get("group_size"), fields.get("bits")
    if type(group_size) is not int or type(bits) is not int:
        raise CheckpointCorrupt(f"{source}: {name} lacks group_size or bits as whole numbers")
    if group_size not in GROUP_SIZES or bits not in BITS:
        raise UnsupportedModel(
            f"{source}: {name} has {bits} bits in groups of {group_size}",
            hint=f"supported: bits {BITS}, groups of {GROUP_SIZES}",
        )
    return group_size, bits
