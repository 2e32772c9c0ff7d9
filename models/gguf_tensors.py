"""The tensors of a GGUF file, one at a time: as floats, or as codes and scales in a mode of MLX.

A block of Q4_0, Q4_1 or Q8_0 is 32 codes and a float16 scale (Q4_1: and a minimum), which is
exactly an MLX affine group; one of MXFP4 is a group of MLX's mxfp4. So these types keep their
codes, and only the bits are put in MLX's order. Every other quantised type is turned into floats
by the `gguf` package.

Block layouts: ggml's `block_q4_0`, `block_q4_1`, `block_q8_0` and `block_mxfp4`.
"""

import math
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from edgekv.device import DeviceProfile
from edgekv.errors import CheckpointCorrupt
from edgekv.models.checkpoint import Checkpoint, Dense, Quantised, Tensor, joined, row_ranges
from edgekv.models.folder_files import opened
from edgekv.models.gguf_file import GgmlType, GgufTensorInfo, read_header
from edgekv.models.parts import Places
from edgekv.models.row_reader import StoredMatrix

GROUP_SIZE = 32
_AFFINE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_MXFP4 = "MXFP4"

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
        lead = info.shape[:-1]
        tensor = joined(self._pieces(name, info), math.prod(lead))
        return tensor.like([array.reshape(*lead, -1) for array in tensor.arrays])

    @property
    def group_size(self) -> int:
        """See `Checkpoint`."""
        return GROUP_SIZE if self._keep_quantised else 1

    def _units(self, name: str) -> tuple[int, bool]:
        kind = self._infos[name].type
        kept = kind.name == _MXFP4 or kind.name in _AFFINE_BITS
        return kind.block_size, kept and self._keep_quantised

    def _load_part(self, name: str, rows: Places, units: Places) -> Tensor:
        info = self._infos[name]
        kind = info.type
        stored = StoredMatrix(
            what=f"{self.path}: tensor {name!r}",
            start=info.start,
            row_bytes=info.shape[-1] // kind.block_size * kind.block_bytes,
            unit_bytes=kind.block_bytes,
        )

        def pieces() -> Iterator[Tensor]:
            with opened(self.path) as file:
                for start, end in row_ranges(len(rows), len(units) * kind.block_size):
                    raw = np.empty((end - start, len(units) * kind.block_bytes), np.uint8)
                    stored.read(file, rows[start:end], units, raw)
                    yield self._piece(raw, kind, self._keep_quantised)

        return joined(pieces(), len(rows))

    def exact(self, name: str) -> Floats:
        """The numbers of a tensor of floats at full width, whatever the device computes in.

        Raises:
            CheckpointCorrupt: There is no such tensor, or not all of it.
        """
        self.shape(name)
        info = self._infos[name]
        with opened(self.path) as file:
            file.seek(info.start)
            raw = self._read(file, info.end - info.start, name)
        return np.array(_floats(raw.reshape(1, -1), info.type).astype(mx.float32)).reshape(-1)

    def _read(self, file: BinaryIO, num_bytes: int, name: str) -> Bytes:
        raw = np.fromfile(file, np.uint8, num_bytes)
        if raw.size != num_bytes:
            raise CheckpointCorrupt(
                f"{self.path}: tensor {name!r} is cut off", hint="the file changed while in use"
            )
        return raw

    def _pieces(self, name: str, info: GgufTensorInfo) -> Iterator[Tensor]:
        """The tensor as matrices of some rows each."""
        *lead, width = info.shape
        row_bytes = width // info.type.block_size * info.type.block_bytes
        keep = self._keep_quantised and len(lead) > 0
        with opened(self.path) as file:
            file.seek(info.start)
            for start, end in row_ranges(math.prod(lead), width):
                raw = self._read(file, (end - start) * row_bytes, name)
                yield self._piece(raw.reshape(-1, row_bytes), info.type, keep)

    def _piece(self, raw: Bytes, kind: GgmlType, keep: bool) -> Tensor:
        """Rows of blocks as a tensor."""
        if kind.name == _MXFP4:
            tensor = _mxfp4(raw, self._compute_dtype)
            return tensor if keep else tensor.dequantised()
        if kind.name not in _AFFINE_BITS:
            return Dense(_floats(raw, kind).astype(self._compute_dtype))
        if keep:
            return _triple(raw, kind, self._compute_dtype)
        codes, scales, biases = _affine(raw, kind)
        # In numpy: MLX's CPU backend takes five times as long to dequantise.
        with np.errstate(all="ignore"):  # damaged scales may be anything
            values = np.multiply(codes, scales, dtype=np.float32)
            values += biases
        return Dense(mx.array(values.reshape(len(raw), -1)).astype(self._compute_dtype))


def _floats(raw: Bytes, kind: GgmlType) -> mx.array:
    match kind.name:
        case "F32":
            return mx.array(raw.view(np.float32))
        case "F16":
            return mx.array(raw.view(np.float16))
        case "BF16":
            return mx.array(raw.view(np.uint16)).view(mx.bfloat16)
    # Here because it costs a quarter of a second, and most files need none of it.
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):
        return mx.array(dequantize(raw, GGMLQuantizationType[kind.name]))


def _mxfp4(raw: Bytes, dtype: mx.Dtype) -> Quantised:
    """A byte of scale (E8M0) and 16 of codes (E2M1), both as in MLX."""
    blocks = raw.reshape(len(raw), -1, 17)
    codes = _nibbles(blocks[..., 1:].reshape(-1, 16)).reshape(len(raw), -1)
    scales = mx.array(np.ascontiguousarray(blocks[..., 0]))
    return Quantised(_words(codes, 4), scales, None, GROUP_SIZE, 4, "mxfp4", dtype)


def _triple(raw: Bytes, kind: GgmlType, dtype: mx.Dtype) -> Quantised:
    codes, scales, biases = _affine(raw, kind)
    bits = _AFFINE_BITS[kind.name]
    return Quantised(
        _words(codes.reshape(len(raw), -1), bits),
        mx.array(scales.reshape(len(raw), -1)).astype(dtype),
        mx.array(biases.reshape(len(raw), -1)).astype(dtype),
        GROUP_SIZE,
        bits,
    )


def _words(codes: Bytes, bits: int) -> mx.array:
    """Codes (rows, columns) as MLX's words, which hold the first code in their lowest bits."""
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    return mx.array(np.ascontiguousarray(codes).view("<u4"))


@np.errstate(all="ignore")  # damaged scales may be anything
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
