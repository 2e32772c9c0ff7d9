"""Tensors quantised as MLX's converters do it, and what the configuration says of them."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

SPECS: dict[str, dict[str, Any]] = {
    "4 bits": {"group_size": 32, "bits": 4, "mode": "affine"},
    "3 bits": {"group_size": 32, "bits": 3, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}


def quantised(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], spec: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """All matrices whose rows are whole groups; the rest stays as it is."""
    stored: dict[str, mx.array] = {}
    said: dict[str, Any] = dict(spec)
    for name, values in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or values.ndim < 2 or "conv" in name:
            stored[name] = mx.array(values)
        elif values.shape[-1] % spec["group_size"]:
            stored[name], said[module] = mx.array(values), False
        else:
            arrays = mx.quantize(mx.array(values), **spec)
            parts = zip(("weight", "scales", "biases"), arrays, strict=False)
            stored |= {f"{module}.{part}": array for part, array in parts}
    return {**config, "quantization": said}, stored
