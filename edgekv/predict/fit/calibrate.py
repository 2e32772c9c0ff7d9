"""How sure is sure enough: what is said over predicted KV, against what exact KV says.

An answer is asked for over predicted KV, and again while parts of that are exact (`gate`). Until it
is wrong its tokens are those of the exact answer; so which tokens are shown at a threshold, and
whether one of them is wrong, is known for every threshold from how sure each asking is behind
the exact answer's tokens. The largest threshold at which an answer would be corrected, its critical
one, is all that is kept of it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from edgekv.kv.provenance import ProvenanceMap
from edgekv.models.decoder import Decoder
from edgekv.predict.fit.chats import chat_prompts
from edgekv.predict.fit.trial import SINKS, Trial
from edgekv.predict.forward import ArrayView, predicted_context, run
from edgekv.predict.gate import ASKED_AGAIN, NUM_ASKINGS, TOKENS_MAX, Gate, certainty
from edgekv.predict.look import ROWS_AGAIN, SHARE, Glance
from edgekv.predict.predictor import Predictor
from edgekv.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What is said over KV that is predicted in part, behind the tokens of the exact answer."""

    predicted_share: float  # of the tokens that were predicted at first
    certain: tuple[float, ...]  # how sure each token is, see `gate.certainty`
    agreed: tuple[bool, ...]  # whether it is the exact answer's
    ends: tuple[bool, ...]  # whether it would end the answer, and so is not shown

    def num_shown(self, first: int, threshold: float) -> int:
        """Up to which token it is shown, from the `first` on, if each is the exact answer's."""
        for index, certain in enumerate(self.certain[first:], first):
            if self.ends[index] or certain < threshold:
                return index
            if not self.agreed[index]:
                return index + 1
        return len(self.certain)


@dataclass(frozen=True, kw_only=True)
class AheadAnswer:
    """A greedy answer, asked for over predicted KV as far as somebody looked."""

    num_prompt: int
    askings: tuple[Asking, ...]  # in order; of the first all is predicted

    def shown(self, threshold: float, num_askings: int = NUM_ASKINGS) -> tuple[int, bool]:
        """How many tokens are shown ahead at a threshold, and whether the last of them is wrong."""
        count = 0
        for asking in self.askings[:num_askings]:
            count = asking.num_shown(before := count, threshold)
            if count > before and not asking.agreed[count - 1]:
                return count, True
        return count, False

    def critical(self, num_askings: int = NUM_ASKINGS) -> float | None:
        """The largest threshold at which it would be corrected; None: at none."""
        found = {each for asking in self.askings[:num_askings] for each in asking.certain}
        wrong = (each for each in found if self.shown(each, num_askings)[1])
        return max(wrong, default=None)


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
    tokens, exact = _answer(base, prompt_ids, num_tokens, eos_ids)
    end = len(prompt_ids) - window
    view, _, looked = predicted_context(
        base, aux, predictor, prompt_ids, sinks=sinks, window=window, look=look
    )
    provenance = ProvenanceMap()
    provenance.mark(0, len(prompt_ids) + len(tokens), "computed")
    provenance.mark(sinks, end, "predicted")
    for span in looked:
        provenance.mark(*span, "computed")
    asked, askings = [*prompt_ids, *tokens[:-1]], []
    for share in (1.0, *ASKED_AGAIN):
        first_predicted = end - int(share * (end - sinks))
        provenance.mark(0, first_predicted, "exact")
        for layer, pair in exact.arrays.items():
            keys, values = (array[:, sinks:first_predicted] for array in pair)
            view.at(sinks).write(layer, keys, values)
        view.offset = len(prompt_ids) - min(window, ROWS_AGAIN)
        first = len(prompt_ids) - 1 - view.offset  # of these rows, to say what comes next
        glance = Glance(first, len(tokens), first_layer=predictor.first_layer)
        logits = base.logits(run(base, asked[view.offset :], view, taps=glance)[first:])
        weights = np.array(glance.weights(base, view.at(len(prompt_ids) - 1)))
        margins = _margins(np.array(logits.astype(mx.float32)))
        said = _tokens(logits)
        certain = [
            certainty(margin, row, provenance) for margin, row in zip(margins, weights, strict=True)
        ]
        askings.append(
            Asking(
                predicted_share=share,
                certain=tuple(certain),
                agreed=tuple(ours == theirs for ours, theirs in zip(said, tokens, strict=True)),
                ends=tuple(token in eos_ids for token in said),
            )
        )
    return AheadAnswer(num_prompt=len(prompt_ids), askings=tuple(askings))


def _answer(
    base: Decoder, prompt_ids: list[int], num_tokens: int, eos_ids: frozenset[int]
) -> tuple[list[int], ArrayView]:
    """What it says, greedily, and its KV."""
    view = ArrayView()
    tokens = _tokens(base.logits(run(base, prompt_ids, view)[-1:]))
    while len(tokens) < num_tokens and tokens[-1] not in eos_ids:
        tokens += _tokens(base.logits(run(base, tokens[-1:], view)))
    return tokens, view


def _tokens(logits: mx.array) -> list[int]:
    return [int(token) for token in np.array(mx.argmax(logits, axis=-1))]


def _margins(logits: np.ndarray) -> list[float]:
    """Of each row: the best logit less the next."""
    second, first = np.partition(logits, -2, axis=-1)[:, -2:].T
    return [float(margin) for margin in first - second]


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
    critical = []
    for num_askings in range(1, NUM_ASKINGS + 1):
        found = [answer.critical(num_askings) for answer in answers]
        critical.append(tuple(sorted(each for each in found if each is not None)))
    return Gate(num_answers=len(answers), critical=tuple(critical))
