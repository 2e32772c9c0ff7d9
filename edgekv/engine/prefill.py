"""How the KV of prompts comes about: the engine's prefill strategy.

    begin ─▶ rows of the prompt, step by step: run, submitted, settled ─▶ decode ─▶ …

`ExactPrefill` computes every row, and does nothing else; `predicted.py` has the other strategy.
"""

# ruff: noqa: ARG002 - exact prefill does nothing where the other strategy does something

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from edgekv.engine.request import EngineSession, Request
from edgekv.engine.steps import EXACT, PartWords
from edgekv.kv.view import KEEPS_NONE, Keeps, StagedView
from edgekv.models.attention import Segment
from edgekv.models.batch import PackedBatch
from edgekv.models.decoder import Decoder
from edgekv.predict.state import StagedState
from edgekv.sched.cost import CostModel
from edgekv.sched.plan import RepairPlan, RepairState, SegmentPlan

Work = Sequence[tuple[Request, SegmentPlan]]  # requests and their rows
Repairs = Sequence[tuple[EngineSession, RepairPlan]]  # sessions, and rows that become exact


class Rows(NamedTuple):
    """One session's rows in a step that computes them all."""

    view: StagedView
    num_rows: int
    num_kept: int  # the last ones, whose logits somebody may ask


class Told(NamedTuple):
    """What other ranks are told of a step's layers."""

    kind: int
    parts: list[PartWords]


class Unsure(NamedTuple):
    """What says how sure a token is that was sampled over predicted KV."""

    margin: float  # see `sampler.sample`
    weights: np.ndarray | None  # `(T,)`: where its row looks, see `look.Glance`; None: nobody asked


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The graph of a step's layers."""

    # `(rows, hidden)` after all layers, of the rows that run through them; None for none.
    hidden: mx.array | None
    ends: list[int]  # where among these each request's rows end, then each repair's
    views: list[StagedView]  # what it writes to sessions' KV
    # What it adds to what sessions keep beside that.
    states: list[tuple[EngineSession, StagedState]] = field(default_factory=list)
    # By request that wants to know: how much its last row looks at each token, `(T,)`.
    glances: dict[Request, mx.array] = field(default_factory=dict)
    # What is computed though nobody reads it, which MLX would leave out: of the slow twin.
    unread: list[mx.array] = field(default_factory=list)
    told: Callable[[], Told] | None = None  # once all of its tokens are known


def keeps(request: Request, plan: SegmentPlan, every: int) -> Keeps:
    """Which states of a request's rows are kept, where there are any: at each `every` tokens.

    And before the generation prompt, which the next turn's prompt may not have. Of what is only
    warmed up the last token will run again, because of its logits; and so may rows of which a
    grammar has yet to say what can come next.
    """
    if not every or request.logits is not None:
        return KEEPS_NONE
    first = plan.start - plan.start % every + every
    places = {*range(first, plan.end + 1, every), request.num_asked}
    if request.prefill_only:
        places.add(len(request.prompt_ids) - 1)
    return Keeps(
        positions=tuple(sorted(place for place in places if plan.start < place <= plan.end)),
        pinned=request.num_asked if request.num_asked % every else 0,
        before=request.constraint is not None and plan.samples,
    )


class ExactPrefill:
    """Every row of every prompt runs through all layers that what follows depends on.

    Where a model's last layers read the KV of layers before them, only rows whose logits are asked
    for need these; the others end where the last KV is made, and nothing is different for it: the
    exact limit of what prediction does. Owned by the engine thread.
    """

    budget_bytes = 0  # of what is kept beside sessions' KV
    # Its slow twin runs all rows through all layers, in every step: MLX would run them in those
    # steps alone whose logits somebody reads.
    cuts_rows = True
    _cut = False  # the step that was built last did

    def __init__(self, *, snapshot_tokens: int = 0) -> None:
        """`snapshot_tokens`: see `KVLayout`."""
        self._snapshot_tokens = snapshot_tokens

    def begin(self, request: Request, cost: CostModel, now_ms: float, share: float) -> None:
        """Decide how the rest of a prompt gets its KV, of a request that is about to compute.

        `share` is the part of the engine's time that prefill gets beside who decodes.
        """

    def reusable(self, request: Request) -> int:
        """How many of a prompt's first tokens a request can take from its session as they are."""
        return request.session.kv.known_prefix(request.prompt_ids[: request.reusable_max])

    def run(self, decoder: Decoder, tokens: mx.array, work: Work, repairs: Repairs) -> Forward:
        """Build the graph of a step; `tokens` `(N,)` are those of the requests' rows in order."""
        assert not repairs
        every = self._snapshot_tokens
        views = [StagedView(r.session.kv, p.start, keeps(r, p, every)) for r, p in work]
        self._cut = self.cuts_rows and decoder.config.kv_layers < decoder.config.num_layers
        kept = [_num_kept(r, plan) if self._cut else plan.num_rows for r, plan in work]
        rows = [
            Rows(view, plan.num_rows, count)
            for view, (_, plan), count in zip(views, work, kept, strict=True)
        ]
        hidden = run_exact(decoder, tokens, rows, cuts_rows=self.cuts_rows)
        unread = [] if self.cuts_rows or hidden is None else [hidden]
        return Forward(
            hidden=hidden,
            ends=list(itertools.accumulate(kept)),
            views=views,
            unread=unread,
            told=lambda: Told(EXACT, [_words(*one) for one in zip(work, rows, strict=True)]),
        )

    def submitted(self, work: Work, repairs: Repairs) -> None:
        """Note what has KV once the step ends that was just submitted: the one place for that."""
        assert not repairs
        for request, plan in work:
            request.session.kv.append(request.tokens[plan.start : plan.end])
            if self._cut:
                request.num_rows_cut += plan.num_rows - _num_kept(request, plan)

    def settled(self, session: EngineSession) -> None:
        """Let go of what a session needs no more; the step that knew of it has ended."""

    def repairs(self) -> tuple[RepairState, ...]:
        """What can be made exact now, most urgent first."""
        return ()

    def goes_ahead(self, request: Request, unsure: Unsure) -> bool:
        """Whether a token may be shown that was sampled over predicted KV."""
        return False

    def recede(self, request: Request, unsure: Unsure | None) -> int:
        """Its answer waits; return from which token on it is to be computed.

        `unsure` is why, if that may change before all KV is exact.
        """
        return request.num_computed

    def look(self, request: Request, weights: np.ndarray) -> int:
        """A request looks at tokens by these weights; return what is to be computed again."""
        return request.num_computed

    def left(self, request: Request) -> None:
        """A request has ended."""

    def close(self) -> None:
        """Keep what is to outlive the process."""

    def cut(self, session: EngineSession) -> None:
        """A session's KV was truncated, or a prefix was copied into it."""

    def drop(self, session: EngineSession) -> None:
        """A session's KV is exact from now on, or what was not is forgotten."""

    def fits(self, session: EngineSession, capacity: int) -> bool:
        """Let what is kept beside a session's KV hold as many tokens; False: there is no room."""
        return True

    def give_back(self, fraction: float) -> bool:
        """While the system is short of memory: keep nothing for next turns; True if any went."""
        return False

    def check_integrity(self, sessions: Iterable[EngineSession]) -> None:
        """Assert that what is kept and its memory agree."""
        assert all(session.kv.is_exact for session in sessions)


def run_exact(
    decoder: Decoder, tokens: mx.array, rows: Sequence[Rows], *, cuts_rows: bool
) -> mx.array | None:
    """All rows through all layers that what follows depends on; `tokens` `(N,)`.

    Returns:
        `(R, hidden)`, before the final norm, of the rows that are kept; None if there are none.
    """
    batch = PackedBatch([Segment(view, num_rows) for view, num_rows, _ in rows], tokens)
    num_layers = decoder.config.num_layers
    last = decoder.config.kv_layers if cuts_rows else num_layers
    hidden = decoder.run_layers(decoder.embed(tokens), batch, last_layer=last)
    if last == num_layers:
        return hidden
    return _finish(decoder, hidden, batch, [kept for _, _, kept in rows], last)


def _words(asked: tuple[Request, SegmentPlan], rows: Rows) -> PartWords:
    request, plan = asked
    return PartWords(
        number=rows.view.number,
        offset=plan.start,
        num_rows=plan.num_rows,
        num_kept=rows.num_kept,
        keeps=rows.view.keeps,
        tokens=request.tokens[plan.start : plan.end],
    )


def _num_kept(request: Request, plan: SegmentPlan) -> int:
    """How many of a segment's last rows somebody asks the logits of."""
    if request.logits is not None:
        return plan.num_rows
    return int(plan.samples and not request.prefill_only)


def _finish(
    decoder: Decoder, hidden: mx.array, batch: PackedBatch, kept: Sequence[int], first_layer: int
) -> mx.array | None:
    """Run each segment's last rows through the layers that make no KV; None if nobody asks."""
    assert batch.tokens is not None
    rows: list[int] = []
    segments: list[Segment] = []
    end = 0
    for segment, count in zip(batch.segments, kept, strict=True):
        end += segment.num_rows
        if count:
            rows.extend(range(end - count, end))
            offset = segment.view.offset + segment.num_rows - count
            segments.append(Segment(segment.view.at(offset), count))
    if not rows:
        return None
    index = mx.array(rows)
    upper = PackedBatch(segments, batch.tokens[index])
    return decoder.run_layers(hidden[index], upper, first_layer=first_layer)
