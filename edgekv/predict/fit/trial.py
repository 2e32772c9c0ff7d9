"""What the base says over predicted KV against what it says over exact KV, piece of text by piece.

The beginning of a piece is the context, whose middle is predicted. Two continuations are forced
through the base over that: what follows in the text, and a passage of the context said again, so
that recall counts as much as style. Differentiable in the predictor's arrays.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from edgekv.models.attention import Segment
from edgekv.models.decoder import Decoder, PackedBatch
from edgekv.models.exponential import softmax_parts
from edgekv.predict.features import Both, Place, Recorder
from edgekv.predict.forward import ArrayView, run
from edgekv.predict.predictor import Predictor

SINKS = 4
WINDOW = 32
_CONTINUATION = 128  # tokens, but a quarter of a short piece
_CONTEXT_SHARE_MIN = 1 / 8  # of a piece


@dataclass(frozen=True)
class Forced:
    """A continuation that is forced through behind a context.

    Attributes:
        rows: `(window + T - 1, hidden)` that enter the first predicted layer: the context's last,
            and all but the last of the continuation.
        target: `(T, vocab)`: what exact KV says of each of its tokens.
        entropy: Of that, nats a token.
    """

    rows: mx.array
    target: mx.array
    entropy: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays, to evaluate at once."""
        return [self.rows, self.target, self.entropy]


@dataclass(frozen=True, kw_only=True)
class Exact:
    """A piece of text, run exactly: what does not depend on the predictor.

    Attributes:
        context: Tokens of the context.
        seen: What the predictor looks at.
        view: Exact KV.
        follow: What follows in the text.
        repeat: A passage of the context, said again.
    """

    context: int
    seen: dict[Place, mx.array]
    view: ArrayView
    follow: Forced
    repeat: Forced


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a predictor loses on one piece, against exact KV.

    Attributes:
        text: KL divergence of the next token's distribution from that over exact KV, where the text
            goes on, nats a token.
        copy: The same where a passage is repeated.
        distance: L1 of keys and values, summed over layers and divided by their number: the loss of
            KV Prediction (arXiv 2410.08391), but of keys as they are cached, after RoPE.
    """

    text: mx.array
    copy: mx.array
    distance: mx.array


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Tries predictors on pieces of text. Uses MLX on the calling thread.

    Attributes:
        base: Whose KV is predicted.
        aux: From whose pass; `base` for kind "self".
        sinks: First tokens, computed exactly.
        window: Last tokens of the context, computed over predicted KV.
    """

    base: Decoder
    aux: Decoder
    sinks: int = SINKS
    window: int = WINDOW

    def exact(self, predictor: Predictor, token_ids: list[int], seed: int) -> Exact:
        """Run a piece exactly.

        Args:
            predictor: Whose features are recorded; its numbers do not matter.
            token_ids: The piece, at least three times as long as sinks and window.
            seed: Chooses how long the context is, of any length up to the piece's less a
                continuation, and what is repeated.
        """
        context, repeated = self._cut(len(token_ids), random.Random(seed))
        token_ids = token_ids[: context + len(repeated)]
        recorder, entering = Recorder(predictor.places), _Entering(predictor.first_layer)
        view = ArrayView()
        if predictor.kind == "self":
            hidden = run(self.base, token_ids, view, taps=Both(recorder, entering))
        else:
            hidden = run(self.base, token_ids, view, taps=entering)
            run(self.aux, token_ids, ArrayView(), last_layer=predictor.depth, taps=recorder)
        window = entering.rows[context - self.window : context]
        again = _Entering(predictor.first_layer)
        behind = view.copy()
        behind.offset = context
        echo = run(self.base, [token_ids[i] for i in repeated[:-1]], behind, taps=again)
        echo = mx.concatenate([hidden[context - 1 : context], echo])
        exact = Exact(
            context=context,
            seen=recorder.seen,
            view=view,
            follow=self._forced(window, entering.rows[context:-1], hidden[context - 1 : -1]),
            repeat=self._forced(window, again.rows, echo),
        )
        mx.eval(exact.follow.arrays, exact.repeat.arrays, list(exact.seen.values()))
        return exact

    def _cut(self, num_tokens: int, dice: random.Random) -> tuple[int, range]:
        """How many tokens are context, and which of them are said again."""
        size = min(_CONTINUATION, num_tokens // 4)
        shortest = max(size, int(_CONTEXT_SHARE_MIN * num_tokens), 2 * (self.sinks + self.window))
        context = dice.randint(shortest, num_tokens - size)
        start = dice.randint(0, context - size)
        return context, range(start, start + size)

    def _forced(self, window: mx.array, rows: mx.array, hidden: mx.array) -> Forced:
        logits = self.base.logits(hidden).astype(mx.float32)
        weights, total = softmax_parts(logits)
        logs = logits - mx.max(logits, axis=-1, keepdims=True) - mx.log(total)
        target = weights / total
        return Forced(mx.concatenate([window, rows]), target, -mx.mean(mx.sum(target * logs, -1)))

    def losses(self, predictor: Predictor, exact: Exact) -> Losses:
        """How a predictor does on a piece that was run exactly."""
        end = exact.context - self.window
        middle = ArrayView()
        middle.offset = self.sinks
        batch = PackedBatch([Segment(middle, end - self.sinks)])
        predicted = predictor.predict(
            self.base, exact.seen, (0, end), self.sinks, predictor.trail(), batch
        )
        view = exact.view.copy()
        distance = mx.array(0.0)
        for layer, pair in predicted.items():
            for ours, theirs in zip(pair, exact.view.arrays[layer], strict=True):
                distance = distance + mx.mean(mx.abs(ours - theirs[:, self.sinks : end]))
            view.offset = self.sinks
            view.write(layer, *pair)
        view.offset = end
        first = predictor.first_layer
        return Losses(
            text=self._divergence(view, exact.follow, first),
            copy=self._divergence(view, exact.repeat, first),
            distance=distance / self.base.config.num_layers,
        )

    def _divergence(self, view: ArrayView, forced: Forced, first_layer: int) -> mx.array:
        rows = self.base.run_layers(
            forced.rows,
            PackedBatch([Segment(view.copy(), forced.rows.shape[0])]),
            first_layer=first_layer,
        )
        logits = self.base.logits(rows[self.window - 1 :]).astype(mx.float32)
        weights, total = softmax_parts(mx.stop_gradient(logits))
        top = mx.max(logits, axis=-1, keepdims=True)
        logs = mx.stop_gradient(logits - top) - mx.log(total)
        value = -forced.entropy - mx.mean(mx.sum(forced.target * logs, axis=-1))
        # Its gradient is known, (softmax - target) / rows: to derive it anew, through a vocabulary
        # of tens of thousands, would take longer than the layers.
        slope = mx.sum((weights / total - forced.target) * logits) / logits.shape[0]
        return value + slope - mx.stop_gradient(slope)

    def quality(self, predictor: Predictor, pieces: Sequence[list[int]]) -> dict[str, float]:
        """Mean divergences on pieces, nats a token: `text_kl` and `copy_kl`, see `Losses`."""
        found = []
        for seed, piece in enumerate(pieces):
            losses = self.losses(predictor, self.exact(predictor, piece, seed))
            mx.eval(losses.text, losses.copy)
            found.append((float(losses.text), float(losses.copy)))
        text, copy = np.mean(found, axis=0)
        return {"text_kl": float(text), "copy_kl": float(copy)}


class _Entering:
    """Keeps the rows that enter a layer."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self.rows = mx.array(0.0)

    def see_hidden(self, depth: int, hidden: mx.array) -> None:
        if depth == self._layer:
            self.rows = hidden

    def see_qkv(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> None:
        del layer, queries, keys, values
