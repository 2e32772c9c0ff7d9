"""Improves a fitted predictor by gradient: what the base says over predicted KV is the measure.

Each step takes one piece of text. Its beginning is the context, whose middle is predicted; the rest
is forced through the base over that. The loss is the KL divergence of the base's next-token
distributions over predicted KV from those over exact KV, and the paper's distance of keys and
values, L1 with weight 1 / number of layers (arXiv 2410.08391; here of keys as they are cached,
after RoPE). Models stay as they are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim

from edgekv.models.attention import Segment
from edgekv.models.decoder import Decoder, PackedBatch
from edgekv.predict.artifact import load_partial, save_partial
from edgekv.predict.features import Place, Recorder
from edgekv.predict.forward import ArrayView, run
from edgekv.predict.predictor import Block, Predictor

CONTEXT_SHARE = 0.75  # of a piece
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
    learning_rate: float = 0.02
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
        base: A differentiable decoder.
        aux: Another one, or the base itself for kind "self".
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
        own = predictor.kind == "self"
        recorder = Recorder(predictor.places if own else frozenset())
        view = ArrayView()
        hidden = run(self.base, token_ids, view, taps=recorder)
        seen = recorder.seen
        if not own:
            other = Recorder(predictor.places)
            run(self.aux, token_ids, ArrayView(), last_layer=predictor.depth, taps=other)
            seen = other.seen
        context = int(CONTEXT_SHARE * len(token_ids))
        rows = self.base.embed(mx.array(token_ids, dtype=mx.uint32))
        if own:
            lower = ArrayView()
            rows = run(self.base, token_ids, lower, last_layer=predictor.depth)
        exact = _Exact(
            context=context,
            seen=seen,
            view=view,
            rows=rows,
            logits=self.base.logits(hidden[context - 1 :]),
        )
        mx.eval(exact.logits, exact.rows, list(seen.values()))
        return exact

    def _loss(self, params: Params, exact: "_Exact") -> mx.array:
        base, options = self.base, self.options
        predictor = _with_params(self.predictor, params)
        end = exact.context - options.window
        middle = ArrayView()
        middle.offset = options.sinks
        batch = PackedBatch([Segment(middle, end - options.sinks)])
        predicted = predictor.predict(
            base, exact.seen, (0, end), options.sinks, predictor.trail(), batch
        )
        view = exact.view.copy()
        for layer, (keys, values) in predicted.items():
            view.offset = options.sinks
            view.write(layer, keys, values)
        view.offset = end
        rows = base.run_layers(
            exact.rows[end:],
            PackedBatch([Segment(view, exact.rows.shape[0] - end)]),
            first_layer=predictor.first_layer,
        )
        logits = base.logits(rows[options.window - 1 :])
        target = mx.softmax(exact.logits.astype(mx.float32), axis=-1)
        logs = logits.astype(mx.float32) - mx.logsumexp(
            logits.astype(mx.float32), axis=-1, keepdims=True
        )
        exact_logs = mx.log(mx.maximum(target, 1e-9))
        divergence = mx.mean(mx.sum(target * (exact_logs - logs), axis=-1))
        return divergence + self._distance(predicted, exact, end)

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


@dataclass(frozen=True, kw_only=True)
class _Exact:
    """Of one piece of text.

    Attributes:
        context: Tokens of the context.
        seen: What the predictor looks at.
        view: Exact KV.
        rows: `(T, hidden)` that enter the first predicted layer.
        logits: From the context's last token on.
    """

    context: int
    seen: dict[Place, mx.array]
    view: ArrayView
    rows: mx.array
    logits: mx.array


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
