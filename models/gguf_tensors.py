"""The tensors of a GGUF file, one at a time: as floats, or as MLX's affine-quantised triples.

A block of Q4_0, Q4_1 or Q8_0 is 32 codes and a float16 scale (Q4_1: and a minimum), which is
exactly an MLX affine group. So these types keep their codes, and only the bits are put in MLX's
order. Every other quantised type is turned into floats by the `gguf` package.

Block layouts: ggml's `block_q4_0`, `block_q4_1` and `block_q8_0`.
"""

import pathlib

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from edgekv.device import DeviceProfile
from edgekv.errors import CheckpointCorrupt
from edgekv.models.checkpoint import Checkpoint, Dense, Quantised, Tensor
from edgekv.models.folder_files import opened
from edgekv.models.gguf_file import GgmlType, GgufTensorInfo, read_header

GROUP_SIZE = 32
_AFFINE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class GgufCheckpoint(Checkpoint):
    """One GGUF file; nothing stays mapped or open between calls.

    Raises:
        CheckpointCorrupt, UnsupportedModel: See `gguf_file.read_header`.
    """

    kind = "gguf"

    def __init__(self, path: pathlib.Path, device: DeviceProfile) -> None:
        header = read_header(path)
        super().__init__(path, header.metadata, dict.fromkeys(header.tensors, path), device)
        self._infos = header.tensors

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._infos[name].shape

    def _load(self, name: str) -> Tensor:
        info = self._infos[name]
        raw = self._read(name, info)
        if info.type.name not in _AFFINE_BITS:
            return Dense(_floats(raw, info).astype(self._compute_dtype))
        if self._keep_quantised and len(info.shape) == 2:
            return _triple(raw, info, self._compute_dtype)
        codes, scales, biases = _affine(raw, info.type)
        # In numpy: MLX's CPU backend takes five times as long to dequantise.
        values = np.multiply(codes, scales, dtype=np.float32)
        values += biases
        return Dense(mx.array(values.reshape(info.shape)).astype(self._compute_dtype))

    def _read(self, name: str, info: GgufTensorInfo) -> Bytes:
        num_bytes = info.end - info.start
        with opened(self.path) as file:
            raw = np.fromfile(file, np.uint8, num_bytes, offset=info.start)
        if raw.size != num_bytes:
            raise CheckpointCorrupt(
                f"{self.path}: tensor {name!r} is cut off", hint="the file changed while in use"
            )
        return raw


def _floats(raw: Bytes, info: GgufTensorInfo) -> mx.array:
    match info.type.name:
        case "F32":
            values = raw.view(np.float32)
        case "F16":
            values = raw.view(np.float16)
        case "BF16":
            return mx.array(raw.view(np.uint16).reshape(info.shape)).view(mx.bfloat16)
        case kind:
            # Here because it costs a quarter of a second, and most files need none of it.
            from gguf.constants import GGMLQuantizationType
            from gguf.quants import dequantize

            with np.errstate(all="ignore"):  # damaged scales may be anything
                row_bytes = info.shape[-1] // info.type.block_size * info.type.block_bytes
                values = dequantize(raw.reshape(-1, row_bytes), GGMLQuantizationType[kind])
    return mx.array(values.reshape(info.shape))


def _triple(raw: Bytes, info: GgufTensorInfo, dtype: mx.Dtype) -> Quantised:
    rows, columns = info.shape
    codes, scales, biases = _affine(raw, info.type)
    bits = _AFFINE_BITS[info.type.name]
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    # MLX's words hold the first code in their lowest bits.
    words = np.ascontiguousarray(codes).view("<u4").reshape(rows, -1)
    groups = (rows, columns // GROUP_SIZE)
    return Quantised(
        mx.array(words),
        mx.array(scales.reshape(groups)).astype(dtype),
        mx.array(biases.reshape(groups)).astype(dtype),
        GROUP_SIZE,
        bits,
    )


def _affine(raw: Bytes, kind: GgmlType) -> tuple[Bytes, Floats, Floats]:
    """Unsigned codes (blocks, 32), scales (blocks, 1) and biases (blocks, 1)."""
    blocks = raw.reshape(-1, kind.block_bytes)
    scales = _halves(blocks, 0)
    if kind.name == "Q4_1":
        return _nibbles(blocks[:, 4:]), scales, _halves(blocks, 2)
    # The others store signed codes: value = scale * (code - zero).
    if kind.name == "Q4_0":
        return _nibbles(blocks[:, 2:]), scales, scales * -8
    assert kind.name == "Q8_0"
    # Two's complement to offset binary: flipping the top bit adds 128.
    return blocks[:, 2:] ^ np.uint8(0x80), scales, scales * -128


def _halves(blocks: Bytes, offset: int) -> Floats:
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """(blocks, 16) bytes → (blocks, 32) codes; low nibbles are the first half of a block."""
    return np.concatenate([packed & np.uint8(0x0F), packed >> np.uint8(4)], axis=1)
