"""Make-believe models whose KV says which tokens came before it, byte by byte.

The KV of a token is a function of all tokens up to it, and so is the next token. `SimRunner` stands
in for the engine's `Runner`: before it computes a row it compares every byte of KV in front of it
with what must stand there, so that nothing wrong that was restored, shared or overwritten goes
unseen. A step costs a fraction of a millisecond, and its floats do not depend on its shape.

One of them has a layer with a state too, `STATEFUL`, which says all tokens that it is made of; of
`WINDOWED` one layer has a window, behind which nobody reads; of `LATENT` one has values that are a
part of its keys, and one reads the KV of another.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import mlx.core as mx
import numpy as np

from edgekv.engine.lead import ALONE_LEAD
from edgekv.engine.prefill import Forward, keeps
from edgekv.engine.request import Request
from edgekv.engine.runner import Draw, Drawn, Step
from edgekv.kv.layout import NOTHING, Heads, KVLayout, StateArray
from edgekv.kv.pool import Buffers
from edgekv.kv.runs import slot_runs, token_runs
from edgekv.kv.session_kv import SessionKV
from edgekv.kv.states import State, States
from edgekv.kv.view import StagedView
from edgekv.sched.cost import EMPTY_STEP
from edgekv.sched.plan import SegmentPlan

VOCAB_SIZE = 251
# Layers differ, as in OpenELM; a granule is 64 tokens, 96 KiB.
LAYOUT = KVLayout(heads=(Heads(1, 64, 64), Heads(2, 64, 64)), dtype_bytes=4, context_max=512)
STATE_SHAPES = ((24, 128), (2, 3, 8))
STATEFUL = replace(
    LAYOUT,
    heads=(LAYOUT.heads[0], NOTHING, LAYOUT.heads[1]),
    states=((), tuple(StateArray(shape, "float32") for shape in STATE_SHAPES), ()),
)


class _FewSlots(KVLayout):
    """What rolls early."""

    @property
    def window_slots(self) -> int:
        return 2 * self.granule_tokens


WINDOWED = _FewSlots(heads=LAYOUT.heads, dtype_bytes=4, context_max=512, windows=(0, 16))
LATENT = replace(LAYOUT, heads=(Heads(2, 64, 0), NOTHING, Heads(2, 64, 64)))
MODELS = {"kv": LAYOUT, "latent": LATENT, "states": STATEFUL, "windows": WINDOWED}
SNAPSHOT_TOKENS = 32
NUM_RUNS = sum(2 * heads.num for heads in LAYOUT.heads)
HEAD_DIM = 64

_POWERS = np.cumprod(np.full(LAYOUT.context_max + 1, 0x5851F42D4C957F2D, dtype=np.uint64))
_OF_RUN = (np.arange(1, NUM_RUNS + 1, dtype=np.uint32) * np.uint32(0x9E3779B2) + 1)[:, None, None]
_OF_DIM = (np.arange(HEAD_DIM, dtype=np.uint32) * np.uint32(0x85EBCA6B))[None, None, :]


def _states(tokens: Sequence[int]) -> np.ndarray:
    """For each token a number, uint32, that depends on it, on all before it and on their order."""
    terms = (np.array(tokens, dtype=np.uint64) + 1) * _POWERS[: len(tokens)]
    return (np.cumsum(terms, dtype=np.uint64) >> np.uint64(32)).astype(np.uint32)


def _kv(tokens: Sequence[int]) -> np.ndarray:
    """`(NUM_RUNS, tokens, HEAD_DIM)` uint32: what stands in a session's buffers."""
    result: np.ndarray = (_states(tokens)[None, :, None] ^ _OF_DIM) * _OF_RUN
    return result


def next_token(tokens: Sequence[int]) -> int:
    """What the model says next."""
    return int(_states(tokens)[-1] >> 7) % VOCAB_SIZE


@lru_cache(maxsize=4096)
def answer_to(prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    """What it says to a prompt, undisturbed."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tuple(tokens[len(prompt) :])


def state_of(tokens: Sequence[int]) -> State:
    """What the layer with a state remembers of these tokens."""
    last = _states(tokens)[-1]
    values = [np.arange(1, np.prod(shape) + 1, dtype=np.uint32) * last for shape in STATE_SHAPES]
    arrays = zip(values, STATE_SHAPES, strict=True)
    return tuple(mx.array(value.reshape(shape)).view(mx.float32) for value, shape in arrays)


def check_states(states: States, tokens: Sequence[int]) -> None:
    """Assert that a state is that of these tokens."""
    for array, expected in zip(states[1], state_of(tokens), strict=True):
        same = mx.array_equal(array.view(mx.uint32), expected.view(mx.uint32))
        assert same, f"a wrong state behind {len(tokens)} tokens"


def check_session(kv: SessionKV) -> None:
    """Assert that all that a session has in memory is that of its tokens."""
    if kv.buffers is not None:
        check_kv(kv.buffers, kv.tokens)
    if kv.states.now:
        check_states(kv.states.now, kv.tokens)
    for position, states in kv.states.kept.items():
        check_states(states, kv.tokens[:position])


def layout_of(buffers: Buffers) -> KVLayout:
    """Of which model they are."""
    if buffers.windows:
        return WINDOWED
    if len(buffers.keys) == LAYOUT.num_layers:
        return LAYOUT
    return STATEFUL if buffers.values[0].size else LATENT


def check_kv(buffers: Buffers, tokens: Sequence[int]) -> None:
    """Assert that the KV in the buffers is that of these tokens."""
    expected = _kv(tokens)
    runs = slot_runs(layout_of(buffers), buffers, 0, len(tokens))
    for run, rows in zip(runs, expected if tokens else (), strict=True):
        first = run.skipped_bytes // run.row_bytes
        found = np.frombuffer(run.memory, dtype=np.uint32).reshape(-1, HEAD_DIM)
        assert first + len(found) == len(tokens)
        wrong = (found != rows[first:]).any(axis=1)
        assert not wrong.any(), f"wrong KV at token {first + int(wrong.argmax())} of {len(tokens)}"


class SimRunner:
    """`edgekv.engine.runner.Runner` for the make-believe model."""

    decoder = None
    lead = ALONE_LEAD

    def __init__(self, layout: KVLayout = LAYOUT) -> None:
        self.layout = layout
        self.num_rows = 0
        self._before: dict[int, list[tuple[Buffers | None, States]]] = {}

    def prepare(
        self,
        work: Sequence[tuple[Request, SegmentPlan]],
        running: Step | None,
        repairs: Sequence[object] = (),
    ) -> Step:
        assert work
        assert not repairs
        shape = EMPTY_STEP
        for request, plan in work:
            shape = shape.plus(plan.num_rows, plan.start)
            assert plan.num_rows > 0
            assert plan.end <= len(request.tokens) + request.pending
        new = [
            Draw(request=request, index=request.num_generated + request.pending, exact=True)
            for request, plan in work
            if plan.samples and not request.prefill_only
        ]
        every = SNAPSHOT_TOKENS if self.layout.states else 0
        views = [StagedView(r.session.kv, p.start, keeps(r, p, every)) for r, p in work]
        forward = Forward(hidden=None, ends=[], views=views)
        step = Step(
            work=work,
            repairs=(),
            shape=shape,
            num_retracted=[0] * len(work),
            forward=forward,
            new=new,
        )
        held = [request.session.kv for request, _ in work]
        self._before = {id(step): [(kv.buffers, kv.states.now) for kv in held]}
        return step

    def submit(self, step: Step, now_ms: float) -> None:
        step.submitted_ms = now_ms
        of_before = self._before.pop(id(step))
        assert step.forward is not None
        views = step.forward.views
        for (request, plan), before, view in zip(step.work, of_before, views, strict=True):
            kv = request.session.kv
            assert kv.resident
            assert kv.buffers is not None
            assert kv.buffers is before[0], "a graph was built for other buffers"
            assert kv.states.now is before[1], "a graph was built for another state"
            assert kv.buffers.ready
            assert kv.num_tokens == plan.start
            tokens = request.tokens[: plan.end]
            assert len(tokens) == plan.end
            check_kv(kv.buffers, tokens[: plan.start])
            assert kv.in_reach(plan.start)
            rows = _kv(tokens)[:, plan.start :]
            for run, row in zip(
                token_runs(self.layout, kv.buffers, plan.start, plan.end), rows, strict=True
            ):
                run[:] = np.ascontiguousarray(row).tobytes()
            if self.layout.states:
                self._move_on(view, tokens, plan)
            kv.append(tokens[plan.start :])
            request.pending = int(any(draw.request is request for draw in step.new))
            self.num_rows += plan.num_rows

    def _move_on(self, view: StagedView, tokens: Sequence[int], plan: SegmentPlan) -> None:
        if plan.start:
            check_states({1: view.state(1) or ()}, tokens[: plan.start])
        for num_rows in view.stops(plan.num_rows):
            view.set_state(1, num_rows, state_of(tokens[: plan.start + num_rows]))
        mx.eval(view.commit())

    def wait(self, step: Step) -> list[Drawn]:
        ends = {request: plan.end for request, plan in step.work}
        # A request that has left is asked too: its tokens are still its own.
        tokens = [(draw.request.tokens, ends[draw.request]) for draw in step.new]
        return [Drawn(next_token(known[:end])) for known, end in tokens]
