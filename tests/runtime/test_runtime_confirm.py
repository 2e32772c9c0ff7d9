"""Confirmed answers: shown ahead over predicted KV, and in the end what exact KV says."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import VOCAB_SIZE
from tiny_predictors import load, random_ids
from tiny_runtime import TIE, answer, arrays_of, assert_same, sampling

from edgekv.config import PredictionOptions, RuntimeConfig, SamplingParams, StoreOptions
from edgekv.engine.predicted import PredictedPrefill
from edgekv.engine.request import Request
from edgekv.errors import ConfigError, PredictorCorrupt
from edgekv.predict.artifact import load_predictor, save_predictor
from edgekv.predict.fit.calibrate import answer_ahead
from edgekv.predict.gate import ASKED_AGAIN, NUM_GATES, Gate, certainty, level
from edgekv.predict.look import chosen, hopeful_share
from edgekv.runtime import Runtime
from edgekv.sched.cost import CostModel

PROMPT = 120
KINDS = ["self", "aux", "identity", "thin"]


def open_runtime(folder, predictor, *, pool_bytes=1 << 26, **options):
    prediction = PredictionOptions(predictor=predictor, aux=str(folder), **options)
    config = RuntimeConfig(
        pool_bytes=pool_bytes, prediction=prediction, store=StoreOptions(disk_bytes=0)
    )
    return Runtime.open(str(folder), config=config)


@pytest.fixture(params=KINDS)
def runtime(request, deep, predictors):
    with open_runtime(deep, predictors[request.param]) as runtime:
        yield runtime


@pytest.fixture(params=["eager", "at most three", "asked again"])
def gate(request, monkeypatch):
    """However unsure a token is, it is shown; in the other cases up to three.

    In the third one token, and one more each time that it is asked again.
    """

    def goes_ahead(self, asked, unsure):
        weights = first_look(asked, unsure)
        assert weights is None or weights.shape == (len(asked.tokens),)
        tokens_max = 1 << 30 if request.param == "eager" else 3
        if request.param == "asked again":
            tokens_max = 1 + asked.asking
        return asked.num_generated < tokens_max

    monkeypatch.setattr(PredictedPrefill, "goes_ahead", goes_ahead)
    if request.param == "asked again":
        ask_again(monkeypatch)
    return request.param


def first_look(asked, unsure):
    """What the real one does whatever it answers."""
    if not asked.looked_at and unsure.weights is not None:
        share = hopeful_share(PredictionOptions.look)
        asked.looked_at = tuple(chosen(unsure.weights, asked.predict, share))
    return unsure.weights


def ask_again(monkeypatch):
    """Hopeless or not, however short a prompt is, and of predictors that were never calibrated."""
    monkeypatch.setattr("edgekv.predict.gate.HOPE", 1e-9)
    monkeypatch.setattr(Gate, "threshold", lambda self, corrected_max, num_places: corrected_max)
    monkeypatch.setattr("edgekv.engine.ahead.WORTH_ASKING", 0.0)


class Reader:
    """Reads a stream as a terminal would, and checks what each delta may do."""

    def __init__(self):
        self.text, self.num_provisional, self.corrections = "", 0, []
        self.ids, self.logprobs = [], []

    def take(self, delta, stream):
        assert delta.retract <= self.num_provisional
        if delta.retract:
            assert not delta.provisional
            self.text = self.text[: -delta.retract]
            self.corrections.append(delta.retract)
        if delta.provisional:
            assert delta.text
            assert delta.token_ids == delta.logprobs == ()
        self.text += delta.text
        assert stream.text == self.text
        self.num_provisional += len(delta.text) if delta.provisional else -delta.retract
        self.ids += delta.token_ids
        self.logprobs += delta.logprobs

    def read(self, stream):
        with stream:
            for delta in stream:
                self.take(delta, stream)
        reply = stream.reply
        assert (reply.text, list(reply.token_ids)) == (self.text, self.ids)
        assert list(reply.logprobs) == self.logprobs
        assert len(self.corrections) <= 1
        return reply


def both(runtime, ids, params, *, prompt=None):
    """The answer over exact KV and the confirmed one, each in an app of its own."""
    replies, readers = [], []
    for mode in ("exact", "predict"):
        with runtime.app(mode).session() as session:
            readers.append(Reader())
            replies.append(
                readers[-1].read(session.submit_ids(ids, params, prefill=mode))
                if prompt is None
                else readers[-1].read(session.stream(prompt, sampling=params, prefill=mode))
            )
            runtime.check_integrity()
    return (*replies, readers[1])


def assert_confirmed(runtime, ids, exact, confirmed, *, greedy=True):
    if greedy:
        assert_same(runtime, ids, confirmed.token_ids, exact.token_ids)
    if confirmed.token_ids == exact.token_ids:
        assert confirmed.text == exact.text
        assert confirmed.finish_reason == exact.finish_reason
        for ours, theirs in zip(confirmed.logprobs, exact.logprobs, strict=True):
            assert abs(ours.logprob - theirs.logprob) <= TIE
            for mine, other in zip(ours.top, theirs.top, strict=True):
                assert abs(mine[1] - other[1]) <= TIE
    else:
        assert greedy


PARAMS = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 5},
    "filtered": {"temperature": 0.8, "seed": 6, "top_k": 40, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.3},
    "penalised and drawn": {"repetition_penalty": 1.2, "temperature": 0.7, "seed": 7},
    "taken off": {"presence_penalty": 0.4, "frequency_penalty": 0.3},
    "with logprobs": {"logprobs": 3},
    "with logprobs, drawn": {"logprobs": 0, "temperature": 1.0, "seed": 8},
}


@pytest.mark.parametrize("options", PARAMS.values(), ids=PARAMS)
def test_an_answer_is_what_exact_kv_says(runtime, gate, options):
    num_corrected = num_ahead = 0
    for seed in range(4):
        ids = random_ids(PROMPT, seed)
        exact, confirmed, reader = both(runtime, ids, sampling(20, **options))
        assert_confirmed(runtime, ids, exact, confirmed, greedy="temperature" not in options)
        stats = confirmed.stats
        assert stats.num_predicted_tokens == PROMPT - 4 - 32
        assert stats.prefill_mode == "predict"
        assert stats.num_output_tokens == 20
        assert stats.ttft_ms <= stats.ttft_confirmed_ms
        assert bool(stats.num_retracted_tokens) >= bool(reader.corrections)
        num_ahead += stats.num_confirmed_tokens + stats.num_retracted_tokens
        num_corrected += stats.num_retracted_tokens > 0
    assert num_ahead >= 4
    if Path(runtime.config.prediction.predictor).name.startswith("identity"):
        assert num_corrected == 0
    elif gate == "eager":
        assert num_corrected > 0
    if gate == "asked again":
        assert num_ahead > 4


def test_a_step_over_tokens_that_were_taken_back_is_not_run(deep, predictors, monkeypatch):
    """A row a step: the next step is built when one says that its tokens are wrong."""
    monkeypatch.setattr(PredictedPrefill, "goes_ahead", lambda self, asked, unsure: True)
    state = Request.state
    monkeypatch.setattr(Request, "state", lambda self: replace(state(self), rows_max=1))
    num_corrected = 0
    for kind, seed in itertools.product(("self", "aux"), range(4)):
        ids, reader = random_ids(PROMPT, seed), Reader()
        with open_runtime(deep, predictors[kind]) as runtime:
            exact = answer(runtime.app("exact").session(), ids, sampling(20))
            with (
                runtime.app("a")
                .session()
                .submit_ids(ids, sampling(20), prefill="predict") as stream
            ):
                for delta in stream:
                    reader.take(delta, stream)
                    runtime.check_integrity()
            assert_same(runtime, ids, reader.ids, exact.token_ids)
        num_corrected += len(reader.corrections)
    assert num_corrected > 2


def test_a_short_prompt_is_not_asked_at_all_places(deep, predictors, monkeypatch):
    """There is too little to gain; and "auto" does not predict it where answers are confirmed."""
    monkeypatch.setattr(Gate, "threshold", lambda self, corrected_max, num_places: corrected_max)
    cost = CostModel(weights=(45.0, 2.0, 0.5))
    with open_runtime(deep, predictors["self"]) as runtime:
        prefill = runtime._engine.loop.ledger.prefill
        assert prefill.ahead._warm_share == 0.5
        for num_prompt, count in ((120, 0), (500, 1), (1000, 2)):
            span = (4, num_prompt - 32)
            found = prefill.ahead._places(span, num_prompt, cost)
            assert len(found) == count
            places = [num_prompt - 32 - int(s * (num_prompt - 36)) for s in ASKED_AGAIN]
            assert found == tuple(places[:count])
            for shows_ahead in (True, False):
                request = SimpleNamespace(prompt_ids=[0] * num_prompt, shows_ahead=shows_ahead)
                assert prefill.ahead.pays(request, span, cost) == (count == 2 and shows_ahead)


def test_what_is_asked_again_is_asked_over_what_is_exact_by_then(deep, predictors, monkeypatch):
    """How sure it is each time is what `answer_ahead`, the slow twin, says."""
    decoder, seen, again = load(deep), [], []
    ask_again(monkeypatch)

    def goes_ahead(self, asked, unsure):
        first_look(asked, unsure)
        sure = certainty(*unsure, asked.session.kv.provenance)
        seen.append((asked.asking, asked.num_generated, sure))
        return level(sure, asked.asking) >= 0.1

    monkeypatch.setattr(PredictedPrefill, "goes_ahead", goes_ahead)
    for kind, seed in itertools.product(("self", "aux"), range(4)):
        ids = random_ids(PROMPT, seed)
        with open_runtime(deep, predictors[kind]) as runtime:
            seen.clear()
            Reader().read(
                runtime.app("a").session().submit_ids(ids, sampling(16), prefill="predict")
            )
        found = said_ahead(decoder, predictors[kind], ids)
        num_shown, is_wrong = found.shown(0.1)
        for number, index, sure in seen:
            if index <= num_shown - is_wrong:
                twin = found.askings[number].certain[index]
                assert sure == pytest.approx(twin, abs=1e-3, rel=1e-2)
                again.append(number)
    assert set(again) == set(range(2 + len(ASKED_AGAIN)))


def said_ahead(decoder, file, ids):
    predictor, _ = load_predictor(file, mx.float32)
    return answer_ahead(
        decoder,
        decoder,
        predictor,
        ids,
        sinks=4,
        window=32,
        look=PredictionOptions.look,
        num_tokens=16,
        eos_ids=frozenset(),
    )


@pytest.mark.parametrize("kind", ["self", "aux"])
def test_what_is_looked_at_does_not_count_as_exact(deep, predictors, kind, monkeypatch):
    """It stands on both sides of where the exact part ends when it is asked on the way."""
    ask_again(monkeypatch)
    monkeypatch.setattr(PredictedPrefill, "goes_ahead", lambda self, asked, unsure: looked(asked))

    def looked(asked):
        asked.looked_at = ((30, 34), (44, 60), (70, 88))
        return False

    ids, arrays = random_ids(PROMPT, 3), []
    with open_runtime(deep, predictors[kind]) as runtime:
        for mode in ("exact", "predict"):
            session = runtime.app(mode).session()
            Reader().read(session.submit_ids(ids, sampling(4), prefill=mode))
            runtime.check_integrity()
            arrays.append(arrays_of(session, PROMPT))
    for ours, theirs in zip(*arrays, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", ["self", "aux"])
def test_as_many_tokens_are_shown_as_the_calibration_reckons_with(
    deep, predictors, kind, monkeypatch
):
    decoder, seeds = load(deep), range(8)
    found = [said_ahead(decoder, predictors[kind], random_ids(PROMPT, seed)) for seed in seeds]
    monkeypatch.setattr("edgekv.engine.ahead.WORTH_ASKING", 0.0)
    shown, threshold = set(), 0.0
    monkeypatch.setattr(Gate, "threshold", lambda self, corrected_max, num_places: threshold)
    with open_runtime(deep, predictors[kind]) as runtime:
        for threshold, seed in itertools.product((0.05, 0.2, 0.5, 1.5), seeds):
            with runtime.app("a").session() as session:
                ids = random_ids(PROMPT, seed)
                stats = (
                    Reader().read(session.submit_ids(ids, sampling(32), prefill="predict")).stats
                )
            is_wrong = stats.num_retracted_tokens > 0
            num_right = min(stats.num_confirmed_tokens, 16)
            count, expected_wrong = found[seed].shown(threshold)
            assert (num_right, is_wrong) == (count - expected_wrong, expected_wrong)
            shown.add((count, expected_wrong))
    assert len(shown) > 4


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5])
def test_a_short_answer_ends_where_it_should(runtime, gate, max_tokens):
    for seed in range(3):
        ids = random_ids(PROMPT, seed)
        exact, confirmed, _ = both(runtime, ids, sampling(max_tokens))
        assert_confirmed(runtime, ids, exact, confirmed)
        assert confirmed.finish_reason == "length"


def test_an_end_of_sequence_is_no_end_before_exact_kv_says_so(runtime, gate, monkeypatch):
    eos_ids = frozenset(range(4, VOCAB_SIZE, 10))
    monkeypatch.setattr(runtime, "tokenizer", replace(runtime.tokenizer, eos_ids=eos_ids))
    num_stopped = 0
    for seed in range(8):
        ids = random_ids(PROMPT, seed)
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=30)
        exact, confirmed, _ = both(runtime, ids, params)
        assert_confirmed(runtime, ids, exact, confirmed, greedy=False)
        num_stopped += exact.finish_reason == "stop"
    assert num_stopped > 4


def test_a_stop_string_ends_the_same_answer(runtime, gate):
    num_stopped = 0
    for seed in range(6):
        ids = random_ids(PROMPT, seed)
        whole = answer(runtime.app("whole").session(), ids, sampling(24)).text
        for start in (1, 5, 12):
            stop = whole[start : start + 2]
            exact, confirmed, _ = both(runtime, ids, sampling(24, stop=(stop,)))
            assert_confirmed(runtime, ids, exact, confirmed)
            assert confirmed.stats.num_output_tokens == exact.stats.num_output_tokens
            num_stopped += confirmed.finish_reason == "stop"
    assert num_stopped > 6


def test_who_cannot_take_back_is_told_what_is_certain(runtime, gate):
    ids = random_ids(PROMPT, 1)
    exact = answer(runtime.app("a").session(), ids, sampling(20))
    session = runtime.app("b").session()
    reader = Reader()
    reply = reader.read(session.submit_ids(ids, sampling(20), prefill="predict", confirmed=True))
    assert_same(runtime, ids, reply.token_ids, exact.token_ids)
    assert reader.num_provisional == 0
    assert reader.corrections == []
    assert reply.stats.ttft_ms == reply.stats.ttft_confirmed_ms
    assert reply.stats.num_confirmed_tokens + reply.stats.num_retracted_tokens > 0


def test_conversations_go_on_as_if_nothing_had_been_predicted(runtime, gate):
    texts = ["tell me " * 30, "and " * 50, "why " * 60]
    talks = {mode: runtime.app(mode).session() for mode in ("exact", "predict")}
    for mode, session in talks.items():
        session.prefill = mode
    for seed, text in enumerate(texts):
        params = sampling(12, temperature=0.7, seed=seed)
        replies = {
            mode: Reader().read(session.stream(text, sampling=params))
            for mode, session in talks.items()
        }
        assert replies["predict"].token_ids == replies["exact"].token_ids
        assert replies["predict"].stats.num_predicted_tokens > 0
        runtime.check_integrity()
    assert talks["predict"].messages == talks["exact"].messages
    kv = talks["predict"]._talk.kv.kv
    assert kv.provenance.exact_prefix == kv.num_tokens


def test_an_answer_that_is_cancelled_keeps_only_what_was_certain(runtime, gate):
    for seed in range(8):
        ids = random_ids(PROMPT, seed)
        exact = answer(runtime.app("a").session(), ids, sampling(20))
        session = runtime.app("b").session()
        reader = Reader()
        stream = session.submit_ids(ids, sampling(20), prefill="predict")
        for _ in range(1 + seed % 3):
            if (delta := stream.wait()) is not None:
                reader.take(delta, stream)
        reply = reader.read(stream)  # closes it after what waits was read
        assert reply.text == reader.text
        assert_same(runtime, ids, reply.token_ids, exact.token_ids[: len(reply.token_ids)])
        runtime.check_integrity()
        # What it left does no harm to who comes next.
        more = [*ids, *random_ids(50, seed + 100)]
        theirs = answer(runtime.app("a").session(), more, sampling(8))
        ours = Reader().read(session.submit_ids(more, sampling(8), prefill="predict"))
        assert_same(runtime, more, ours.token_ids, theirs.token_ids)
        session.close()


def test_confirm_without_repair_is_refused():
    with pytest.raises(ConfigError, match="nothing would confirm"):
        PredictionOptions(repair="off")
    assert PredictionOptions(repair="off", confirm=False).repair == "off"


def test_a_look_that_confirms_everything_would_be_noticed(deep, predictors, gate, monkeypatch):
    """The tests above can fail."""

    def lax(self, index, token):
        del token
        self.num_confirmed = index + 1
        return True

    monkeypatch.setattr(Request, "confirm", lax)
    with open_runtime(deep, predictors["self"]) as runtime, pytest.raises(AssertionError):
        test_an_answer_is_what_exact_kv_says(runtime, gate, {})


class TestTheGate:
    """Which tokens are shown ahead, and what is learned of it."""

    @pytest.fixture
    def calibrated(self, predictors, tmp_path):
        """Writes the predictor with a calibration."""

        def write(*critical, num_answers=99):
            predictor, info = load_predictor(Path(predictors["self"]), mx.float32)
            path = tmp_path / "calibrated.safetensors"
            info = replace(info, num_answers=num_answers, critical=[sorted(critical)] * NUM_GATES)
            save_predictor(path, predictor, info)
            return path

        return write

    def answers(self, runtime, num_answers=6, prefill="predict"):
        found = []
        for seed in range(num_answers):
            with runtime.app("a").session() as session:
                ids = random_ids(PROMPT, seed)
                stream = session.submit_ids(ids, sampling(20), prefill=prefill)
                found.append(Reader().read(stream).stats)
        return found

    def test_nothing_is_shown_ahead_of_a_predictor_that_was_never_calibrated(
        self, deep, predictors
    ):
        with open_runtime(deep, predictors["self"]) as runtime:
            for stats in self.answers(runtime):
                assert stats.num_predicted_tokens > 0
                assert stats.num_confirmed_tokens == stats.num_retracted_tokens == 0
            assert self.answers(runtime, 1, "auto")[0].prefill_mode == "exact"

    def test_thresholds_decide(self, deep, calibrated):
        num_ahead = []
        for critical in (0.0, 0.05, 0.2, 1e9):
            with open_runtime(deep, calibrated(*[critical] * 3)) as runtime:
                stats = self.answers(runtime)
            num_ahead.append(sum(s.num_confirmed_tokens + s.num_retracted_tokens for s in stats))
        assert num_ahead == sorted(num_ahead, reverse=True)
        assert num_ahead[0] > num_ahead[1] > num_ahead[2] > num_ahead[3] == 0

    def test_what_is_allowed_decides(self, deep, calibrated):
        file = calibrated(*[1e9] * 10)
        for corrected_max, some in ((0.0, False), (0.05, False), (0.2, True), (1.0, True)):
            with open_runtime(deep, file, corrected_max=corrected_max) as runtime:
                stats = self.answers(runtime, 3)
            assert any(s.num_confirmed_tokens + s.num_retracted_tokens for s in stats) == some

    def test_no_more_than_was_looked_at_is_shown(self, deep, calibrated, monkeypatch):
        monkeypatch.setattr("edgekv.engine.ahead.TOKENS_MAX", 2)
        with open_runtime(deep, calibrated(), corrected_max=1.0) as runtime:
            stats = self.answers(runtime)
        assert max(s.num_confirmed_tokens + s.num_retracted_tokens for s in stats) == 2

    def test_corrections_are_remembered(self, deep, calibrated, tmp_path):
        file, store = calibrated(), StoreOptions(folder=tmp_path / "kv", free_reserve_bytes=0)
        prediction = PredictionOptions(predictor=file, corrected_max=1.0)
        config = RuntimeConfig(pool_bytes=1 << 26, prediction=prediction, store=store)

        def gate(runtime):
            return runtime._engine.loop.ledger.prefill.ahead.gate

        with Runtime.open(str(deep), config=config) as runtime:
            stats = self.answers(runtime)
            learned = gate(runtime)
        assert learned.corrected == sum(s.num_retracted_tokens > 0 for s in stats) > 0
        assert learned.foretold == pytest.approx(6 * 0.01)
        with Runtime.open(str(deep), config=config) as runtime:
            assert gate(runtime) == learned
        (tmp_path / "kv/gates.json").write_text('{"x": 1')
        with Runtime.open(str(deep), config=config) as runtime:
            assert gate(runtime).experience == [0, 0]


def test_a_gate_that_makes_no_sense_is_refused(predictors, tmp_path):
    predictor, info = load_predictor(Path(predictors["self"]), mx.float32)
    for index, (num_answers, critical) in enumerate(
        [(1, [0.1, 0.2]), (9, [0.2, 0.1]), (9, ["a"]), (9, [float("nan")]), ("9", []), (9, None)]
    ):
        path = tmp_path / f"{index}.safetensors"
        asked = [] if critical is None else [critical] * NUM_GATES
        wrong = replace(info, num_answers=num_answers, critical=asked)
        save_predictor(path, predictor, wrong)
        with pytest.raises(PredictorCorrupt, match=r"answers|critical"):
            load_predictor(path, mx.float32)


def test_progress_never_goes_back(deep, predictors, gate):
    prediction = PredictionOptions(predictor=predictors["self"])
    config = RuntimeConfig(
        pool_bytes=1 << 26,
        tbt_target_ms=1.0,
        prediction=prediction,
        store=StoreOptions(disk_bytes=0),
    )
    with Runtime.open(str(deep), config=config) as runtime:
        beside = runtime.app("b").session()
        other = beside.submit_ids(random_ids(20, 9), sampling(400))  # so that prefill is in chunks
        other.wait()
        stream = (
            runtime.app("a")
            .session()
            .submit_ids(random_ids(200, 1), sampling(8), prefill="predict")
        )
        seen = []
        while not stream.done:
            stream.wait(0.0005)
            seen.append(stream.prefill_progress[0])
        assert seen == sorted(seen)
        assert len(set(seen)) > 2
        assert seen[-1] == 200
        other.close()
