"""Predicted prefill through the runtime: labelled, repaired, and gone when it is exact."""

import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import FAMILIES, tiny_config, write_folder
from tiny_predictors import fitted, load, random_ids, write_predictor
from tiny_runtime import answer, arrays_of, assert_same, eventually, sampling

from edgekv.config import PredictionOptions, RuntimeConfig, StoreOptions
from edgekv.engine.outbox import Outbox
from edgekv.engine.predicted import PredictedPrefill
from edgekv.engine.runner import Runner
from edgekv.errors import (
    ConfigError,
    PoolTooSmall,
    PredictorCorrupt,
    PredictorNotFound,
    SessionBusy,
)
from edgekv.predict.artifact import load_predictor
from edgekv.predict.forward import predicted_context
from edgekv.predict.predictor import Predictor
from edgekv.runtime import Runtime
from edgekv.sched.compose import TAIL_SHARE
from edgekv.sched.cost import CostModel
from edgekv.tokenizer.grammar import Grammar

PROMPT = 120


def open_runtime(folder, predictor, **options):
    options = {"confirm": False, "look": 0.0} | options
    prediction = PredictionOptions(predictor=predictor, aux=str(folder), **options)
    return Runtime.open(
        str(folder), config=RuntimeConfig(prediction=prediction, store=StoreOptions(disk_bytes=0))
    )


def ask(session, ids, num_tokens, prefill):
    with session.submit_ids(ids, sampling(num_tokens), prefill=prefill) as stream:
        for _ in stream:
            pass
    return stream.reply


def test_a_constrained_answer_is_over_exact_kv(deep, predictors):
    """Also where the turn before was predicted, and goes on being so."""
    grammar = Grammar(kind="regex", text="[a-z]{9}")
    with open_runtime(deep, predictors["identity"], repair="off") as runtime:
        session, ids = runtime.app().session(), random_ids(PROMPT, 1)
        assert ask(session, ids, 4, "predict").stats.prefill_mode == "predict"
        with session.submit_ids(ids, prefill="predict", grammar=grammar) as stream:
            for _ in stream:
                pass
        assert stream.reply.stats.prefill_mode == "exact"
        assert stream.reply.stats.num_predicted_tokens == 0
        assert re.fullmatch(grammar.text, stream.reply.text)
        runtime.check_integrity()


def test_an_identical_auxiliary_changes_no_answer(deep, predictors):
    with open_runtime(deep, predictors["identity"], repair="off") as runtime:
        ids = random_ids(PROMPT, 1)
        exact = answer(runtime.app("a").session(), ids, sampling(24))
        reply = ask(runtime.app("b").session(), ids, 24, "predict")
        assert_same(runtime, ids, reply.token_ids, exact.token_ids)
        assert reply.stats.prefill_mode == "predict"
        assert reply.stats.num_predicted_tokens == PROMPT - 4 - 32
        assert exact.stats.prefill_mode == "exact"
        runtime.check_integrity()


@pytest.mark.parametrize("kind", ["self", "thin", "aux"])
@pytest.mark.parametrize("repair", ["idle", "eager"])
def test_repair_ends_with_exact_kv(deep, predictors, kind, repair):
    with open_runtime(deep, predictors[kind], repair=repair) as runtime:
        ids = random_ids(PROMPT, 2)
        session = runtime.app("a").session()
        reply = ask(session, ids, 40, "predict")
        assert reply.stats.num_predicted_tokens > 0
        kv = session._talk.kv.kv
        eventually(lambda: kv.provenance.exact_prefix == kv.num_tokens)
        assert kv.num_tokens >= PROMPT + 39
        runtime.check_integrity()
        assert (session._talk.kv.predicted is not None) == (kind == "aux")  # kept for the next turn
        # Exact KV of the same tokens, by the next turn's answer.
        tokens = [*ids, *reply.token_ids]
        more = random_ids(8, 3)
        ours = ask(session, [*tokens, *more], 16, "exact")
        assert ours.stats.num_cached_tokens == len(tokens) - 1
        theirs = answer(runtime.app("b").session(), [*tokens, *more], sampling(16))
        assert_same(runtime, [*tokens, *more], ours.token_ids, theirs.token_ids)
        runtime.check_integrity()


@pytest.mark.parametrize("kind", ["self", "aux"])
@pytest.mark.parametrize("family", FAMILIES)
def test_repair_of_every_family(tmp_path, family, kind):
    folder = write_folder(tmp_path / "model", tiny_config(family))
    path = write_predictor(tmp_path / "p.safetensors", fitted(load(folder), kind, 1), folder)
    ids = random_ids(PROMPT, 2)
    with open_runtime(folder, path, repair="eager") as runtime:
        found = []
        for mode in ("exact", "predict"):
            session = runtime.app(mode).session()
            reply = ask(session, [*ids, *(found[0][0] if found else ())], 1 if found else 16, mode)
            kv = session._talk.kv.kv
            eventually(lambda kv=kv: kv.provenance.exact_prefix == kv.num_tokens)
            assert (reply.stats.num_predicted_tokens > 0) == (mode == "predict")
            runtime.check_integrity()
            found.append((reply.token_ids, arrays_of(session, PROMPT + 15)))
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        assert np.abs(ours - theirs).max() < 1e-4


class TestAuxiliary:
    """Its KV is kept beside a session's, caught up in chunks, and given up first."""

    def turn_of(self, session, prompt, num_tokens, prefill="predict"):
        reply = ask(session, prompt, num_tokens, prefill)
        kv = session._talk.kv.kv
        eventually(lambda: kv.provenance.exact_prefix == kv.num_tokens)
        return reply, [*prompt, *reply.token_ids]

    def assert_predicted_as_at_once(self, deep, predictors, session, tokens, start):
        """The rows from `start` on, but the window, against the slow twin over all tokens."""
        base = load(deep)
        predictor, _ = load_predictor(Path(predictors["aux"]), mx.float32)
        twin, *_ = predicted_context(base, base, predictor, tokens, sinks=4, window=32)
        expected = [np.array(twin.arrays[i][part]) for part in (0, 1) for i in range(4)]
        end = len(tokens) - 32
        for ours, theirs in zip(arrays_of(session, len(tokens)), expected, strict=True):
            assert np.abs(ours[:, start:end] - theirs[:, start:end]).max() < 1e-3

    def test_the_next_turn_goes_on_with_what_was_kept(self, deep, predictors):
        with open_runtime(deep, predictors["aux"]) as runtime:
            session = runtime.app().session()
            _, tokens = self.turn_of(session, random_ids(PROMPT, 1), 20)
            kept = session._talk.kv.predicted
            assert kept.side_end == PROMPT - 32
        # The same again without repair, so that what is predicted can be looked at.
        with open_runtime(deep, predictors["aux"], repair="off") as runtime:
            session = runtime.app().session()
            reply = ask(session, random_ids(PROMPT, 1), 20, "predict")
            tokens = [*random_ids(PROMPT, 1), *reply.token_ids]
            kept = session._talk.kv.predicted
            more = [*tokens, *random_ids(90, 2)]
            ask(session, more, 1, "predict")
            assert session._talk.kv.predicted is kept
            assert kept.side_end == len(more) - 32
            self.assert_predicted_as_at_once(deep, predictors, session, more, len(tokens) + 4)
            runtime.check_integrity()

    def test_a_long_way_behind_it_catches_up_in_chunks(self, deep, predictors, monkeypatch):
        caught_up, room = [], []
        plain = PredictedPrefill._part

        def noted(runner, request, plan, view, state):
            caught_up.append(plan.num_extra)
            less = (1 - runner.prediction.row_share) * (plan.num_extra + plan.num_cheap)
            room.append(plan.num_extra + plan.num_rows - less)
            return plain(runner, request, plan, view, state)

        monkeypatch.setattr(PredictedPrefill, "_part", noted)
        with open_runtime(deep, predictors["aux"], repair="off") as runtime:
            session = runtime.app().session()
            _, tokens = self.turn_of(session, random_ids(700, 3), 1, "exact")
            more = [*tokens, *random_ids(100, 4)]
            other = runtime.app("b").session().submit_ids(random_ids(8, 5), sampling(200))
            reply = ask(session, more, 1, "predict")
            other.close()
            start = len(tokens) - 1 + 4
            assert reply.stats.num_predicted_tokens == len(more) - 32 - start
            assert sum(caught_up) == start
            assert sum(num_extra > 0 for num_extra in caught_up) > 1
            assert max(room) <= (1 + TAIL_SHARE) * 256
            self.assert_predicted_as_at_once(deep, predictors, session, more, start)
            runtime.check_integrity()

    def test_what_is_kept_makes_room_for_who_predicts_now(self, deep, predictors):
        prediction = PredictionOptions(predictor=predictors["aux"], aux=str(deep))
        config = RuntimeConfig(
            prediction=prediction, pool_bytes=1_200_000, store=StoreOptions(disk_bytes=0)
        )
        with Runtime.open(str(deep), config=config) as runtime:
            sessions = [runtime.app(f"app-{i}").session() for i in range(12)]
            for i, session in enumerate(sessions):
                reply, _ = self.turn_of(session, random_ids(PROMPT, 40 + i), 4)
                assert reply.stats.num_predicted_tokens > 0
                runtime.check_integrity()
            kept = [s for s in sessions if s._talk.kv.predicted is not None]
            assert 0 < len(kept) < 12
            assert sessions[-1] in kept

    def test_a_prefix_copied_from_another_session_is_exact(self, deep, predictors):
        """It lies beyond what was repaired here."""
        with open_runtime(deep, predictors["aux"]) as runtime:
            app = runtime.app()
            first, ids = app.session(), random_ids(PROMPT, 8)
            self.turn_of(first, ids, 4)
            assert first._talk.kv.predicted is not None
            longer = [*ids, *random_ids(130, 9)]
            other = app.session()
            expected = ask(other, [*longer, 5, 6], 8, "exact")
            ours = ask(first, [*longer, 7, 8], 8, "predict")
            assert ours.stats.num_cached_tokens >= len(longer)
            runtime.check_integrity()
            theirs = ask(first, [*longer, 5, 6], 8, "exact")
            assert_same(runtime, [*longer, 5, 6], theirs.token_ids, expected.token_ids)
            runtime.check_integrity()

    def test_under_pressure_nothing_is_kept(self, deep, predictors):
        with open_runtime(deep, predictors["aux"]) as runtime:
            session = runtime.app().session()
            self.turn_of(session, random_ids(PROMPT, 10), 4)
            assert session._talk.kv.predicted is not None
            runtime._engine.set_pressure(0.3)
            answer(runtime.app("b").session(), random_ids(8, 11), sampling(4))
            eventually(lambda: session._talk.kv.predicted is None)
            runtime.check_integrity()

    def test_cut_below_it_the_auxiliary_begins_anew(self, deep, predictors):
        with open_runtime(deep, predictors["aux"], repair="off") as runtime:
            session = runtime.app().session()
            first = random_ids(PROMPT, 6)
            ask(session, first, 4, "predict")
            second = [*first[:60], *random_ids(100, 7)]
            ask(session, second, 1, "predict")
            self.assert_predicted_as_at_once(deep, predictors, session, second, 64)
            runtime.check_integrity()


@pytest.mark.parametrize("kind", ["self", "aux"])
def test_suspended_while_its_repair_is_prepared(deep, predictors, kind, monkeypatch):
    """A step that was prepared to repair it does not run; others are served."""
    plain, suspended = Runner.prepare, []

    def prepare(runner, work, running, repairs=()):
        step = plain(runner, work, running, repairs)
        if repairs and not work and not suspended and session._talk.kv.active is None:
            thread = threading.Thread(target=suspend)
            thread.start()
            suspended.append(thread)
            time.sleep(0.2)  # its call is in the inbox by then
        return step

    def suspend():
        while True:
            try:
                return session.suspend()
            except SessionBusy:  # its answer has ended, and nobody has told it yet
                time.sleep(0.01)

    with open_runtime(deep, predictors[kind]) as runtime:
        session = runtime.app("a").session()
        monkeypatch.setattr(Runner, "prepare", prepare)
        ask(session, random_ids(600, 1), 1, "predict")
        eventually(lambda: suspended)
        suspended[0].join()
        assert len(ask(runtime.app("b").session(), random_ids(20, 2), 2, "exact").token_ids) == 2
        assert session._talk.kv.predicted is None
        runtime.check_integrity()


def test_an_exact_request_forgets_what_is_predicted(deep, predictors):
    with open_runtime(deep, predictors["self"], repair="off") as runtime:
        ids = random_ids(PROMPT, 4)
        session = runtime.app("a").session()
        reply = ask(session, ids, 8, "predict")
        assert session._talk.kv.predicted is not None
        runtime.check_integrity()
        tokens = [*ids, *reply.token_ids, *random_ids(4, 5)]
        ours = ask(session, tokens, 16, "exact")
        assert ours.stats.num_cached_tokens == 4  # the sinks
        theirs = answer(runtime.app("b").session(), tokens, sampling(16))
        assert_same(runtime, tokens, ours.token_ids, theirs.token_ids)
        runtime.check_integrity()


@pytest.mark.parametrize("kind", ["self", "aux"])
def test_the_next_turn_is_predicted_on_top(deep, predictors, kind):
    with open_runtime(deep, predictors[kind], repair="off") as runtime:
        session = runtime.app("a").session()
        tokens = random_ids(PROMPT, 6)
        for turn in range(3):
            reply = ask(session, tokens, 8, "predict")
            assert reply.stats.num_predicted_tokens > 0
            runtime.check_integrity()
            tokens = [*tokens, *reply.token_ids, *random_ids(60, 7 + turn)]


def _wrong(block, what):
    """A predictor's body that does not fit its models, though its metadata do."""
    half = block.up.shape[1] // 2
    up, bias = block.up, block.bias
    blocks = {
        "targets are missing": replace(
            block, targets=block.targets[:2], up=up[:, :half], bias=bias[:half]
        ),
        "a tap beyond": replace(block, taps=tuple(t._replace(layer=9) for t in block.taps)),
        "too few features": replace(block, up=up[:-3]),
    }
    depth = {"depth 99": 99, "depth 0": 0}.get(what, 2)
    return Predictor("self", depth, (blocks.get(what, block),))


@pytest.mark.parametrize(
    "what",
    ["targets are missing", "a tap beyond", "too few features", "depth 99", "depth 0"],
)
def test_a_predictor_that_does_not_fit_inside_is_refused(deep, tmp_path, what):
    (block,) = fitted(load(deep), "self", 2).blocks
    path = write_predictor(tmp_path / "p.safetensors", _wrong(block, what), deep)
    with pytest.raises(PredictorCorrupt, match=r"p\.safetensors"), open_runtime(deep, path):
        pass


def test_asking_for_prediction_without_a_predictor(deep):
    with Runtime.open(str(deep)) as runtime, pytest.raises(ConfigError, match="no KV predictor"):
        ask(runtime.app().session(), [5, 6, 7], 1, "predict")


@pytest.mark.parametrize("kind", ["self", "aux"])
def test_cancelled_while_it_is_predicted(deep, predictors, kind):
    """Whatever the moment, the next answer is what an undisturbed session says."""
    with open_runtime(deep, predictors[kind]) as runtime:
        ids = random_ids(PROMPT, 8)
        expected = answer(runtime.app("b").session(), ids, sampling(16))
        session = runtime.app("a").session()
        for num_events in range(6):
            stream = session.submit_ids(ids, sampling(40), prefill="predict")
            for _ in range(num_events):
                stream.wait(0.02)
            stream.close()
            runtime.check_integrity()
        ours = ask(session, ids, 16, "exact")
        assert ours.stats.prefill_mode == "exact"
        assert_same(runtime, ids, ours.token_ids, expected.token_ids)
        runtime.check_integrity()


def test_several_sessions_predict_and_decode_together(deep, predictors):
    """Those that did not ask for it say what they say alone."""
    with open_runtime(deep, predictors["self"]) as runtime:
        prompts = [random_ids(PROMPT + 16 * i, 20 + i) for i in range(6)]
        alone = [answer(runtime.app("x").session(), ids, sampling(24)) for ids in prompts]
        sessions = [runtime.app(f"app-{i}").session() for i in range(6)]
        streams = [
            session.submit_ids(ids, sampling(24), prefill=("exact", "predict")[i % 2])
            for i, (session, ids) in enumerate(zip(sessions, prompts, strict=True))
        ]
        for i, stream in enumerate(streams):
            with stream:
                for _ in stream:
                    pass
            stats = stream.reply.stats
            assert (stats.num_predicted_tokens > 0) == (i % 2 == 1)
            if i % 2 == 0:
                assert_same(runtime, prompts[i], stream.reply.token_ids, alone[i].token_ids)
        runtime.check_integrity()


def test_predicted_kv_is_neither_shared_nor_stored(deep, predictors, tmp_path):
    prediction = PredictionOptions(predictor=predictors["self"], repair="off", confirm=False)
    config = RuntimeConfig(prediction=prediction, store=StoreOptions(folder=tmp_path))
    ids = random_ids(PROMPT, 30)
    with Runtime.open(str(deep), config=config) as runtime:
        app = runtime.app("a")
        session = app.session("kept")
        ask(session, ids, 8, "predict")
        other = ask(app.session("other"), ids, 8, "exact")
        assert other.stats.num_cached_tokens <= 4  # the sinks
        expected = answer(runtime.app("b").session(), ids, sampling(8))
        assert_same(runtime, ids, other.token_ids, expected.token_ids)
        assert session.suspend() <= 4
        runtime.check_integrity()


def test_more_predicted_sessions_than_memory(deep, predictors):
    """Leaving memory forgets what is predicted; everybody is answered."""
    prediction = PredictionOptions(predictor=predictors["self"])
    config = RuntimeConfig(
        prediction=prediction, pool_bytes=400_000, store=StoreOptions(disk_bytes=0)
    )
    with Runtime.open(str(deep), config=config) as runtime:
        streams = [
            runtime.app(f"app-{i}")
            .session()
            .submit_ids(random_ids(PROMPT, 40 + i), sampling(30), prefill="predict")
            for i in range(8)
        ]
        for stream in streams:
            with stream:
                for _ in stream:
                    pass
            assert len(stream.reply.token_ids) == 30
        runtime.check_integrity()


def test_a_pool_that_is_too_small_says_how_large_it_must_be(deep, predictors):
    def opened(pool_bytes):
        prediction = PredictionOptions(predictor=predictors["self"])
        store = StoreOptions(disk_bytes=0)
        config = RuntimeConfig(prediction=prediction, store=store, pool_bytes=pool_bytes)
        return Runtime.open(str(deep), config=config)

    with pytest.raises(PoolTooSmall, match="pool of 131072 bytes") as caught:
        opened(131072)
    enough = int(re.search(r"at least (\d+) bytes", caught.value.hint)[1])
    assert enough > 131072
    with pytest.raises(PoolTooSmall):
        opened(enough - 8)
    opened(enough).close()


@pytest.mark.parametrize("predictor", ["~nobody-of-this-name/x", "nosuch"])
def test_a_predictor_that_is_nowhere(deep, predictor):
    with pytest.raises(PredictorNotFound, match="no KV predictor"):
        open_runtime(deep, predictor)


def test_auto_leaves_short_prompts_alone(deep, predictors):
    with open_runtime(deep, predictors["self"], ttft_target_ms=1e6) as runtime:
        reply = ask(runtime.app().session(), random_ids(PROMPT, 50), 4, "auto")
        assert reply.stats.prefill_mode == "exact"
    with open_runtime(deep, predictors["self"], ttft_target_ms=0.0) as runtime:
        reply = ask(runtime.app().session(), random_ids(30, 51), 4, "auto")
        assert reply.stats.prefill_mode == "exact"  # nothing between sinks and window


def test_auto_predicts_where_exact_is_late_and_prediction_pays(deep, predictors, monkeypatch):
    ids = random_ids(600, 52)
    # A millisecond a row, whatever the machine is busy with: what auto decides, not how it learns.
    monkeypatch.setattr(CostModel, "observe", lambda self, shape, ms: self)

    def mode(**options):
        with open_runtime(deep, predictors["self"], **options) as runtime:
            return ask(runtime.app().session(), ids, 1, "auto").stats.prefill_mode

    assert mode(ttft_target_ms=0.0) == "predict"
    assert mode(ttft_target_ms=1e6) == "exact"
    with monkeypatch.context() as patch:
        patch.setattr("edgekv.engine.predicted.GAIN", 0.1)
        assert mode(ttft_target_ms=0.0) == "exact"
    begin = PredictedPrefill.begin

    def late(self, request, cost, now_ms, share):
        begin(self, request, cost, now_ms + 2e6, share)

    monkeypatch.setattr(PredictedPrefill, "begin", late)
    assert mode(ttft_target_ms=1e6) == "predict"  # it waited so long before


@pytest.mark.parametrize("prefill", ["exact", "predict"])
def test_the_first_token_is_told_before_the_next_step_runs(deep, predictors, monkeypatch, prefill):
    """On a CPU that blocks for most of the step, with repair in it a long one."""
    log = []
    for owner, name in ((Runner, "submit"), (Outbox, "put")):
        whole = getattr(owner, name)

        def noted(self, *args, name=name, whole=whole):
            log.append(name)
            return whole(self, *args)

        monkeypatch.setattr(owner, name, noted)
    with open_runtime(deep, predictors["self"]) as runtime:
        ask(runtime.app().session(), random_ids(PROMPT, 53), 8, prefill)
    assert log[:3] == ["submit", "put", "submit"]


def test_agreement_is_reported(deep, predictors):
    with open_runtime(deep, predictors["identity"], repair="eager") as runtime:
        reply = ask(runtime.app().session(), random_ids(PROMPT, 60), 60, "predict")
        assert reply.stats.num_repaired_tokens > 0
        assert reply.stats.repair_agreement == 1.0


@pytest.mark.parametrize("sinks", [4, 256, 300, 550])  # a step takes 256 rows
@pytest.mark.parametrize("kind", ["self", "aux"])
@pytest.mark.parametrize("look", [0.0, 0.3])
def test_in_chunks_it_is_what_it_is_at_once(deep, predictors, kind, sinks, look):
    """Against the slow twin: one sequence, in plain steps."""
    ids = random_ids(600, 70)
    expected = at_once(deep, predictors[kind], ids, sinks, look)
    with open_runtime(deep, predictors[kind], repair="off", sinks=sinks, look=look) as runtime:
        session = runtime.app().session()
        reply = ask(session, ids, 1, "predict")
        assert reply.stats.num_predicted_tokens == 600 - sinks - 32
        runtime.check_integrity()
        for ours, theirs in zip(arrays_of(session, 600), expected, strict=True):
            assert np.abs(ours - theirs).max() < 1e-3


@pytest.mark.parametrize("kind", ["self", "aux"])
@pytest.mark.parametrize(
    ("tbt_target_ms", "look"), [(1.0, 0.0), (1.0, 0.5), (4.0, 0.2), (9.0, 0.0), (50.0, 0.5)]
)
def test_beside_another_predicted_session_in_chunks_however_small(
    deep, predictors, kind, tbt_target_ms, look, monkeypatch
):
    """Down to a row a step, so that first chunks end among the sinks."""
    monkeypatch.setattr(CostModel, "observe", lambda self, shape, ms: self)
    ids = random_ids(100, 71)
    expected = at_once(deep, predictors[kind], ids, 4, look)
    config = RuntimeConfig(
        prediction=PredictionOptions(
            predictor=predictors[kind], aux=str(deep), repair="off", confirm=False, look=look
        ),
        store=StoreOptions(disk_bytes=0),
        tbt_target_ms=tbt_target_ms,
    )
    with Runtime.open(str(deep), config=config) as runtime:
        other = runtime.app("a").session()
        with other.submit_ids(random_ids(PROMPT, 72), sampling(600), prefill="predict") as stream:
            next(iter(stream))
            session = runtime.app("b").session()
            reply = ask(session, ids, 1, "predict")
            assert stream.reply is None, "it was to decode all the while"
        assert reply.stats.num_predicted_tokens == 100 - 4 - 32
        runtime.check_integrity()
        for ours, theirs in zip(arrays_of(session, 100), expected, strict=True):
            assert np.abs(ours - theirs).max() < 1e-3


def at_once(folder, path, ids, sinks, look):
    """KV of a prompt whose middle is predicted, in one piece."""
    base = load(folder)
    predictor, _ = load_predictor(Path(path), mx.float32)
    twin, *_ = predicted_context(base, base, predictor, ids, sinks=sinks, window=32, look=look)
    return [np.array(twin.arrays[i][part]) for part in (0, 1) for i in range(4)]


def test_who_never_asked_is_untouched_byte_for_byte(deep, predictors):
    ids = random_ids(PROMPT, 80)
    found = []
    for predictor in (None, predictors["self"]):
        with open_runtime(deep, predictor) as runtime:
            session = runtime.app().session()
            reply = answer(session, ids, sampling(20))
            runtime.check_integrity()
            found.append([reply.token_ids, *arrays_of(session, PROMPT + 19)])
    assert found[0][0] == found[1][0]
    for without, with_ in zip(found[0][1:], found[1][1:], strict=True):
        assert without.tobytes() == with_.tobytes()


def test_an_answer_on_an_earlier_turns_predicted_kv_is_labelled(deep, predictors):
    with open_runtime(deep, predictors["self"], repair="off") as runtime:
        session = runtime.app().session()
        ids = random_ids(PROMPT, 90)
        reply = ask(session, ids, 8, "predict")
        more = [*ids, *reply.token_ids, *random_ids(3, 91)]  # too short to predict any of it
        second = ask(session, more, 4, "predict")
        assert second.stats.num_predicted_tokens == 0
        assert second.stats.num_cached_tokens > PROMPT
        assert second.stats.prefill_mode == "predict"
        third = ask(session, [*more, *second.token_ids, 7], 4, "exact")
        assert third.stats.prefill_mode == "exact"
        assert third.stats.num_cached_tokens <= 4
