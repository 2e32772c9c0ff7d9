"""What the base says over predicted KV against what it says over exact KV, piece of text by piece.

The beginning of a piece is the context, whose middle is predicted. Two continuations are forced
through the base over that: what follows in the text, and a passage of the context said again, so
that recall counts as much as style. Of a chat the context is the prompt, and the base's own answer
follows. Differentiable in the predictor's arrays.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from edgekv.models.attention import Segment
from edgekv.models.batch import PackedBatch
from edgekv.models.decoder import Decoder
from edgekv.models.exponential import softmax_parts
from edgekv.predict.features import Place, Recorder
from edgekv.predict.forward import ArrayView, run, run_next
from edgekv.predict.predictor import Predictor

SINKS = 4  # of a context: first tokens, computed exactly
_CONTINUATION = 128  # tokens, but a quarter of a short piece
_CONTEXT_SHARE_MIN = 1 / 8  # of a piece


@dataclass(frozen=True)
class Forced:
    """A continuation that is forced through behind a context."""

    # `(window + T - 1, hidden)` that enter the first predicted layer: the context's last, and all
    # but the last of the continuation.
    rows: mx.array
    target: mx.array  # `(T, vocab)`: what exact KV says of each of its tokens
    entropy: mx.array  # of that, nats a token


@dataclass(frozen=True, kw_only=True)
class Exact:
    """A piece of text, run exactly: what does not depend on the predictor."""

    context: int  # tokens of the context
    seen: dict[Place, mx.array]  # what the predictor looks at
    view: ArrayView  # exact KV
    follow: Forced  # what follows in the text
    repeat: Forced  # a passage of the context, said again


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a predictor loses on one piece, against exact KV."""

    # KL divergence of the next token's distribution from that over exact KV, where the text goes
    # on, nats a token.
    text: mx.array
    copy: mx.array  # the same where a passage is repeated
    # L1 of keys and values, summed over layers and divided by their number: the loss of KV
    # Prediction (arXiv 2410.08391), but of keys as they are cached, after RoPE.
    distance: mx.array


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Tries predictors on pieces of text. Uses MLX on the calling thread."""

    base: Decoder  # whose KV is predicted
    aux: Decoder  # from whose pass; `base` for kind "self"
    window: int = 32  # last tokens of the context, computed over predicted KV

    def exact(
        self, predictor: Predictor, token_ids: list[int], seed: int, context: int | None = None
    ) -> Exact:
        """Run a piece exactly.

        Args:
            predictor: Whose features are recorded; its numbers do not matter.
            token_ids: The piece, at least three times as long as sinks and window.
            seed: Chooses how long the context is, of any length up to the piece's less a
                continuation, and what is repeated.
            context: How long it is, where that is given.
        """
        context, end, repeated = self._cut(len(token_ids), random.Random(seed), context)
        token_ids = token_ids[:end]
        view, recorder = ArrayView(), Recorder(predictor.places)
        below = recorder if predictor.kind == "self" else None
        rows, hidden = self._run(token_ids, view, predictor.first_layer, below)
        if below is None:
            run(self.aux, token_ids, ArrayView(), last_layer=predictor.depth, taps=recorder)
        again, echo = self._run(
            [token_ids[i] for i in repeated[:-1]], view.copy(context), predictor.first_layer
        )
        echo = mx.concatenate([hidden[context - 1 : context], echo])
        window = rows[context - self.window : context]
        exact = Exact(
            context=context,
            seen=recorder.seen,
            view=view,
            follow=self._forced(window, rows[context:-1], hidden[context - 1 : -1]),
            repeat=self._forced(window, again, echo),
        )
        mx.eval(vars(exact.follow), vars(exact.repeat), exact.seen)
        return exact

    def answers(self, prompts: Sequence[tuple[list[int], int]], num_tokens: int) -> list[list[int]]:
        """What the base answers to prompts over exact KV, each drawn at temperature 1 by its seed.

        All at once, so that the weights are read once for all of them.
        """
        if not prompts:
            return []
        dice = [np.random.default_rng(seed) for _, seed in prompts]
        views, answers = [ArrayView() for _ in prompts], [list[int]() for _ in prompts]
        rows = [
            run(self.base, ids, view)[-1:] for view, (ids, _) in zip(views, prompts, strict=True)
        ]
        hidden = mx.concatenate(rows)
        for _ in range(num_tokens):
            logits = np.array(self.base.logits(hidden).astype(mx.float32))
            drawn = np.argmax(logits + [one.gumbel(size=logits.shape[1]) for one in dice], axis=1)
            for answer, token in zip(answers, drawn, strict=True):
                answer.append(int(token))
            hidden = run_next(self.base, drawn, views)
        return answers

    def _cut(
        self, num_tokens: int, dice: random.Random, context: int | None
    ) -> tuple[int, int, range]:
        """How many tokens are context, where what follows ends, and which are said again."""
        size = min(_CONTINUATION, num_tokens // 4)
        end = num_tokens
        if context is None:
            shortest = max(size, int(_CONTEXT_SHARE_MIN * num_tokens), 2 * (SINKS + self.window))
            context = dice.randint(shortest, num_tokens - size)
            end = context + size
        start = dice.randint(0, context - size)
        return context, end, range(start, start + size)

    def _run(
        self, token_ids: list[int], view: ArrayView, layer: int, below: Recorder | None = None
    ) -> tuple[mx.array, mx.array]:
        """Run tokens; return their rows as they enter a layer, below which is recorded, and all."""
        batch = PackedBatch([Segment(view, len(token_ids))])
        rows = self.base.embed(mx.array(token_ids, dtype=mx.uint32))
        rows = self.base.run_layers(rows, batch, last_layer=layer, taps=below)
        return rows, self.base.run_layers(rows, batch, first_layer=layer)

    def _forced(self, window: mx.array, rows: mx.array, hidden: mx.array) -> Forced:
        logits = self.base.logits(hidden).astype(mx.float32)
        weights, total = softmax_parts(logits)
        logs = logits - mx.max(logits, axis=-1, keepdims=True) - mx.log(total)
        target = weights / total
        return Forced(mx.concatenate([window, rows]), target, -mx.mean(mx.sum(target * logs, -1)))

    def losses(self, predictor: Predictor, exact: Exact) -> Losses:
        """How a predictor does on a piece that was run exactly."""
        end = exact.context - self.window
        view, distance = exact.view.copy(SINKS), mx.array(0.0)
        trail, first = predictor.trail(), predictor.first_layer
        predictor.predict(self.base, exact.seen, (0, end), SINKS, trail, view)
        for layer in range(first, self.base.config.num_layers):
            for ours, theirs in zip(view.arrays[layer], exact.view.arrays[layer], strict=True):
                distance = distance + mx.mean(mx.abs(ours[:, SINKS:end] - theirs[:, SINKS:end]))
        view.offset = end
        return Losses(
            text=self._divergence(view, exact.follow, first),
            copy=self._divergence(view, exact.repeat, first),
            distance=distance / self.base.config.num_layers,
        )

    def _divergence(self, view: ArrayView, forced: Forced, first_layer: int) -> mx.array:
        batch = PackedBatch([Segment(view.copy(view.offset), forced.rows.shape[0])])
        rows = self.base.run_layers(forced.rows, batch, first_layer=first_layer)
        logits = self.base.logits(rows[self.window - 1 :]).astype(mx.float32)
        weights, total = softmax_parts(mx.stop_gradient(logits))
        top = mx.max(logits, axis=-1, keepdims=True)
        logs = mx.stop_gradient(logits - top) - mx.log(total)
        value = -forced.entropy - mx.mean(mx.sum(forced.target * logs, axis=-1))
        # Its gradient is known, (softmax - target) / rows: to derive it anew, through a vocabulary
        # of tens of thousands, would take longer than the layers.
        slope = mx.sum((weights / total - forced.target) * logits) / logits.shape[0]
        return value + slope - mx.stop_gradient(slope)

    def quality(
        self,
        predictor: Predictor,
        pieces: Sequence[list[int]],
        watch: Callable[[int], None] = lambda _: None,
    ) -> dict[str, float]:
        """Mean divergences on pieces, nats a token: `text_kl` and `copy_kl`, see `Losses`.

        `watch` is told how many pieces are done.
        """
        found = []
        for seed, piece in enumerate(pieces):
            losses = self.losses(predictor, self.exact(predictor, piece, seed))
            mx.eval(losses.text, losses.copy)
            found.append((float(losses.text), float(losses.copy)))
            watch(len(found))
        text, copy = map(float, np.mean(found, axis=0))
        return {"text_kl": text, "copy_kl": copy}
