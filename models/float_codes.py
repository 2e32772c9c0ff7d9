"""The floats that MLX's codes of 4 and 8 bits stand for, looked up in numpy.

A code is a float itself, and so is its group's scale; the product is exact in float32. MLX's CPU
backend composes that of a dozen ops and, beside the result, takes its size once more: on one core
of an EPYC 55M weights of mxfp4 a second, 40M of nvfp4; this does 190M. Formats: OCP Microscaling
Formats 1.0; the scale of nvfp4 is an E4M3 as well.
"""

import functools
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, eq=False)
class CodeTable:
    """What a byte stands for: as codes, one or two (lowest bits first), and as a scale."""

    codes: npt.NDArray[np.void]  # (256,), each of `8 / bits` float32
    scales: Floats  # (256,)

    def floats(self, codes: Bytes, scales: Bytes) -> Floats:
        """Codes `(rows, bytes)` and scales `(rows, groups)` → `(rows, columns)`."""
        values = self.codes[codes].view(np.float32)
        groups = values.reshape(*scales.shape, -1)
        with np.errstate(all="ignore"):  # damaged scales may be anything
            groups *= self.scales[scales][..., None]
        return values


@functools.cache
def code_table(mode: str) -> CodeTable:
    """The table of "mxfp4", "nvfp4" or "mxfp8"."""
    every = np.arange(256)
    e2m1 = np.array([*_E2M1, *(-value for value in _E2M1)], np.float32)
    e4m3 = np.array(mx.from_fp8(mx.array(every.astype(np.uint8)), mx.float32))
    e8m0 = np.array([*(2.0 ** (every[:-1] - 127)), np.inf], np.float32)
    pairs = np.stack([e2m1[every & 0xF], e2m1[every >> 4]], axis=-1)
    codes, scales = {
        "mxfp4": (pairs, e8m0),
        "nvfp4": (pairs, e4m3),
        "mxfp8": (e4m3[:, None], e8m0),
    }[mode]
    # As whole items numpy gathers them as fast as integers.
    items = np.ascontiguousarray(codes).view(f"V{4 * codes.shape[1]}").reshape(256)
    return CodeTable(items, scales)
