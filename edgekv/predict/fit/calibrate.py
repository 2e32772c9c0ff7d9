"""How sure is sure enough: what greedy answers over predicted KV say, against exact KV.

An answer that is shown while every token's margin reaches a threshold is corrected if and only if
its first token that exact KV does not say was shown: if the least margin up to there reaches it.
That margin, its critical one, is all that a threshold needs to know of an answer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from edgekv.models.decoder import Decoder
from edgekv.predict.fit.chats import chat_prompts
from edgekv.predict.fit.trial import SINKS, Trial
from edgekv.predict.forward import ArrayView, predicted_context, run
from edgekv.predict.gate import TOKENS_MAX, Gate
from edgekv.predict.look import SHARE
from edgekv.predict.predictor import Predictor
from edgekv.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class AheadAnswer:
    """A greedy answer over predicted KV, as far as somebody looked."""

    num_prompt: int
    margins: tuple[float, ...]  # of each token: its logit less that of the next best
    agreed: tuple[bool, ...]  # whether exact KV says it too, behind the same tokens

    @property
    def critical(self) -> float | None:
        """The largest threshold at which it would be corrected; None: at none."""
        if all(self.agreed):
            return None
        return min(self.margins[: self.agreed.index(False) + 1])


def answer_ahead(
    base: Decoder,
    aux: Decoder,
    predictor: Predictor,
    prompt_ids: list[int],
    *,
    sinks: int,
    window: int,
    look: float,
    num_tokens: int,
    eos_ids: frozenset[int],
) -> AheadAnswer:
    """Answer greedily over predicted KV, up to `num_tokens`, then look what exact KV says."""
    view, rows = predicted_context(
        base, aux, predictor, prompt_ids, sinks=sinks, window=window, look=look
    )
    tokens: list[int] = []
    margins: list[float] = []
    hidden = rows[-1:]
    while len(tokens) < num_tokens:
        logits = np.array(base.logits(hidden)[0].astype(mx.float32))
        token = int(logits.argmax())
        second, first = np.partition(logits, -2)[-2:]
        tokens.append(token)
        margins.append(float(first - second))
        if token in eos_ids:
            break
        hidden = run(base, [token], view)
    exact = run(base, [*prompt_ids, *tokens[:-1]], ArrayView())[len(prompt_ids) - 1 :]
    said = np.array(mx.argmax(base.logits(exact), axis=-1))
    agreed = tuple(bool(ours == theirs) for ours, theirs in zip(tokens, said, strict=True))
    return AheadAnswer(num_prompt=len(prompt_ids), margins=tuple(margins), agreed=agreed)


def calibrate(
    trial: Trial,
    predictor: Predictor,
    tokenizer: Tokenizer,
    pieces: Iterable[list[int]],
    watch: Callable[[int], None],
) -> Gate:
    """Answer a chat about each piece of text, and see where answers over predicted KV go wrong."""
    answers = []
    shortest = 2 * (SINKS + trial.window)
    for prompt_ids in chat_prompts(tokenizer, pieces, shortest=shortest):
        answers.append(
            answer_ahead(
                trial.base,
                trial.aux,
                predictor,
                prompt_ids,
                sinks=SINKS,
                window=trial.window,
                look=SHARE,
                num_tokens=TOKENS_MAX,
                eos_ids=tokenizer.eos_ids,
            )
        )
        mx.clear_cache()  # else it keeps buffers of every length
        watch(len(answers))
    return gate_of(answers)


def gate_of(answers: Sequence[AheadAnswer]) -> Gate:
    """What answers say of the predictor that made them."""
    found = [answer.critical for answer in answers]
    critical = sorted(margin for margin in found if margin is not None)
    return Gate(num_answers=len(answers), critical=tuple(critical))
