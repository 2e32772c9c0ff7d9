"""Eight sessions at random, some predicted: nobody is disturbed, and all is exact in the end."""

import pytest
from hypothesis import settings
from random_play import Play, plays, steady
from tiny_runtime import eventually

from edgekv.config import PredictionOptions, RuntimeConfig, StoreOptions
from edgekv.engine.predicted import PredictedPrefill
from edgekv.predict.gate import Gate
from edgekv.predict.look import chosen
from edgekv.runtime import Runtime

few = settings(steady, max_examples=2)
MODES = ("predict", "exact", "auto", "predict")


@pytest.fixture(scope="module", params=["roomy", "tight", "on disk"])
def open_play(request, deep, predictors, tmp_path_factory):
    """Opens runtimes with room for all, or for a few: others wait, are pushed out, preempted."""
    opened = {}

    def open_(kind, repair, *, confirm=False):
        key = (kind, repair, confirm)
        if key not in opened:
            tight = request.param != "roomy"
            disk = {"folder": tmp_path_factory.mktemp("kv"), "free_reserve_bytes": 0}
            options = disk if request.param == "on disk" else {"disk_bytes": 0}
            prediction = PredictionOptions(
                predictor=predictors[kind],
                aux=str(deep),
                repair=repair,
                confirm=confirm,
                sinks=40,  # so that some chunks end before what is predicted
                window=8,
                ttft_target_ms=0.0,
            )
            opened[key] = Runtime.open(
                str(deep),
                config=RuntimeConfig(
                    pool_bytes=12 * 128 * 1024 if tight else 1 << 26,
                    tbt_target_ms=1.0,  # chunks of a few rows
                    prediction=prediction,
                    store=StoreOptions(**options),
                ),
            )
        return opened[key]

    with pytest.MonkeyPatch.context() as patch:
        if request.param != "roomy":
            patch.setattr("edgekv.engine.request.ADMISSION_RESERVE_TOKENS", 1)
        yield open_
        for runtime in opened.values():
            runtime.close()


class Mixed(Play):
    """Who asked for exact answers gets them; what the others get is theirs."""

    exact_all = False

    def check(self, index, tokens):
        if self.exact_all or self.prefill(index) == "exact":
            super().check(index, tokens)


def play(runtime, steps, lengths, *, exact_all):
    played = Mixed(runtime, lengths, greedy=set(range(8)), prefill=lambda i: MODES[i % 4])
    played.exact_all = exact_all
    for index, action in steps:
        getattr(played, action)(index)
        runtime.check_integrity()
    played.end_all()
    for session in played.sessions.values():
        if runtime.config.prediction.repair != "off":
            kv = session._talk.kv.kv
            eventually(lambda kv=kv: kv.provenance.exact_prefix == kv.num_tokens)
    played.prefill = lambda _index: "exact"
    for index in list(played.sessions):
        played.go_on(index)
        played.read_all(index)
    played.close_all()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kind", "repair"), [("self", "off"), ("self", "idle"), ("aux", "eager"), ("thin", "idle")]
)
@plays
@few
def test_eight_sessions_some_predicted(open_play, kind, repair, steps, lengths, greedy):
    del greedy
    play(open_play(kind, repair), steps, lengths, exact_all=False)


@pytest.mark.faults
@pytest.mark.parametrize("repair", ["idle"])
@plays
@few
def test_a_predictor_that_says_what_is_exact(open_play, repair, steps, lengths, greedy):
    del greedy
    play(open_play("identity", repair), steps, lengths, exact_all=True)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kind", "repair"), [("self", "eager"), ("aux", "idle"), ("thin", "eager")]
)
@plays
@few
def test_confirmed_answers_are_exact(open_play, kind, repair, steps, lengths, greedy):
    del greedy
    runtime = open_play(kind, repair, confirm=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PredictedPrefill, "goes_ahead", some_go_ahead)
        patch.setattr(Gate, "threshold", lambda self, corrected_max, num_places: corrected_max)
        patch.setattr("edgekv.engine.ahead.WORTH_ASKING", 0.0)
        patch.setattr("edgekv.predict.gate.HOPE", 1e-9)
        play(runtime, steps, lengths, exact_all=True)


def some_go_ahead(self, request, unsure):
    """Sure or not: none of some answers, few tokens of others, nearly all of the rest.

    And some more each time that they are asked again.
    """
    weights = unsure.weights
    assert weights is None or weights.shape == (len(request.tokens),)
    if not request.looked_at and weights is not None:
        request.looked_at = tuple(chosen(weights, request.predict, 0.2))
    more = 2 * request.asking
    return request.num_generated < (len(request.prompt_ids) * 7919 % 4) ** 3 + more
