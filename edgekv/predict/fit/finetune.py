"""Improves a fitted predictor by gradient: what the base says over predicted KV is the measure.

The loss is that of a `Trial`: the divergence where the text goes on, that where a passage of it is
repeated, and the distance of keys and values. Models stay as they are.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.optimizers as optim

from edgekv.errors import PredictorCorrupt
from edgekv.predict.fit.checkpoint import load_partial, save_partial, with_prefix
from edgekv.predict.fit.trial import Exact, Trial
from edgekv.predict.predictor import Predictor

_CLIP = 1.0  # norm of the gradients
_TEXT_WEIGHT = 2.0  # where text goes on gradients are smaller than where it repeats
_DISTANCE_WEIGHT = 0.2  # it draws outputs to zero where they are uncertain
ANSWER_TOKENS = 32  # of an answer to a chat
_ANSWERED_AT_ONCE = 8  # pieces; one at a time, answers took half of a training
Params = dict[str, mx.array]


class Piece(NamedTuple):
    """What a step is taken on."""

    token_ids: list[int]  # a text
    is_prompt: bool = False  # or a chat's prompt, which the base answers
    answer: Sequence[int] = ()


class Finetune:
    """A training under way. Owned by who makes it; uses MLX on that thread."""

    def __init__(
        self,
        trial: Trial,
        predictor: Predictor,
        steps: int,
        before: int = 0,
        learning_rate: float = 0.004,
    ) -> None:
        """No step is taken yet.

        Of the steps (pieces of text) a tenth warm up, then a cosine falls to a tenth; `before` were
        taken in earlier trainings, and other pieces come now. `learning_rate` is by how much a step
        may move an output, about, at its peak.
        """
        self.step = 0
        self._trial, self._predictor, self._steps, self._before = trial, predictor, steps, before
        self._params = {name: a * _num_inputs(a) for name, a in predictor.arrays.items()}
        warm = max(1, steps // 10)
        rise = optim.linear_schedule(learning_rate / warm, learning_rate, warm)
        fall = optim.cosine_decay(learning_rate, max(1, steps - warm), learning_rate / 10)
        schedule = optim.join_schedules([rise, fall], [warm])
        self._optimizer = optim.AdamW(learning_rate=schedule, weight_decay=0.0)
        self._optimizer.init(self._params)
        self._gradient = mx.value_and_grad(self._loss)

    def train(
        self, pieces: Iterator[Piece], watch: Callable[[int, float], object] | None = None
    ) -> Predictor:
        """Train on pieces of text until all steps are done; return the predictor.

        `watch` is told after every step how many are done, and the loss.
        """
        while left := self._steps - self.step:
            group = list(itertools.islice(pieces, min(_ANSWERED_AT_ONCE, left)))
            if not group:
                break
            for piece in self._answered(group):
                loss = self.learn(piece)
                if watch is not None:
                    watch(self.step, loss)
        return self._with(self._params)

    def _answered(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces of the next steps, with the base's answers to those that are prompts."""
        seeds = range(self._before + self.step, self._before + self.step + len(pieces))
        prompts = [
            (each.token_ids, seed)
            for each, seed in zip(pieces, seeds, strict=True)
            if each.is_prompt
        ]
        answers = iter(self._trial.answers(prompts, ANSWER_TOKENS))
        return [each._replace(answer=next(answers)) if each.is_prompt else each for each in pieces]

    def learn(self, piece: Piece) -> float:
        """Take one step; return the loss.

        Raises:
            PredictorCorrupt: That is not finite: the training diverged.
        """
        seed, token_ids = self._before + self.step, [*piece.token_ids, *piece.answer]
        context = len(piece.token_ids) if piece.is_prompt else None
        exact = self._trial.exact(self._predictor, token_ids, seed, context)
        loss, gradients = self._gradient(self._params, exact)
        gradients, _ = optim.clip_grad_norm(gradients, _CLIP)  # type: ignore[no-untyped-call]
        self._params = self._optimizer.apply_gradients(gradients, self._params)
        mx.eval(self._params, self._optimizer.state, loss)
        self.step += 1
        if not math.isfinite(float(loss)):
            raise PredictorCorrupt(f"the training diverged at step {self.step}")
        return float(loss)

    def _loss(self, params: Params, exact: Exact) -> mx.array:
        losses = self._trial.losses(self._with(params), exact)
        return _TEXT_WEIGHT * losses.text + losses.copy + _DISTANCE_WEIGHT * losses.distance

    def _with(self, params: Params) -> Predictor:
        return self._predictor.mapped(lambda name, array: params[name] / _num_inputs(array))

    # --- checkpoints ---

    def save(self, path: Path, key: str) -> None:
        """Write everything that the next step needs; `key` names what is trained."""
        arrays = {f"param.{name}": array for name, array in self._params.items()}
        for name in self._params:
            for moment, array in self._optimizer.state[name].items():
                arrays[f"{moment}.{name}"] = array
        save_partial(path, key, {"step": self.step, **arrays})

    def resume(self, path: Path, key: str) -> None:
        """Take in what `save` wrote, if it is there, whole, and of the same training."""
        arrays = load_partial(path, key)
        if arrays is None:
            return
        self.step = int(arrays["step"])
        self._params = with_prefix("param.", arrays)
        for name in self._params:
            for moment in self._optimizer.state[name]:
                self._optimizer.state[name][moment] = arrays[f"{moment}.{name}"]
        self._optimizer.state["step"] = mx.array(self.step, dtype=mx.uint64)


def _num_inputs(array: mx.array) -> int:
    # Matrices are trained times their number of inputs: Adam moves every number alike, and a sum
    # over thousands of inputs would move by thousands of times that (it diverged).
    return array.shape[0] if array.ndim == 2 else 1
