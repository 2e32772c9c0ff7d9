"""A decode step copies no KV, proved by peak memory; and the proof can fail.

MLX updates a buffer in place only if nothing else refers to it, and says nothing when it copies
instead. So the steps here run as the engine runs them, on buffers that dwarf everything else.
"""

import copy
from collections.abc import Callable, Sequence

import mlx.core as mx
import pytest
from stepping import CPU_PROFILE, FUSED_PROFILE, layout_of
from tiny_models import random_ids, tiny_config, write_folder
from tiny_predictors import fitted

from edgekv.config import PredictionOptions, Sampling
from edgekv.engine.predicted import PredictedPrefill
from edgekv.engine.prefill import ExactPrefill
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.runner import Runner, Step
from edgekv.kv.pool import KVPool
from edgekv.kv.session_kv import SessionKV
from edgekv.models.decoder import Decoder
from edgekv.models.open_model import open_decoder
from edgekv.predict.state import PredictedState, Prediction, side_layout
from edgekv.sched.plan import RepairPlan, SegmentPlan
from edgekv.tokenizer import IncrementalDetokenizer
from edgekv.tokenizer.vocabulary import Vocabulary

CAPACITY = 40_960
MIB = 1 << 20
NO_TEXT = Vocabulary(
    tokens=["a"],
    scheme="byte_level",
    hidden_ids=frozenset(),
    literal_ids=frozenset(),
    leading_space=False,
)


@pytest.fixture(scope="module", params=[CPU_PROFILE, FUSED_PROFILE], ids=["composed", "fused"])
def decoder(request, tmp_path_factory) -> Decoder:
    config = tiny_config("llama", max_position_embeddings=CAPACITY)
    folder = write_folder(tmp_path_factory.mktemp("model"), config, tokenizer=False)
    return open_decoder(folder, request.param)


class Bench:
    """Sessions with large buffers that decode together, step by step, as the engine does it."""

    def __init__(
        self, decoder: Decoder, num_sessions: int, prediction: Prediction | None = None
    ) -> None:
        layout = layout_of(decoder)
        prefill = ExactPrefill()
        if prediction is not None:
            side = side_layout(prediction, layout)
            self.side_pool = KVPool(side, mx.float32, 2 * side.capacity_bytes(CAPACITY))
            prefill = PredictedPrefill(
                prediction, self.side_pool, PredictionOptions(), decoder.config.num_layers
            )
        self.runner = Runner(decoder, prefill)
        self.layer_bytes = CAPACITY * layout.layer_token_bytes(0)
        self.pool = KVPool(layout, mx.float32, num_sessions * layout.capacity_bytes(CAPACITY))
        self.requests = [self._request(seed) for seed in range(num_sessions)]
        self.running: Step | None = None
        for request in self.requests:  # prompts of unlike length, so that offsets differ
            end = len(request.prompt_ids)
            plan = SegmentPlan(request_id=request.request_id, start=0, end=end, samples=True)
            self.turn([(request, plan)])
        self.drain()

    def _request(self, seed: int) -> Request:
        session = EngineSession(app="test")
        session.kv.buffers = self.pool.allocate(CAPACITY)
        return Request(
            session=session,
            prompt_ids=random_ids(40 + 7 * seed, seed),
            sampling=Sampling(),
            detokenizer=IncrementalDetokenizer(NO_TEXT),
            submitted_ms=0.0,
        )

    def decode_work(self) -> list[tuple[Request, SegmentPlan]]:
        return [
            (
                request,
                SegmentPlan(
                    request_id=request.request_id,
                    start=request.num_computed,
                    end=request.num_computed + 1,
                    samples=True,
                ),
            )
            for request in self.requests
        ]

    def turn(
        self,
        work: list[tuple[Request, SegmentPlan]],
        repairs: Sequence[tuple[EngineSession, RepairPlan]] = (),
    ) -> None:
        """Build the next step while one runs, submit it once that has ended."""
        step = self.runner.prepare(work, self.running, repairs)
        self.drain()
        self.runner.submit(step, 0.0)
        self.running = step

    def drain(self) -> None:
        if self.running is None:
            return
        step, self.running = self.running, None
        for draw, drawn in zip(
            step.new, self.runner.wait(step), strict=False
        ):  # checks come behind
            draw.request.pending = 0
            draw.request.append(drawn.token, 0.0)

    def peak_of_decode(self, num_steps: int = 4) -> int:
        """Bytes above what was there that pipelined decode steps need at their worst moment."""

        def decode() -> None:
            for _ in range(num_steps):
                self.turn(self.decode_work())

        return self.peak_of(decode)

    def peak_of(self, turns: Callable[[], None]) -> int:
        """Bytes above what was there that some turns need at their worst moment."""
        self.drain()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        turns()
        self.drain()
        return mx.get_peak_memory() - before


@pytest.mark.parametrize("num_sessions", [1, 4])
def test_a_decode_step_copies_no_kv(decoder, num_sessions):
    bench = Bench(decoder, num_sessions)
    assert bench.layer_bytes > 8 * MIB
    # The first decode step turns lazy zeros into buffers where no prefill did.
    assert bench.peak_of_decode() < bench.layer_bytes / 20
    assert all(len(request.tokens) > 43 for request in bench.requests)


def test_a_step_that_is_thrown_away_costs_no_copy(decoder):
    """The engine drops a prepared step when somebody leaves; the next must still be in place."""
    bench = Bench(decoder, 2)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(3):
        bench.turn(bench.decode_work())
        dropped = bench.runner.prepare(bench.decode_work(), bench.running)
        bench.drain()
        del dropped
    assert mx.get_peak_memory() - before < bench.layer_bytes / 20


@pytest.mark.parametrize("kind", ["self", "aux"])
def test_steps_that_predict_and_repair_copy_no_kv(decoder, kind):
    """Neither the session's KV nor what is kept beside it: hidden states, the auxiliary's KV."""
    prediction = Prediction(predictor=fitted(decoder, kind, 1), aux=decoder, row_share=0.5)
    bench = Bench(decoder, 2, prediction)
    layout = side_layout(prediction, layout_of(decoder))
    for request in bench.requests:
        side = SessionKV()
        side.buffers = bench.side_pool.allocate(CAPACITY)
        request.session.predicted = PredictedState(
            side=side, has_aux=kind == "aux", trail=prediction.predictor.trail()
        )
        # 41 more tokens: the first and the last 8 computed, what is between predicted.
        request.tokens += random_ids(40, 9)
    first, second = bench.requests

    def predict(request):
        start, end = request.num_computed, len(request.tokens)
        return request, SegmentPlan(
            request_id=request.request_id,
            start=start,
            end=end,
            samples=True,
            cheap=(start + 1, end - 8),
            cheap_share=0.5,
        )

    bench.turn([predict(first)])  # lazy zeros of the side buffers become buffers
    bench.turn([predict(second)])

    def repair(session):
        at = session.kv.provenance.exact_prefix
        plan = RepairPlan(session_id=session.session_id, start=at, end=at + 4, share=0.5)
        return session, plan

    def decode_and_repair():
        for _ in range(3):
            plans = [repair(request.session) for request in bench.requests]
            bench.turn(bench.decode_work(), plans)

    def predict_more():
        bench.drain()
        for request in bench.requests:
            request.tokens += random_ids(40, 10)
        bench.turn([predict(first), predict(second)])

    # One layer's keys are half of this; the own arrays of 82 rows take up to a seventh.
    copied = min(bench.layer_bytes, layout.layer_token_bytes(0) * CAPACITY)
    assert bench.peak_of(decode_and_repair) < copied / 20
    assert bench.peak_of(predict_more) < copied / 4


def test_the_proof_can_fail(decoder):
    """One alias of one layer's keys, held across a step, and MLX copies those keys."""
    bench = Bench(decoder, 2)
    buffers = bench.requests[1].session.kv.buffers
    assert buffers is not None
    bench.drain()
    alias = copy.copy(buffers.keys[1])
    peak = bench.peak_of_decode(num_steps=2)
    assert peak >= alias.nbytes >= bench.layer_bytes / 2
