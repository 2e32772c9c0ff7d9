"""mlx-lm as the slow twin: the same folder, the same tokens, its logits."""

import pathlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np


def load_mlx_lm(folder: pathlib.Path) -> Any:
    """mlx-lm's model of a folder. Imported here because that costs more than a second."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return model


def mlx_lm_logits(folder: pathlib.Path, ids: Sequence[int]) -> np.ndarray:
    """Logits `(T, vocab)` that mlx-lm computes for a text in one go, f32."""
    logits = load_mlx_lm(folder)(mx.array([list(ids)]))
    return np.array(logits[0].astype(mx.float32))
