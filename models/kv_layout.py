"""What KV a decoder needs on a device."""

import mlx.core as mx

from edgekv.device import DeviceProfile
from edgekv.kv.layout import KVLayout
from edgekv.models.config import DecoderConfig


def kv_layout(config: DecoderConfig, device: DeviceProfile) -> KVLayout:
    """Shapes of the KV that is kept for each session of a model."""
    dtype: mx.Dtype = getattr(mx, device.compute_dtype)
    return KVLayout(
        heads=config.kv_heads,
        dtype_bytes=dtype.size,
        context_max=config.context_max,
    )
