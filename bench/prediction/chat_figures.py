"""What `bench quality --chat` says of answers over predicted KV beside exact ones. Pure.

Shares and means are over all prompts of a row; times, and their ratios, are medians of pairs, so
that a machine that is slower for a while is slower for both.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from edgekv.bench.figures import over_pairs, ratio, ttft_ms
from edgekv.bench.report import Columns, Row, print_columns
from edgekv.metrics import Stats


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer, as its reader saw it."""

    text: str  # in the end
    token_ids: tuple[int, ...]
    stats: Stats
    whole_ms: float  # submission to end
    began_early: bool = False  # some text was shown before exact KV had said it
    num_retracted_chars: int = 0  # of what was shown


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt, answered over exact KV, and over predicted KV and confirmed."""

    kind: str  # of the text that the prompt is about
    context: int  # tokens of that text
    exact: Answer
    predicted: Answer
    # Of what is said over predicted KV behind each of the exact answer's tokens: whether it is the
    # next of these, and how sure it is (the first of an `AheadAnswer`'s askings).
    agreed: tuple[bool, ...]
    certain: tuple[float, ...]
    is_tie: bool = False  # the answers part where two tokens are equally likely

    @property
    def differs(self) -> bool:
        """Whether the answer in the end is another than exact KV's."""
        ours, theirs = self.predicted, self.exact
        return (ours.text, ours.token_ids) != (theirs.text, theirs.token_ids)

    @property
    def was_corrected(self) -> bool:
        """Whether exact KV said another token than one that was shown, or text was taken back."""
        predicted = self.predicted
        return predicted.stats.num_retracted_tokens > 0 or predicted.num_retracted_chars > 0

    @property
    def num_ahead(self) -> int:
        """Tokens that were shown before exact KV had said them."""
        stats = self.predicted.stats
        return stats.num_confirmed_tokens + stats.num_retracted_tokens

    def times(self) -> dict[str, float | None]:
        """Milliseconds, and ratios."""
        exact, predicted = self.exact, self.predicted
        exact_ms, visible_ms = ttft_ms(exact.stats), ttft_ms(predicted.stats)
        confirmed_ms = predicted.stats.ttft_confirmed_ms
        return {
            "exact_ttft_ms": exact_ms,
            "ttft_ms": visible_ms,
            "ttft_confirmed_ms": confirmed_ms,
            "ttft_ratio": ratio(exact_ms, visible_ms),
            "ttft_ratio_early": ratio(exact_ms, visible_ms) if predicted.began_early else None,
            "ttft_confirmed_ratio": ratio(exact_ms, confirmed_ms),
            "exact_whole_ms": exact.whole_ms,
            "whole_ms": predicted.whole_ms,
            "whole_ratio": ratio(predicted.whole_ms, exact.whole_ms),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def chat_rows(pairs: Sequence[Pair]) -> list[Row]:
    """Figures of all prompts, then by length and by kind of text where there are several."""
    rows = [_row(pairs) | {"samples": [pair.to_dict() for pair in pairs]}]
    for part in ("context", "kind"):
        values = list(dict.fromkeys(getattr(pair, part) for pair in pairs))
        if len(values) > 1:
            found = [[pair for pair in pairs if getattr(pair, part) == v] for v in values]
            rows += [_row(some, **{part: v}) for v, some in zip(values, found, strict=True)]
    return rows


def _row(pairs: Sequence[Pair], *, context: int | None = None, kind: str | None = None) -> Row:
    """Figures of some prompts; a ratio of TTFT is exact's to ours, one of whole answers ours to it.

    `erasure` is characters taken back to those of the final texts (arXiv 2004.03643), `agreement`
    a mean over prompts, `..._early` is of the answers alone that began early.
    """
    early = [pair for pair in pairs if pair.predicted.began_early]
    retracted = sum(pair.predicted.num_retracted_chars for pair in pairs)
    return {
        "context": context,
        "kind": kind,
        "num_prompts": len(pairs),
        "prompt_tokens": median(pair.exact.stats.num_prompt_tokens for pair in pairs),
        "early_share": _share([pair.predicted.began_early for pair in pairs]),
        "tokens_ahead": mean(pair.num_ahead for pair in pairs),
        "tokens_ahead_early": mean(pair.num_ahead for pair in early) if early else None,
        "num_corrected": sum(pair.was_corrected for pair in pairs),
        "corrected_share": _share([pair.was_corrected for pair in pairs]),
        "erasure": ratio(retracted, sum(len(pair.predicted.text) for pair in pairs)),
        "agreement": mean(_share(pair.agreed) for pair in pairs),
        "first_agreement": _share([pair.agreed[0] for pair in pairs]),
        **over_pairs([pair.times() for pair in pairs]),
        "num_differing": sum(pair.differs for pair in pairs),
        "num_ties": sum(pair.differs and pair.is_tie for pair in pairs),
    }


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def wrong_answers(rows: Sequence[Row]) -> list[str]:
    """What is wrong with rows: an answer that was confirmed is exact, or the first of a tie."""
    found = []
    for row in rows:
        num_wrong = row["num_differing"] - row["num_ties"]
        if num_wrong and "samples" in row:  # all prompts of a predictor
            found.append(
                f"{row['predictor']}: {num_wrong} of {row['num_prompts']} confirmed answers are "
                "not what exact KV says"
            )
    return found


_OF_WHAT: Columns = (("about", "{about}"), ("prompts", "{num_prompts}"))
_ANSWERS: Columns = (
    *_OF_WHAT,
    ("early", "{early_share:.0%}"),
    ("ahead", "{tokens_ahead_early:.1f}"),
    ("of all", "{tokens_ahead:.1f}"),
    ("corrected", "{corrected_share:.1%}"),
    ("erased", "{erasure:.3f}"),
    ("agree", "{agreement:.3f}"),
    ("first", "{first_agreement:.3f}"),
    ("differ", "{num_differing}"),
    ("ties", "{num_ties}"),
)
_TIMES: Columns = (
    *_OF_WHAT,
    ("TTFT exact", "{exact_ttft_ms:.0f}"),
    ("seen", "{ttft_ms:.0f}"),
    ("sooner", "{ttft_ratio_early:.2f}"),
    ("of all", "{ttft_ratio:.2f}"),
    ("certain", "{ttft_confirmed_ms:.0f}"),
    ("sooner", "{ttft_confirmed_ratio:.2f}"),
    ("whole exact", "{exact_whole_ms:.0f}"),
    ("whole", "{whole_ms:.0f}"),
    ("ratio", "{whole_ratio:.2f}"),
)


def print_chat(rows: Sequence[Row]) -> None:
    """Print tables on stdout, two a predictor: of what is seen, and of how long it takes."""
    for name in dict.fromkeys(row["predictor"] for row in rows):
        mine = [row | {"about": _about(row)} for row in rows if row["predictor"] == name]
        first = mine[0]
        gate = "not calibrated, so nothing is shown ahead"
        if first["certain_min"] is not None:
            gate = f"at most {first['corrected_max']:.1%} corrected, from a certainty of "
            gate += f"{first['certain_min']:.1f} on"
        print_columns(f"{first['model']} · {name} · {gate}", _ANSWERS, mine)
        print_columns("ms, and ratios of pairs: medians", _TIMES, mine)


def _about(row: Row) -> str:
    if row["context"] is not None:
        return f"{row['context']} tokens"
    return row["kind"] or "all"
