"""The tensors of a folder of safetensors files, MLX-quantised ones seen as one tensor each."""

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.folder_files import CONFIG_FILE, find_shards
from edgekv.models.quant_spec import QuantSpec, QuantTable, parse_quantisation
from edgekv.models.safetensors_file import FLOAT_DTYPES, SafetensorInfo, read_header
from edgekv.models.tensors import WORD_BITS, Dense, Quantised, Tensor

_WEIGHT, _SCALES, _BIASES = ".weight", ".scales", ".biases"


@dataclass(frozen=True, kw_only=True)
class FolderTensors:
    """Reads tensors of one folder on demand. Owned by the thread that opened it.

    MLX opens a shard when its first tensor is asked for, and reads a tensor's bytes when the array
    is evaluated.
    """

    infos: Mapping[str, SafetensorInfo]
    files: Mapping[str, pathlib.Path]  # of each tensor
    quantisation: QuantTable | None
    config_path: pathlib.Path
    compute_dtype: mx.Dtype
    keep_quantised: bool
    _shards: dict[pathlib.Path, dict[str, mx.array]] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: pathlib.Path,
        config: Mapping[str, object],
        *,
        compute_dtype: mx.Dtype,
        keep_quantised: bool,
    ) -> "FolderTensors":
        """Find the shards and check their headers.

        Raises:
            CheckpointCorrupt: A shard is missing, truncated or malformed.
            UnsupportedModel: Another format, dtype or quantisation.
        """
        config_path = folder / CONFIG_FILE
        quantisation = parse_quantisation(config, str(config_path))
        infos: dict[str, SafetensorInfo] = {}
        files: dict[str, pathlib.Path] = {}
        for path in find_shards(folder):
            for name, info in read_header(path).items():
                if name in infos:
                    raise CheckpointCorrupt(f"{path}: {files[name].name} has {name!r} too")
                infos[name], files[name] = info, path
        return cls(
            infos=infos,
            files=files,
            quantisation=quantisation,
            config_path=config_path,
            compute_dtype=compute_dtype,
            keep_quantised=keep_quantised,
        )

    @property
    def names(self) -> frozenset[str]:
        """Logical tensors: scales and biases belong to their weight."""
        parts = {
            f"{module}{suffix}"
            for module in map(_module_of, self.infos)
            if self._is_quantised(module)
            for suffix in (_SCALES, _BIASES)
        }
        return frozenset(self.infos.keys() - parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape, (out, in) for a linear layer.

        Raises:
            CheckpointCorrupt: Codes and scales of a quantised tensor do not fit each other.
        """
        if not self._is_quantised(_module_of(name)):
            return self.infos[name].shape
        spec = self._check_triple(name)
        words = self.infos[name].shape
        return (*words[:-1], words[-1] * WORD_BITS // spec.bits)

    def file_of(self, name: str) -> pathlib.Path:
        """The file that holds the tensor."""
        return self.files[name]

    def load(self, name: str) -> Tensor:
        """Load one tensor, lazily.

        Raises:
            CheckpointCorrupt: MLX cannot load the file, or see `shape`.
            UnsupportedModel: The tensor is not of floats.
        """
        module = _module_of(name)
        if not self._is_quantised(module):
            return Dense(self._floats(name))
        spec = self._check_triple(name)
        triple = Quantised(
            self._array(name),
            self._floats(module + _SCALES),
            self._floats(module + _BIASES),
            spec.group_size,
            spec.bits,
        )
        return triple if self.keep_quantised else triple.dequantised()

    def _is_quantised(self, module: str) -> bool:
        weight = self.infos.get(module + _WEIGHT)
        return weight is not None and weight.dtype == "U32" and module + _SCALES in self.infos

    def _check_triple(self, name: str) -> QuantSpec:
        module = _module_of(name)
        spec = self.quantisation.of(module) if self.quantisation is not None else None
        if spec is None:
            raise CheckpointCorrupt(
                f"{self.files[name]}: tensor {name!r} is quantised, "
                f"but {self.config_path} does not say how"
            )
        words, scales, biases = (
            self.infos[part].shape if part in self.infos else None
            for part in (name, module + _SCALES, module + _BIASES)
        )
        assert words is not None
        columns = words[-1] * WORD_BITS // spec.bits if words else 0
        expected = (*words[:-1], columns // spec.group_size)
        if len(words) < 2 or columns % spec.group_size or not scales == biases == expected:
            raise CheckpointCorrupt(
                f"{self.files[name]}: tensor {name!r} of shape {words} with {spec.bits} bits in "
                f"groups of {spec.group_size} needs scales and biases of shape {expected}, "
                f"found {scales} and {biases}"
            )
        return spec

    def _floats(self, name: str) -> mx.array:
        dtype = self.infos[name].dtype
        if dtype not in FLOAT_DTYPES:
            raise UnsupportedModel(
                f"{self.files[name]}: tensor {name!r} has dtype {dtype}",
                hint="supported for weights: " + ", ".join(FLOAT_DTYPES) + ", MLX affine triples",
            )
        return self._array(name).astype(self.compute_dtype)

    def _array(self, name: str) -> mx.array:
        path = self.files[name]
        if name not in self._shards.get(path, ()):
            try:
                loaded = mx.load(str(path), format="safetensors")
            except (RuntimeError, ValueError) as error:
                raise CheckpointCorrupt(f"{path}: MLX cannot load it: {error}") from error
            assert isinstance(loaded, dict)
            self._shards[path] = loaded
        # Taken out, so that the bytes are freed once the caller has cast or dequantised them.
        return self._shards[path].pop(name)


def _module_of(name: str) -> str:
    return name.removesuffix(_WEIGHT)
