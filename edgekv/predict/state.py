"""What a session keeps beside its KV while part of that is predicted.

Kind "self" keeps the hidden states after the base's first layers, from which repair goes on. Kind
"aux" keeps the auxiliary's own KV. Either is KV of a sort, and lives in a pool of its own, under a
budget of its own: hidden states as one layer's keys (first half) and values (second half).
"""

from dataclasses import dataclass

import mlx.core as mx

from edgekv.kv.layout import Heads, KVLayout
from edgekv.kv.session_kv import SessionKV
from edgekv.kv.view import StagedView
from edgekv.models.decoder import Decoder
from edgekv.predict.features import Trail
from edgekv.predict.gate import NO_ANSWERS, Gate
from edgekv.predict.predictor import Predictor


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A predictor and the models that it connects. Values, shared by all sessions."""

    predictor: Predictor  # the maps
    aux: Decoder  # the auxiliary; the base itself for kind "self"
    row_share: float  # what a predicted row costs, relative to an exact one
    gate: Gate = NO_ANSWERS  # how sure is sure enough


@dataclass(kw_only=True)
class PredictedState:
    """Of one session with predicted KV. Owned by the engine thread."""

    side: SessionKV  # hidden states, or the auxiliary's KV
    has_aux: bool  # the auxiliary is a model of its own, and may lag behind
    trail: Trail  # behind the rows that the auxiliary, or of kind "self" the base, saw last
    # Tokens, from 0, that these rows, `side` and `trail` know of, or will when the step in flight
    # ends.
    side_end: int = 0
    # Of kind "self": tokens, from 0, whose hidden states are in `side`, however many have KV.
    kept_end: int = 0


def side_layout(prediction: Prediction, base: KVLayout) -> KVLayout:
    """Shapes of what is kept beside a session's KV."""
    config = prediction.aux.config
    if prediction.predictor.kind == "self":
        heads: tuple[Heads, ...] = (Heads(1, *(config.hidden_size // 2,) * 2),)
    else:
        heads = config.kv_heads[: prediction.predictor.depth]
    return KVLayout(heads=heads, dtype_bytes=base.dtype_bytes, context_max=base.context_max)


class StagedState:
    """What a step adds to a session's state, not yet the session's until committed."""

    def __init__(self, state: PredictedState) -> None:
        self.state = state
        self.view = StagedView(state.side, 0)
        self.trail = state.trail

    def keep(self, start: int, hidden: mx.array) -> None:
        """Hidden states `(rows, hidden)` of the tokens from `start` on."""
        first, second = mx.split(hidden, 2, axis=-1)
        self.view.at(start).write(0, first[None], second[None])

    def kept(self, start: int, end: int) -> mx.array:
        """Hidden states of the tokens `[start, end)`."""
        first, second = self.view.read(0, end)
        return mx.concatenate([first[0, start:], second[0, start:]], axis=-1)

    def commit(self) -> list[mx.array]:
        """Make it the session's; the arrays returned must be evaluated."""
        self.state.trail = self.trail
        return [*self.view.commit(), *self.trail.rows.values()]
