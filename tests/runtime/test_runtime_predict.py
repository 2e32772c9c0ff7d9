"""Predicted prefill through the runtime: labelled, repaired, and gone when it is exact."""

import pytest
from tiny_models import tiny_config, write_folder
from tiny_predictors import fitted, identity, load, random_ids, write_predictor
from tiny_runtime import answer, assert_same, eventually, sampling

from edgekv.config import PredictionOptions, RuntimeConfig, StoreOptions
from edgekv.errors import ConfigError
from edgekv.runtime import Runtime

PROMPT = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"), tiny_config("llama", num_hidden_layers=4))


@pytest.fixture(scope="module")
def predictors(folder, tmp_path_factory):
    base = load(folder)
    root = tmp_path_factory.mktemp("predictors")
    made = {
        "self": fitted(base, "self", 2),
        "aux": fitted(base, "aux", 2),
        "identity": identity(base),
    }
    return {
        name: write_predictor(root / f"{name}.safetensors", predictor, folder)
        for name, predictor in made.items()
    }


def open_runtime(folder, predictor, **options):
    prediction = PredictionOptions(predictor=predictor, aux=str(folder), **options)
    return Runtime.open(
        str(folder), config=RuntimeConfig(prediction=prediction, store=StoreOptions(disk_bytes=0))
    )


def ask(session, ids, num_tokens, prefill):
    with session.submit_ids(ids, sampling(num_tokens), prefill=prefill) as stream:
        for _ in stream:
            pass
    return stream.reply


def test_an_identical_auxiliary_changes_no_answer(folder, predictors):
    with open_runtime(folder, predictors["identity"], repair="off") as runtime:
        ids = random_ids(PROMPT, 1)
        exact = answer(runtime.app("a").session(), ids, sampling(24))
        reply = ask(runtime.app("b").session(), ids, 24, "predict")
        assert_same(runtime, ids, reply.token_ids, exact.token_ids)
        assert reply.stats.prefill_mode == "predict"
        assert reply.stats.num_predicted_tokens == PROMPT - 4 - 32
        assert exact.stats.prefill_mode == "exact"
        runtime.check_integrity()


@pytest.mark.parametrize("kind", ["self", "aux"])
@pytest.mark.parametrize("repair", ["idle", "eager"])
def test_repair_ends_with_exact_kv(folder, predictors, kind, repair):
    with open_runtime(folder, predictors[kind], repair=repair) as runtime:
        ids = random_ids(PROMPT, 2)
        session = runtime.app("a").session()
        reply = ask(session, ids, 40, "predict")
        assert reply.stats.num_predicted_tokens > 0
        kv = session._kv.kv
        eventually(lambda: kv.provenance.exact_prefix == kv.num_tokens)
        assert kv.num_tokens >= PROMPT + 39
        runtime.check_integrity()
        assert session._kv.predicted is None
        # Exact KV of the same tokens, by the next turn's answer.
        tokens = [*ids, *reply.token_ids]
        more = random_ids(8, 3)
        ours = ask(session, [*tokens, *more], 16, "exact")
        assert ours.stats.num_cached_tokens == len(tokens) - 1
        theirs = answer(runtime.app("b").session(), [*tokens, *more], sampling(16))
        assert_same(runtime, [*tokens, *more], ours.token_ids, theirs.token_ids)
        runtime.check_integrity()


def test_an_exact_request_forgets_what_is_predicted(folder, predictors):
    with open_runtime(folder, predictors["self"], repair="off") as runtime:
        ids = random_ids(PROMPT, 4)
        session = runtime.app("a").session()
        reply = ask(session, ids, 8, "predict")
        assert session._kv.predicted is not None
        runtime.check_integrity()
        tokens = [*ids, *reply.token_ids, *random_ids(4, 5)]
        ours = ask(session, tokens, 16, "exact")
        assert ours.stats.num_cached_tokens == 4  # the sinks
        theirs = answer(runtime.app("b").session(), tokens, sampling(16))
        assert_same(runtime, tokens, ours.token_ids, theirs.token_ids)
        runtime.check_integrity()


@pytest.mark.parametrize("kind", ["self", "aux"])
def test_the_next_turn_is_predicted_on_top(folder, predictors, kind):
    with open_runtime(folder, predictors[kind], repair="off") as runtime:
        session = runtime.app("a").session()
        tokens = random_ids(PROMPT, 6)
        for turn in range(3):
            reply = ask(session, tokens, 8, "predict")
            assert reply.stats.num_predicted_tokens > 0
            runtime.check_integrity()
            tokens = [*tokens, *reply.token_ids, *random_ids(60, 7 + turn)]


def test_asking_for_prediction_without_a_predictor(folder):
    with Runtime.open(str(folder)) as runtime, pytest.raises(ConfigError, match="no KV predictor"):
        ask(runtime.app().session(), [5, 6, 7], 1, "predict")
