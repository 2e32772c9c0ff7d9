"""Steps that rank 0 tells of, built and run by another rank."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from edgekv.engine.predicted import PredictedPrefill
from edgekv.engine.prefill import ExactPrefill, Rows, run_exact
from edgekv.engine.steps import EXACT, PartWords, Reader
from edgekv.kv.session_kv import SessionKV
from edgekv.kv.view import StagedView
from edgekv.models.decoder import Decoder
from edgekv.predict.packed import Part, run_packed
from edgekv.predict.state import PredictedState, StagedState


class FollowerSteps:
    """Builds and runs the steps that rank 0 tells of, on another rank."""

    def __init__(
        self,
        decoder: Decoder,
        prefill: ExactPrefill,
        kvs: dict[int, SessionKV],
        beside: dict[int, PredictedState],
    ) -> None:
        """`kvs` are sessions' KV by the number of their buffers, `beside` what is kept beside."""
        self._decoder, self._prefill = decoder, prefill
        self._kvs, self._beside = kvs, beside

    def run(self, words: Sequence[int]) -> None:
        """Run a step to its end."""
        reader = Reader(words)
        kind, cuts_rows, num_parts = reader.many(3)
        parts = [reader.part() for _ in range(num_parts)]
        self._decoder.group.begin()
        views: dict[int, StagedView] = {}
        placed = [self._view(part, views) for part in parts]
        tokens = mx.array([token for part in parts for token in part.tokens], dtype=mx.uint32)
        commits: list[Callable[[], list[mx.array]]] = [view.commit for view in views.values()]
        if kind == EXACT:
            rows = [Rows(v, p.num_rows, p.num_kept) for v, p in zip(placed, parts, strict=True)]
            hidden = run_exact(self._decoder, tokens, rows, cuts_rows=bool(cuts_rows))
            arrays = [] if hidden is None or cuts_rows else [hidden]
        else:
            states: dict[int, StagedState] = {}
            hidden, arrays = self._run_packed(tokens, parts, placed, states)
            commits += [state.commit for state in states.values()]
        for _ in range(reader.one()):
            assert hidden is not None
            arrays.append(self._decoder.logits(hidden[mx.array(reader.counted())]))
        arrays += [array for commit in commits for array in commit()]
        for part in parts:
            kv = self._kvs[part.number]
            kv.append([0] * max(0, part.offset + part.num_rows - kv.num_tokens))
        mx.eval(arrays)

    def _view(self, part: PartWords, views: dict[int, StagedView]) -> StagedView:
        if part.number in views:
            return views[part.number].at(part.offset)
        view = StagedView(self._kvs[part.number], part.offset, part.keeps)
        views[part.number] = view
        return view

    def _run_packed(
        self,
        tokens: mx.array,
        parts: Sequence[PartWords],
        placed: Sequence[StagedView],
        states: dict[int, StagedState],
    ) -> tuple[mx.array | None, list[mx.array]]:
        assert isinstance(self._prefill, PredictedPrefill)
        made = []
        for part, view in zip(parts, placed, strict=True):
            if part.beside and part.beside not in states:
                states[part.beside] = StagedState(self._beside[part.beside])
            made.append(
                Part(
                    view=view,
                    num_rows=part.num_rows,
                    state=states.get(part.beside),
                    predicted=part.predicted,
                    repair=part.repair,
                    aux_start=part.aux_start,
                    aux_tokens=part.aux_tokens,
                    glance=part.glance,
                )
            )
        packed = run_packed(self._decoder, self._prefill.prediction, tokens, made)
        return packed.hidden, list(packed.glances.values())
