"""Checks of single kernels: what MLX fuses on this device against the same composed in float32."""

import itertools

import mlx.core as mx

from edgekv.bench.selftest.checks import CheckResult, error_check, relative_error
from edgekv.bench.selftest.tiny_decoder import GROUP_SIZE, HEAD_DIM
from edgekv.device import DeviceProfile
from edgekv.models.attention import Segment, attend
from edgekv.models.config import LayerConfig, RopeConfig
from edgekv.models.rope import Rope
from edgekv.predict.forward import ArrayView

# One kernel rounds a few times, or at every addition where it accumulates in bfloat16.
_TOLERANCE = {"bfloat16": 8e-2, "float32": 1e-3}
# Fused rope takes fast cosines, whose error grows with the angle: radians up to 4096 here.
_ROPE_TOLERANCE = {"bfloat16": 2e-2, "float32": 5e-3}
_ROPES = {
    "plain": RopeConfig(base=10_000.0),
    "stretched": RopeConfig(
        base=500_000.0, wavelength_factors=tuple(1 + i / HEAD_DIM for i in range(HEAD_DIM // 2))
    ),
}
_WINDOW = 40
_WIDTHS = (320, 512)  # Metal has another kernel for multiples of 512


def _dtypes(device: DeviceProfile) -> dict[str, mx.Dtype]:
    return {name: getattr(mx, name) for name in (device.compute_dtype, "float32")}


def _random(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def check_rope(device: DeviceProfile) -> CheckResult:
    """Fused rotary embedding, every row at an offset of its own, against composed float32."""
    positions = mx.array([0, 1, 7, 63, 511, 4095], dtype=mx.int32)
    x = _random(6, 4, HEAD_DIM, seed=0)
    errors = {}
    for dtype_name, dtype in _dtypes(device).items():
        for name, config in _ROPES.items():
            rounded = x.astype(dtype)
            fused = Rope(config, HEAD_DIM, fused=True)
            composed = Rope(config, HEAD_DIM, fused=False)
            got = fused.apply(rounded, fused.tables(positions))
            wanted = composed.apply(rounded.astype(mx.float32), composed.tables(positions))
            error = relative_error(got, wanted)
            errors[f"{dtype_name} {name}"] = (error, _ROPE_TOLERANCE[dtype_name])
    return error_check("fused rope equals composed", errors)


def check_attention(device: DeviceProfile) -> CheckResult:
    """One row and chunks behind cached tokens, with and without a window, against float32."""
    errors = {}
    for dtype_name, dtype in _dtypes(device).items():
        for window in (None, _WINDOW):
            for rows, cached in ((1, 100), (33, 0), (33, 100), (150, 7)):
                error = _attention_error(device, dtype, rows, cached, window)
                label = f"{dtype_name} {rows} rows behind {cached}{', window' if window else ''}"
                errors[label] = (error, _TOLERANCE[dtype_name])
    return error_check("attention equals composed", errors)


def _attention_error(
    device: DeviceProfile, dtype: mx.Dtype, rows: int, cached: int, window: int | None
) -> float:
    layer = LayerConfig(
        num_heads=6,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        ffn_size=1,
        rope=_ROPES["plain"],
        sliding_window=window,
    )
    tokens = cached + rows
    queries = _random(rows, layer.num_heads, HEAD_DIM, seed=1).astype(dtype)
    # As in the pool: the buffer is longer than what is valid, and the rest must not be seen.
    keys, values = (
        _random(layer.num_kv_heads, tokens + 50, HEAD_DIM, seed=s).astype(dtype)[:, :tokens]
        for s in (2, 3)
    )
    scale = HEAD_DIM**-0.5
    segments = [Segment(ArrayView(cached), rows)]  # of the view, attention asks the offset alone
    got = attend(queries, [(keys, values)], segments, layer, scale, device)
    return relative_error(got, _plain_attention(queries, keys, values, layer, scale))


def _plain_attention(
    queries: mx.array, keys: mx.array, values: mx.array, layer: LayerConfig, scale: float
) -> mx.array:
    """Attention written out in float32: `(rows, heads * head_dim)`."""
    rows, tokens = queries.shape[0], keys.shape[1]
    group = layer.num_heads // layer.num_kv_heads
    q = queries.astype(mx.float32).swapaxes(0, 1)
    k = mx.repeat(keys.astype(mx.float32), group, axis=0)
    v = mx.repeat(values.astype(mx.float32), group, axis=0)
    at = mx.arange(tokens - rows, tokens)[:, None]
    seen = mx.arange(tokens)[None] <= at
    if layer.sliding_window is not None:
        seen = seen & (mx.arange(tokens)[None] > at - layer.sliding_window)
    scores = mx.where(seen, scale * (q @ k.swapaxes(-1, -2)), -mx.inf)
    return (mx.softmax(scores, axis=-1) @ v).swapaxes(0, 1).reshape(rows, -1)


def check_quantised_matmul(device: DeviceProfile) -> CheckResult:
    """Quantised products, one row and many, against the dequantised matrix in float32."""
    errors = {}
    for dtype_name, dtype in _dtypes(device).items():
        for bits, group_size, width, rows in itertools.product(
            (4, 8), (32, GROUP_SIZE), _WIDTHS, (1, 3, 40)
        ):
            label = f"{dtype_name} {bits} bits in {group_size}s, {rows} rows of {width}"
            error = _quantised_error(dtype, bits, group_size, width, rows)
            errors[label] = (error, _TOLERANCE[dtype_name])
    return error_check("quantised matmul equals dequantised", errors)


def _quantised_error(dtype: mx.Dtype, bits: int, group_size: int, width: int, rows: int) -> float:
    weight = _random(96, width, seed=4).astype(dtype)
    x = _random(rows, width, seed=5).astype(dtype)
    codes, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
    got = mx.quantized_matmul(
        x, codes, scales, biases, transpose=True, group_size=group_size, bits=bits
    )
    # Dequantised in float32: in the narrower type it would round once more than the product does.
    dense = mx.dequantize(
        codes,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        group_size=group_size,
        bits=bits,
    )
    return relative_error(got, x.astype(mx.float32) @ dense.T)
