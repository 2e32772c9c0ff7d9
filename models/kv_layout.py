"""What KV a decoder needs on a device, and what state where layers keep one in place of it."""

from edgekv.device import DeviceProfile
from edgekv.kv.layout import DTYPE_BYTES, KVLayout, StateArray
from edgekv.models.config import DecoderConfig


def kv_layout(config: DecoderConfig, device: DeviceProfile) -> KVLayout:
    """Shapes of what is kept for each session of a model."""
    dtype = device.compute_dtype
    states = tuple(
        tuple(map(StateArray, layer.state_shapes(config.hidden_size), (dtype, "float32")))
        for layer in config.layers
    )
    return KVLayout(
        heads=config.kv_heads,
        dtype_bytes=DTYPE_BYTES[dtype],
        context_max=config.context_max,
        states=states if any(states) else (),
    )
