"""How sure is sure enough: what is said over predicted KV, against what exact KV says.

An answer is asked for over predicted KV, and again while parts of that are exact (`gate`). Until it
is wrong its tokens are those of the exact answer; so which tokens are shown at a threshold, and
whether one of them is wrong, is known for every threshold from how sure each asking is behind
the exact answer's tokens. The largest threshold at which an answer would be corrected, its critical
one, is all that is kept of it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np

from edgekv.kv.provenance import ProvenanceMap, Span
from edgekv.models.decoder import Decoder
from edgekv.predict.fit.chats import chat_prompts
from edgekv.predict.fit.trial import SINKS, Trial
from edgekv.predict.forward import ArrayView, look_twice, predicted_context, run
from edgekv.predict.gate import (
    ASKED_AGAIN,
    NUM_GATES,
    TOKENS_MAX,
    Gate,
    certainty,
    hope_level,
    level,
)
from edgekv.predict.look import ROWS_AGAIN, SHARE, Glance, chosen, hopeful_share
from edgekv.predict.predictor import Predictor
from edgekv.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What is said over KV that is not exact yet, behind the tokens of the exact answer.

    Of each token.
    """

    certain: tuple[float, ...]  # how sure it is, see `gate.certainty`
    # The same with the same margin, by what will be computed and exact at each asking later.
    hopes: tuple[tuple[float, ...], ...]
    agreed: tuple[bool, ...]  # whether it is the exact answer's
    ends: tuple[bool, ...]  # whether it would end the answer, and so is not shown

    def num_shown(self, first: int, threshold: float, number: int) -> int:
        """Up to which token it is shown, from the `first` on, if each is the exact answer's.

        `number` is that of the asking.
        """
        for index, certain in enumerate(self.certain[first:], first):
            if self.ends[index] or level(certain, number) < threshold:
                return index
            if not self.agreed[index]:
                return index + 1
        return len(self.certain)


@dataclass(frozen=True, kw_only=True)
class AheadAnswer:
    """A greedy answer, asked for over predicted KV as far as somebody looked."""

    num_prompt: int
    askings: tuple[Asking, ...]  # in order: first, after looking twice, on the way to exact KV

    def shown(self, threshold: float, num_places: int = len(ASKED_AGAIN)) -> tuple[int, bool]:
        """How many tokens are shown ahead at a threshold, and whether the last of them is wrong.

        `num_places` is how often it may be asked on the way.
        """
        number, count = 0, 0
        while True:
            asking = self.askings[number]
            count = asking.num_shown(before := count, threshold, number)
            if count > before and not asking.agreed[count - 1]:
                return count, True
            if count == len(asking.certain) or asking.ends[count]:
                return count, False
            later = range(number + 1, len(self.askings[: 2 + num_places]))
            hopeful = (
                n for n in later if hope_level(asking.hopes[n - number - 1][count], n) >= threshold
            )
            number = next(hopeful, 0)
            if not number:
                return count, False

    def critical(self, num_places: int = len(ASKED_AGAIN)) -> float | None:
        """The largest threshold at which it would be corrected; None: at none.

        It is one of the levels that `shown` compares a threshold with.
        """
        askings = self.askings[: 2 + num_places]
        found = {
            level(sure, number) for number, asking in enumerate(askings) for sure in asking.certain
        }
        for number, asking in enumerate(askings):
            for later, hopes in enumerate(asking.hopes[: len(askings) - number - 1], number + 1):
                found |= {hope_level(hope, later) for hope in hopes}
        return max((each for each in found if self.shown(each, num_places)[1]), default=None)


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
    text = predicted_context(base, aux, predictor, prompt_ids, sinks=sinks, window=window)
    looked = chosen(text.weights, (sinks, end), hopeful_share(look)) if look else []
    provenance = ProvenanceMap()
    provenance.mark(0, len(prompt_ids) + len(tokens), "computed")
    provenance.mark(sinks, end, "predicted")
    places = [0, 0, *(end - int(share * (end - sinks)) for share in ASKED_AGAIN)]
    askings = []
    for number, place in enumerate(places):
        if number == 1:
            look_twice(base, predictor, text, looked)
            for span in looked:
                provenance.mark(*span, "computed")
        if place:
            provenance.mark(0, place, "exact")
            for layer, (keys, values) in exact.arrays.items():
                text.view.at(sinks).write(layer, keys[:, sinks:place], values[:, sinks:place])
        text.view.offset = len(prompt_ids) - min(window, ROWS_AGAIN)
        said = _Said.over(base, predictor, text.view, prompt_ids, tokens)
        later = places[number + 1 :]
        askings.append(said.against(tokens, provenance, later, looked, eos_ids))
    return AheadAnswer(num_prompt=len(prompt_ids), askings=tuple(askings))


class _Said(NamedTuple):
    """What is said behind each of an answer's tokens."""

    tokens: list[int]
    margins: list[float]
    weights: np.ndarray  # `(tokens, T)`: where each one's row looks

    @classmethod
    def over(
        cls,
        base: Decoder,
        predictor: Predictor,
        view: ArrayView,
        prompt_ids: list[int],
        answer: list[int],
    ) -> Self:
        """Over a prompt's KV, of which the rows behind the view's offset run again."""
        asked, last = [*prompt_ids, *answer[:-1]][view.offset :], len(prompt_ids) - 1
        first = last - view.offset
        glance = Glance(first, len(answer), first_layer=predictor.first_layer)
        logits = base.logits(run(base, asked, view, taps=glance)[first:])
        weights = np.array(glance.weights(base, view.at(last)))
        second, first = np.partition(np.array(logits.astype(mx.float32)), -2, axis=-1)[:, -2:].T
        return cls(_tokens(logits), (first - second).tolist(), weights)

    def against(
        self,
        answer: list[int],
        provenance: ProvenanceMap,
        later: Sequence[int],
        looked: Sequence[Span],
        eos_ids: frozenset[int],
    ) -> Asking:
        """Beside an answer; `later` places are to be exact, and `looked` spans computed by then."""
        return Asking(
            certain=self.sure(provenance),
            hopes=tuple(self.sure(provenance, place, looked) for place in later),
            agreed=tuple(ours == theirs for ours, theirs in zip(self.tokens, answer, strict=True)),
            ends=tuple(token in eos_ids for token in self.tokens),
        )

    def sure(
        self, provenance: ProvenanceMap, place: int = 0, computed: Sequence[Span] = ()
    ) -> tuple[float, ...]:
        """How sure each is, see `gate.certainty`."""
        return tuple(
            certainty(margin, row, provenance, place, computed)
            for margin, row in zip(self.margins, self.weights, strict=True)
        )


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
    for num_places in range(NUM_GATES):
        found = [answer.critical(num_places) for answer in answers]
        critical.append(tuple(sorted(each for each in found if each is not None)))
    return Gate(num_answers=len(answers), critical=tuple(critical))
