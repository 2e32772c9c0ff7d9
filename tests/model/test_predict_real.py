"""The predictors that come with edgekv, on the real model."""

import pytest
from tiny_runtime import assert_same, eventually, sampling

from edgekv.bench.workload import TextIds
from edgekv.cli.chat import known_predictor
from edgekv.config import PredictionOptions, RuntimeConfig, StoreOptions
from edgekv.errors import PredictorNotFound
from edgekv.models.hub import resolve
from edgekv.predict.shipped import find_predictor, shipped_predictors
from edgekv.runtime import Runtime

pytestmark = [pytest.mark.model, pytest.mark.slow]

MODEL = "smollm2-135m"
NAMES = [predictor.name for predictor in shipped_predictors(MODEL)]


def ask(session, ids, num_tokens, prefill):
    with session.submit_ids(ids, sampling(num_tokens), prefill=prefill) as stream:
        for _ in stream:
            pass
    return stream.reply


def test_there_are_two_of_twenty_megabytes_at_most():
    predictors = shipped_predictors(MODEL)
    assert len(predictors) == 2
    for predictor in predictors:
        assert predictor.path.stat().st_size <= 20_000_000
        assert predictor.info.num_tokens >= 200_000


def test_they_are_found_for_the_weights_under_whatever_name():
    first = shipped_predictors(MODEL)[0]
    weights = first.info.base_fingerprint
    assert find_predictor("./other.gguf", None, weights) == first.path
    assert find_predictor("./other.gguf", first.name) == first.path
    for fingerprint in (None, "0123"):
        with pytest.raises(PredictorNotFound, match=r"other\.gguf"):
            find_predictor("./other.gguf", None, fingerprint)


def test_chat_offers_them_for_a_path(tmp_path):
    path = resolve(MODEL)
    assert known_predictor(MODEL) == known_predictor(str(path)) == shipped_predictors(MODEL)[0].name
    assert known_predictor(str(tmp_path / "nowhere.gguf")) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_much_the_same_and_repaired_behind_it(name):
    config = RuntimeConfig(
        prediction=PredictionOptions(predictor=name, confirm=False, repair="eager"),
        store=StoreOptions(disk_bytes=0),
    )
    with Runtime.open(MODEL, config=config) as runtime:
        ids = TextIds(runtime.tokenizer).stretch(256, 3)
        session = runtime.app("a").session()
        reply = ask(session, ids, 32, "predict")
        assert reply.stats.num_predicted_tokens == 256 - 4 - 32
        assert reply.stats.repair_agreement is not None
        assert reply.stats.repair_agreement > 0.5
        kv = session._talk.kv.kv
        eventually(lambda: kv.provenance.exact_prefix == kv.num_tokens)
        runtime.check_integrity()
        more = [*ids, *reply.token_ids, *ids[:20]]
        ours = ask(session, more, 24, "exact")
        assert ours.stats.num_cached_tokens > 256
        theirs = ask(runtime.app("b").session(), more, 24, "exact")
        assert_same(runtime, more, ours.token_ids, theirs.token_ids)
