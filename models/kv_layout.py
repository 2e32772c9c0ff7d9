"""What KV a decoder needs on a device, and what state where layers keep one in place of it."""

from dataclasses import replace

from edgekv.device import DeviceProfile
from edgekv.kv.layout import DTYPE_BYTES, KVLayout, StateArray
from edgekv.models.config import DecoderConfig


def kv_layout(
    config: DecoderConfig, device: DeviceProfile, *, whole_windows: bool = False
) -> KVLayout:
    """Shapes of what is kept for each session of a model.

    `whole_windows`: what layers with a window no longer see stays in memory all the same.
    """
    dtype = device.compute_dtype
    states = tuple(
        tuple(map(StateArray, layer.state_shapes, (dtype, "float32"))) for layer in config.layers
    )
    layout = KVLayout(
        heads=config.kv_heads,
        dtype_bytes=DTYPE_BYTES[dtype],
        context_max=config.context_max,
        states=states if any(states) else (),
    )
    if whole_windows or layout.states:
        return layout
    windowed = replace(layout, windows=_windows(config))
    return windowed if windowed.window_slots < layout.context_max else layout


def _windows(config: DecoderConfig) -> tuple[int, ...]:
    """What of each layer's own KV is seen, by itself or those that read it."""
    seen: list[list[int | None]] = [[] for _ in config.layers]
    for index, layer in enumerate(config.layers):
        seen[index if layer.kv_from is None else layer.kv_from].append(layer.sliding_window)
    windows = tuple(0 if None in by else max(filter(None, by), default=0) for by in seen)
    return windows if any(windows) else ()
