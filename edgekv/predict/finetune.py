"""Improves a fitted predictor by gradient: what the base says over predicted KV is the measure.

Each step takes one piece of text. Its beginning is the context, whose middle is predicted. Two
continuations are forced through the base over that: what follows in the text, and a passage of the
context said again, so that recall is trained as much as style. The loss is the KL divergence of the
base's next-token distributions over predicted KV from those over exact KV, and the paper's distance
of keys and values, L1 with weight 1 / number of layers (arXiv 2410.08391; here of keys as they are
cached, after RoPE). Models stay as they are.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim

from edgekv.models.attention import Segment
from edgekv.models.decoder import Decoder, PackedBatch
from edgekv.models.exponential import softmax_parts
from edgekv.predict.artifact import load_partial, save_partial
from edgekv.predict.features import Both, Place, Recorder
from edgekv.predict.forward import ArrayView, run
from edgekv.predict.predictor import Block, Predictor

_CONTEXT_SHARES = (0.6, 0.75)  # of a piece, evenly between
_CLIP = 1.0  # norm of the gradients
Watch = Callable[[int, float], None]  # steps done, loss
Params = dict[str, mx.array]


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """How it is trained.

    Attributes:
        steps: Pieces of text.
        learning_rate: By how much one step may move an output, about, at its peak; a tenth of the
            steps warm up, then a cosine to a tenth of it.
        sinks: First tokens, computed exactly.
        window: Last tokens of the context, computed over predicted KV.
    """

    steps: int
    learning_rate: float = 0.004
    sinks: int = 4
    window: int = 32

    @property
    def schedule(self) -> Callable[[mx.array], mx.array]:
        """Learning rate by step."""
        warm = max(1, self.steps // 10)
        rise = optim.linear_schedule(self.learning_rate / warm, self.learning_rate, warm)
        fall = optim.cosine_decay(
            self.learning_rate, max(1, self.steps - warm), self.learning_rate / 10
        )
        return optim.join_schedules([rise, fall], [warm])


@dataclass
class Finetune:
    """A training under way. Owned by who makes it; uses MLX on that thread.

    Args:
        base: Whose KV is predicted.
        aux: From whose pass; `base` for kind "self".
        predictor: Where it begins.
        options: How it is trained.
    """

    base: Decoder
    aux: Decoder
    predictor: Predictor
    options: FinetuneOptions
    step: int = 0
    _params: Params = field(init=False)
    _optimizer: optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self._params = _params_of(self.predictor)
        self._optimizer = optim.AdamW(learning_rate=self.options.schedule, weight_decay=0.0)
        self._optimizer.init(self._params)
        self._gradient = mx.value_and_grad(self._loss)

    def train(self, pieces: Iterator[list[int]], watch: Watch | None = None) -> Predictor:
        """Train on pieces of text until all steps are done; return the predictor."""
        for piece in pieces:
            if self.step >= self.options.steps:
                break
            loss = self.learn(piece)
            if watch is not None:
                watch(self.step, loss)
        return self.current()

    def learn(self, token_ids: list[int]) -> float:
        """One step; returns the loss."""
        exact = self._exact(token_ids)
        loss, gradients = self._gradient(self._params, exact)
        gradients, _ = optim.clip_grad_norm(gradients, _CLIP)  # type: ignore[no-untyped-call]
        self._params = self._optimizer.apply_gradients(gradients, self._params)
        mx.eval(self._params, self._optimizer.state, loss)
        self.step += 1
        return float(loss.item())  # type: ignore[arg-type]  # a real number

    def current(self) -> Predictor:
        """The predictor as it is by now."""
        return _with_params(self.predictor, self._params)

    # --- one step ---

    def _exact(self, token_ids: list[int]) -> "_Exact":
        """What does not depend on the predictor."""
        predictor = self.predictor
        recorder, entering = Recorder(predictor.places), _Entering(predictor.first_layer)
        view = ArrayView()
        if predictor.kind == "self":
            hidden = run(self.base, token_ids, view, taps=Both(recorder, entering))
        else:
            hidden = run(self.base, token_ids, view, taps=entering)
            run(self.aux, token_ids, ArrayView(), last_layer=predictor.depth, taps=recorder)
        context, repeated = self._cut(len(token_ids))
        window = entering.rows[context - self.options.window : context]
        again = _Entering(predictor.first_layer)
        behind = view.copy()
        behind.offset = context
        echo = run(self.base, [token_ids[i] for i in repeated[:-1]], behind, taps=again)
        last = hidden[context - 1 : context]
        exact = _Exact(
            context=context,
            seen=recorder.seen,
            view=view,
            follow=self._forced(window, entering.rows[context:-1], hidden[context - 1 : -1]),
            repeat=self._forced(window, again.rows, mx.concatenate([last, echo])),
        )
        mx.eval(exact.follow.arrays, exact.repeat.arrays, list(exact.seen.values()))
        return exact

    def _cut(self, num_tokens: int) -> tuple[int, range]:
        """Tokens of context, and which of them are said again; the same after a resumption."""
        dice = random.Random(self.step)
        low, high = (int(share * num_tokens) for share in _CONTEXT_SHARES)
        context = dice.randint(low, high)
        size = num_tokens - context
        start = dice.randint(0, context - size)
        return context, range(start, start + size)

    def _forced(self, window: mx.array, rows: mx.array, hidden: mx.array) -> "_Forced":
        logits = self.base.logits(hidden).astype(mx.float32)
        weights, total = softmax_parts(logits)
        logs = logits - mx.max(logits, axis=-1, keepdims=True) - mx.log(total)
        target = weights / total
        return _Forced(mx.concatenate([window, rows]), target, -mx.mean(mx.sum(target * logs, -1)))

    def _loss(self, params: Params, exact: "_Exact") -> mx.array:
        predictor = _with_params(self.predictor, params)
        sinks, end = self.options.sinks, exact.context - self.options.window
        middle = ArrayView()
        middle.offset = sinks
        batch = PackedBatch([Segment(middle, end - sinks)])
        predicted = predictor.predict(
            self.base, exact.seen, (0, end), sinks, predictor.trail(), batch
        )
        view = exact.view.copy()
        for layer, (keys, values) in predicted.items():
            view.offset = sinks
            view.write(layer, keys, values)
        view.offset = end
        divergence = self._divergence(view, exact.follow) + self._divergence(view, exact.repeat)
        return divergence + self._distance(predicted, exact, end)

    def _divergence(self, view: ArrayView, forced: "_Forced") -> mx.array:
        """KL divergence of the next token's distributions over a view from those over exact KV."""
        rows = self.base.run_layers(
            forced.rows,
            PackedBatch([Segment(view.copy(), forced.rows.shape[0])]),
            first_layer=self.predictor.first_layer,
        )
        logits = self.base.logits(rows[self.options.window - 1 :]).astype(mx.float32)
        weights, total = softmax_parts(mx.stop_gradient(logits))
        top = mx.max(logits, axis=-1, keepdims=True)
        logs = mx.stop_gradient(logits - top) - mx.log(total)
        value = -forced.entropy - mx.mean(mx.sum(forced.target * logs, axis=-1))
        # Its gradient is known, (softmax - target) / rows: to derive it anew, through a vocabulary
        # of tens of thousands, would take longer than the layers.
        slope = mx.sum((weights / total - forced.target) * logits) / logits.shape[0]
        return value + slope - mx.stop_gradient(slope)

    def _distance(
        self, predicted: dict[int, tuple[mx.array, mx.array]], exact: "_Exact", end: int
    ) -> mx.array:
        """L1 of keys and values, by 1 / number of layers."""
        sinks = self.options.sinks
        total = mx.array(0.0)
        for layer, pair in predicted.items():
            for ours, theirs in zip(pair, exact.view.arrays[layer], strict=True):
                total = total + mx.mean(mx.abs(ours - theirs[:, sinks:end]))
        return total / self.base.config.num_layers

    # --- checkpoints ---

    def save(self, path: Path, key: str) -> None:
        """Write everything that the next step needs; `key` names what is trained."""
        arrays = {f"param.{name}": array for name, array in self._params.items()}
        for name in self._params:
            for moment, array in self._optimizer.state[name].items():
                arrays[f"state.{name}.{moment}"] = array
        save_partial(path, key, arrays, step=self.step)

    def resume(self, path: Path, key: str) -> None:
        """Take in what `save` wrote, if it is there, whole, and of the same training."""
        found = load_partial(path, key)
        if found is None:
            return
        arrays, metadata = found
        self.step = int(metadata["step"])
        self._params = {name: arrays[f"param.{name}"] for name in self._params}
        for name in self._params:
            for moment in self._optimizer.state[name]:
                self._optimizer.state[name][moment] = arrays[f"state.{name}.{moment}"]
        self._optimizer.state["step"] = mx.array(self.step, dtype=mx.uint64)


@dataclass(frozen=True)
class _Forced:
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
        return [self.rows, self.target, self.entropy]


@dataclass(frozen=True, kw_only=True)
class _Exact:
    """Of one piece of text.

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
    follow: _Forced
    repeat: _Forced


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


def _params_of(predictor: Predictor) -> Params:
    # Matrices times their number of inputs: Adam moves every number alike, and a sum over thousands
    # of inputs would move by thousands of times that (it diverged).
    params = {}
    for index, block in enumerate(predictor.blocks):
        if block.down is not None:
            params[f"{index}:down"] = block.down * block.down.shape[0]
        params[f"{index}:up"] = block.up * block.up.shape[0]
        params[f"{index}:bias"] = block.bias
    return params


def _with_params(predictor: Predictor, params: Params) -> Predictor:
    blocks: list[Block] = [
        replace(
            block,
            down=None if block.down is None else params[f"{index}:down"] / block.down.shape[0],
            up=params[f"{index}:up"] / block.up.shape[0],
            bias=params[f"{index}:bias"],
        )
        for index, block in enumerate(predictor.blocks)
    ]
    return Predictor(predictor.kind, predictor.depth, tuple(blocks))
