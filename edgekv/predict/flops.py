"""Multiplications that a prompt costs, exact and predicted. Arithmetic, no measurement."""

from edgekv.models.config import DecoderConfig, LayerConfig
from edgekv.predict.predictor import Predictor


def prompt_macs(
    config: DecoderConfig,
    start: int,
    end: int,
    *,
    first_layer: int = 0,
    last_layer: int | None = None,
) -> float:
    """Of the rows `[start, end)` of a prompt through some layers, attention included.

    The head is left out: one row of the prompt needs it, whatever was predicted.
    """
    layers = config.layers[first_layer:last_layer]
    num_rows = end - start
    num_pairs = (end * (end + 1) - start * (start + 1)) / 2
    return sum(
        num_rows * _row_macs(config, layer) + 2 * num_pairs * layer.num_heads * layer.head_dim
        for layer in layers
    )


def predicted_macs(
    base: DecoderConfig,
    aux: DecoderConfig,
    predictor: Predictor,
    num_tokens: int,
    *,
    sinks: int,
    window: int,
) -> float:
    """Of a prompt whose middle is predicted."""
    middle = num_tokens - window
    exact_rows = [(0, sinks), (middle, num_tokens)]
    first = predictor.first_layer
    macs = sum(prompt_macs(base, *rows, first_layer=first) for rows in exact_rows)
    macs += (middle - sinks) * predictor.num_macs
    if predictor.kind == "self":
        return macs + prompt_macs(base, 0, num_tokens, last_layer=predictor.depth)
    return macs + prompt_macs(aux, 0, middle, last_layer=predictor.depth)


def _row_macs(config: DecoderConfig, layer: LayerConfig) -> int:
    qkv = config.hidden_size * (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
    out = layer.num_heads * layer.head_dim * config.hidden_size
    return qkv + out + 3 * config.hidden_size * layer.ffn_size
