"""How sure is sure enough: what is said over predicted KV, against what exact KV says.

An answer is asked for over predicted KV, and again while parts of that are exact (`gate`). Until it
is wrong its tokens are those of the exact answer; so which tokens are shown at a threshold, and
whether one of them is wrong, is known for every threshold from the margins of each asking behind
the exact answer's tokens. The largest threshold at which an answer would be corrected, its critical
one, is all that is kept of it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from edgekv.models.decoder import Decoder
from edgekv.predict.fit.chats import chat_prompts
from edgekv.predict.fit.trial import SINKS, Trial
from edgekv.predict.forward import ArrayView, predicted_context, run
from edgekv.predict.gate import ASKED_AGAIN, TOKENS_MAX, Gate, margin_share
from edgekv.predict.look import SHARE
from edgekv.predict.predictor import Predictor
from edgekv.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What is said over KV that is predicted in part, behind the tokens of the exact answer."""

    predicted_share: float  # of the tokens that were predicted at first
    margins: tuple[float, ...]  # of each token: its logit less that of the next best
    agreed: tuple[bool, ...]  # whether it is the exact answer's
    ends: tuple[bool, ...]  # whether it would end the answer, and so is not shown

    @property
    def thresholds(self) -> list[float]:
        """Of each token the largest one at which it is shown."""
        return [margin / margin_share(self.predicted_share) for margin in self.margins]

    def num_shown(self, first: int, threshold: float) -> int:
        """Up to which token it is shown, from the `first` on, if each is the exact answer's."""
        for index, largest in enumerate(self.thresholds[first:], first):
            if self.ends[index] or largest < threshold:
                return index
            if not self.agreed[index]:
                return index + 1
        return len(self.margins)


@dataclass(frozen=True, kw_only=True)
class AheadAnswer:
    """A greedy answer, asked for over predicted KV as far as somebody looked."""

    num_prompt: int
    askings: tuple[Asking, ...]  # in order; of the first all is predicted

    def shown(self, threshold: float) -> tuple[int, bool]:
        """How many tokens are shown ahead at a threshold, and whether the last of them is wrong."""
        count = 0
        for asking in self.askings:
            count = asking.num_shown(before := count, threshold)
            if count > before and not asking.agreed[count - 1]:
                return count, True
        return count, False

    @property
    def critical(self) -> float | None:
        """The largest threshold at which it would be corrected; None: at none."""
        thresholds = {each for asking in self.askings for each in asking.thresholds}
        return max((each for each in thresholds if self.shown(each)[1]), default=None)


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
    """Answer greedily over exact KV, up to `num_tokens`, then ask what predicted KV says."""
    exact, end = ArrayView(), len(prompt_ids) - window
    rows = run(base, prompt_ids, exact)[-1:]
    tokens = _likeliest(base, rows)
    while len(tokens) < num_tokens and tokens[-1] not in eos_ids:
        tokens += _likeliest(base, run(base, tokens[-1:], exact))
    predicted, _ = predicted_context(
        base, aux, predictor, prompt_ids, sinks=sinks, window=window, look=look
    )
    askings = []
    for share in (1.0, *ASKED_AGAIN):
        first_predicted = end - int(share * (end - sinks))
        view = predicted.copy(sinks)
        for layer, (keys, values) in exact.arrays.items():
            view.write(layer, keys[:, sinks:first_predicted], values[:, sinks:first_predicted])
        view.offset = end
        rows = run(base, [*prompt_ids[end:], *tokens[:-1]], view)[window - 1 :]
        askings.append(_asking(share, np.array(base.logits(rows)), tokens, eos_ids))
    return AheadAnswer(num_prompt=len(prompt_ids), askings=tuple(askings))


def _likeliest(base: Decoder, rows: mx.array) -> list[int]:
    return [int(token) for token in np.array(mx.argmax(base.logits(rows), axis=-1))]


def _asking(share: float, logits: np.ndarray, tokens: list[int], eos_ids: frozenset[int]) -> Asking:
    said = logits.argmax(axis=-1).tolist()
    second, first = np.partition(logits, -2, axis=-1)[:, -2:].T
    return Asking(
        predicted_share=share,
        margins=tuple((first - second).tolist()),
        agreed=tuple(ours == theirs for ours, theirs in zip(said, tokens, strict=True)),
        ends=tuple(token in eos_ids for token in said),
    )


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
