"""Rotary position embedding of packed rows, each row with a position of its own."""

import math

import mlx.core as mx

from edgekv.models.config import RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int) -> mx.array:
    """Radians per position of each rotary pair, `(rotated / 2,)`, f32."""
    half = (config.rotated or head_dim) // 2
    inverse = mx.exp(mx.arange(half, dtype=mx.float32) * (-math.log(config.base) / half))
    if config.wavelength_factors is not None:
        inverse = inverse / mx.array(config.wavelength_factors, dtype=mx.float32)
    return inverse


@mx.compile
def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    first, second = mx.split(x, 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


# What one step's rows need of one rope: their positions, (N,) int32, or the cosines and sines of
# these, (N, 1, head_dim / 2) each.
RopeTables = mx.array | tuple[mx.array, mx.array]


class Rope:
    """One rotary embedding; layers with equal configuration share it and its tables.

    Of heads that are rotated as a whole the configuration's `magnitude` is in the scale of their
    scores (`HeadAttention`); of others it multiplies what is rotated.
    """

    def __init__(self, config: RopeConfig, head_dim: int, *, fused: bool) -> None:
        self.rotated = config.rotated or head_dim
        self.fused = fused
        self._magnitude = 1.0 if self.rotated == head_dim else config.magnitude
        self._inverse = inverse_frequencies(config, head_dim)
        self._wavelengths = mx.reciprocal(self._inverse)
        mx.eval(self._inverse, self._wavelengths)

    def tables(self, positions: mx.array) -> RopeTables:
        """Tables for rows at `positions (N,)`, computed once a step."""
        if self.fused:
            return positions
        angles = positions[:, None].astype(mx.float32) * self._inverse
        return mx.cos(angles)[:, None], mx.sin(angles)[:, None]

    def apply(self, x: mx.array, tables: RopeTables) -> mx.array:
        """Rotate `x (N, heads, head_dim)`, row by row; what is not rotated stays."""
        if isinstance(tables, tuple):
            if self.rotated == x.shape[-1]:
                rotated: mx.array = _rotate(x, *tables)
                return rotated
            turned = _rotate(x[..., : self.rotated], *tables) * self._magnitude
            return mx.concatenate([turned, x[..., self.rotated :]], axis=-1)
        if self._magnitude != 1.0:
            larger = x[..., : self.rotated] * self._magnitude
            x = mx.concatenate([larger, x[..., self.rotated :]], axis=-1)
        rotated = mx.fast.rope(
            x[:, :, None],
            self.rotated,
            traditional=False,
            base=None,
            scale=1.0,
            offset=tables,
            freqs=self._wavelengths,
        )
        return rotated[:, :, 0]
